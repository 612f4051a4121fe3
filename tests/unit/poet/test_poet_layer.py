"""PoetLinear against the dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_dist import poet
from tests.support import models
from tests.unit.poet.rotated_layers import ROWS, M, N, One, rotated, spin, weight_of


def gradients(layer, x, upstream):
    """(y, dx and those of every trained parameter) of a pass, from zero."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (torch.sin(y) * upstream).sum().backward()
    named = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return y.detach(), {"x": x.grad, **named}


def rows(*shape, seed=3, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


# -- what is kept for the backward pass


def saved_by(layer, x):
    """Tensors that autograd keeps of a pass, but the layer's own and the indices of blocks."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found = {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.dtype.is_floating_point:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return list(found.values())


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
def test_the_memory_variant_saves_its_input_alone(form):
    x = rows(11, N).requires_grad_()
    saved = saved_by(rotated(variant="memory", form=form), x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
def test_the_fast_variant_saves_two_activations_and_no_matrix(form):
    x = rows(11, N).requires_grad_()
    saved = saved_by(rotated(form=form), x)
    activations = sum(t.numel() for t in saved if len(t) == 11)
    most = 11 * (N + M if form == "block_stochastic" else 2 * N + M)
    assert 11 * (N + M) <= activations <= most
    assert all(t.numel() < M * N for t in saved)


class Shapes(TorchDispatchMode):
    """Names of what gives a tensor of W's size, and does not only look at W."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor) and t.numel() == M * N and not function.is_view:
                self.found.add(function.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
@pytest.mark.parametrize("variant", ["fast", "memory"])
def test_nothing_of_the_size_of_w_is_computed(form, variant):
    """Neither W_eff nor a gradient of W; a permuted copy of W is none."""
    layer = rotated(form=form, variant=variant)
    with Shapes() as seen:
        gradients(layer, rows(11, N), rows(11, M, seed=4))
    assert seen.found <= {"index_select"}


class Asked(TorchDispatchMode):
    """What torch is asked for: names of what is no view, and copies that block the host."""

    def __init__(self):
        super().__init__()
        self.names, self.blocking = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[-1] if name == "copy_" else args[0]
            given = kwargs or {}
            waits = not given.get("non_blocking") and not (name == "copy_" and len(args) > 2)
            if waits and source.device != result.device:
                self.blocking.append((name, source.device, result.device))
        if not function.is_view and name not in ("promote_types", "empty", "detach"):
            self.names.append(name)
        return result


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "_linalg_check_errors"}


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
@pytest.mark.parametrize("variant", ["fast", "memory"])
@pytest.mark.parametrize("order", [4, "exact"])
def test_passes_and_merges_wait_for_no_device(form, variant, order):
    """The meta device has no values to wait for, and copies from the CPU are seen."""
    layer = rotated(form=form, variant=variant, order=order).to("meta")
    x = torch.empty(11, N, dtype=torch.float64, device="meta", requires_grad=True)
    with Asked() as seen:
        for _ in range(2):
            layer(x).sum().backward()
            layer.merge(layer.weight, layer.skews)
    assert not WAITS & set(seen.names)
    assert not seen.blocking
    with Asked() as seen:  # so that a copy that blocks is seen
        torch.zeros(3).to("meta")
    assert len(seen.blocking) == 1


@pytest.mark.parametrize(("variant", "most"), [("fast", 49), ("memory", 61)])
def test_a_pass_starts_few_kernels(variant, most):
    """On a GPU small layers take as long as the host needs to start them: 109 and 148 before."""
    layer = rotated(48, 48, False, torch.float32, blocks={"up": (8, 8)}, variant=variant).bfloat16()
    for r in layer.rotations:
        getattr(layer, r.skew).data = getattr(layer, r.skew).data.float()
    x, upstream = (rows(64, 48, seed=s).bfloat16().requires_grad_() for s in (1, 2))
    layer(x).backward(upstream)  # places are cached
    layer.zero_grad()
    x.grad = None
    with Asked() as seen:
        layer(x).backward(upstream)
    assert len(seen.names) <= most, seen.names


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
