"""A few steps of --engine megatron; called through the harness, in a pool of megatron-core's."""

import argparse
import typing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typing_extensions
from transformers import LlamaConfig

from spectral_dist.launch import llama, megatron_config
from tests.launch.jobs import MODEL
from tests.launch.torch_runs import this_rank, train
from tests.support import megatron_cpu

VERSION = megatron_cpu.VERSIONS[0]
GROUPED = {**MODEL, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0}
TIED = {**GROUPED, "tie_word_embeddings": True}


def engine(path: Path, model: dict[str, Any]) -> Any:
    megatron_cpu.install(VERSION)
    from megatron.core import parallel_state

    from spectral_dist.launch.engines.megatron import MegatronEngine

    if parallel_state.model_parallel_is_initialized():  # by another test
        parallel_state.destroy_model_parallel()
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    config = megatron_config.read(path)
    return MegatronEngine(config, LlamaConfig.from_dict(model), 0, this_rank())


def losses(
    path: Path,
    model: dict[str, Any] = GROUPED,
    steps: tuple[int, int] = (0, 12),
    load: Path | None = None,
    save: Path | None = None,
) -> tuple[list[float], dict[str, Any]]:
    """The global loss of each step, and numbers about this rank's engine."""
    return train(engine(path, model), this_rank(), steps, load, save)


def compared(path: Path, model: dict[str, Any]) -> tuple[float, float]:
    """How far logits and losses are from those of transformers, for a length that TP cannot cut."""
    theirs: Any = llama.build(LlamaConfig.from_dict(model), 0)
    mine = engine(path, model)
    rows = torch.arange(16).view(2, 8) * 3 % 64
    with torch.no_grad():
        logits = theirs(input_ids=rows[:, :-1]).logits
        nats = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)
        found = mine.logits(rows[:, :-1]), mine.losses(rows)
    assert [f.shape for f in found] == [logits.shape, nats.shape]
    return float((found[0] - logits).abs().max()), float((found[1] - nats).abs().max())


def parsed(flags: list[str]) -> dict[str, Any]:
    """What Megatron's own parser, with our flags, makes of those of a script."""
    vars(typing).setdefault("override", typing_extensions.override)  # 0.19.2 wants Python 3.12
    megatron_cpu.install(VERSION)
    from megatron.training.arguments import add_megatron_arguments

    from spectral_dist.integrations.megatron import add_spectral_args

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    found = vars(add_spectral_args(add_megatron_arguments(parser)).parse_args(flags))
    add_spectral_args(argparse.ArgumentParser())  # forgets them, for other tests in this process
    return {k: v for k, v in found.items() if isinstance(v, str | int | float | list | None)}
