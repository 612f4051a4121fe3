"""What the factory reads and refuses, what is saved for from_pretrained, and Accelerate alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, TrainingArguments

import spectral_dist
from spectral_dist.integrations.huggingface import SpectralCallback, SpectralFactory
from spectral_dist.integrations.huggingface.section import read
from tests.distributed.huggingface import trainer_runs
from tests.distributed.huggingface.fsdp_on_cpu import fresh
from tests.support import harness
from tests.support.quiet import quiet


def groups_of(optimizer: str, **arguments: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer as TrainingArguments make it, without their parameters."""
    with quiet(), fresh(False):
        args = trainer_runs.arguments("unused", "one", **arguments)
        model = trainer_runs.model_of(optimizer if optimizer == "poet" else "muon")
        ours = SpectralFactory()(model, optimizer=optimizer, args=args)
    return [{k: v for k, v in group.items() if k != "params"} for group in ours.param_groups]


def test_options_come_from_the_training_arguments() -> None:
    given = {"learning_rate": 0.3, "weight_decay": 0.2, "optim_args": "momentum=0.8, polar=jordan"}
    matrices, rest = harness.run(1, groups_of, "muon", **given)[0]
    assert (matrices["lr"], matrices["weight_decay"]) == (0.3, 0.2)
    assert (matrices["momentum"], matrices["polar"]) == (0.8, "jordan")
    assert rest["betas"] == (0.9, 0.95)
    assert rest["eps"] == 1e-8


def test_transformers_defaults_do_not_hide_the_optimizers_own() -> None:
    usual = {"adam_beta2": 0.999, "optim_args": None}
    assert harness.run(1, groups_of, "poet", **usual)[0][0]["eps"] == 1e-6
    assert harness.run(1, groups_of, "muon", **usual)[0][1]["betas"] == (0.9, 0.95)


@dataclass
class OtherDefaults(TrainingArguments):
    """As ms-swift has them."""

    adam_beta2: float = 0.97


def betas_of(**given: Any) -> Any:
    """AdamW's, of arguments that are passed by their place, as Axolotl does."""
    with quiet(), fresh(False):
        args = OtherDefaults(output_dir="unused", use_cpu=True, report_to=[], **given)
        ours = SpectralFactory()(trainer_runs.model_of("muon"), args)
    return ours.param_groups[1]["betas"]


def test_defaults_are_those_of_the_arguments_class() -> None:
    assert harness.run(1, betas_of) == [(0.9, 0.95)]
    assert harness.run(1, betas_of, adam_beta2=0.999) == [(0.9, 0.999)]


def test_a_section_has_options_of_all_kinds() -> None:
    section = {"optimizer": "muon", "momentum": 0.9, "heads": "auto", "scalars": ["q_proj"]}
    assert read(section) == (section, None)
    keywords, rotation = read(
        {"optimizer": "poet", "block": 4, "merge_every": 2, "matrices": ["lm_head"]}
    )
    assert keywords == {"optimizer": "poet", "merge_every": 2}
    assert rotation == {"block": 4, "matrices": ["lm_head"]}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (None, "spectral is None; write {optimizer: muon"),
        ("muon", "spectral is 'muon'; write {optimizer: muon"),
        ({"momentum": 0.9}, "write {optimizer: muon"),
        ({"optimizer": "moun"}, "unknown optimizer 'moun'; did you mean 'muon'"),
        ({"optimizer": "muon", "momentun": 0.9}, "'momentun'; did you mean 'momentum'"),
        ({"optimizer": "muon", "block": 4}, "spectral: unknown option 'block'"),
        ({"optimizer": "muon", "lr": 0.1}, "write learning_rate beside spectral"),
        ({"optimizer": "poet", "block": 0}, "poet.convert: block is 0"),
        ({"optimizer": "poet", "split": {}}, "split has no effect: POET"),
    ],
)
def test_a_wrong_section_is_an_error(section: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        read(section)


@pytest.mark.parametrize(
    ("optimizer", "optim_args", "says"),
    [
        ("moun", None, "unknown optimizer 'moun'.*muon"),
        ("muon", "momentun=0.9", "has no option 'momentun'.*momentum"),
        ("muon", "momentum", "optim_args: 'momentum'; write .name=value."),
        ("muon", "momentum=1.5", "momentum is 1.5"),
    ],
)
def test_errors_name_what_to_write(optimizer: str, optim_args: str | None, says: str) -> None:
    harness.run_refused(1, says, groups_of, optimizer, optim_args=optim_args)


def from_pretrained(folder: str) -> None:
    """What a checkpoint says between two merges is what the model was."""
    with quiet(), fresh(False):
        trainer = trainer_runs.trainer_of(folder, "one", "poet", max_steps=5)  # merges at 4
        trainer.train()
        trainer.save_model(f"{folder}/last")
        model = trainer.model
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/last").double()
        wanted = spectral_dist.poet.export(model)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6, msg=name)
    frozen = model.model.layers[0].mlp.up_proj.weight
    assert (again.model.layers[0].mlp.up_proj.weight - frozen).abs().max() > 1e-4


def test_from_pretrained_of_a_poet_checkpoint_has_the_rotated_weights(tmp_path: Path) -> None:
    harness.run(1, from_pretrained, str(tmp_path))


def without_callback(optimizer: str) -> bool:
    for callback in list(SpectralCallback.instances):
        SpectralCallback.instances.discard(callback)
    with fresh(False):
        Accelerator(cpu=True)
    with quiet():
        ours = SpectralFactory()(trainer_runs.model_of(optimizer), optimizer=optimizer)
    return bool(ours.options.replicate_momentum)


def test_without_a_callback_every_rank_keeps_all() -> None:
    assert harness.run(2, without_callback, "muon") == [True, True]
    said = r"SUMO keeps state at the owners.*callbacks=\[SpectralCallback\(\)\]"
    harness.run_refused(2, said, without_callback, "sumo")


def steps(accelerator: Accelerator, model: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        rows = torch.randint(48, (2, 8), generator=generator)
        accelerator.backward(model(input_ids=rows, labels=rows).loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        with quiet():
            optimizer.step()
        optimizer.zero_grad()


def prepared(layout: str, optimizer: str) -> tuple[Accelerator, Any, Any]:
    plugin = None
    if layout == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
    with fresh(layout == "fsdp"):
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = trainer_runs.model_of(optimizer)
    callback = SpectralCallback()  # the factory asks for one, which only a Trainer would call
    with quiet():
        options = trainer_runs.OPTIONS[optimizer]
        ours = SpectralFactory()(model, optimizer=optimizer, lr=0.02, **options)
        model, wrapped = accelerator.prepare(model, ours)
    del callback
    if layout == "ddp" and optimizer != "poet":
        accelerator.register_save_state_pre_hook(lambda *_: ours.consolidate_state_dict())
    return accelerator, model, wrapped


def accelerated(layout: str, optimizer: str, folder: str) -> None:
    """Saved and loaded by ``save_state`` and ``load_state``: the same weights, bit by bit."""
    accelerator, model, ours = prepared(layout, optimizer)
    trainer_runs.check_layout(layout, model)
    steps(accelerator, model, ours, 0, 3)
    with quiet():
        accelerator.save_state(folder)
    steps(accelerator, model, ours, 3, 6)
    wanted = trainer_runs.weights(model)
    accelerator, model, ours = prepared(layout, optimizer)
    with quiet():
        accelerator.load_state(folder)
    steps(accelerator, model, ours, 3, 6)
    for name, value in trainer_runs.weights(model).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["muon", "sumo", "poet"])
@pytest.mark.fast_cases("sumo-ddp", "sumo-fsdp")
def test_accelerate_saves_and_loads(layout: str, optimizer: str, tmp_path: Path) -> None:
    harness.run(2, accelerated, layout, optimizer, str(tmp_path))
