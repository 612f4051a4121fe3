"""What a pass of a rotated layer keeps, makes, starts and waits for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.poet.rotated_layers import M, N, gradients, rotated, rows


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
