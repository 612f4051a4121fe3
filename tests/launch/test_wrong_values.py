"""Values of another type in what a run is given: an error that names file and setting, in a line.

Every field of the shipped files, in one process: ranks read the same file before they meet.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from spectral_dist.launch import deepspeed_config, llama, megatron_config, torch_config
from spectral_dist.launch.pretrain import app
from spectral_dist.launch.yaml_config import Loader
from tests.faults.forked_ranks import ForkedRanks
from tests.launch.jobs import ROOT, LaunchedJob
from tests.launch.torch_runs import write

VALUES = (5, -1, 0, True, None, "x", [], {}, 1.5, float("nan"), [1], {"a": 1}, {5: 1})


def paths(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(content, dict):
        for name, inner in content.items():
            yield from paths(inner, (*path, name))


def changed(content: Any, path: tuple[str, ...], value: Any) -> Any:
    result = inner = copy.deepcopy(content)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return result


def kind(value: Any) -> str:
    """Numbers pass for each other: an lr may be 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__
    return "number"


def wrong_ones(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path in paths(content):
        inner = content
        for name in path:
            inner = inner[name]
        for value in VALUES:
            if kind(value) != kind(inner) and not (isinstance(inner, dict) and value == {}):
                yield path, value


def check(read: Any, file: Path, content: Any, dump: Any, null: set[str]) -> None:
    """Each wrong one is a ValueError of one line with names of field and file; some may be null."""
    count = 0
    for path, value in wrong_ones(content):
        name = ".".join(path)
        if value is None and path[-1] in null:
            continue
        file.write_text(dump(changed(content, path, value)))
        try:
            read(file)
        except ValueError as error:
            said = str(error)
            assert path[-1] in said, (name, value, said)
            assert file.name in said, (name, value, said)
            assert "\n" not in said, (name, value, said)
        else:
            raise AssertionError(f"{name} = {value!r} was taken")
        count += 1
    assert count > 50


def json_of(content: Any) -> str:
    return json.dumps(content)


@pytest.mark.parametrize("name", ["zero2", "zero2_adamw", "zero2_poet", "zero2_root", "zero2_sumo"])
def test_deepspeed_json(tmp_path: Path, name: str) -> None:
    content = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
    check(deepspeed_config.read, tmp_path / "x.json", content, json_of, {"scalar_lr"})


@pytest.mark.parametrize("name", ["muon", "adamw", "poet", "sumo", "hsdp"])
def test_torch_yaml(tmp_path: Path, name: str) -> None:
    content = yaml.load((ROOT / f"configs/torch/{name}.yaml").read_text(), Loader)
    check(torch_config.read, tmp_path / "x.yaml", content, yaml.safe_dump, {"scalar_lr"})


def test_megatron_yaml(tmp_path: Path) -> None:
    content = yaml.load((ROOT / "configs/megatron/llama_8b.yaml").read_text(), Loader)
    check(megatron_config.read, tmp_path / "x.yaml", content, yaml.safe_dump, {"scalar_lr"})


def test_model_json(tmp_path: Path) -> None:
    content = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    content["pad_token_id"] = 0
    del content["eos_token_id"]  # which may be a list
    check(
        llama.load_config, tmp_path / "x.json", content, json_of, {"bos_token_id", "pad_token_id"}
    )
    for name, value in (("hidden_act", "selu2"), ("num_key_value_heads", 4), ("eos_token_id", [])):
        (tmp_path / "x.json").write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=r"x\.json: "):
            llama.load_config(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({**content, "eos_token_id": [1, 2]}))
    assert llama.load_config(tmp_path / "x.json").eos_token_id == [1, 2]


@pytest.mark.parametrize("text", ["", "5", "[]", "{", "\x00", '{"optimizer": {}}', "[" * 100000])
def test_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    for read in (deepspeed_config.read, llama.load_config):
        with pytest.raises(ValueError, match=r"x\.json"):
            read(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    for read in (deepspeed_config.read, llama.load_config, torch_config.read):
        with pytest.raises(ValueError, match=r"x\.json"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize("total", [0, -5, True, "7", 1.5, None])
def test_total_num_steps(job: LaunchedJob, total: Any) -> None:
    path = job.config("wrong", 1, {"type": "SpectralMuon", "params": {"lr": 0.01}})
    content = changed(
        json.loads(path.read_text()), ("scheduler", "params", "total_num_steps"), total
    )
    path.write_text(json.dumps(content))
    result = CliRunner().invoke(app, [*job.arguments("a"), "--config", str(path)])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(
        f"pretrain: error: {path}: scheduler.params.total_num_steps is {total!r}"
    )
    assert not (job.folder / "a").exists()


def test_resume_may_stand_alone(job: LaunchedJob) -> None:
    """And says which values it takes."""
    for options in (["--resume", "--seed", "-1"], ["--resume=auto", "--seed", "-1"]):
        result = CliRunner().invoke(app, [*job.arguments("a"), "--optimizer", "muon", *options])
        assert "Invalid value for '--seed'" in result.output
    for options in (["--resume=always"], ["--resume", "always"]):
        result = CliRunner().invoke(app, [*job.arguments("a"), *options])
        assert "'always' is not one of" in result.output


# What fuzzed configurations have shown (tests/faults/test_config_fuzz.py)

MUON = {"type": "SpectralMuon", "params": {"lr": 0.01}}


def said(read: Any, file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(file.name)) as caught:
        read(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_hidden_layer", "num_hidden_layers"),
        ("TIE_WORD_EMBEDDINGS", "tie_word_embeddings"),
        ("rms-norm_eps", "rms_norm_eps"),
        ("rope_thta", "rope_theta"),
        ("torch_dtyp", "torch_dtype"),
    ],
)
def test_a_slip_in_a_field_of_a_model(tmp_path: Path, name: str, meant: str) -> None:
    """Which transformers would keep beside the default of the field that is meant."""
    content = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    for model in (content, {k: v for k, v in content.items() if k != meant}):
        text = json.dumps({**model, name: 1})
        assert f"unknown field {name!r}; did you mean {meant!r}?" in said(
            llama.load_config, tmp_path / "x.json", text
        )


def test_fields_of_models_that_others_have_published(tmp_path: Path) -> None:
    content = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    content |= {"pretraining_tp": 1, "transformers_version": "4.40.0", "rope_scaling": None}
    content |= {"torch_dtype": "bfloat16", "use_cache": True, "_name_or_path": "x", "note": "y"}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert llama.load_config(tmp_path / "x.json").hidden_size == content["hidden_size"]


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    model = '{"model_type": "llama", "vocab_size": 320, "vocab_size": 640}'
    config = '{"optimizer": {"type": "AdamW", "params": {"lr": 1, "lr": 2}}}'
    yaml_text = "optimizer: {type: Muon, lr: 1, lr: 2}\nbatch: 8\nsteps: 8\n"
    for read, name, text, key in (
        (llama.load_config, "x.json", model, "vocab_size"),
        (deepspeed_config.load, "x.json", config, "lr"),
        (torch_config.read, "x.yaml", yaml_text, "lr"),
    ):
        assert f"the key {key!r} is there twice" in said(read, tmp_path / name, text)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [-float("inf"), 2, "linear", [], True])
def test_rotations_of_a_model(tmp_path: Path, name: str, value: Any) -> None:
    content = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    text = json.dumps({**content, name: value})
    said_of = said(llama.load_config, tmp_path / "x.json", text)
    assert f"{name} is {value!r}; it must be an object, or null" in said_of


@pytest.mark.parametrize("value", [2, -1, "x", float("nan"), True, None])
def test_dropouts_of_a_model(tmp_path: Path, value: Any) -> None:
    content = json.loads((ROOT / "configs/models/quickstart.json").read_text())
    text = json.dumps({**content, "attention_dropout": value})
    said_of = said(llama.load_config, tmp_path / "x.json", text)
    assert f"attention_dropout is {value!r}; it must be a number from 0 to 1" in said_of


@pytest.mark.parametrize("folder", ["optimizer", "scheduler"])
@pytest.mark.parametrize("name", ["lr", "parms", "Type"])
def test_what_deepspeed_does_not_read(tmp_path: Path, folder: str, name: str) -> None:
    content = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    content[folder][name] = 1
    text = said(deepspeed_config.read, tmp_path / "x.json", json.dumps(content))
    assert f"{folder}: unknown key {name!r}" in text


def test_whole_numbers_that_no_tensor_holds(tmp_path: Path) -> None:
    """Are numbers where numbers are asked for, and no whole ones where those are."""
    huge = "1" + "0" * 30
    for optimizer in ("AdamW", "Muon"):
        text = f"optimizer: {{type: {optimizer}, eps: {huge}}}\nbatch: 8\nsteps: 8\nclip: {huge}\n"
        (tmp_path / "x.yaml").write_text(text)
        config = torch_config.read(tmp_path / "x.yaml")
        assert [type(config.options.eps), type(config.clip)] == [float, float]
        assert config.options.eps == config.clip == 1e30
    for value in (huge, f"-{huge}", "1" * 5000):
        text = f"optimizer: {{type: Muon}}\nbatch: {value}\nsteps: 8\n"
        assert "batch is" in said(torch_config.read, tmp_path / "x.yaml", text)
        content = f'{{"optimizer": {{"type": "AdamW"}}, "train_batch_size": {value}}}'
        assert "train_batch_size is" in said(deepspeed_config.read, tmp_path / "x.json", content)
    (tmp_path / "x.json").write_text(
        f'{{"optimizer": {{"type": "AdamW", "params": {{"eps": {huge}}}}}}}'
    )
    eps = deepspeed_config.read(tmp_path / "x.json")["optimizer"]["params"]["eps"]
    assert (type(eps), eps) == (float, 1e30)


@pytest.mark.parametrize(
    ("batch", "micro", "accumulated", "ranks", "must_be"),
    [
        (8, None, None, 2, None),
        (8, 2, None, 2, None),
        (8, None, 2, 2, None),
        (8, 2, 2, 2, None),
        (None, 2, 2, 2, None),
        (7, None, None, 2, "a multiple of 2"),
        (8, 3, None, 2, "a multiple of 6"),
        (8, None, 3, 1, "a multiple of 3"),
        (8, 2, 1, 2, "4"),
        (4, 2, 2, 2, "8"),
    ],
)
def test_batches_that_cannot_be_divided(
    batch: int, micro: int, accumulated: int, ranks: int, must_be: str | None
) -> None:
    given = dict(zip(deepspeed_config.BATCH, (batch, micro, accumulated), strict=True))
    content = {name: value for name, value in given.items() if value}
    if must_be is None:
        deepspeed_config.check_batch(Path("x.json"), content, ranks)
        return
    with pytest.raises(ValueError, match=rf"x\.json: train_batch_size is .* {must_be}$") as caught:
        deepspeed_config.check_batch(Path("x.json"), content, ranks)
    assert all(name in str(caught.value) for name in deepspeed_config.BATCH)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--grace", value) for value in ("nan", "inf", "1e400")),
        *(("--save-minutes", value) for value in ("nan", "inf")),
        ("--seed", str(2**32)),
    ],
)
def test_numbers_of_the_command_line(job: LaunchedJob, option: str, value: str) -> None:
    result = CliRunner().invoke(app, [*job.arguments("a"), "--optimizer", "muon", option, value])
    assert result.exit_code == 2
    assert option in result.output
    assert "Traceback" not in result.output
    assert not (job.folder / "a").exists()


@pytest.mark.parametrize("option", ["--model", "--config", "--data", "--out"])
def test_an_empty_path_is_not_this_folder(job: LaunchedJob, option: str) -> None:
    config = job.config("muon", 1, MUON)
    for given in ([option, ""], [f"{option}="]):
        arguments = [*job.arguments("a"), "--config", str(config), *given]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert f"{option} is empty" in result.output


@pytest.mark.slow
def test_what_deepspeed_says_of_settings(job: LaunchedJob) -> None:
    """A slip of one that it has is an error, another is told; its errors name what they can."""
    path = job.config("muon", 1, MUON)
    content = json.loads(path.read_text())
    changes: dict[str, Any] = {
        "!gradient_cliping": 1.0,
        "!zero-optimization": {"stage": 1},
        "!wall_clock_breakdown": [1],
        "!checkpoint": -1,
        "stage": 2,
    }
    printed_by_run = []
    with ForkedRanks(job) as ranks:
        for number, (name, value) in enumerate(changes.items()):
            path = job.folder / f"{number}.json"
            path.write_text(json.dumps({**content, name.lstrip("!"): value}))
            options = [*job.arguments(str(number)), "--config", str(path), "--stop-at", "1"]
            (ending,) = ranks.run(1, options, 120, job.folder)
            assert ending.status == (2 if name.startswith("!") else 0), ending.printed
            printed_by_run.append(ending.printed)
    slip, other_slip, flag, section, told = printed_by_run
    assert "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?" in slip
    assert "unknown key 'zero-optimization'; did you mean 'zero_optimization'?" in other_slip
    for printed, name in ((flag, "'wall_clock_breakdown': [1]"), (section, "'checkpoint': -1")):
        (line,) = [line for line in printed.splitlines() if line.startswith("pretrain: error")]
        assert f"the last setting that it has read is {name}" in line
    assert "4.json: DeepSpeed has no setting 'stage': ignored" in told


def test_training_that_diverges_is_one_line(job: LaunchedJob) -> None:
    configs = {"adamw": {"type": "AdamW", "lr": 1e30}, "muon": {"type": "Muon", "lr": 1e30}}
    runs = []
    for name, optimizer in configs.items():
        path = write(job.folder, optimizer, name, clip=0, warmup=0)
        runs.append([f"!{name}", "--engine", "ddp", "--config", str(path)])
    for printed in job.in_turn(*runs):
        (line,) = [line for line in printed.splitlines() if line.startswith("pretrain: error")]
        assert "lr" in line
        assert "Traceback" not in printed
