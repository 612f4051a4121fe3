"""Values of another type in what a run is given: an error that names file and setting, in a line.

Every field of the shipped files, in one process: ranks read the same file before they meet.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from spectral_dist.launch import deepspeed_config, llama, megatron_config, torch_config
from spectral_dist.launch.pretrain import app
from spectral_dist.launch.yaml_config import Loader
from tests.launch.jobs import ROOT, Job

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
def test_total_num_steps(job: Job, total: Any) -> None:
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


def test_resume_may_stand_alone(job: Job) -> None:
    """And says which values it takes."""
    for options in (["--resume", "--seed", "-1"], ["--resume=auto", "--seed", "-1"]):
        result = CliRunner().invoke(app, [*job.arguments("a"), "--optimizer", "muon", *options])
        assert "Invalid value for '--seed'" in result.output
    for options in (["--resume=always"], ["--resume", "always"]):
        result = CliRunner().invoke(app, [*job.arguments("a"), *options])
        assert "'always' is not one of" in result.output
