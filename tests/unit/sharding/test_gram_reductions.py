"""What ranks reduce of slabs: polar factors against float64, quantiles against whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.polar import of_gram, polar, reductions
from spectral_dist.sharding.boxes import Slabs
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.gram import Reduction
from spectral_dist.sharding.slabs import SlabBatch
from tests.reference import polar as reference
from tests.support import harness, sharded_model

# -- accuracy, against float64


def decaying(kind, s, long, seed=0):
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(s, dtype=torch.float64)
    sigma = (1 + i) ** -1.5 if kind == "power" else 10 ** (-6 * i / s)
    u, v = (
        torch.linalg.qr(torch.randn(n, s, generator=generator, dtype=torch.float64))[0]
        for n in (s, long)
    )
    return (u * sigma) @ v.T


def alone_batch(shape, ranks, rank, count=1, along=1):
    edges = sharded_model.even(shape[along], ranks)
    ranges = tuple((edges[r], edges[r + 1]) for r in range(ranks))
    cut = Slabs(along, ranges, True)
    owners = tuple(sorted(k % ranks for k in range(count)))
    return SlabBatch(tuple(range(count)), owners, shape, cut, cut.box(rank, shape))


def slab_of(x, batch):
    b = batch.box
    return x[..., b.row : b.row + b.rows, b.col : b.col + b.cols].contiguous()


def bf16_partial_grams(x, rows, group):
    """What others do: every step all-reduces the bfloat16 Gram of what each rank holds."""
    norm = x.float().square().sum()
    dist.all_reduce(norm, group=group)
    x = (x.float() / norm.sqrt()).bfloat16()
    for a, b, c in rows:
        g = (x @ x.mT).float()
        dist.all_reduce(g, group=group)
        g = g.bfloat16()
        x = a * x + (b * g + c * (g @ g)) @ x
    return x


def errors(spectrum, name, dtype):
    """Of gram, of the direct form in the same dtype, of the bfloat16 partial sums."""
    dtype = getattr(torch, dtype)
    group, _ = sharded_model.grid(2, 1)
    x = decaying(spectrum, 48, 384)
    wire = x.to(dtype)
    wanted = reference.newton_schulz(name, 5, wire.double())
    meter = Meter()
    batch = alone_batch(tuple(x.shape), 2, dist.get_rank())
    mine = slab_of(wire, batch)
    wide = of_gram.gram_dtype(name, 5, dtype)
    found = Reduction(batch, group, meter).multiply(
        mine[None], wide, lambda r: of_gram.multiplier(r, name, 5)
    )[0]
    here = slab_of(wanted, batch)
    direct = slab_of(polar(wire, method=name, steps=5, compute_dtype=dtype), batch)
    others = [direct]
    if dtype is torch.bfloat16 and name == "jordan":
        others.append(bf16_partial_grams(mine, [(3.4445, -4.7750, 2.0315)] * 5, group))
    return [((f.double() - here).norm() / here.norm()).item() for f in (found, *others)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spectrum", ["power", "exponential"])
@pytest.mark.parametrize("name", ["jordan", "polar_express"])
def test_no_less_accurate_than_the_direct_form(spectrum, name, dtype):
    for gram, *others in harness.run(2, errors, spectrum, name, dtype):
        assert all(gram <= other for other in others), (gram, others)


def missing_rank():
    group, _ = sharded_model.grid(2, 1)
    found = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator) @ torch.randn(4, 200, generator=generator)
    batch = alone_batch((40, 200), 2, dist.get_rank())
    for name, steps, dtype in (("deepseekv4", 10, "bfloat16"), ("jordan", 12, "float32"),
                               ("qdwh", None, "float32")):  # fmt: skip
        wide = of_gram.gram_dtype(name, steps, getattr(torch, dtype))
        u = Reduction(batch, group, Meter()).multiply(
            slab_of(x, batch)[None], wide, lambda r, n=name, s=steps: of_gram.multiplier(r, n, s)
        )[0]
        gram = u @ u.mT
        dist.all_reduce(gram, group=group)
        found.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()[[0, 3, 4]].tolist())
    return found


def test_missing_rank_stays_missing():
    """A float32 Gram would make NaN of deepseekv4: such schedules get float64."""
    for results in harness.run(2, missing_rank):
        for first, last, beyond in results:
            assert 0.6 < last <= first < 1.3
            assert beyond < 0.05  # 12 steps of jordan raise 2e-8 by 3e6


def test_methods_that_need_the_matrix():
    for method, dtype in (("zolo", torch.float64), ("svd", torch.float32), ("qdwh", torch.float64)):
        with pytest.raises(
            ValueError, match=f"polar is '{method}'.*needs the matrix.*polar='qdwh'"
        ):
            of_gram.gram_dtype(method, None, dtype)
    with pytest.raises(ValueError, match=r"jordan' of 20 steps.*fewer polar_steps"):
        of_gram.gram_dtype("jordan", 20, torch.float32)
    assert of_gram.gram_dtype("jordan", 5, torch.bfloat16) == torch.float32
    assert of_gram.gram_dtype("deepseekv4", None, torch.bfloat16) == torch.float64
    assert of_gram.gram_dtype("jordan", 5, torch.float32) == torch.float64


def bad_values(value):
    group, _ = sharded_model.grid(2, 1)
    batch = alone_batch((4, 10), 2, dist.get_rank(), 2)
    x = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    x[1, 0, 0] = value
    found = []
    for method in ("jordan", "eigh"):
        u = Reduction(batch, group, Meter()).multiply(
            slab_of(x, batch), torch.float64, lambda r, m=method: of_gram.multiplier(r, m, None)
        )
        found.append((u[0].isfinite().all().item(), u[1].isnan().all().item()))
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_in_their_matrix_and_hang_nobody(value):
    assert harness.run(2, bad_values, value) == [[(True, True)] * 2] * 2


# -- reductions


def quantiles(cases):
    group, _ = sharded_model.grid(2, 1)
    wrong = []
    for number, (values, shape, dtype, along, edges) in enumerate(cases):
        x = torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)).view(-1, *shape)
        ranges = ((0, edges), (edges, shape[along]))
        cut = Slabs(along, ranges, True)
        batch = SlabBatch(tuple(range(len(x))), (0,) * len(x), shape, cut,
                          cut.box(dist.get_rank(), shape))  # fmt: skip
        mine = slab_of(x.abs(), batch)
        for q in (0, 0.1, 0.5, 0.9, 0.999, 1):
            found = Reduction(batch, group, Meter()).quantile(mine, q)
            if not torch.equal(found, reductions.quantile(x.abs(), q)):
                wrong.append((number, q, found, reductions.quantile(x.abs(), q)))
    return wrong


numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3e-42, 1e-39, 1.1, 1e30, math.pi])


@st.composite
def quantile_case(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    count = draw(st.integers(1, 3))
    size = shape[0] * shape[1] * count
    values = draw(st.lists(numbers | st.floats(-1e3, 1e3, width=32), min_size=size, max_size=size))
    along = draw(st.integers(0, 1))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return values, shape, dtype, along, draw(st.integers(0, shape[along]))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(quantile_case(), min_size=10, max_size=10))
@pytest.mark.slow
def test_quantiles_are_those_of_the_whole_matrix_bitwise(cases):
    assert harness.run(2, quantiles, cases) == [[], []]


def large_quantile():
    x = torch.randn(2, 64, 300, generator=torch.Generator().manual_seed(3))
    return quantiles([(x.flatten().tolist(), (64, 300), "float32", 1, 77)])


def test_quantiles_of_many_numbers():
    assert harness.run(2, large_quantile) == [[], []]
