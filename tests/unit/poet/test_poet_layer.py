"""PoetLinear against the dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectral_dist import poet
from tests.support import models
from tests.unit.poet.rotated_layers import (
    ROWS,
    M,
    N,
    One,
    gradients,
    rotated,
    rows,
    spin,
    weight_of,
)

FORMS = [
    {},
    {"segments": 2, "blocks": {"up": (5, 3)}},
    {"order": 3, "blocks": {"up": (2, 4)}},
    {"order": "exact", "segments": 4, "blocks": {"up": (5, 3)}},
    {"form": "fully_stochastic", "blocks": {"up": (7, 5)}},
    {"form": "fully_stochastic", "blocks": {}, "block": 0.5, "order": 2},
]


@pytest.mark.parametrize("variant", ["fast", "memory"])
@pytest.mark.parametrize("settings", FORMS)
def test_forward_and_every_gradient(settings, variant):
    for bias, merges, batch in ((True, 0, ROWS), (False, 3, (4,))):
        layer = rotated(bias=bias, variant=variant, **settings)
        layer.merges = merges
        layer.drop_indices()
        x, upstream = rows(*batch, N), rows(*batch, M, seed=4)
        y, grads = gradients(layer, x, upstream)
        leaves = [getattr(layer, r.skew).detach().clone().requires_grad_() for r in layer.rotations]
        mine = x.clone().requires_grad_()
        bias_leaf = layer.bias.detach().clone().requires_grad_() if bias else 0.0
        expected = mine @ weight_of(layer, leaves).T + bias_leaf  # the bias is not rotated
        (torch.sin(expected) * upstream).sum().backward()
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-12)
        theirs = {"x": mine, "skew_in": leaves[0], "skew_out": leaves[1]}
        theirs |= {"bias": bias_leaf} if bias else {}
        assert grads.keys() == theirs.keys()
        for name, leaf in theirs.items():
            torch.testing.assert_close(grads[name], leaf.grad, rtol=1e-10, atol=1e-10)
        assert not layer.weight.requires_grad


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
@pytest.mark.parametrize("variant", ["fast", "memory"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_rows_against_the_reference(form, variant, autocast):
    """A bf16 model with float32 skews, or a float32 one under autocast."""
    layer = rotated(dtype=torch.float32, form=form, variant=variant, turn=0.1)
    layer = layer if autocast else layer.bfloat16()
    for r in layer.rotations:
        getattr(layer, r.skew).data = getattr(layer, r.skew).data.float()
    x = rows(64, N).to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = x.double() @ weight_of(layer).T + layer.bias.double()
    assert (y.double() - expected).norm() <= 8e-3 * expected.norm()
    y.sum().backward()
    leaves = [getattr(layer, r.skew).detach().double().requires_grad_() for r in layer.rotations]
    (x.double() @ weight_of(layer, leaves).T).sum().backward()
    for r, leaf in zip(layer.rotations, leaves, strict=True):
        grad = getattr(layer, r.skew).grad
        assert grad.dtype == torch.float32
        assert (grad.double() - leaf.grad).norm() <= 2e-2 * leaf.grad.norm()


def test_a_small_rotation_is_not_lost_in_bf16():
    """G would round to I; x + x delta^T is what keeps it."""
    layer = rotated(64, 64, bias=False, turn=1e-3, blocks={"up": (64, 64)}, dtype=torch.float32)
    layer.weight.copy_(torch.eye(64))
    layer = layer.bfloat16()
    for r in layer.rotations:
        getattr(layer, r.skew).data = getattr(layer, r.skew).data.float()
    x = torch.zeros(64, 64).bfloat16()
    x.fill_diagonal_(1.0)
    moved = layer(x).double() - x.double()
    moved.fill_diagonal_(0.0)  # what is added to ones is rounded; the rest has bf16's own digits
    expected = weight_of(layer).T.clone().fill_diagonal_(0.0)
    assert (moved - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
@pytest.mark.parametrize("variant", ["fast", "memory"])
@pytest.mark.parametrize("batch", [(0,), (2, 0), ()])
def test_no_rows_and_a_bare_one(form, variant, batch):
    """An expert that no token was sent to; a vector."""
    layer = rotated(form=form, variant=variant)
    x = rows(*batch, N)
    found = layer(x)
    expected = x @ weight_of(layer).T + layer.bias
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.sum().backward()
    assert layer.skew_in.grad.any() == (not batch)


# -- conversion and merges do not change the function


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
def test_conversion_is_the_identity(form):
    """Bitwise where sums are exact (whole numbers), and else to float32's rounding."""
    model, x = models.build(), models.tokens(0)
    before = model(x).detach()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"block": 8} if form == "block_stochastic" else {"block": 0.5, "form": form}
    settings["blocks"] = {r"\.1\.up": (8, 61 if form == "block_stochastic" else 9),
                          r"\.1\.down": (61 if form == "block_stochastic" else 9, 8),
                          "unused": (8, 3)}  # fmt: skip
    assert poet.convert(model, **settings) is model
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-6, atol=0)
    for name, value in kept.items():
        assert torch.equal(model.get_parameter(name), value)
    one = One(dtype=torch.float32)
    with torch.no_grad():
        one.up.weight.copy_(torch.randint(-8, 9, (M, N)))
    x = torch.randint(-8, 9, (5, N)).float()
    y = one(x)
    assert torch.equal(poet.convert(one, form=form, blocks={"up": (5, 3)})(x), y)


@pytest.mark.parametrize("settings", [s for s in FORMS if s.get("order", 4) == 4])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_merge_changes_no_output(settings, scale):
    """Bias, non-square, b_in != b_out, W of a wide spectrum; several merges on end."""
    layer = rotated(dtype=torch.float32, **settings)
    with torch.no_grad():
        layer.weight.mul_(scale)[:, 0] *= 40
    x = rows(50, N, dtype=torch.float32)
    for merges in range(1, 5):
        spin(layer, 0.4, merges)
        before, index = layer(x), layer.outer[0].index(layer.merges)
        expected = weight_of(layer)
        layer.merge(layer.weight, layer.skews)
        after = layer(x)
        assert (after - before).norm() <= 1e-6 * before.norm()
        assert (layer.weight - expected).norm() <= 1e-6 * expected.norm()
        assert layer.merges == merges
        assert not any(skew.any() for skew in layer.skews.values())
        assert not torch.equal(layer.outer[0].index(layer.merges), index)
        expected = rows(50, N, dtype=torch.float32).double() @ weight_of(layer).T
        torch.testing.assert_close((after - layer.bias).double(), expected, rtol=1e-4, atol=1e-3)


def test_effective_is_in_float32_and_changes_nothing():
    layer = rotated(dtype=torch.bfloat16)
    before = copy.deepcopy(layer.state_dict())
    found = layer.rotated_weight(layer.weight, layer.skews)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weight_of(layer), rtol=0, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_variants_are_bitwise_equal(form, dtype):
    found = []
    for variant in ("fast", "memory"):
        layer = rotated(form=form, variant=variant, dtype=dtype)
        found.append(gradients(layer, rows(*ROWS, N, dtype=dtype), rows(*ROWS, M, dtype=dtype)))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name])


# -- changes between passes


def edit(layer):
    with torch.no_grad():
        layer.skew_in.mul_(-0.5)


def edit_data(layer):
    layer.skew_in.data.mul_(-0.5)  # which counts no version


def load(layer):
    layer.load_state_dict(rotated(start=9).state_dict())


def load_other_merges(layer):
    other = rotated()
    other.merge(other.weight, other.skews)
    spin(other, 0.2, 5)
    layer.load_state_dict(other.state_dict())


def count(layer):
    state = layer.get_extra_state()
    state[0] = 3
    layer.set_extra_state(state)


def put_another(layer):
    layer.skew_in = nn.Parameter(layer.skew_in.detach() * -0.5)


def merge(layer):
    layer.merge(layer.weight, layer.skews)
    spin(layer, 0.2, 5)


@pytest.mark.parametrize(
    "change", [edit, edit_data, load, load_other_merges, count, put_another, merge]
)
def test_a_change_is_seen_by_the_next_pass(change):
    layer, x = rotated(), rows(4, N)
    before = layer(x)
    change(layer)
    for training in (True, False, True):
        layer.train(training)
        found = layer(x)
        expected = x @ weight_of(layer).T + layer.bias
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(found, before, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(layer(x), found)


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
@pytest.mark.parametrize("variant", ["fast", "memory"])
def test_training_after_inference_mode(form, variant):
    """What a validation pass after a merge has cached, the backward pass may save."""
    layer, x = rotated(form=form, variant=variant), rows(4, N)
    with torch.inference_mode():
        before = layer(x)
    y, grads = gradients(layer, x, rows(4, M, seed=4))
    torch.testing.assert_close(y, before, rtol=0, atol=0)
    assert grads["skew_in"].any()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fast", "memory"])
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled(variant):
    """Also when the skews change, and the permutations."""
    layer, x = rotated(variant=variant), rows(4, N)
    compiled = torch.compile(layer, backend="aot_eager")
    y, grads = gradients(compiled, x, rows(4, M, seed=4))
    expected, leaves = gradients(layer, x, rows(4, M, seed=4))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for name, grad in leaves.items():
        torch.testing.assert_close(grads.get(name, grads.get(f"_orig_mod.{name}")), grad)
    for seed in range(3):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
        spin(layer, 0.2, seed)
        torch.testing.assert_close(compiled(x), x @ weight_of(layer).T + layer.bias)
        layer.merge(layer.weight, layer.skews)
        torch.testing.assert_close(compiled(x), x @ layer.weight.T + layer.bias)


# -- checkpoints

CHANGES = [
    {"seed": 1}, {"segments": 2}, {"order": 3}, {"form": "fully_stochastic"},
    {"blocks": {"up": (2, 3)}}, {"blocks": {"up": (5, 6)}},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_cannot_be_loaded(change):
    saved = rotated().get_extra_state()
    assert saved.dtype == torch.int64
    layer = rotated(**change)
    name = {"blocks": "block of"}.get(*change, *change)
    with pytest.raises(ValueError, match=f"up: .*{name}.*; convert the model with the settings"):
        layer.set_extra_state(saved)


def test_a_state_dict_has_no_buffers_and_brings_the_merges():
    layer = rotated()
    layer.merge(layer.weight, layer.skews)
    spin(layer)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "skew_in", "skew_out", "_extra_state"]
    assert not list(layer.buffers())
    other = rotated(start=4, variant="memory")  # which is no setting of the checkpoint
    other.load_state_dict(copy.deepcopy(state))
    assert other.merges == 1
    x = rows(3, N)
    assert torch.equal(other(x), layer(x))
