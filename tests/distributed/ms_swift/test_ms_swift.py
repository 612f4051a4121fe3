"""``swift sft`` on 2 ranks computes what one process without it does, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("swift")

from tests.support import recorded

COMMAND = "tests.distributed.ms_swift.command"
PLUGIN = recorded.ROOT / "examples/ms_swift_plugin.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and rows."""
    folder = tmp_path_factory.mktemp("ms_swift")
    recorded.write_inputs(folder)
    rows = json.loads((folder / "rows.json").read_text())
    lines = [
        json.dumps({"messages": [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]})
        for row in rows
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(lines))
    for name, config in recorded.ENGINES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def launch(folder: Path, name: str, optimizer: str, optim_args: str, **changes: Any) -> Any:
    settings = {
        "model": folder / "model", "model_type": "llama", "template": "dummy",
        "tuner_type": "full", "dataset": folder / "rows.jsonl", "output_dir": folder / name,
        "add_version": "false", "learning_rate": recorded.LR, "weight_decay": recorded.DECAY,
        "torch_dtype": "float32", "fp16": "false",
        "bf16": "false", "use_cpu": "true", "report_to": "none", "attn_impl": "eager",
        "check_model": "false", "max_length": 128, "dataloader_num_workers": 0,
        "external_plugins": PLUGIN, "optimizer": optimizer, "optim_args": optim_args,
        **recorded.ARGUMENTS, **changes,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return recorded.launch(COMMAND, [str(folder / name), *words])


def run(folder: Path, name: str, optimizer: str, **changes: Any) -> list[list[dict[str, Any]]]:
    """Return each rank's records."""
    optim_args = ",".join(f"{key}={value}" for key, value in recorded.OPTIONS[optimizer].items())
    done = launch(folder, name, f"spectral_{optimizer}", optim_args, **changes)
    return recorded.records_of(folder, name, done)


@pytest.mark.parametrize(("layout", "optimizer"), recorded.cases(["ddp", *recorded.ENGINES]))
@pytest.mark.fast_cases("ddp-muon", "ddp-poet", "zero2-sumo")
def test_ranks_train_as_a_loop_does_and_resume(layout: str, optimizer: str, folder: Path) -> None:
    changes = {"deepspeed": folder / f"{layout}.json"} if layout in recorded.ENGINES else {}
    name = f"{layout}_{optimizer}"
    whole = run(folder, name, optimizer, **changes)
    wrapper = "DeepSpeedEngine" if layout in recorded.ENGINES else "DistributedDataParallel"
    assert recorded.layouts(whole) == {(wrapper, recorded.RANKS)}
    assert recorded.have_other_rows(whole)
    losses = recorded.losses(whole)
    assert len(losses) == recorded.STEPS
    wanted = recorded.by_loop(folder, optimizer, whole)
    assert recorded.are_equal(losses, wanted)
    saved = folder / name / f"checkpoint-{recorded.SAVED_AT}"
    if layout == "ddp":
        next_loss = recorded.of_checkpoint(saved, whole)
        assert recorded.are_equal([next_loss], [losses[recorded.SAVED_AT]])
    rest = run(folder, f"{name}_rest", optimizer, resume_from_checkpoint=saved, **changes)
    resumed = recorded.difference(recorded.losses(rest), losses[recorded.SAVED_AT :])
    assert resumed < recorded.RESUMED


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "option": (
        "spectral_muon", "momentun=0.9", {},
        "Muon has no option 'momentun'; did you mean 'momentum'",
    ),
    "adapter": (
        "spectral_poet", "block=8", {"tuner_type": "lora"},
        "--tuner_type is 'lora', but POET rotates the weights themselves",
    ),
    "block": ("spectral_poet", "block=0", {}, "poet.convert: block is 0"),
    "vit_lr": (
        "spectral_muon", "momentum=0.9", {"vit_lr": 0.1},
        "vit_lr has no effect on --optimizer spectral_muon",
    ),
    "lorap": (
        "spectral_muon", "momentum=0.9", {"tuner_type": "lora", "lorap_lr_ratio": 4},
        "lorap_lr_ratio has no effect on --optimizer spectral_muon",
    ),
    "engine": (
        "spectral_muon", "momentum=0.9",
        {"deepspeed": json.dumps(
            {**recorded.ENGINES["zero2"], "optimizer": {"type": "SpectralMuon"}}
        )},
        "leave out optimizer there, or --optimizer spectral_muon here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.fast_cases("option")
def test_what_would_have_no_effect_is_refused(case: str, folder: Path) -> None:
    optimizer, optim_args, changes, said = REFUSED[case]
    done = launch(folder, case, optimizer, optim_args, **changes)
    assert done.returncode
    assert said in done.stderr


def test_keywords_win_over_the_command_line(folder: Path, tmp_path: Path) -> None:
    """A plugin file of one's own, for options that optim_args cannot say."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from swift.optimizers import optimizers_map\n"
        "from spectral_dist.integrations.ms_swift import callback_of\n"
        "optimizers_map['mine'] = callback_of('muon', scalars=['mlp'], polar_dtype='float32')\n"
    )
    done = launch(folder, "mine", "mine", "scalar_lr=0.003", external_plugins=plugin)
    records = recorded.records_of(folder, "mine", done)
    losses = recorded.losses(records)
    wanted = recorded.by_loop(folder, "muon", records, scalars=["mlp"])
    assert recorded.are_equal(losses, wanted)
    assert losses[-1] != pytest.approx(recorded.by_loop(folder, "muon", records)[-1], abs=1e-4)
