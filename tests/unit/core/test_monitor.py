"""What the monitor reports is what an independent computation of the same step gives."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch

import spectral_dist
from spectral_dist.monitor import QUANTITIES, Monitor, stable_rank, to_jsonl, to_tensorboard
from tests.distributed.torch import layouts
from tests.reference import rules
from tests.support import harness, models
from tests.support.weights import Weights, give_gradients

SHAPES = {"wide": (4, 9), "tall": (10, 3), "square": (6, 6)}


def watched(cls: Any, steps: int, every: int, **options: Any) -> tuple[Any, list[Any], Any]:
    model = Weights(**SHAPES)
    optimizer = cls(spectral_dist.param_groups(model), **options)
    seen: list[Any] = []
    optimizer.monitor = Monitor(every, [lambda step, report: seen.append((step, report))])
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return model, seen, optimizer


def test_reports_every_kth_step_only() -> None:
    _, seen, _ = watched(spectral_dist.Muon, 7, 3)
    assert [step for step, _ in seen] == [3, 6]
    for _, report in seen:
        assert set(report) == set(QUANTITIES)
        for values in report.values():
            assert set(values) == {f"{name}.weight" for name in SHAPES}


def test_the_numbers_of_a_first_step() -> None:
    lr, quantile = 0.02, 0.9
    for cls in (spectral_dist.Muon, spectral_dist.PolarGrad, spectral_dist.ROOT):
        start = {n: p.detach().clone() for n, p in Weights(**SHAPES).named_parameters()}
        model, seen, _ = watched(cls, 1, 1, lr=lr, weight_decay=0.0)
        report = seen[0][1]
        for name, p in model.named_parameters():
            moved = (start[name] - p.detach()).double()
            g = (1 - 0.95) * p.grad.double()  # the momentum, and what Nesterov makes of it
            x = g if cls is spectral_dist.PolarGrad else (1 - 0.95) * p.grad.double() + 0.95 * g
            clamped = 0.0
            if cls is spectral_dist.ROOT:
                limit = torch.quantile(x.abs().flatten(), quantile)
                clamped = float((x.abs() > limit).double().mean())
                x = x.clamp(-limit, limit)
            oracle = rules.svd if cls is spectral_dist.PolarGrad else rules.schedule("jordan")
            u = oracle(x)
            s = min(u.shape)
            gram = u @ u.mT if u.shape[0] == s else u.mT @ u
            sigma = torch.linalg.svdvals(x)
            wanted = {
                "update_rms": float(moved.norm()) / lr / math.sqrt(p.numel()),
                "relative_update": float(moved.norm() / start[name].double().norm()),
                "orthogonality_error": float((gram - torch.eye(s)).norm()) / s**0.5,
                "stable_rank": float(sigma.square().sum() / sigma[0] ** 2),
                "nuclear_norm": float((x * u).sum()),
                "clamped_fraction": clamped,
            }
            for quantity, value in wanted.items():
                tolerance = {"stable_rank": 0.02}.get(quantity, 1e-4)
                found = report[quantity][name]
                assert found == pytest.approx(value, rel=tolerance, abs=2e-5), (name, quantity)


@pytest.mark.filterwarnings("ignore:SUMO with rank")
@pytest.mark.parametrize("rank", [2, 1.0])
def test_the_numbers_of_sumo(rank: float) -> None:
    """What is orthogonalized is the gradient inside of the subspace, of its top directions."""
    model, seen, _ = watched(spectral_dist.SUMO, 1, 1, rank=rank, basis="svd", perp_scale=0.0)
    for name, p in model.named_parameters():
        found = {quantity: values[name] for quantity, values in seen[0][1].items()}
        sigma = torch.linalg.svdvals(p.grad.double())
        top = sigma[:2] if rank == 2 else sigma
        captured = float(top.norm() / sigma.norm()) if rank == 2 else 0.0
        assert found["captured_fraction"] == pytest.approx(captured, rel=1e-4)
        assert found["nuclear_norm"] == pytest.approx(float(top.sum()), rel=1e-4)
        wanted = float(top.square().sum() / top[0] ** 2)
        assert found["stable_rank"] == pytest.approx(wanted, rel=0.02)
        assert found["orthogonality_error"] < 1e-5
        assert found["update_rms"] == pytest.approx(0.2, rel=1e-4)


def test_stable_rank() -> None:
    for spectrum in ([1.0] * 6, [1, 0.5, 0.1, 0.01], [1.0, 0.0, 0.0], [3e-12, 1e-12]):
        u = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum)))[0]
        v = torch.linalg.qr(torch.randn(9, len(spectrum)))[0]
        x = (u * torch.tensor(spectrum)) @ v.mT
        wanted = sum(s * s for s in spectrum) / max(spectrum) ** 2
        assert float(stable_rank(x[None])) == pytest.approx(wanted, rel=0.02)
    assert float(stable_rank(torch.zeros(1, 3, 4))) == 0.0


def test_changes_no_bit_and_sends_nothing_when_not_due() -> None:
    with_monitor, _, watching = watched(spectral_dist.Muon, 4, 3)
    without, _, _ = watched(spectral_dist.Muon, 4, 100)
    for a, b in zip(with_monitor.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert watching.meter.calls == {}


def report_under(layout: str, rule: str) -> tuple[Any, int, int]:
    """(the last report, all-reduces of 4 steps with one report, without one)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen: list[Any] = []
        calls = []
        for every in (4, 100):
            placed = layouts.build(layout, odd=False)
            groups = spectral_dist.param_groups(placed.model, split={"qkv": 3})
            optimizer = getattr(spectral_dist, rule)(groups, lr=0.02)
            optimizer.monitor = Monitor(every, [lambda step, report: seen.append(report)])
            for step in range(4):
                placed.backward(step)
                optimizer.step()
            calls.append(optimizer.meter.calls.get("all_reduce", 0))
    return (seen[-1] if seen else None), calls[0], calls[1]


@pytest.mark.parametrize("rule", ["Muon", "ROOT"])
@pytest.mark.fast_cases("Muon")
def test_sharded_reports_are_those_of_one_process(rule: str) -> None:
    wanted = harness.run(1, report_under, "one", rule)[0][0]
    for world, layout in ((2, "ddp"), (3, "fsdp"), (4, "hsdp"), (4, "tp_fsdp")):
        results = harness.run(world, report_under, layout, rule)
        assert [result[0] is not None for result in results] == [True] + [False] * (world - 1)
        for quantity, values in wanted.items():
            for name, value in values.items():
                found = results[0][0][quantity][name]
                assert found == pytest.approx(value, rel=1e-3, abs=1e-5), (layout, quantity, name)
        for _, with_report, without in results:
            assert 0 < with_report - without <= 2 * 2  # a reduction a unit, two where copies are


def test_sinks(tmp_path: Any) -> None:
    model = models.build(odd=False)
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model))

    class ScalarWriter:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

    writer = ScalarWriter()
    file = tmp_path / "folder" / "metrics.jsonl"
    optimizer.monitor = Monitor(2, [to_jsonl(file), to_tensorboard(writer)])
    for step in range(4):
        optimizer.zero_grad()
        model(models.tokens(step)).backward()
        optimizer.step()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["kind"] == "matrices" for line in lines)
    rms = lines[0]["update_rms"]["layers.0.up.weight"]
    assert ("update_rms/layers.0.up.weight", rms, 2) in writer.scalars
    assert 0.1 < rms < 0.3


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_bad_every(every: Any) -> None:
    with pytest.raises(ValueError, match=r"every is .* whole number of steps"):
        Monitor(every, [])
