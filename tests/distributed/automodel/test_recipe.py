"""Automodel's recipe trains on 2 ranks as on one, saves, and resumes with the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch import nn

pytest.importorskip("nemo_automodel")

from tests.support import harness

ROOT = Path(__file__).resolve().parents[3]
STEPS, SAVED_AT = 4, 2
SAVED, LAST = "epoch_0_step_1", "epoch_0_step_3"
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"polar_dtype": "float32"},
    "root": {"polar_dtype": "float32"},
    "sumo": {"rank": 8, "period": 3},
    "normuon": {"polar_dtype": "float32"},
    "poet": {"merge_every": 2},
}
MATRICES = {"poet": "skew"}
"""The kind of group that the rule trains, where it is not of matrices."""


def sections(name: str = "muon", **changes: Any) -> dict[str, Any]:
    """Those of the example."""
    file = "automodel_poet.yaml" if name == "poet" else "automodel.yaml"
    both: dict[str, Any] = yaml.safe_load((ROOT / "examples" / file).read_text())
    if name == "poet":
        both["model"] = {**both["model"], "block": 4, "model": TRANSFORMERS}
        del both["checkpoint"]
    options = {**both["optimizer"]["options"], "eps": 1e-4, **OPTIONS.get(name, {})}
    both["optimizer"] = {**both["optimizer"], "name": name, "options": options, **changes}
    return both


TRANSFORMERS = {
    "_target_": "transformers.AutoModelForCausalLM.from_config",
    "config": {"_target_": "tests.distributed.automodel.recipe.tiny"},
    "attn_implementation": "eager",
    "dtype": "float32",
}


def of_ranks(name: str) -> Any:
    """A function of the recipe's module, which ranks alone may import: it changes torch."""
    return SimpleNamespace(__module__="tests.distributed.automodel.recipe", __qualname__=name)


def lines(world: int, folder: Path, start: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses and rates of the steps of a run."""
    folder.mkdir(exist_ok=True)
    return harness.run(world, of_ranks("lines"), str(folder), start, wanted, pool="automodel")[0]


def losses_of(steps: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in steps]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.fast_cases("sumo")
def test_two_ranks_train_as_one_and_resume(name: str, tmp_path: Path) -> None:
    wanted = sections(name)
    whole = lines(2, tmp_path / "two", "fresh", wanted)
    alone = lines(1, tmp_path / "one", "fresh", wanted)
    losses = losses_of(whole)
    assert len(losses) == STEPS
    assert losses == pytest.approx(losses_of(alone), rel=1e-6)
    kind = MATRICES.get(name, "matrix")
    for line in whole:  # the scheduler keeps what scalar_lr is of lr
        (lr, decay), (scalar_lr, scalar_decay) = line["rates"][kind], line["rates"]["scalar"]
        assert scalar_lr == pytest.approx(0.3 * lr)
        assert scalar_decay == 0.1
        assert decay == (0.1 if kind == "matrix" else 0.0)
    assert max(line["rates"][kind][0] for line in whole) > 0.005
    assert len({line["rates"][kind][0] for line in whole}) > 1
    shutil.rmtree(tmp_path / "two/run" / LAST)
    for link in (tmp_path / "two/run").iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()
    rest = lines(2, tmp_path / "two", SAVED, wanted)
    assert losses_of(rest) == pytest.approx(losses[SAVED_AT:], rel=1e-6)


REFUSED = {
    "unrotated": ({**sections("muon"), "optimizer": sections("poet")["optimizer"]},
                  "spectral_dist.integrations.automodel.rotated in the section model"),
    "moun": (sections("moun"), "did you mean 'muon'"),
    "option": (sections(options={"momentun": 0.9}), "did you mean 'momentum'"),
    "decay": (
        sections(weight_decay=0.0, options={"scalar_weight_decay": 0.1}),
        "keeps it as a multiple of that of kind 'matrix', which is 0.0",
    ),
}  # fmt: skip


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
    for error in harness.run_expecting_errors(
        2, of_ranks("lines"), str(tmp_path), "fresh", wanted, pool="automodel", within=120.0
    ):
        assert error.startswith("ValueError"), error
        assert message in error
