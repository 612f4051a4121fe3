"""How the weights of stacks and fused projections split into matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_dist.params.classify import classify
from spectral_dist.params.splits import matrices_of
from tests.unit.params.small_models import ModelOf, V, linear


def elements(matrix):
    """Its elements of the flattened parameter, in order."""
    n = matrix.shape[1]
    found = [e for start, rows in matrix.blocks for e in range(start, start + rows * n)]
    assert len(found) == matrix.numel
    return found


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


def test_experts_hold_their_slices():
    whole = numbered(3, 4, 6)
    found = [elements(m) for m in matrices_of("e", (3, 4, 6), None)]
    assert found == [whole[k].flatten().tolist() for k in range(3)]


def test_attention_projection_is_three():
    model = ModelOf(attention=nn.MultiheadAttention(6, 2))
    by_name = {r.name: r for r in classify(model)}
    whole = numbered(18, 6)
    wanted = [whole[a : a + 6].flatten().tolist() for a in (0, 6, 12)]
    assert [elements(m) for m in by_name["attention.in_proj_weight"].matrices] == wanted
    assert [m.shape for m in by_name["attention.out_proj.weight"].matrices] == [(6, 6)]
    assert by_name["attention.in_proj_bias"].kind == "scalar"


@pytest.mark.parametrize("asked", [[], ["[qkv]_proj_weight"]])
def test_separate_projections_of_attention_are_not_cut_in_three(asked):
    model = ModelOf(attention=nn.MultiheadAttention(6, 2, kdim=5, vdim=7))
    by_name = {r.name: r for r in classify(model, matrices=asked)}
    for name, shape in (("q", (6, 6)), ("k", (6, 5)), ("v", (6, 7))):
        assert [m.shape for m in by_name[f"attention.{name}_proj_weight"].matrices] == [shape]


def test_split_into_equal_parts():
    model = ModelOf(gate_up=linear(10))
    (route,) = classify(model, split={"gate_up": 2})
    whole = numbered(10, 4)
    assert [m.shape for m in route.matrices] == [(5, 4), (5, 4)]
    wanted = [whole[:5].flatten().tolist(), whole[5:].flatten().tolist()]
    assert [elements(m) for m in route.matrices] == wanted


def test_split_by_rows():
    model = ModelOf(qkv=linear(16))
    (route,) = classify(model, split={"qkv": [8, 4, 4]})
    whole = numbered(16, 4)
    wanted = [part.flatten().tolist() for part in (whole[:8], whole[8:12], whole[12:])]
    assert [elements(m) for m in route.matrices] == wanted
    assert len({m.name for m in route.matrices}) == 3


def test_split_interleaved_by_query_group():
    # Megatron's layout: 3 groups of (2 heads of q, one of k, one of v), d = 2
    whole = numbered(3, 8, 4)
    (route,) = classify(ModelOf(qkv=linear(24)), split={"qkv": [4, 2, 2]})
    wanted = [whole[:, :4], whole[:, 4:6], whole[:, 6:]]
    assert [m.shape for m in route.matrices] == [(12, 4), (6, 4), (6, 4)]
    assert [elements(m) for m in route.matrices] == [w.flatten().tolist() for w in wanted]


def test_split_of_every_expert():
    whole = numbered(2, 6, 3)
    found = matrices_of("gate_up", (2, 6, 3), [2, 4])
    wanted = [whole[0, :2], whole[0, 2:], whole[1, :2], whole[1, 2:]]
    assert [elements(m) for m in found] == [w.flatten().tolist() for w in wanted]
    assert len({m.name for m in found}) == 4


@pytest.mark.parametrize(
    "split", [0, -2, 5, True, 2.5, "2", [], [3, 4], [0, 8], [-2, 10], [16], [1.5, 2.5], ["4", "4"]]
)  # fmt: skip
def test_split_that_does_not_fit(split):
    with pytest.raises(ValueError, match="split"):
        classify(ModelOf(qkv=linear(8)), split={"qkv": split})


def test_split_error_says_the_rows():
    with pytest.raises(ValueError, match=r"qkv\.weight.*sum to 7, but the weight has 8 rows"):
        classify(ModelOf(qkv=linear(8)), split={"qkv": [3, 4]})


@pytest.mark.parametrize("split", [3, "qkv", ["qkv"], [["qkv", 3]]])
def test_split_that_is_no_mapping(split):
    with pytest.raises(ValueError, match="split"):
        classify(ModelOf(qkv=linear(9)), split=split)


def test_split_of_what_is_no_matrix():
    model = ModelOf(embed=nn.Embedding(V, 8), linear=linear(4, 8))
    with pytest.raises(ValueError, match=r"'embed' matches embed\.weight, which is no matrix"):
        classify(model, split={"embed": 1})


def test_two_splits_of_one_weight_contradict():
    with pytest.raises(ValueError, match="qkv"):
        classify(ModelOf(qkv=linear(12)), split={"qkv": 3, "weight": [4, 8]})
