"""Adapters of PEFT train under transformers' Trainer as in a loop of our own, and are saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

import spectral_dist
from spectral_dist.params.classify import classify
from tests.distributed.huggingface import peft_runs, trainer_runs
from tests.support import harness

LAYOUTS = {"one": 1, "ddp": 2, "fsdp": 2, "fsdp_full": 2}


def run(world: int, function: Any, *args: Any) -> dict[str, Any]:
    result: dict[str, Any] = harness.run(world, function, *args, pool="peft")[0]
    return result


def close(got: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=bound)


@pytest.mark.parametrize("optimizer", ["muon", "sumo", "normuon"])
@pytest.mark.parametrize("kind", peft_runs.KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("one-saved-muon", "ddp-dora-sumo", "fsdp-lora-muon", "fsdp-embedding-sumo")
def test_the_trainer_does_what_a_loop_does(
    layout: str, kind: str, optimizer: str, tmp_path: Path
) -> None:
    world, args = LAYOUTS[layout], (str(tmp_path), layout, kind, optimizer)
    whole = run(world, peft_runs.by_trainer, *args)
    wanted = peft_runs.by_loop(world, kind, optimizer)
    close(whole["weights"], wanted["weights"], 1e-6)
    torch.testing.assert_close(whole["losses"], wanted["losses"], rtol=0, atol=2e-6)
    rest = run(world, peft_runs.resumed, *args)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    close(rest["weights"], whole["weights"], 0.0)
    if layout != "fsdp":  # whose checkpoints have shards in place of adapters' files
        last = tmp_path / f"checkpoint-{trainer_runs.STEPS}"
        assert (last / "adapter_model.safetensors").exists()
        adapters = peft_runs.saved_adapters(last)
        trained = peft_runs.model_of(kind)
        trained.load_state_dict(whole["weights"])
        close(adapters, peft_runs.adapters_of(trained), 1e-7)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("by", ["json", "factory"])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.fast_cases("3-factory-lora")
def test_under_deepspeed(stage: int, by: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    args = (str(tmp_path), stage, by == "json", kind)
    whole = run(2, peft_runs.by_deepspeed, *args)
    wanted = trainer_runs.by_loop(2, "muon", peft_runs.model_of(kind).float())
    torch.testing.assert_close(whole["losses"], wanted["losses"], rtol=0, atol=2e-6)
    for name, value in whole["weights"].items():
        torch.testing.assert_close(value, wanted["weights"][name], rtol=0, atol=1e-6)
    rest = run(2, peft_runs.by_deepspeed, *args, True)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    close(rest["weights"], whole["weights"], 0.0)


def kinds_of(kind: str) -> dict[str, str]:
    """The kinds of what is trained, without the model's own part of names."""
    specs = [s for s in classify(peft_runs.model_of(kind)) if s.kind != "frozen"]
    return {
        s.name.removeprefix("base_model.model."): s.kind for s in specs if "layers.1" not in s.name
    }


def test_adapters_of_linear_layers_are_matrices_and_the_rest_is_not() -> None:
    layer = "model.layers.0.self_attn.q_proj"
    up = "model.layers.0.mlp.up_proj"
    factors = {
        f"{where}.lora_{which}.default.weight": "matrix"
        for where in (layer, up) for which in "AB"
    }  # fmt: skip
    assert kinds_of("lora") == factors
    magnitudes = {
        f"{where}.lora_magnitude_vector.default.weight": "scalar" for where in (layer, up)
    }
    assert kinds_of("dora") == {**factors, **magnitudes}
    of_embedding = {
        f"model.embed_tokens.lora_embedding_{which}.default": "scalar" for which in "AB"
    }
    q_only = {name: kind for name, kind in factors.items() if layer in name}
    assert kinds_of("embedding") == {**of_embedding, **q_only}
    v = "model.layers.0.self_attn.v_proj"
    assert kinds_of("saved") == {
        f"{v}.lora_A.default.weight": "matrix", f"{v}.lora_B.default.weight": "matrix",
        "lm_head.modules_to_save.default.weight": "scalar",
        "model.norm.modules_to_save.default.weight": "scalar",
        **{
            f"model.layers.0.{norm}_layernorm.modules_to_save.default.weight": "scalar"
            for norm in ("input", "post_attention")
        },
    }  # fmt: skip


def test_sumos_rank_above_loras_is_loras_with_a_warning() -> None:
    def trained(rank: int | float) -> dict[str, torch.Tensor]:
        model = peft_runs.model_of("lora")
        groups = spectral_dist.param_groups(model)
        optimizer = spectral_dist.SUMO(groups, lr=0.02, rank=rank, period=2)
        rows = torch.tensor([row["input_ids"] for row in trainer_runs.data(1)[:4]])
        for _ in range(4):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters()}

    with pytest.warns(UserWarning, match="SUMO with rank 8 has no smaller subspace in 8 of 8"):
        above = trained(8)
    with pytest.warns(UserWarning, match="has no smaller subspace in 8 of 8"):
        equal = trained(peft_runs.RANK)
    close(above, equal, 0.0)
    assert all(value.isfinite().all() for value in above.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        below = trained(2)
    assert any((below[name] - value).abs().max() > 1e-3 for name, value in above.items())
