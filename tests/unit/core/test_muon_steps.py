"""step(): missing and bad gradients, closures, and weights that hold several matrices."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from spectral_dist.core.units import MatrixUnit
from tests.support import models
from tests.support.weights import Weights, give_gradients, mixed_model, muon, run, same, values

# -- gradients that are missing or not finite


def test_a_parameter_without_gradient_is_warned_of_once_and_left_alone():
    model = mixed_model()
    optimizer = muon(model)
    before = values(model)
    skip = ("1.weight", "2.bias")
    for step in range(3):
        give_gradients(model, step, skip)
        if step == 0:
            with pytest.warns(UserWarning, match="has no gradient") as caught:
                optimizer.step()
            said = sorted(str(w.message).split()[0] for w in caught)
            assert said == sorted(skip)
        else:
            optimizer.step()  # a warning would be an error
    for name, w in values(model).items():
        assert torch.equal(w, before[name]) == (name in skip), name
    assert not any(v.any() for v in optimizer.state[model[1].weight].values())
    assert not any(v.any() for v in optimizer.state[model[2].bias].values())


def test_it_starts_fresh_once_it_has_a_gradient():
    model, other = mixed_model(), mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0, skip=("1.weight", "2.bias"))
    with pytest.warns(UserWarning, match="has no gradient"):
        optimizer.step()
    give_gradients(model, 1)
    optimizer.step()
    fresh = muon(other)
    give_gradients(other, 1)
    fresh.step()
    assert torch.equal(model[1].weight, other[1].weight)
    assert torch.equal(model[2].bias, other[2].bias)


def test_no_gradient_at_all():
    model = mixed_model()
    optimizer = muon(model)
    with pytest.raises(ValueError, match=r"no parameter has a gradient; call backward\(\)"):
        optimizer.step()


def everything(model, optimizer):
    """Copies of weights, states (by parameter name), and groups' values."""
    states = {
        f"{name}:{key}": value.clone()
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    return {**values(model), **states}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "3.weight", "2.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad):
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    give_gradients(model, 1)
    dict(model.named_parameters())[name].grad.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"gradient of {re.escape(name)} is NaN or infinite"):
        optimizer.step()
    after = everything(model, optimizer)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert before.keys() == after.keys()


def test_all_bad_gradients_are_named():
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    for name in ("1.weight", "3.weight"):
        dict(model.named_parameters())[name].grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"gradient of 1\.weight, 3\.weight is NaN"):
        optimizer.step()


def test_of_many_bad_gradients_some_are_named():
    model = Weights(**{f"w{i}": (2, 3) for i in range(8)})
    optimizer = muon(model)
    give_gradients(model, 0)
    for p in model.parameters():
        p.grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"w0\.weight, .*w4\.weight and 3 more is NaN"):
        optimizer.step()


def test_check_finite_false_lets_it_through():
    model = mixed_model()
    optimizer = muon(model, check_finite=False)
    give_gradients(model, 0)
    model[1].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert model[1].weight.isnan().all()
    assert model[3].weight.isfinite().all()


def test_large_but_finite_gradients_pass():
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    for p in model.parameters():
        p.grad.mul_(1e30)  # whose square is not finite
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_in_another_memory_order():
    """Users may assign .grad; torch's own optimizers take any strides."""
    model, other = Weights(a=(4, 6)), Weights(a=(4, 6))
    one, two = muon(model), muon(other)
    give_gradients(model, 0)
    other.a.weight.grad = model.a.weight.grad.T.contiguous().T
    assert not other.a.weight.grad.is_contiguous()
    one.step()
    two.step()
    assert torch.equal(model.a.weight, other.a.weight)


# -- step()


def test_closure():
    model, other = mixed_model(), mixed_model()
    optimizer, plain = muon(model), muon(other)
    tokens = torch.tensor([[1, 2, 3]])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    other_loss = other(tokens).square().mean()
    other_loss.backward()
    assert plain.step() is None
    assert loss.item() == other_loss.item()
    assert same(values(model), values(other))


def test_polar_calls_count_matrices():
    model = models.build()
    optimizer = muon(model, split={"qkv": 3})
    give_gradients(model, 0)
    optimizer.step()
    # 2 layers of (3 of qkv, out, up, down), 3 experts, unused
    assert optimizer.polar_calls == 2 * 6 + 3 + 1
    optimizer.step()
    assert optimizer.polar_calls == 2 * 16
    assert optimizer.comm_bytes == 0


def test_steps_are_counted_per_parameter():
    model = mixed_model()
    optimizer = muon(model)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [3.0] * 7


def test_state_is_one_buffer_for_matrices_and_two_for_the_rest():
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = {"step", "exp_avg"} | (set() if name in ("1.weight", "3.weight") else {"exp_avg_sq"})
        assert set(optimizer.state[p]) == kept
        assert all(optimizer.state[p][k].shape == p.shape for k in kept - {"step"})


def test_parameters_that_something_sharded_are_refused():
    model = mixed_model()
    optimizer = muon(model)
    model[1].weight.data = model[1].weight.data[:4]
    model[1].weight.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"1\.weight is now \(4, 6\) but was \(8, 6\)"):
        optimizer.step()


def test_parameters_out_of_memory_order_are_refused():
    """But for channels_last."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2))
    model[0].weight.data = model[0].weight.data.transpose(2, 3)
    optimizer = muon(model)
    give_gradients(model, 0)
    with pytest.raises(ValueError, match=r"0\.weight is not contiguous"):
        optimizer.step()


# -- a weight that holds several matrices


ROWS = {
    3: [slice(0, 8), slice(8, 16), slice(16, 24)],
    (12, 6, 6): [slice(0, 12), slice(12, 18), slice(18, 24)],
    (4, 2, 2): [
        [r for g in (0, 8, 16) for r in range(g, g + 4)],
        [r for g in (4, 12, 20) for r in range(g, g + 2)],
        [r for g in (6, 14, 22) for r in range(g, g + 2)],
    ],
}


@pytest.mark.parametrize("split", ROWS)
def test_a_split_weight_equals_its_parts_bitwise(split):
    whole = Weights(qkv=(24, 10))
    rows = ROWS[split]
    parts = Weights(**{f"part{i}": (1, 1) for i in range(3)})
    for i, part in enumerate(parts.children()):
        part.weight.data = whole.qkv.weight.detach()[rows[i]].clone()
    one = muon(whole, split={"qkv": split if isinstance(split, int) else list(split)})
    two = muon(parts)
    for step in range(3):
        give_gradients(whole, step)
        for i, part in enumerate(parts.children()):
            part.weight.grad = whole.qkv.weight.grad[rows[i]].clone()
        one.step()
        two.step()
    for i, part in enumerate(parts.children()):
        assert torch.equal(whole.qkv.weight[rows[i]], part.weight)
    assert one.polar_calls == two.polar_calls == 9


def test_a_stack_of_experts_equals_its_matrices_bitwise():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(0.1 * torch.randn(4, 6, 5))

    torch.manual_seed(3)
    stack = Experts()
    parts = Weights(**{f"e{i}": (6, 5) for i in range(4)})
    for i, part in enumerate(parts.children()):
        part.weight.data = stack.experts.detach()[i].clone()
    one, two = muon(stack), muon(parts)
    for step in range(3):
        give_gradients(stack, step)
        for i, part in enumerate(parts.children()):
            part.weight.grad = stack.experts.grad[i].clone()
        one.step()
        two.step()
    for i, part in enumerate(parts.children()):
        assert torch.equal(stack.experts[i], part.weight)


def test_a_convolution_is_its_matrix_bitwise():
    torch.manual_seed(4)
    conv = nn.Sequential(nn.Conv2d(3, 8, (2, 5), bias=False))
    flat = Weights(a=(8, 30))
    flat.a.weight.data = conv[0].weight.detach().view(8, 30).clone()
    one, two = muon(conv), muon(flat)
    for step in range(3):
        give_gradients(conv, step)
        flat.a.weight.grad = conv[0].weight.grad.view(8, 30).clone()
        one.step()
        two.step()
    assert torch.equal(conv[0].weight.view(8, 30), flat.a.weight)


@pytest.mark.parametrize("bucket_mb", [1e-9, 0.002, 0.01])
def test_buckets_change_no_bit(bucket_mb):
    one, two = models.build(), models.build()
    first = run(one, 3, split={"qkv": 3})
    second = run(two, 3, split={"qkv": 3}, bucket_mb=bucket_mb)
    assert same(values(one), values(two))
    assert first.polar_calls == second.polar_calls
    (unit,) = (u for u in second.all_units if isinstance(u, MatrixUnit))
    assert len(unit.plan.buckets) > 1


def test_parameters_that_a_framework_has_flattened_are_refused():
    """As under DeepSpeed when its integration is not imported: nothing may be taken for whole."""
    model = Weights(a=(4, 6), b=(6, 4))
    optimizer = muon(model)
    flat = nn.Parameter(torch.randn(48))
    flat.grad = torch.randn(48)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(
        ValueError, match=r"a\.weight is now \(48,\) but was \(4, 6\).*integrations"
    ):
        optimizer.step()
