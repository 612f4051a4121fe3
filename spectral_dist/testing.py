"""Checks for whoever writes a rule or a placement: public, and used by this project's own tests.

    from spectral_dist.testing import check_rule
    check_rule(MyRule, {"temperature": 2.0})

``check_rule`` starts processes on this machine (gloo, CPU), so call it below
``if __name__ == "__main__"`` or in a test. Call ``check_placement`` on every rank of your job.
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from spectral_dist import checkpoint
from spectral_dist._error_help import explained
from spectral_dist.core.check_placement import check_placement
from spectral_dist.core.named import class_of
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.params.param_groups import param_groups
from spectral_dist.params.spec import ParamSpec
from spectral_dist.placement.base import ParamGroup, ReplicatedPlacement
from spectral_dist.rules import registry
from spectral_dist.rules.base import Rule
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import BaseOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.layout import Cut, Located, flat_layout

__all__ = ["LAYOUTS", "FlatPlacement", "check_placement", "check_rule"]

LAYOUTS = ("ddp", "fsdp", "tp_rows", "tp_columns", "flat")
"""The ways in which ``check_rule`` shards a model: replicas, FSDP2, tiles of rows and of columns,
and runs that begin in the middle of rows, as ZeRO has them."""
SHAPES = {"wide": (8, 20), "tall": (24, 8), "square": (12, 12), "other": (8, 20)}
STEPS, SAVED_AFTER = 4, 2


class CheckedModel(nn.Module):
    """The model that ``check_rule`` trains: matrices of several shapes, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            layer = nn.Linear(columns, rows, bias=name == "tall", dtype=dtype)
            self.add_module(name, layer)
        for name, p in self.named_parameters():
            p.data.copy_(_values(name, -1, p.shape))


def _values(name: str, step: int, shape: Sequence[int]) -> Tensor:
    """Return float32 numbers that depend on name and step alone."""
    generator = torch.Generator().manual_seed(1000 * (step + 2) + sum(map(ord, name)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).float()


class FlatPlacement(ReplicatedPlacement):
    """Every parameter in even runs of its elements over a group, wherever rows end.

    Parameters are replaced by this rank's runs: what ZeRO does, without DeepSpeed.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(None)
        self.shard_group = group

    def world_groups(self) -> list[Group]:
        """Return the group."""
        return [self.shard_group]

    def check(self, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> None:
        """Do nothing: runs are contiguous."""

    def cut(self, numel: int) -> Cut:
        """Return how a parameter is cut."""
        return Cut.even(
            -(-numel // collectives.size(self.shard_group)), collectives.size(self.shard_group)
        )

    def locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Located]:
        """Return one layout for each matrix."""
        layouts, spans = [], []
        for i, route in enumerate(routes):
            cut = self.cut(math.prod(route.shape))
            layouts += [flat_layout(matrix, cut, tensor=i) for matrix in route.matrices]
            spans.append((route.name, i, 0, tensors[i].numel()))
        indices = tuple(range(len(tensors)))
        device = tensors[0].device
        return [Located(tuple(layouts), self.shard_group, device, tuple(spans), tensors=indices)]


class Trial:
    """A model under one layout with its optimizer, which takes steps on prescribed gradients."""

    def __init__(
        self, cls: type[SpectralOptimizer], options: Mapping[str, Any], layout: str, dtype: str
    ) -> None:
        self.model: nn.Module = CheckedModel(getattr(torch, dtype))
        self.layout = layout
        placement = None
        if layout == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif layout == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model)
        elif layout.startswith("tp"):
            self._tile(0 if layout == "tp_rows" else 1)
        groups = param_groups(self.model)
        if layout == "flat":
            placement = FlatPlacement(dist.group.WORLD)
            for p in self.model.parameters():
                begin, end = placement.cut(p.numel()).run(dist.get_rank())
                p.data = p.data.flatten()[begin : min(end, p.numel())].clone()
        self.placement = placement
        self.optimizer = cls(groups, placement=placement, **options)

    def _tile(self, dimension: int) -> None:
        """Make every matrix a DTensor that the ranks hold in tiles, and all else replicas."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        for module in self.model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                layout = Shard(dimension) if p.ndim == 2 else Replicate()
                setattr(module, name, nn.Parameter(distribute_tensor(p.data, mesh, [layout])))

    def step(self, number: int, scale: float = 1.0) -> None:
        """Take a step on the gradients of this step number, times ``scale``."""
        shapes = {name: p.shape for name, p in CheckedModel().named_parameters()}
        for name, p in self.model.named_parameters():
            bare_name = name.removeprefix("module.")  # DDP adds the prefix
            gradient = (_values(bare_name, number, shapes[bare_name]) * scale).to(p.dtype)
            p.grad = self._sharded(gradient, p)
        self.optimizer.step()

    def _sharded(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        """Return this rank's part of a whole gradient, as its parameter is sharded."""
        if isinstance(parameter, DTensor):
            return distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        if self.placement is not None:
            begin, end = self.placement.cut(gradient.numel()).run(dist.get_rank())
            return gradient.flatten()[begin : min(end, gradient.numel())].clone()
        return gradient

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, unsharded, on every rank."""
        weights = {}
        for name, p in self.model.named_parameters():
            tensor = p.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            bare_name = name.removeprefix("module.")
            if self.placement is not None:
                shape = dict(CheckedModel().named_parameters())[bare_name].shape
                runs: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(runs, tensor)
                tensor = torch.cat(runs).view(shape)
            weights[bare_name] = tensor.clone()
        return weights


def _train(
    cls: type[SpectralOptimizer],
    options: Mapping[str, Any],
    layout: str,
    dtype: str = "float32",
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Return the weights after ``STEPS`` steps under a layout."""
    trial = Trial(cls, options, layout, dtype)
    for number in range(STEPS):
        trial.step(number, scale)
    return trial.weights()


def _rank(rank: int, world: int, port: int, job: dict[str, Any], folder: str) -> None:
    """Run every layout on one of the ranks, and save the weights of rank 0 in ``folder``."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cls, options = class_of(_entry(job["rule"])), job["options"]
    answers: dict[str, dict[str, Tensor]] = {}
    for layout in job["layouts"]:
        for strategy in job["strategies"] if layout.startswith("tp") else ["auto"]:
            answers[f"{layout} {strategy}"] = _train(cls, {**options, "strategy": strategy}, layout)
    for layout in ("ddp", "fsdp"):
        if layout in job["layouts"]:
            trial = Trial(cls, options, layout, "float32")
            for number in range(SAVED_AFTER):
                trial.step(number)
            checkpoint.save(Path(folder, layout), trial.model, trial.optimizer)
    if rank == 0:
        torch.save(answers, Path(folder, "answers.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _entry(rule: type[Rule[Any]]) -> registry.Entry:
    """Return the registered optimizer of a rule.

    Raises:
        ValueError: there is none.
    """
    for entry in registry.entries():
        if entry.rule is rule:
            return entry
    raise ValueError(
        f'{rule.__name__} is not registered; decorate it with @register("{rule.__name__.lower()}")'
    )


@explained
def check_rule(
    rule: type[Rule[Any]],
    options: Mapping[str, Any] | None = None,
    *,
    ranks: int = 2,
    layouts: Sequence[str] = LAYOUTS,
    tolerance: float = 1e-5,
) -> None:
    """Check that a registered rule keeps its contract.

    One process gives the same weights as ``ranks`` processes under every layout, and under 'gram'
    if the rule names a polar factor that allows it; zero gradients move nothing; bfloat16 weights
    follow; saved state continues under another layout; every option refuses a value that is none.

    Args:
        rule: importable by its module and name, as processes of this machine import it.
        options: to check it with, beside its defaults.
        ranks: number of processes, 2 to 4.
        layouts: names out of ``LAYOUTS``.
        tolerance: the largest difference in a weight, over the largest change of one.

    Raises:
        AssertionError: the contract is broken; says how.
        ValueError: the rule is not registered, or its options are bad.
    """
    entry = _entry(rule)
    values = {"lr": 0.02, **(options or {})}
    _check_options(entry, values)
    cls = class_of(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = {name: p.detach().clone() for name, p in CheckedModel().named_parameters()}
        expected = _train(cls, values, "one process")
        change = max(float((expected[name] - start[name]).abs().max()) for name in expected)
        if not change > 0:
            raise AssertionError(f"{entry.title} does not move any weight")
        _check_zero(cls, values, start)
        _check_half(cls, values, expected, change)
        with tempfile.TemporaryDirectory() as folder:
            strategies = ["owner", "gram"] if _works_on_grams(entry, values) else ["owner"]
            job = {"rule": rule, "options": values, "layouts": layouts, "strategies": strategies}
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            mp.spawn(_rank, (ranks, port, job, folder), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]
            bound = tolerance * change
            for setup, weights in torch.load(Path(folder, "answers.pt")).items():
                _assert_near(f"under {setup} on {ranks} ranks", weights, expected, bound)
            for layout in ("ddp", "fsdp"):
                if layout in layouts:
                    resumed = _resume(cls, values, Path(folder, layout))
                    where = f"saved under {layout} and resumed in one process"
                    _assert_near(where, resumed, expected, bound)


def _works_on_grams(entry: registry.Entry, values: Mapping[str, Any]) -> bool:
    """Return whether the rule names polar factors, and takes strategy 'gram'."""
    assert entry.rule is not None
    options: Any = entry.options.from_user(values, entry.title)
    rule = entry.rule()
    prepared = rule.prepare(options, SHAPES)
    if any(rule.polar(prepared, shape) is None for shape in SHAPES.values()):
        return False
    try:
        entry.options.from_user({**values, "strategy": "gram"}, entry.title)
    except ValueError:
        return False
    return True


def _resume(
    cls: type[SpectralOptimizer], options: Mapping[str, Any], folder: Path
) -> dict[str, Tensor]:
    """Return the weights of one process that loads a checkpoint and takes the other steps."""
    trial = Trial(cls, options, "one process", "float32")
    checkpoint.load(folder, trial.model, trial.optimizer)
    for number in range(SAVED_AFTER, STEPS):
        trial.step(number)
    return trial.weights()


def _check_zero(
    cls: type[SpectralOptimizer], options: Mapping[str, Any], start: Mapping[str, Tensor]
) -> None:
    """Check that zero gradients without decay move nothing."""
    trained = _train(cls, {**options, "weight_decay": 0.0}, "one process", scale=0.0)
    for name, weight in trained.items():
        if not torch.equal(weight, start[name]):
            raise AssertionError(f"zero gradients move {name}, or make it NaN")


def _check_half(
    cls: type[SpectralOptimizer],
    options: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    change: float,
) -> None:
    """Check that weights in bfloat16 follow those in float32, within their rounding."""
    trained = _train(cls, options, "one process", "bfloat16")
    for name, weight in trained.items():
        error = float((weight.float() - expected[name]).abs().max())
        rounding = STEPS * 2.0**-8 * max(1.0, float(expected[name].abs().max()))
        if not error < change / 4 + rounding:
            raise AssertionError(f"in bfloat16 {name} is {error:.1e} from what it is in float32")


def _check_options(entry: registry.Entry, values: Mapping[str, Any]) -> None:
    """Check that every option of the rule's own is documented and refuses what is no value."""
    shared = {each.name for each in fields(BaseOptions)}
    for name, spec in specs_of(entry.options).items():
        if name in shared:
            continue
        if not spec.doc:
            raise AssertionError(
                f"option {name} of {entry.title} has no documentation; declare it by"
                " spectral_dist.rules.options.number, whole, flag, choice or option"
            )
        try:
            entry.options.from_user({**values, name: object()}, entry.title)
        except ValueError as error:
            if name not in str(error):
                raise AssertionError(f"a bad {name} is refused without its name: {error}") from None
        else:
            raise AssertionError(f"option {name} of {entry.title} takes any object for a value")


def _assert_near(
    where: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float
) -> None:
    """Check that weights differ from those of one process by at most ``bound``."""
    for name, weight in weights.items():
        error = float((weight - expected[name]).abs().max())
        if not error <= bound:
            raise AssertionError(
                f"{where}, {name} differs from one process by {error:.1e}; allowed is {bound:.1e}"
            )
