"""What leaves verl's engine of a model that POET trains is the model without rotations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl")

import spectral_dist
from tests.distributed.verl import engine_runs, poet_runs
from tests.support import harness


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """With a model in it."""
    engine_runs.write_model(tmp_path)
    return str(tmp_path)


def run(function: Any, *args: Any) -> list[Any]:
    return harness.run(engine_runs.RANKS, function, *args, pool="verl")


def plain(folder: str) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


def assert_close(tensors: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("case", poet_runs.CASES)
@pytest.mark.fast_cases("fsdp-")
def test_a_rollout_gets_the_trained_model(case: str, tied: bool, tmp_path: Path) -> None:
    engine_runs.write_model(tmp_path, tied)
    folder = str(tmp_path)
    trained, _ = engine_runs.by_loop(folder, "POET", poet_runs.STEPS)
    exported = spectral_dist.poet.export(trained)
    _, of_loop = engine_runs.by_loop(folder, "POET")
    tokens, _ = engine_runs.batch(99, 0, 0)
    before = plain(folder)(tokens).logits
    after = trained(tokens).logits
    assert (after - before).abs().max() > 0.01
    for (tensors, losses), wanted in zip(run(poet_runs.sent, folder, case), of_loop, strict=True):
        assert_close(tensors, exported)
        model = plain(folder)
        model.load_state_dict(tensors)
        torch.testing.assert_close(model(tokens).logits, after, rtol=1e-5, atol=1e-5)
        assert losses == pytest.approx(wanted, rel=1e-6)  # sending has changed nothing


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True], ids=["stays", "offloaded"])
def test_a_rollout_gets_what_has_changed(offload: bool, folder: str) -> None:
    for held, tensors in run(poet_runs.sent_by_deltas, folder, offload):
        assert held.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(held[name], tensor), name


def test_the_files_of_a_checkpoint_are_the_trained_model(folder: str) -> None:
    run(poet_runs.saved, folder)
    trained, _ = engine_runs.by_loop(folder, "POET", poet_runs.STEPS)
    model = plain(f"{folder}/checkpoint/huggingface")
    assert_close(model.state_dict(), spectral_dist.poet.export(trained))
    _, of_loop = engine_runs.by_loop(folder, "POET")
    for rest, losses in zip(run(poet_runs.resumed_from_files, folder), of_loop, strict=True):
        begin = poet_runs.STEPS * engine_runs.MICRO
        assert rest == pytest.approx(losses[begin:], rel=1e-6)


@pytest.mark.slow
def test_what_would_leave_the_rotations_out_is_refused(folder: str) -> None:
    run(poet_runs.saved, folder)
    arguments = ["merge", "--backend", "fsdp", "--local_dir", f"{folder}/checkpoint"]
    merger = subprocess.run(
        [sys.executable, "-m", "verl.model_merger", *arguments, "--target_dir", f"{folder}/merged"],
        env={**os.environ, "VERL_USE_EXTERNAL_MODULES": "spectral_dist.integrations.verl"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert merger.returncode
    assert "add hf_model to the trainer's checkpoint.save_contents" in merger.stderr
    assert not list(Path(folder).glob("merged/*.safetensors"))


def test_what_is_refused(folder: str) -> None:
    for said in run(poet_runs.errors, folder):
        assert "leave clip_ramp out" in said["ramp"]
        assert "override_optimizer_config has init" in said["init"]
        assert "'blok'; did you mean 'block'" in said["unknown"]
        assert "split has no effect: POET orthogonalizes no matrix" in said["matrix"]
        assert "and 1 like it" in said["blocks"]
        assert "write actor_rollout_ref.model.lora_rank=0" in said["lora"]
        assert "qat.enable is True" in said["quantized"]
        assert "write model_dtype=fp32" in said["dtype"]
        assert "seed is 1 here, but 0 in the checkpoint" in said["seed"]


@pytest.mark.slow
def test_a_reference_model_is_left_alone(folder: str) -> None:
    for tensors in run(poet_runs.reference, folder):
        assert_close(tensors, dict(plain(folder).state_dict()))
