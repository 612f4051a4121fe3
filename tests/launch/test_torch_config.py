"""The YAML of the plain torch engines: what is wrong in it is named, with its file."""

from pathlib import Path

import pytest

from spectral_dist.launch import torch_config

GOOD = """
optimizer: {type: Muon, lr: 1e-2, betas: [0.9, 0.99], scalars: [lm_head], split: {qkv: 3}}
batch: 8
steps: 25
"""


def read(folder: Path, text: str) -> torch_config.TorchConfig:
    path = folder / "x.yaml"
    path.write_text(text)
    return torch_config.read(path)


def test_what_it_says_and_what_it_leaves_open(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert (config.kind, config.options.lr, config.options.betas) == ("Muon", 0.01, (0.9, 0.99))
    assert config.options.momentum == 0.95
    assert config.routing == {"scalars": ["lm_head"], "split": {"qkv": 3}}
    assert (config.batch, config.steps, config.warmup, config.clip) == (8, 25, 2, 1.0)
    assert (config.mesh, config.tensor_parallel) == (torch_config.Mesh(1, -1), 1)
    assert (config.dtype, config.param_dtype, config.monitor_every) == ("float32", None, 0)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", ".001", "0.1e-2", "+1e-3", "10e-4"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, GOOD.replace("1e-2", text)).options.lr == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps: 25", "step: 25", r"unknown key 'step'; did you mean 'steps'\?"),
        ("steps: 25", "", "steps is missing"),
        ("steps: 25", "steps: 0", "steps is 0; it must be a whole number, at least 1"),
        ("batch: 8", "batch: 8.5", "batch is 8.5; it must be a whole number"),
        ("batch: 8", "batch: true", "batch is True; it must be a whole number"),
        ("batch: 8", "batch: 8\nmicro_batch: a", "micro_batch is 'a'"),
        ("batch: 8", "batch: 8\nclip: -1", "clip is -1; it must be a number, at least 0"),
        ("batch: 8", "batch: 8\nwarmup: -1", "warmup is -1"),
        ("batch: 8", "batch: 8\ndtype: float16", "dtype is 'float16'; .* float32 or bfloat16"),
        ("batch: 8", "batch: 8\nparam_dtype: half", "param_dtype is 'half'"),
        ("batch: 8", "batch: 8\nmonitor_every: -1", "monitor_every is -1"),
        ("batch: 8", "batch: 8\ntensor_parallel: 0", "tensor_parallel is 0"),
        ("batch: 8", "batch: 8\nmesh: 2", r"mesh is 2; write {replicate: 1, shard: -1}"),
        ("batch: 8", "batch: 8\nmesh: {shards: 2}", "mesh: unknown key 'shards'; did you mean"),
        ("batch: 8", "batch: 8\nmesh: {shard: 0}", "mesh: shard is 0; .* or -1 for all"),
        ("batch: 8", "batch: 8\nmesh: {replicate: -1}", "mesh: only one of replicate and shard"),
        ("batch: 8", "batch: 8\nbatch: 9", "the key 'batch' is there twice"),
        ("type: Muon", "type: Moun", "optimizer: unknown type 'Moun'; did you mean 'Muon'"),
        ("type: Muon, ", "", "optimizer is .*; write {type: Muon"),
        ("lr: 1e-2", "learning_rate: 1", "optimizer: unknown option 'learning_rate'"),
        ("lr: 1e-2", "lr: '1e-2'", "optimizer: lr is '1e-2'; it must be a number"),
        ("lr: 1e-2", "momentum: 1.0", "optimizer: momentum is 1.0"),
        ("type: Muon", "type: ROOT, quantile: 2", "optimizer: quantile is 2"),
        ("type: Muon", "type: Muon, quantile: 0.9", "optimizer: unknown option 'quantile'"),
        ("type: Muon", "type: AdamW", "optimizer: AdamW has no option 'scalars'"),
        ("batch", "? [", "cannot read the configuration"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=rf"x\.yaml: {said}|{said} .*x\.yaml"):
        read(tmp_path, GOOD.replace(old, new))


def test_nothing_to_watch(tmp_path: Path) -> None:
    text = "optimizer: {type: AdamW, lr: 0.01}\nbatch: 8\nsteps: 9\nmonitor_every: 3"
    with pytest.raises(ValueError, match="monitor_every: there is nothing to watch"):
        read(tmp_path, text)
    for text in ("", "[1]", "a"):
        with pytest.raises(ValueError, match=r"x\.yaml: expected keys and values"):
            read(tmp_path, text)
    with pytest.raises(ValueError, match="cannot read the configuration"):
        torch_config.read(tmp_path / "absent.yaml")
