"""The engines of plain torch: one run, however the ranks share it and wherever it stops."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.launch.torch_runs import OPTIMIZERS, losses, write
from tests.support import harness

MATRICES = 2 * 7
HSDP = {"mesh": {"replicate": 2, "shard": -1}}
TP = {"tensor_parallel": 2}
LAYOUTS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "ddp on 2": (2, False, {}),
    "fsdp alone": (1, True, {}),
    "fsdp on 2": (2, True, {}),
    "tp on 2": (2, True, TP),
    "hsdp on 4": (4, True, HSDP),
    "tp and fsdp on 4": (4, True, TP),
}


@functools.cache
def alone(kind: str, folder: Path) -> list[float]:
    """The run of one process."""
    found, _ = harness.run(1, losses, write(folder, OPTIMIZERS[kind], kind), False)[0]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch")


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (layout, kind)
        for layout in LAYOUTS
        for kind in OPTIMIZERS
        # an engine treats Muon, PolarGrad, ROOT and SUMO alike
        if kind in ("Muon", "AdamW") or layout == "fsdp on 2"
    ],
)
@pytest.mark.fast_cases(
    "ddp on 2-Muon",
    "ddp on 2-AdamW",
    "fsdp alone-Muon",
    "fsdp on 2-AdamW",
    "fsdp on 2-Muon",
    "fsdp on 2-PolarGrad",
    "fsdp on 2-SUMO",
    "tp and fsdp on 4-Muon",
)
def test_however_many_ranks_share_it(folder: Path, kind: str, layout: str) -> None:
    world, sharded, keys = LAYOUTS[layout]
    path = write(folder, OPTIMIZERS[kind], **keys)
    found = harness.run(world, losses, path, sharded)
    wanted = alone(kind, folder)
    assert wanted[-1] < wanted[0] - 0.5
    assert found[0][0] == pytest.approx(wanted, abs=1e-5)
    assert all(each == found[0][0] for each, _ in found)
    calls = sum(numbers["calls"] for _, numbers in found)
    assert calls == (0 if kind == "AdamW" else 12 * MATRICES)  # no matrix twice


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if k not in ("PolarGrad", "ROOT")])
@pytest.mark.fast_cases("Muon")
def test_goes_on_elsewhere_as_if_it_had_not_stopped(folder: Path, kind: str) -> None:
    places = [(4, True, TP), (1, False, {}), (2, True, {}), (2, False, {})]
    found: list[float] = []
    for number, (world, sharded, keys) in enumerate(places):
        path = write(folder, OPTIMIZERS[kind], "resumed", **keys)
        span = (3 * number, 3 * number + 3)
        at = folder / f"{kind} resumed"
        load = at if number else None
        results = harness.run(world, losses, path, sharded, span, load=load, save=at)
        found += results[0][0]
    assert found == pytest.approx(alone(kind, folder), abs=2e-6)
    assert (at / "latest").read_text() == "step_000012"


@pytest.mark.parametrize("kind", ["Muon", "AdamW"])
@pytest.mark.fast_cases("Muon")
def test_half_precision(folder: Path, kind: str) -> None:
    wanted = alone(kind, folder)
    kept = write(folder, OPTIMIZERS[kind], "kept", param_dtype="bfloat16")
    for path, dtype in ((kept, "float32"), (None, "bfloat16")):
        chosen = path or write(folder, OPTIMIZERS[kind], "half", dtype="bfloat16")
        for world, sharded in ((2, True), (2, False)):
            if path and not sharded:
                continue
            found, numbers = harness.run(world, losses, chosen, sharded)[0]
            assert numbers["dtypes"] == {f"torch.{dtype}"}
            assert found != wanted
            assert found == pytest.approx(wanted, abs=0.15)


def test_a_checkpoint_of_another_optimizer_is_refused(folder: Path) -> None:
    muon = write(folder, OPTIMIZERS["Muon"], "saved")
    harness.run(2, losses, muon, True, (0, 1), save=folder / "saved")
    for changes, said in (
        ({"optimizer": OPTIMIZERS["AdamW"]}, 'optimizer.type was "Muon", now it is "AdamW"'),
        ({"optimizer": {"type": "Muon", "lr": 0.02}}, "optimizer.lr was 0.01, now it is 0.02"),
        ({"optimizer": {"type": "Muon", "lr": 0.01, "scalar_weight_decay": 0.0}},
         "optimizer.scalar_weight_decay was 0.1, now it is 0.0"),
        ({"clip": 0.5}, "clip was 1.0, now it is 0.5"),
        ({"dtype": "bfloat16"}, 'dtype was "float32", now it is "bfloat16"'),
        ({"warmup": 3}, "warmup was 2, now it is 3"),
    ):  # fmt: skip
        path = write(folder, **{"optimizer": OPTIMIZERS["Muon"], **changes})
        harness.run_refused(2, said, losses, path, False, (1, 2), load=folder / "saved")


@pytest.mark.parametrize(
    ("keys", "sharded", "said"),
    [
        ({"micro_batch": 3}, True, "batch: 8 is no multiple of micro_batch 3 times 2"),
        ({"mesh": {"shard": 3}}, True, "mesh: 1 x 3 ranks"),
        ({"mesh": {"replicate": 4}}, True, "mesh: 4 x -1 ranks"),
        ({"tensor_parallel": 3}, True, r"tensor_parallel: 2 rank\(s\) cannot be cut into 3s"),
        (TP, False, "tensor_parallel: only --engine fsdp"),
        (HSDP, False, "mesh: only --engine fsdp"),
        ({"param_dtype": "bfloat16"}, False, "param_dtype: only --engine fsdp"),
        ({"optimizer": {"type": "Muon", "scalars": ["nothing"]}}, True, "optimizer: scalars: "),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, keys: dict[str, Any], sharded: bool, said: str
) -> None:
    path = write(folder, **{"optimizer": OPTIMIZERS["Muon"], **keys})
    said = f"ValueError: .*a.yaml: {said}"
    harness.run_refused(2, said, losses, path, sharded, (0, 0))
