"""Permutations, the rotations of one side, and what they do to rows."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.poet import cayley
from spectral_dist.poet.permutation import generator, permutation
from spectral_dist.poet.rotation import Places, Rotate, Rotation, rotate
from tests.reference import poet as reference

quick = settings(max_examples=20, deadline=None, derandomize=True)
GOLDEN = [5, 2, 3, 1, 7, 0, 6, 4]
INDEX = [3, 1, 2, 0, 5, 6, 4, 7]


def rotation(size=24, block=3, segments=1, **kwargs):
    spans = kwargs.pop("spans", ((0, size),))
    key = kwargs.pop("key", "layers.0.up/in")
    return Rotation(key, "skew_in", spans, block, segments, **kwargs)


# -- permutations


@quick
@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 99))
def test_permutations_are_valid_and_stable(size, seed, merges):
    found = permutation(size, "poet", seed, "layer/in", 0, merges)
    assert found.dtype == torch.int64
    assert found.sort().values.tolist() == list(range(size))
    torch.manual_seed(seed)
    torch.randn(3)
    assert torch.equal(permutation(size, "poet", seed, "layer/in", 0, merges), found)


def test_permutations_neither_use_nor_change_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = rotation().index(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(rotation().index(0), first)


def test_golden_values():
    """Another process and a later version continue a checkpoint: no salted hash."""
    assert permutation(8, "poet", 0, "a/in", 0, 0).tolist() == GOLDEN
    assert Rotation("a/in", "s", ((0, 8),), 2, 2).index(3).tolist() == INDEX
    digest = hashlib.sha256(b"poet init/0/a").digest()
    assert generator("poet init", 0, "a").initial_seed() == int.from_bytes(digest[:8], "big") // 2


def test_everything_that_names_a_permutation_changes_it():
    base = {"size": 64, "block": 4, "segments": 2, "key": "layers.0.up/in", "seed": 3}
    changes = [{"key": "layers.1.up/in"}, {"key": "layers.0.up/out"}, {"seed": 4}]
    found = [rotation(**base).index(m) for m in range(4)]
    found += [rotation(**{**base, **change}).index(0) for change in changes]
    segments = [index[32:] - 32 for index in found] + [index[:32] for index in found]
    for a, b in itertools.combinations(segments, 2):
        assert not torch.equal(a, b)


@quick
@given(st.sampled_from([1, 2, 4]), st.sampled_from([2, 3, 6]), st.integers(0, 99))
def test_blocks_stay_in_their_segment(segments, block, merges):
    found = rotation(24, block, segments).index(merges)
    length = 24 // segments
    assert found.sort().values.tolist() == list(range(24))
    for i, part in enumerate(found.split(length)):
        assert part.sort().values.tolist() == list(range(i * length, (i + 1) * length))


# -- tiles


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("merges", [0, 5])
def test_tiles_hold_their_part_of_the_whole(ranks, merges):
    whole = rotation(24, 3, 4).index(merges)
    size = 24 // ranks
    found = []
    for rank in range(ranks):
        tile = rotation(size, 3, 4, rank=rank, ranks=ranks)
        assert tile.shape == (size // 3, 3)
        found.append(tile.index(merges) + rank * size)
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tiles_of_several_spans(ranks):
    """The k-th of a fused weight's: each query group's rows are apart, in every tile alike."""
    whole = rotation(16, 2, 4, key="k/out").index(2)
    size = 16 // ranks
    for rank in range(ranks):
        half = size // 2
        spans = ((10, half), (100, size - half))
        places = [*range(10, 10 + half), *range(100, 100 + size - half)]
        tile = rotation(0, 2, 4, key="k/out", spans=spans, rank=rank, ranks=ranks)
        assert tile.size == size
        expected = [places[i - rank * size] for i in whole[rank * size :][:size].tolist()]
        assert tile.index(2).tolist() == expected


def test_fully_stochastic_takes_a_subset():
    tile = rotation(24, 5, fully=True)
    assert tile.shape == (1, 10)
    found = [tile.index(m) for m in range(8)]
    for index in found:
        assert len(set(index.tolist())) == 5
        assert 0 <= index.min() <= index.max() < 24
    assert len({tuple(sorted(index.tolist())) for index in found}) == 8
    assert sorted(rotation(24, 24, fully=True).index(0).tolist()) == list(range(24))


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"block": 5}, ["layers.0.up/in", "block 5", "24", "4 does"]),
        ({"block": 1}, ["block 1", "2 does"]),
        ({"block": 8, "segments": 24}, ["segments of 1", "scalars=['a pattern of its name']"]),
        ({"block": 8, "segments": 4}, ["block 8", "segments of 6", "6 does"]),
        ({"block": 2, "segments": 5}, ["24", "5 equal segments"]),
        ({"segments": 2, "ranks": 4}, ["segments is 2", "4 ranks", "segments=4"]),
        ({"block": 5, "fully": True, "segments": 2}, ["segments=1", "block_stochastic"]),
        ({"block": 25, "fully": True}, ["25", "from 2 to its dimension, 24"]),
        ({"block": 1, "fully": True}, ["block is 1"]),
    ],
)
def test_errors_say_what_divides(kwargs, texts):
    with pytest.raises(ValueError, match="layers") as error:
        rotation(**kwargs)
    for text in texts:
        assert text in str(error.value)


def test_a_tile_is_checked_by_the_whole_dimension():
    assert rotation(12, 6, 4, rank=1, ranks=2).shape == (2, 15)  # segments of 6
    with pytest.raises(ValueError, match="dimension, 24 in segments of 6; 3 does"):
        rotation(12, 4, 4, rank=1, ranks=2)


# -- rows


def case(blocks, d, fully, seed=0):
    """Rows, deltas of ``blocks`` (count, b) in one index, and R by the reference."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(d, generator=g)[: sum(k * b for k, b in blocks)]
    deltas, r, start = [], torch.eye(d, dtype=torch.float64), 0
    for k, b in blocks:
        skew = 0.3 * torch.randn(k, b * (b - 1) // 2, generator=g, dtype=torch.float64)
        deltas.append(cayley.delta(skew, b, 4).requires_grad_())
        parts = index[start : start + k * b].split(b)
        r = r @ reference.rotation(skew, parts, d, 4)
        start += k * b
    x = torch.randn(7, d, generator=g, dtype=torch.float64).requires_grad_()
    assert (start == d) != fully
    return x, Places.of(index, not fully, x.device), deltas, r


@pytest.mark.parametrize(
    ("blocks", "fully"), [([(4, 3)], False), ([(2, 3), (1, 4), (1, 2)], False), ([(1, 5)], True)]
)
def test_rotate_is_x_times_r_transposed(blocks, fully):
    x, places, deltas, r = case(blocks, 12, fully)
    before = x.detach().clone()
    found = Rotate.apply(x, places.index, places.inverse, *deltas)
    torch.testing.assert_close(found, x @ r.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate(x, places, deltas), found, rtol=0, atol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("blocks", "fully"), [([(4, 3)], False), ([(2, 3), (1, 4), (1, 2)], False), ([(1, 5)], True)]
)
def test_gradients_of_rotate(blocks, fully):
    x, places, deltas, _ = case(blocks, 12, fully)
    leaves = [t.detach().requires_grad_() for t in (x, *deltas)]
    assert torch.autograd.gradcheck(
        lambda rows, *changes: Rotate.apply(rows, places.index, places.inverse, *changes), leaves
    )


def test_rotate_makes_only_gradients_that_are_asked_for():
    x, places, deltas, _ = case([(4, 3)], 12, False)
    frozen = [change.detach() for change in deltas]
    found = Rotate.apply(x, places.index, places.inverse, *frozen)
    found.sum().backward()
    assert x.grad is not None
    found = Rotate.apply(x.detach(), places.index, places.inverse, *deltas)
    found.sum().backward()
    assert deltas[0].grad is not None
