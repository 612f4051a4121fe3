"""The shipped configurations say what they are named after."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from spectral_dist import poet
from spectral_dist.launch import llama, megatron_config, torch_config
from spectral_dist.launch.torch_config import optimizers
from spectral_dist.rules.options import MatrixOptions

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "quickstart": 4_229_568,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_3b": 2_764_474_880,
    "tiny": 631_424,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "llama_405b": 405_853_388_800,
    "deepseek_v3": 671_026_404_352,
}


def test_models_have_the_stated_size() -> None:
    numbers = {}
    for path in (ROOT / "configs/models").iterdir():
        numbers[path.stem] = sum(p.numel() for p in llama.build_empty(path).parameters())
    assert numbers == PARAMETERS


TYPES = {
    "": "SpectralMuon",
    "adamw": "AdamW",
    "polargrad": "SpectralPolarGrad",
    "root": "SpectralROOT",
    "sumo": "SpectralSUMO",
    "poet": "SpectralPOET",
}
"""zeroSTAGE_NAME.json -> type"""


def test_every_json_is_zero2_but_for_what_it_is_named_after() -> None:
    files = {p.stem: json.loads(p.read_text()) for p in (ROOT / "configs/deepspeed").iterdir()}
    stages = {f"zero{stage}{twin}" for stage in range(4) for twin in ("", "_adamw")}
    assert set(files) == stages | {f"zero2_{name}" for name in TYPES if name}
    muon = files["zero2"]["optimizer"]
    for file, config in files.items():
        stage, _, name = file.removeprefix("zero").partition("_")
        optimizer = config["optimizer"]
        changed = {"optimizer": optimizer, "zero_optimization": {"stage": int(stage)}}
        assert config == files["zero2"] | changed, file
        assert optimizer["type"] == TYPES[name], file
        if name == "":
            assert optimizer == muon, file
        if name == "adamw":
            for shared in ("betas", "eps", "weight_decay"):
                assert optimizer["params"][shared] == muon["params"][shared], (file, shared)
            assert optimizer["params"]["torch_adam"] is True, file  # else a C++ build of minutes


TORCH = {
    "muon": "Muon",
    "polargrad": "PolarGrad",
    "root": "ROOT",
    "sumo": "SUMO",
    "adamw": "AdamW",
    "poet": "POET",
    "hsdp": "Muon",
    "tp_fsdp": "Muon",
}


def test_every_yaml_says_the_same_but_for_what_it_is_named_after() -> None:
    assert {path.stem for path in (ROOT / "configs/torch").iterdir()} == set(TORCH)
    jsons = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    for name, kind in TORCH.items():
        config = torch_config.read(ROOT / f"configs/torch/{name}.yaml")
        config.check_engine("fsdp")
        assert config.kind == kind
        assert (config.batch, config.clip) == (jsons["train_batch_size"], 1.0)
        schedule = jsons["scheduler"]["params"]
        assert config.steps == schedule["total_num_steps"]
        assert config.warmup == schedule["warmup_num_steps"]
        if kind == "POET":
            _rotates_the_quickstart(config)
        twin = "" if kind == "Muon" else f"_{kind.lower()}"
        json_file = ROOT / f"configs/deepspeed/zero2{twin}.json"
        params = json.loads(json_file.read_text())["optimizer"]["params"]
        params.pop("torch_adam", None)
        assert {k: params.pop(k) for k in config.rotation} == config.rotation
        where = optimizers().get(kind, MatrixOptions)
        assert config.options == where.from_user(params)
        if name in ("hsdp", "tp_fsdp"):
            with pytest.raises(ValueError, match="only --engine fsdp"):
                config.check_engine("ddp")
        else:
            config.check_engine("ddp")


def _rotates_the_quickstart(config: torch_config.TorchConfig) -> None:
    """Blocks divide its dimensions, and merges happen."""
    assert config.options.merge_every <= config.steps // 2
    with torch.device("meta"):
        model = LlamaForCausalLM(llama.load_config(ROOT / "configs/models/quickstart.json"))
    poet.convert(model, **config.routing, **config.rotation)


MEGATRON = {
    "tiny_muon": "tiny",
    "tiny_poet": "tiny",
    "llama_8b": "llama_8b",
    "llama_70b": "llama_70b",
}


def test_every_megatron_yaml_has_a_model_that_it_cuts_evenly() -> None:
    assert {path.stem for path in (ROOT / "configs/megatron").iterdir()} == set(MEGATRON)
    for name, model in MEGATRON.items():
        config = megatron_config.read(ROOT / f"configs/megatron/{name}.yaml")
        config.check_model(llama.load_config(ROOT / f"configs/models/{model}.json"))
        assert config.kind == ("spectral_poet" if name == "tiny_poet" else "spectral_muon")
        assert config.tensor_parallel > 1
        assert config.use_distributed_optimizer
        assert config.warmup < config.steps
    eight = megatron_config.read(ROOT / "configs/megatron/llama_8b.yaml")
    assert eight.micro_batch_size(4) == 1  # TP 2 on 8 GPUs


def test_initial_weights_depend_on_seed_and_name() -> None:
    config = llama.load_config(ROOT / "configs/models/quickstart.json")
    config.num_hidden_layers = 2
    first, again, other = (llama.build(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.045, rel=0.02)
    assert not torch.equal(first[name], first[name.replace(".1.", ".0.")])
    assert torch.equal(first["model.norm.weight"], torch.ones(config.hidden_size))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="expected a LlamaConfig"):
        llama.load_config(tmp_path / "m.json")
    with pytest.raises(ValueError, match="cannot read the model"):
        llama.load_config(tmp_path / "absent.json")
