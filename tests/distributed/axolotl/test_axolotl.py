"""``axolotl train`` on 2 ranks computes what one process without it does, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("axolotl")

from tests.support import recorded

EXAMPLE = yaml.safe_load((recorded.ROOT / "examples/axolotl.yaml").read_text())
COMMAND = "tests.distributed.axolotl.command"
QUIET = {"AXOLOTL_DO_NOT_TRACK": "1"}
NAMES = {"per_device_train_batch_size": "micro_batch_size", "lr_scheduler_type": "lr_scheduler"}
ARGUMENTS = {NAMES.get(name, name): value for name, value in recorded.ARGUMENTS.items()}
FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "cpu_ram_efficient_loading": False,
}  # fmt: skip
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("DistributedDataParallel", {}),
    "fsdp2": ("FSDPLlamaForCausalLM", {"fsdp_version": 2, "fsdp_config": FSDP}),
    **{name: ("DeepSpeedEngine", {"deepspeed": json}) for name, json in recorded.ENGINES.items()},
}
"""The class of the trained model, and what YAML asks for it."""


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "rows.json"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"), "dataset_num_proc": 1,
        "sequence_len": 512, "output_dir": str(folder / "unnamed"), "bf16": False, "fp16": False,
        "tf32": False, "attn_implementation": "eager", "special_tokens": {"pad_token": "<pad>"},
        **ARGUMENTS, **EXAMPLE, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and tokenized rows: 2 ranks that tokenize wait for each other for ever."""
    folder = tmp_path_factory.mktemp("axolotl")
    recorded.write_inputs(folder)
    path = folder / "preprocess.yaml"
    path.write_text(yaml.safe_dump(configuration(folder)))
    done = recorded.launch(COMMAND, ["preprocess", str(path)], ranks=0, **QUIET)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


def launch(folder: Path, name: str, optimizer: str, **changes: Any) -> Any:
    for lock in (folder / "prepared").rglob("*.lock"):
        lock.unlink()
    section = {"optimizer": optimizer, **recorded.OPTIONS[optimizer]}
    if optimizer == "muon":
        section = {**EXAMPLE["spectral"], **section}
    settings = configuration(folder, spectral=section, output_dir=str(folder / name), **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    variables = QUIET if "deepspeed" in changes else {**QUIET, "ACCELERATE_USE_CPU": "true"}
    return recorded.launch(COMMAND, ["train", str(path), str(folder / name)], **variables)


def run(folder: Path, name: str, optimizer: str, **changes: Any) -> list[list[dict[str, Any]]]:
    """Return each rank's records."""
    return recorded.records_of(folder, name, launch(folder, name, optimizer, **changes))


@pytest.mark.parametrize(("layout", "optimizer"), recorded.cases(LAYOUTS))
@pytest.mark.fast_cases("ddp-muon", "fsdp2-sumo", "ddp-poet")
def test_ranks_train_as_a_loop_does_and_resume(layout: str, optimizer: str, folder: Path) -> None:
    wrapper, changes = LAYOUTS[layout]
    name = f"{layout}_{optimizer}"
    whole = run(folder, name, optimizer, **changes)
    assert recorded.layouts(whole) == {(wrapper, recorded.RANKS)}
    if not layout.startswith("zero"):  # there accelerate knows of one process on CPUs
        assert recorded.have_other_rows(whole)
    losses = recorded.losses(whole)
    assert len(losses) == recorded.STEPS
    wanted = recorded.by_loop(folder, optimizer, whole)
    assert recorded.are_equal(losses, wanted)
    saved = str(folder / name / f"checkpoint-{recorded.SAVED_AT}")
    if layout == "ddp":
        next_loss = recorded.of_checkpoint(Path(saved), whole)
        assert recorded.are_equal([next_loss], [losses[recorded.SAVED_AT]])
    rest = run(folder, f"{name}_rest", optimizer, resume_from_checkpoint=saved, **changes)
    resumed = recorded.difference(recorded.losses(rest), losses[recorded.SAVED_AT :])
    assert resumed < recorded.RESUMED


@pytest.mark.slow
def test_an_optimizer_in_deepspeeds_json_is_refused(folder: Path) -> None:
    config = {**recorded.ENGINES["zero2"], "optimizer": {"type": "SpectralMuon"}}
    done = launch(folder, "engine", "muon", deepspeed=config)
    assert done.returncode
    assert "leave out optimizer there, or spectral here" in done.stderr


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"spectral": None}, "spectral is None; write {optimizer: muon"),
    "name": ({"spectral": {"optimizer": "moun"}}, "unknown optimizer 'moun'; did you mean 'muon'"),
    "option": (
        {"spectral": {"optimizer": "muon", "momentun": 0.9}},
        "unknown option 'momentun'; did you mean 'momentum'",
    ),
    "value": ({"spectral": {"optimizer": "muon", "momentum": 1.5}}, "momentum is 1.5"),
    "rate": ({"spectral": {"optimizer": "muon", "lr": 0.1}}, "write learning_rate beside spectral"),
    "two": (
        {"spectral": {"optimizer": "sumo"}, "optimizer": "muon"},
        "optimizer is 'muon', and spectral names another",
    ),
    "groups": (
        {"spectral": {"optimizer": "muon"}, "embedding_lr": 0.1},
        "embedding_lr has no effect on spectral's optimizer",
    ),
    "relora": ({"spectral": {"optimizer": "muon"}, "relora": True}, "relora resets AdamW's state"),
    "adapter": (
        {"spectral": {"optimizer": "poet"}, "adapter": "lora", "lora_target_linear": True},
        "adapter is 'lora', but POET rotates the weights",
    ),
    "heads": (
        {"spectral": {"optimizer": "poet", "heads": "auto"}},
        "heads has no effect: POET orthogonalizes no matrix",
    ),
}


def test_a_wrong_yaml_is_an_error_before_there_is_a_model(tmp_path: Path) -> None:
    right = {"optimizer": "muon", "momentum": 0.9, "heads": "auto", "split": {"qkv_proj": 1}}
    configs = {name: configuration(tmp_path, **changes) for name, (changes, _) in CASES.items()}
    configs["right"] = configuration(tmp_path, spectral=right)
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(configs))
    done = recorded.launch(COMMAND, ["check", str(path)], ranks=0, **QUIET)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    said = json.loads((tmp_path / "configs.json.said").read_text())
    assert said.pop("right") == right
    for name, text in said.items():
        assert CASES[name][1] in text, name
