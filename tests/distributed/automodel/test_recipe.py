"""Automodel's recipe trains on 2 ranks as on one, saves, and resumes with the same losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch import nn

pytest.importorskip("nemo_automodel")
ROOT = Path(__file__).resolve().parents[3]
STEPS, SAVED_AT = 4, 2
SAVED, LAST = "epoch_0_step_1", "epoch_0_step_3"


def sections(name: str = "muon", **changes: Any) -> dict[str, Any]:
    """Those of the example, in float32."""
    both: dict[str, Any] = yaml.safe_load((ROOT / "examples/automodel.yaml").read_text())
    polar = {} if name == "sumo" else {"polar_dtype": "float32"}
    options = {**both["optimizer"]["options"], **polar}
    both["optimizer"] = {**both["optimizer"], "name": name, "options": options, **changes}
    return both


def launch(world: int, folder: Path, start: str, wanted: dict[str, Any]) -> Any:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    program = ["-m", "tests.distributed.automodel.recipe", str(folder), start, json.dumps(wanted)]
    return subprocess.run(
        [sys.executable, *torchrun, *program],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def lines(world: int, folder: Path, start: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    done = launch(world, folder, start, wanted)
    path = folder / f"{start}0.json"
    assert path.exists(), (done.stdout + done.stderr)[-6000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["muon", "root", "sumo", "normuon"])
@pytest.mark.fast_cases("sumo")
def test_two_ranks_train_as_one_and_resume(name: str, tmp_path: Path) -> None:
    wanted = sections(name)
    whole = lines(2, tmp_path / "two", "fresh", wanted)
    alone = lines(1, tmp_path / "one", "fresh", wanted)
    losses = [line["loss"] for line in whole]
    assert len(losses) == STEPS
    assert losses == pytest.approx([line["loss"] for line in alone], abs=1e-5)
    for line in whole:  # the scheduler keeps what scalar_lr is of lr
        (lr, decay), (scalar_lr, scalar_decay) = line["rates"]
        assert scalar_lr == pytest.approx(0.3 * lr)
        assert decay == scalar_decay == 0.1
    assert len({line["rates"][0][0] for line in whole}) > 1
    shutil.rmtree(tmp_path / "two/run" / LAST)
    for link in (tmp_path / "two/run").iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()
    rest = lines(2, tmp_path / "two", SAVED, wanted)
    assert [line["loss"] for line in rest] == pytest.approx(losses[SAVED_AT:], abs=1e-6)


REFUSED = {
    "poet": (sections("poet"), "no place for spectral_dist.poet.convert"),
    "moun": (sections("moun"), "did you mean 'muon'"),
    "option": (sections(options={"momentun": 0.9}), "did you mean 'momentum'"),
    "decay": (
        sections(weight_decay=0.0, options={"scalar_weight_decay": 0.1}),
        "keeps it as a multiple of weight_decay, which is 0.0",
    ),
}


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_is_refused() -> None:
    """Its model is a list of stages."""
    from spectral_dist.integrations.automodel import SpectralConfig

    model = SimpleNamespace(parts=[nn.Linear(4, 4)])
    config = SpectralConfig(name="muon")
    with pytest.raises(ValueError, match="pipeline parallelism is not supported under Automodel"):
        config.build(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.fast_cases("moun")
def test_what_automodel_could_not_schedule_is_refused(case: str, tmp_path: Path) -> None:
    wanted, message = REFUSED[case]
    done = launch(1, tmp_path, "fresh", wanted)
    assert done.returncode
    assert message in done.stderr
