"""LLaMA-Factory on 2 ranks computes what one process without it does, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("llamafactory")

from tests.support import recorded

EXAMPLE = yaml.safe_load((recorded.ROOT / "examples/llama_factory.yaml").read_text())
COMMAND = "tests.distributed.llama_factory.command"
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("DistributedDataParallel", {}),
    "zero2": ("DeepSpeedEngine", {"deepspeed": recorded.ENGINES["zero2"]}),
}
"""The class of the trained model, and what YAML asks for it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, rows, and pairs."""
    folder = tmp_path_factory.mktemp("llama_factory")
    recorded.write_inputs(folder)
    rows = json.loads((folder / "rows.json").read_text())
    pairs = [{**row, "chosen": row["output"], "rejected": "no"} for row in rows]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    of_pairs = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    sets = {"rows": {"file_name": "rows.json"}, "pairs": of_pairs}
    (folder / "dataset_info.json").write_text(json.dumps(sets))
    return folder


def launch(folder: Path, name: str, words: list[str], environment: Any = (), **changes: Any) -> Any:
    settings = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True,
        "finetuning_type": "full", "dataset": "rows", "dataset_dir": str(folder),
        "template": "empty", "cutoff_len": 64, "output_dir": str(folder / name),
        "report_to": "none", "use_cpu": True, "overwrite_cache": True, "flash_attn": "disabled",
        **recorded.ARGUMENTS, **EXAMPLE, **changes,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    variables = {"DISABLE_VERSION_CHECK": "1", **dict(environment)}
    return recorded.launch(COMMAND, [str(folder / name), str(path), *words], **variables)


def run(
    folder: Path, name: str, optimizer: str, words: list[str], **changes: Any
) -> list[list[dict[str, Any]]]:
    """Return each rank's records."""
    section = {**EXAMPLE["spectral"], "optimizer": optimizer, **recorded.OPTIONS[optimizer]}
    done = launch(folder, name, words, spectral=section, **changes)
    return recorded.records_of(folder, name, done)


@pytest.mark.parametrize(("layout", "optimizer"), recorded.cases(LAYOUTS))
@pytest.mark.fast_cases("ddp-muon", "ddp-poet", "zero2-sumo")
def test_ranks_train_as_a_loop_does_and_resume(layout: str, optimizer: str, folder: Path) -> None:
    wrapper, changes = LAYOUTS[layout]
    name = f"{layout}_{optimizer}"
    words = ["spectral.scalar_lr=0.005"]  # over the YAML's
    whole = run(folder, name, optimizer, words, **changes)
    assert recorded.layouts(whole) == {(wrapper, recorded.RANKS)}
    assert recorded.have_other_rows(whole)
    losses = recorded.losses(whole)
    assert len(losses) == recorded.STEPS
    wanted = recorded.by_loop(folder, optimizer, whole, scalar_lr=0.005)
    assert recorded.are_equal(losses, wanted)
    saved = str(folder / name / f"checkpoint-{recorded.SAVED_AT}")
    if layout == "ddp":
        next_loss = recorded.of_checkpoint(Path(saved), whole)
        assert recorded.are_equal([next_loss], [losses[recorded.SAVED_AT]])
    rest = run(
        folder, f"{name}_rest", optimizer, words, resume_from_checkpoint=saved, **changes
    )  # fmt: skip
    resumed = recorded.difference(recorded.losses(rest), losses[recorded.SAVED_AT :])
    assert resumed < recorded.RESUMED


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "dpo", "rm"])
def test_other_stages_train(stage: str, folder: Path) -> None:
    """With another rate of matrices the losses are others, so the optimizer is ours."""
    changes: dict[str, Any] = {"stage": stage, "dataset": "rows" if stage == "pt" else "pairs"}
    changes["disable_gradient_checkpointing"] = True  # DDP refuses it in stage rm
    one = run(folder, stage, "muon", [], **changes)
    other = run(folder, f"{stage}_other", "muon", ["spectral.polar_steps=1"], **changes)
    one_losses, other_losses = recorded.losses(one), recorded.losses(other)
    assert one_losses[0] == other_losses[0]
    assert one_losses[-1] != pytest.approx(other_losses[-1], abs=1e-5)


MUON, POET = {"optimizer": "muon"}, {"optimizer": "poet"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "none": ({"spectral": None}, {}, "spectral is None; write {optimizer: muon"),
    "option": (
        {"spectral": {**MUON, "momentun": 0.9}}, {},
        "spectral: unknown option 'momentun'; did you mean 'momentum'",
    ),
    "adapter": (
        {"spectral": POET, "finetuning_type": "lora"}, {},
        "finetuning_type is 'lora', but POET rotates the weights themselves",
    ),
    "reward": ({"spectral": POET, "stage": "rm"}, {}, "stage is 'rm'; with POET spectral runs in"),
    "block": ({"spectral": {**POET, "block": 5}}, {}, "5 does not divide"),
    "muon": ({"spectral": MUON, "use_muon": True}, {}, "use_muon is True beside spectral"),
    "stage": ({"spectral": MUON, "stage": "ppo"}, {}, "stage is 'ppo'; spectral runs in pt, sft"),
    "v1": ({"spectral": MUON}, {"USE_V1": "1"}, "USE_V1 is '1': spectral runs under"),
    "engine": (
        {"spectral": MUON, "deepspeed": {
            **recorded.ENGINES["zero2"], "optimizer": {"type": "SpectralMuon"},
        }}, {},
        "leave out optimizer there, or spectral here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.fast_cases("option")
def test_what_would_have_no_effect_is_refused(case: str, folder: Path) -> None:
    changes, environment, said = REFUSED[case]
    done = launch(folder, case, [], environment, **changes)
    assert done.returncode
    assert said in done.stderr
