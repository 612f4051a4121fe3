"""Gradients that were reduced to owners, between backward pass and step: right, or errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from spectral_dist.core import finite
from spectral_dist.integrations.torch.reduce_to_owners import OwnerReduction, reduce_to_owners
from tests.distributed.torch import layouts
from tests.distributed.torch.owner_runs import (
    CLIP,
    HEADS,
    STEPS,
    backward,
    built,
    difference,
    model_of,
    optimizer_of,
    values,
)
from tests.support import harness
from tests.support.quiet import quiet


def norms_seen() -> list[float]:
    model = model_of()
    with quiet():
        optimizer = optimizer_of(model, split=HEADS)
        reduction = reduce_to_owners(model, optimizer)
    backward(model, 0)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    owned = [run for run in reduction.parts if run.owner == dist.get_rank()]
    assert 0 < len(owned) < len(reduction.parts)
    optimizer.step()  # reading changes nothing
    return [float(get_total_norm(grads)), *(float(g.norm()) for g in grads)]


def norms_wanted() -> list[float]:
    model = model_of()
    backward(model, 0)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [float(get_total_norm(grads)), *(float(g.norm()) for g in grads)]


def test_norms_of_gradients_are_right_on_every_rank() -> None:
    wanted = harness.run(2, norms_wanted)[0]
    for ours in harness.run(2, norms_seen):
        assert ours == pytest.approx(wanted, rel=1e-6)


def by_torch(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    backward(model, 0)
    clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()


def by_torch_without_effect(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    """A factor of 1 is one, too: it need not be 1 on every rank."""
    backward(model, 0)
    clip_grad_norm_(model.parameters(), 1e6)
    optimizer.step()


def by_both(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    backward(model, 0)
    clip_grad_norm_(model.parameters(), CLIP)
    reduction.clip_grad_norm_(CLIP)


def replaced(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    backward(model, 0)
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()


def only_local(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    with model.no_sync():
        model(layouts.tokens(0)).backward()
    optimizer.step()


def local_after_reduced(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    backward(model, 0)
    with model.no_sync():
        model(layouts.tokens(0)).backward()
    optimizer.step()


def reduced_twice(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    backward(model, 0)
    backward(model, 1)


def not_cleared(model: nn.Module, optimizer: Any, reduction: OwnerReduction) -> None:
    backward(model, 0)
    reduction.clip_grad_norm_(CLIP)
    optimizer.step()
    backward(model, 1)


WRONG = {
    "changed after it was reduced": [
        by_torch, by_torch_without_effect, by_both, replaced, only_local,
    ],
    "would add to the gradient": [reduced_twice, not_cleared, local_after_reduced],
}  # fmt: skip


def refused(name: str, views: bool) -> str:
    model, optimizer, reduction = built(gradient_as_bucket_view=views)
    before = values(model)
    use: Callable[..., None] = globals()[name]
    with pytest.raises(ValueError, match=r"^reduce_to_owners: ") as raised:
        use(model, optimizer, reduction)
    if name not in ("not_cleared",):
        assert all(torch.equal(v, before[n]) for n, v in values(model).items())
    assert any("#reduce_to_owners" in note for note in raised.value.__notes__)
    return str(raised.value)


@pytest.mark.parametrize("views", [False, True])
def test_gradients_that_would_be_wrong_are_errors_on_every_rank(views: bool) -> None:
    for text, uses in WRONG.items():
        for use in uses:
            for message in harness.run(2, refused, use.__name__, views):
                assert text in message, (use, message)


def refused_later(check_finite: bool) -> list[str]:
    """As on GPUs, where the host says a step later what was wrong."""
    model = model_of()
    with quiet():
        optimizer = optimizer_of(model, check_finite=check_finite)
        reduction = reduce_to_owners(model, optimizer)
    texts = []
    with mock.patch.object(finite, "LATER_ON", ("cpu",)):
        for step, limit in enumerate((0.0, CLIP, math.inf)):
            optimizer.zero_grad()
            backward(model, step)
            before = values(model)
            try:
                if limit:
                    clip_grad_norm_(model.parameters(), limit)
                else:
                    reduction.clip_grad_norm_(CLIP)
                optimizer.step()
                optimizer.check_last_step()
            except ValueError as error:
                texts.append(str(error))
            is_same = all(torch.equal(v, before[n]) for n, v in values(model).items())
            assert is_same == bool(limit)
    return texts


@pytest.mark.parametrize("check_finite", [False, True])
def test_they_are_errors_where_the_host_looks_later(check_finite: bool) -> None:
    for texts in harness.run(2, refused_later, check_finite):
        assert len(texts) == 2
        for text in texts:
            assert "changed after it was reduced" in text
            assert text.startswith("in the last step, which was not applied: ") == check_finite


def not_finite(value: float) -> list[str]:
    """One rank's gradient is bad, in a matrix that the other rank owns."""
    model, optimizer, reduction = built()
    backward(model, 0)
    optimizer.step()
    before, texts = values(model), []
    for owner in (0, 1):
        run = next(r for r in reduction.parts if r.owner == owner)
        handle = run.parameter.register_hook(
            lambda grad, owner=owner: grad * (value if dist.get_rank() != owner else 1.0)
        )
        optimizer.zero_grad()
        backward(model, 1)
        handle.remove()
        with pytest.raises(ValueError, match="is NaN or infinite") as raised:
            optimizer.step()
        texts.append(str(raised.value))
        assert all(torch.equal(v, before[n]) for n, v in values(model).items())
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    return texts


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_bad_gradient_on_one_rank_is_an_error_on_all(value: float) -> None:
    results = harness.run(2, not_finite, value)
    assert results[0] == results[1]


def large() -> float:
    """Elements whose squares overflow are finite, and are stepped on as ever."""
    model, optimizer, reduction = built()
    run = next(r for r in reduction.parts if r.piece.length > 100)
    run.parameter.register_hook(lambda grad: torch.full_like(grad, 1e25))
    backward(model, 0)
    optimizer.step()
    return float(run.of(run.parameter.grad).double().norm() / run.piece.length**0.5)


def test_a_large_gradient_is_finite() -> None:
    assert harness.run(2, large) == pytest.approx([1e25] * 2, rel=1e-5)


def with_scaler(owners: bool) -> dict[str, Any]:
    """Two steps overflow, each on one rank: one of them not at the matrix's owner."""
    with quiet():
        model = model_of()
        optimizer = optimizer_of(model)
        reduction = reduce_to_owners(model, optimizer) if owners else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    weight = next(p for n, p in model.named_parameters() if n.endswith("out.weight"))
    step = 0

    def spoil(grad: Tensor) -> Tensor:
        return grad * (math.inf if step == 1 + dist.get_rank() else 1.0)

    weight.register_hook(spoil)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = layouts.tokens(step).chunk(2)[dist.get_rank()]
        scaler.scale(model(batch)).backward()
        scaler.unscale_(optimizer)
        if reduction:
            reduction.clip_grad_norm_(CLIP)
        else:
            clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"parameters": values(model), "scales": scales, "steps": optimizer.steps_taken()}


def test_a_scaler_skips_a_step_on_every_rank() -> None:
    found, wanted = (harness.run(2, with_scaler, owners) for owners in (True, False))
    assert difference(found, wanted) < 1e-6
    for ours in found:
        assert ours["scales"] == wanted[0]["scales"]
        assert ours["steps"] == wanted[0]["steps"] == STEPS - 2
