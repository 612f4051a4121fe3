"""A few steps of an engine; called through the harness."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from transformers import LlamaConfig

from spectral_dist.launch import checkpoints, torch_config
from spectral_dist.launch.batches import rank_micro_batches
from spectral_dist.launch.engines.base import Engine
from spectral_dist.launch.engines.torch import TorchEngine
from spectral_dist.launch.ranks import Ranks
from tests.launch.jobs import MODEL

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Muon": {"type": "Muon", "lr": 0.01},
    "PolarGrad": {"type": "PolarGrad", "lr": 0.3, "scalar_lr": 0.01},
    "ROOT": {"type": "ROOT", "lr": 0.01},
    "SUMO": {"type": "SUMO", "lr": 0.01, "rank": 0.5, "period": 5},
    "AdamW": {"type": "AdamW", "lr": 0.01},
}


def write(folder: Path, optimizer: dict[str, Any], name: str = "a", **keys: Any) -> Path:
    """A YAML for twelve steps of eight rows."""
    path = folder / f"{name}.yaml"
    said = {"optimizer": optimizer, "batch": 8, "micro_batch": 2, "steps": 12, "warmup": 2, **keys}
    path.write_text(yaml.safe_dump(said))
    return path


def rows_of(step: int) -> torch.Tensor:
    """The global batch: each row counts on from where it starts."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(64, (8, 1), generator=generator)
    return (starts + torch.arange(17)) % 64


def losses(
    path: Path,
    sharded: bool,
    steps: tuple[int, int] = (0, 12),
    load: Path | None = None,
    save: Path | None = None,
    model: dict[str, Any] = MODEL,
) -> tuple[list[float], dict[str, Any]]:
    """The global loss of each step, and numbers about this rank's engine."""
    here = this_rank()
    config = torch_config.read(path)
    engine = TorchEngine(config, LlamaConfig.from_dict(model), 0, here, sharded=sharded)
    return train(engine, here, steps, load, save)


def this_rank() -> Ranks:
    """In a rank of the harness."""
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def train(
    engine: Engine, here: Ranks, steps: tuple[int, int], load: Path | None, save: Path | None
) -> tuple[list[float], dict[str, Any]]:
    """As the trainer does it, without its reports."""
    watched: list[int] = []
    engine.watch(lambda step, report: watched.append(step))
    run = engine.identity()
    if load is not None:
        checkpoint, notes = checkpoints.find(load)
        assert checkpoint is not None
        assert (checkpoint.run["step"], notes) == (steps[0], [])
        checkpoints.load(engine, here, checkpoint, run)
    found = []
    for step in range(*steps):
        parts = rank_micro_batches(rows_of(step), engine.micro, engine.data_rank, engine.data_ranks)
        mine = [engine.backward(part, last=part is parts[-1]) for part in parts]
        engine.step()
        found.append(here.total([float(sum(mine))])[0] / (len(mine) * here.world))
    if save is not None:
        checkpoints.save(engine, here, save, {"step": steps[1], **run})
    kept = {"bytes": engine.state_bytes(), "calls": engine.polar_calls(), "lr": engine.lr}
    kept |= {"watched": watched, "parameters": engine.num_parameters}
    return found, {**kept, "dtypes": {str(p.dtype) for p in engine.model.parameters()}}
