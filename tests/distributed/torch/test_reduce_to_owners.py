"""Gradients of matrices reduced to their owners under DDP: the same training, fewer bytes."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

import spectral_dist
from benchmarks.traffic import OTHERS, RULES, Traffic
from spectral_dist.core import finite
from spectral_dist.integrations.torch.reduce_to_owners import OwnerReduction, reduce_to_owners
from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients
from tests.distributed.torch import layouts
from tests.support import harness
from tests.support.quiet import quiet

STEPS = 4
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
HEADS = {"qkv": [8, 8, 8]}
"""A pattern that repeats three times: matrices in several blocks of rows, of several owners."""
CLIP = 0.05
"""Below the norm of every step's gradient."""


def model_of(dtype: torch.dtype = torch.float32, **ddp: Any) -> DistributedDataParallel:
    model = layouts.conditioned(odd=True).to(dtype)
    ddp.setdefault("find_unused_parameters", not ddp.get("static_graph"))
    return DistributedDataParallel(model, bucket_cap_mb=0.01, **ddp)


def optimizer_of(
    model: nn.Module, title: str = "Muon", split: Any = 3, **options: Any
) -> spectral_dist.Muon:
    split = split if isinstance(split, dict) else {"qkv": split}
    groups = spectral_dist.param_groups(model, split=split)
    rules = {"SUMO": {"rank": 0.5, "period": 3}}
    settings = {**OPTIONS, **rules.get(title, {}), **options}
    return getattr(spectral_dist, title)(groups, **settings)


def backward(model: nn.Module, step: int, accumulation: int = 1) -> None:
    """Add this rank's gradients, reduced in the last micro-batch."""
    chunks = list(layouts.tokens(step).chunk(dist.get_world_size() * accumulation))
    batches = chunks[dist.get_rank() :: dist.get_world_size()]
    for number, batch in enumerate(batches):
        last = number + 1 == len(batches)
        with contextlib.nullcontext() if last else model.no_sync():
            (model(batch) / accumulation).backward()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def run(
    owners: bool,
    first: int = 0,
    last: int = STEPS,
    clip: float = 0.0,
    accumulation: int = 1,
    zeros: bool = False,
    load: str = "",
    save: str = "",
    ddp: dict[str, Any] | None = None,
    monitor: str = "",
    **options: Any,
) -> dict[str, Any]:
    """``zeros``: gradients are set to zero, not to None."""
    norms = []
    with quiet():
        model = model_of(**(ddp or {}))
        optimizer = optimizer_of(model, **options)
        if monitor:
            write = [spectral_dist.monitor.to_jsonl(monitor)]
            optimizer.monitor = spectral_dist.monitor.Monitor(2, write)
        reduction = reduce_to_owners(model, optimizer) if owners else None
        if load:
            spectral_dist.checkpoint.load(load, model, optimizer)
        for step in range(first, last):
            optimizer.zero_grad(set_to_none=not zeros)
            backward(model, step, accumulation)
            if clip and reduction:
                norms.append(float(reduction.clip_grad_norm_(clip)))
            elif clip:
                norms.append(float(clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
        if save:
            spectral_dist.checkpoint.save(save, model, optimizer)
    return {"parameters": values(model), "norms": norms}


@functools.cache
def plain(world: int, **changes: Any) -> list[dict[str, Any]]:
    return harness.run(world, run, False, **changes)


def difference(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """The largest of any parameter on any rank; ranks must have the same bits."""
    for ours in found[1:]:
        for name, value in ours["parameters"].items():
            assert torch.equal(value, found[0]["parameters"][name]), name
    pairs = [(found[0]["parameters"][n], v) for n, v in wanted[0]["parameters"].items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (2, {"split": HEADS}),
        (2, {"accumulation": 3}),
        (2, {"accumulation": 2, "zeros": True, "ddp": {"gradient_as_bucket_view": True}}),
        (2, {"ddp": {"gradient_as_bucket_view": True}}),
        (2, {"ddp": {"static_graph": True}}),
        (2, {"ddp": {"dtype": torch.bfloat16}}),
        (2, {"ddp": {"dtype": torch.float64}}),
        (2, {"title": "SUMO"}),
        (2, {"title": "NorMuon"}),
        (2, {"check_finite": False, "zeros": True}),
        (3, {}),
        (4, {}),
        (4, {"split": HEADS, "ddp": {"gradient_as_bucket_view": True}}),
    ],
)
def test_equals_plain_ddp(world: int, changes: dict[str, Any]) -> None:
    """Bitwise on 2 ranks, where a sum of two has one order."""
    found, wanted = (harness.run(world, run, owners, **changes) for owners in (True, False))
    error = difference(found, wanted)
    assert error == 0 if world == 2 else error < 1e-6


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (2, {"accumulation": 2, "ddp": {"gradient_as_bucket_view": True}}),
        (2, {"split": HEADS, "zeros": True}),
        (3, {}),
    ],
)
def test_clips_as_torch_clips_plain_ddp(world: int, changes: dict[str, Any]) -> None:
    found, wanted = (
        harness.run(world, run, owners, clip=CLIP, **changes) for owners in (True, False)
    )
    assert difference(found, wanted) < 1e-6
    for ours in found:
        assert ours["norms"] == found[0]["norms"]
        assert min(ours["norms"]) > CLIP
        for norm, expected in zip(ours["norms"], wanted[0]["norms"], strict=True):
            assert math.isclose(norm, expected, rel_tol=1e-6)
    free = harness.run(world, run, True, **changes)
    assert difference(free, wanted) > 1e-4


class Sometimes(nn.Module):
    """Each rank of a group uses one of two weights, and the group's first a third, a stack."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rank = rank
        self.first, self.second = (nn.Linear(6, 6, bias=False) for _ in range(2))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(x) if self.rank else self.first(x)
        return self.head(y if self.rank else y @ self.stack.sum(0)).square().mean()


def in_groups(owners: bool) -> dict[str, Any]:
    """Two groups of two ranks, which are not neighbours, each with a model of its own."""
    groups = [dist.new_group([first, first + 2]) for first in (0, 1)]
    group = groups[dist.get_rank() % 2]
    rank = dist.get_rank(group)
    model = DistributedDataParallel(
        Sometimes(rank), process_group=group, find_unused_parameters=True
    )
    with quiet():
        optimizer = optimizer_of(model, split={})
        reduction = reduce_to_owners(model, optimizer) if owners else None
        for step in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            model(torch.randn(5, 6, generator=generator)).backward()
            optimizer.step()
    owned = {run.owner for run in reduction.runs} if reduction else {0, 1}
    assert owned == {0, 1}
    return {"parameters": values(model)}


def test_ranks_that_do_not_use_a_matrix() -> None:
    found, wanted = (harness.run(4, in_groups, owners) for owners in (True, False))
    for first in (0, 1):
        assert difference(found[first::2], wanted[first::2]) == 0
    assert difference(found[:1], wanted[1:2]) > 1e-3


# -- what it sends


def even(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8, bias=bias) for _ in range(8)]
    return nn.Sequential(nn.Embedding(4, 8), *layers, nn.Linear(8, 4, bias=False))


def sent(title: str) -> dict[str, Any]:
    """Bytes of the second step, when DDP has rebuilt its buckets."""
    model = DistributedDataParallel(even())
    optimizer = optimizer_of(model, title, split={}, check_finite=False)
    reduction = reduce_to_owners(model, optimizer)
    for step in range(2):
        before = dict(reduction.meter.bytes), dict(optimizer.meter.bytes)
        optimizer.zero_grad()
        model(torch.tensor([step, 1, 2])).square().sum().backward()
        optimizer.step()
    after = reduction.meter.bytes, optimizer.meter.bytes
    counted = [
        {k: v - old.get(k, 0) for k, v in new.items()}
        for old, new in zip(before, after, strict=True)
    ]
    return {"hook": counted[0], "optimizer": counted[1], "runs": len(reduction.runs)}


@pytest.mark.parametrize("title", ["Muon", "SUMO"])
@pytest.mark.parametrize("world", [2, 4])
def test_sends_what_the_all_reduce_of_plain_ddp_sends(world: int, title: str) -> None:
    """To the byte, where owners have equal shares; beside it one number a matrix, for norms."""
    share, matrices, rest = (world - 1) / world, 8 * 64, 32 + 32
    for ours in harness.run(world, sent, title):
        assert ours["hook"]["reduce"] == share * 4 * matrices
        assert ours["optimizer"] == {"all_gather": share * 4 * matrices}
        norms = 2 * share * 8 * (ours["runs"] + 1)
        assert ours["hook"]["all_reduce"] == 2 * share * 4 * rest + norms
        whole = sum(ours["hook"].values()) + sum(ours["optimizer"].values())
        assert whole - norms == 2 * share * 4 * (matrices + rest)


def calls() -> dict[str, int]:
    """Bytes of a backward pass's collectives, counted at torch's functions."""
    model = DistributedDataParallel(even())
    optimizer = optimizer_of(model, split={}, check_finite=False)
    reduce_to_owners(model, optimizer)
    model(torch.tensor([0, 1, 2])).square().sum().backward()
    optimizer.step()
    with contextlib.ExitStack() as restored:
        for name in (*RULES, *OTHERS.split()):
            for module in (dist, dist.distributed_c10d):
                restored.callback(setattr, module, name, getattr(module, name))
        traffic = Traffic()
        traffic.on = True
        optimizer.zero_grad()
        model(torch.tensor([1, 1, 2])).square().sum().backward()
        traffic.on = False
    return dict(traffic.bytes)


def test_its_meter_counts_what_torch_is_asked_to_send() -> None:
    """By the convention of the benchmarks a reduction is (P - 1) / P of its bytes on each rank."""
    for ours in harness.run(2, calls):
        assert ours["reduce"] == 4 * 8 * 64 / 2
        assert ours["all_reduce"] == 4 * (32 + 32) + 8 * (8 + 1)


# -- gradients between the backward pass and the step


def norms_seen() -> list[float]:
    model = model_of()
    with quiet():
        optimizer = optimizer_of(model, split=HEADS)
        reduction = reduce_to_owners(model, optimizer)
    backward(model, 0)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    owned = [run for run in reduction.runs if run.owner == dist.get_rank()]
    assert 0 < len(owned) < len(reduction.runs)
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


def built(**ddp: Any) -> tuple[DistributedDataParallel, Any, OwnerReduction]:
    model = model_of(**ddp)
    with quiet():
        optimizer = optimizer_of(model)
        return model, optimizer, reduce_to_owners(model, optimizer)


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
        run = next(r for r in reduction.runs if r.owner == owner)
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
    run = next(r for r in reduction.runs if r.numel > 100)
    run.parameter.register_hook(lambda grad: torch.full_like(grad, 1e25))
    backward(model, 0)
    optimizer.step()
    return float(run.of(run.parameter.grad).double().norm() / run.numel**0.5)


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


# -- the rest of a training


def test_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    harness.run(2, run, True, 0, 2, save=folder)
    found = harness.run(2, run, True, 2, STEPS, load=folder)
    assert difference(found, harness.run(2, run, False)) == 0
    # in a run without it
    assert difference(harness.run(2, run, False, 2, STEPS, load=folder), found) == 0


def test_the_monitor_says_the_same(tmp_path: Path) -> None:
    reports = []
    for owners in (True, False):
        path = tmp_path / f"{owners}.jsonl"
        harness.run(2, run, owners, monitor=str(path))
        reports.append(path.read_text())
    assert reports[0] == reports[1]
    assert len(reports[0].splitlines()) == STEPS // 2


# -- what is refused


def not_possible() -> list[str]:
    model, texts = model_of(), []
    other = DistributedDataParallel(nn.Linear(3, 3))
    hooked = model_of()
    with quiet():
        optimizer = optimizer_of(model)
        project_gradients(hooked, optimizer_of(hooked, "SUMO", perp_scale=0.0))
        poet = DistributedDataParallel(spectral_dist.poet.convert(even(), block=4))
        half = DistributedDataParallel(even().to(torch.float16))
        last = DistributedDataParallel(
            nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
        )
        pairs = [
            (model, optimizer_of(model, replicate_momentum=True)),
            (other, optimizer),
            (model.module, optimizer),
            (hooked, optimizer_of(hooked, "SUMO", perp_scale=0.0)),
            (poet, spectral_dist.POET(spectral_dist.param_groups(poet), lr=0.01)),
            (model, torch.optim.AdamW(model.parameters())),
            (half, optimizer_of(half, split={})),
            (last, optimizer_of(last, split={})),
        ]
        for wrapped, wrong in pairs:
            try:
                reduce_to_owners(wrapped, wrong)
            except ValueError as error:
                texts.append(str(error))
        reduce_to_owners(model, optimizer)
        try:
            project_gradients(model, optimizer_of(model, "SUMO", perp_scale=0.0))
        except ValueError as error:
            texts.append(str(error))
    dist.barrier()
    return texts


def test_refused() -> None:
    for texts in harness.run(2, not_possible):
        words = [
            "replicate_momentum=False", "is not of this model", "is a Tiny", "hook already",
            "this POET has none", "this AdamW has none", "is float16", "is channels_last",
            "project_gradients: the model has a communication hook already",
        ]  # fmt: skip
        assert len(texts) == len(words), texts
        for text, word in zip(texts, words, strict=True):
            assert word in text


def by_itself() -> None:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model = DistributedDataParallel(even(), process_group=group)
    with quiet():
        optimizer = optimizer_of(model, split={})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reduction = reduce_to_owners(model, optimizer)
    assert any("reduce_to_owners has no effect" in str(w.message) for w in caught)
    model(torch.tensor([0, 1, 2])).mul(1e6).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    norm = get_total_norm(grads)
    assert torch.allclose(reduction.clip_grad_norm_(float(norm) / 2), norm)
    assert torch.allclose(get_total_norm([p.grad for p in model.parameters()]), norm / 2, rtol=1e-4)
    clip_grad_norm_(model.parameters(), 1e-9)  # as in one process
    optimizer.step()


def test_a_rank_by_itself() -> None:
    harness.run(2, by_itself)
