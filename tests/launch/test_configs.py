"""The shipped configurations say what they are named after."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from spectral_dist.launch import llama

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "quickstart": 4_229_568,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
}


def test_every_model_is_listed() -> None:
    assert {path.stem for path in (ROOT / "configs/models").iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_stated_size(name: str) -> None:
    config = llama.load_config(ROOT / f"configs/models/{name}.json")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("stage", range(4))
def test_twins_differ_in_the_optimizer_only(stage: int) -> None:
    ours, adamw = (
        json.loads((ROOT / f"configs/deepspeed/zero{stage}{twin}.json").read_text())
        for twin in ("", "_adamw")
    )
    first, second = ours.pop("optimizer"), adamw.pop("optimizer")
    assert ours == adamw
    assert ours["zero_optimization"]["stage"] == stage
    assert (first["type"], second["type"]) == ("SpectralMuon", "AdamW")
    for shared in ("betas", "eps", "weight_decay"):
        assert first["params"][shared] == second["params"][shared]
    assert second["params"]["torch_adam"] is True  # else a C++ build of minutes


def test_stages_differ_in_the_stage_only() -> None:
    found = [json.loads(p.read_text()) for p in (ROOT / "configs/deepspeed").glob("zero?.json")]
    assert sorted(config.pop("zero_optimization")["stage"] for config in found) == [0, 1, 2, 3]
    assert all(config == found[0] for config in found)


def test_no_file_in_launch_hides_a_module() -> None:
    # launch/ comes first on sys.path when a file in it is run as a script.
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    mine = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert mine
    assert not mine & taken


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
