"""Routes made into parameter groups, in one process and on real ranks."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spectral_dist
from spectral_dist.params.classify import classify
from tests.support import harness, models
from tests.unit.params.small_models import ModelOf, V, linear

# -- into groups


def small():
    return ModelOf(
        embed=nn.Embedding(V, 8), up=linear(12, 8), down=linear(8, 12), norm=nn.LayerNorm(8)
    )


def test_groups_are_the_matrices_then_the_rest():
    model = small()
    found = spectral_dist.param_groups(model)
    assert [g["kind"] for g in found] == ["matrix", "scalar"]
    assert [id(p) for p in found[0]["params"]] == [id(model.up.weight), id(model.down.weight)]
    assert [id(p) for p in found[1]["params"]] == [
        id(model.embed.weight),
        id(model.norm.weight),
        id(model.norm.bias),
    ]


@pytest.mark.parametrize("named", [False, True])
def test_bare_parameters_are_refused(named):
    model = small()
    params = model.named_parameters() if named else model.parameters()
    with pytest.raises(ValueError, match=r"param_groups\(model\), or call spectral_dist\.tag"):
        spectral_dist.Muon(params, lr=0.01)


@pytest.mark.parametrize("named", [False, True])
def test_tagged_parameters_are_known(named, caplog):
    model = small()
    spectral_dist.tag(model, scalars=["down"], split={"up": 3})
    assert caplog.text.count("which parameters are matrices") == 1
    optimizer = spectral_dist.Muon(
        model.named_parameters() if named else model.parameters(), lr=0.01
    )
    first, second = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(model.up.weight)]
    assert len(second["params"]) == 4
    (route,) = (r for r in optimizer.all_routes if r.name == "up.weight")
    assert len(route.matrices) == 3
    assert len(caplog.messages) == 1


def test_one_tensor_as_params():
    model = small()
    spectral_dist.tag(model)
    optimizer = spectral_dist.Muon([{"params": model.up.weight}], lr=0.01)
    assert [g["kind"] for g in optimizer.param_groups] == ["matrix"]


def test_tagged_frozen_parameters_must_be_left_out():
    model = small()
    model.down.weight.requires_grad_(False)
    spectral_dist.tag(model)
    with pytest.raises(ValueError, match=r"down\.weight is frozen"):
        spectral_dist.Muon(model.parameters(), lr=0.01)
    model.up.weight.requires_grad_(False)  # after it was tagged
    with pytest.raises(ValueError, match=r"up\.weight is frozen"):
        spectral_dist.Muon([model.up.weight], lr=0.01)


def test_a_groups_own_options_stay_with_both_halves():
    model = small()
    spectral_dist.tag(model)
    group = {
        "params": list(model.parameters()),
        "weight_decay": 0.3,
        "lr": 0.005,
        "momentum": 0.8,
        "eps": 1e-6,
        "name": "all",
    }
    matrix, scalar = spectral_dist.Muon([group], lr=0.01, weight_decay=0.1).param_groups
    for half in (matrix, scalar):
        assert half["weight_decay"] == 0.3
        assert half["name"] == "all"
        assert half["lr"] * half["lr_ratio"] == pytest.approx(0.005)
    assert matrix["momentum"] == 0.8
    assert scalar["eps"] == 1e-6
    assert "eps" not in matrix
    assert "momentum" not in scalar


def test_an_empty_group():
    """Code that sorts parameters into decayed and others may find none of one kind."""
    model = small()
    spectral_dist.tag(model)
    groups = [{"params": model.parameters()}, {"params": [], "weight_decay": 0.0}]
    optimizer = spectral_dist.Muon(groups, lr=0.01)
    assert [len(g["params"]) for g in optimizer.param_groups if g["params"]] == [2, 3]


def test_groups_of_different_options():
    model = small()
    spectral_dist.tag(model)
    optimizer = spectral_dist.Muon(
        [
            {"params": [model.up.weight], "momentum": 0.9},
            {"params": [model.down.weight, model.embed.weight], "lr": 0.02},
            {"params": list(model.norm.parameters()), "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    found = [(g["kind"], len(g["params"]), g["lr"] * g["lr_ratio"]) for g in optimizer.param_groups]
    assert found == [
        ("matrix", 1, 0.01),
        ("matrix", 1, pytest.approx(0.02)),
        ("scalar", 1, pytest.approx(0.02)),
        ("scalar", 2, 0.01),
    ]
    assert [g.get("momentum") for g in optimizer.param_groups] == [0.9, 0.95, None, None]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]


def test_a_group_added_later():
    model = small()
    spectral_dist.tag(model)
    optimizer = spectral_dist.Muon([model.up.weight], lr=0.01)
    optimizer.add_param_group({"params": [model.embed.weight, model.down.weight]})
    assert [g["kind"] for g in optimizer.param_groups] == ["matrix", "matrix", "scalar"]
    for p in (model.up.weight, model.down.weight, model.embed.weight):
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [True, True, True, False, False]


# -- on real ranks


def wrapped():
    """Names under DistributedDataParallel, and what each rank prints."""
    model = models.build(odd=False)
    bare = [(r.name, r.kind) for r in classify(model)]
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        spectral_dist.param_groups(nn.parallel.DistributedDataParallel(model))
    ddp = [(r.name, r.kind) for r in classify(nn.parallel.DistributedDataParallel(model))]
    return bare, ddp, text.getvalue()


def test_distributed_data_parallel_and_one_table_for_all_ranks():
    results = harness.run(2, wrapped)
    for bare, ddp, _ in results:
        assert ddp == bare
        assert ("head.weight", "scalar") in ddp
    assert results[0][2].count("which parameters are matrices") == 1
    assert results[1][2] == ""


def flattened(use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            models.build(odd=False), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
    try:
        spectral_dist.param_groups(model)
    except ValueError as error:
        return str(error)
    return f"no error, {dist.get_world_size()} ranks"


@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp1_is_refused(ranks):
    for text in harness.run(ranks, flattened, False):
        assert "flattened to 1-D by FSDP1" in text
        assert "torch.distributed.fsdp.fully_shard" in text


def test_fsdp1_with_original_parameters_is_refused():
    """Its parameters keep their names, but a rank sees 1-D pieces of them, or nothing."""
    for text in harness.run(2, flattened, True):
        assert "FSDP1" in text


@pytest.mark.parametrize("given", [None, 5, "weights", nn.Linear(2, 2), {"params": []}])
def test_what_is_no_list_of_groups(given):
    with pytest.raises(ValueError, match=r"write spectral_dist\.param_groups\(model\)"):
        spectral_dist.Muon(given)


@pytest.mark.parametrize("given", [torch.ones(2, 2), nn.Parameter(torch.ones(2, 2))])
def test_one_tensor_is_no_list(given):
    with pytest.raises(ValueError, match=r"params is a .*; write spectral_dist\.param_groups"):
        spectral_dist.POET(given)


def test_what_is_no_parameter():
    with pytest.raises(ValueError, match=r"'weight' is no parameter; write spectral_dist\.param"):
        spectral_dist.Muon(["weight"])
    with pytest.raises(ValueError, match=r"None is no parameter"):
        spectral_dist.Muon([{"params": [None]}])
    with pytest.raises(ValueError, match="bare parameters do not tell"):
        spectral_dist.Muon(p for p in nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("function", [spectral_dist.param_groups, spectral_dist.tag])
@pytest.mark.parametrize("given", [None, "model", [nn.Linear(2, 2)], nn.Linear(2, 2).parameters()])
def test_what_is_no_model(function, given):
    with pytest.raises(ValueError, match=r"model is .*; write the nn\.Module itself"):
        function(given)
