"""The estimate of a job: what every rank keeps, sends and computes, without running it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from spectral_dist._error_help import explained
from spectral_dist.core.named import class_of
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.estimate.counts import LEAST_STATE, MatrixCounter
from spectral_dist.estimate.engines import PlacedUnit, TensorPlan, built_as, place, places_of
from spectral_dist.estimate.job import Job
from spectral_dist.estimate.megatron import MegatronPlan
from spectral_dist.estimate.megatron_model import MegatronModel
from spectral_dist.params.classify import classify
from spectral_dist.params.modules import torch_inspector
from spectral_dist.params.param_groups import split_by_kind
from spectral_dist.params.spec import ParamSpec
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry

STEP = 4
"""Bytes of a tensor's count of steps."""
AGREEMENT = 12
"""Bytes of the three numbers that ranks compare before a step."""
QUANTITIES = {
    "parameters": "of the model, as they lie between steps",
    "master_weights": "float32 copies that are stepped on",
    "gradients": "when the step begins",
    "optimizer_state": "momentum, moments, matrix state",
    "temporary": "at most, while the optimizer steps",
    "moved": "sent in a step beyond AdamW's",
    "polar_calls": "matrices orthogonalized in a step",
    "flops": "of that",
}
"""What is estimated of each rank, in bytes, but for the last two."""


@dataclass(frozen=True)
class Estimate:
    """What each rank of a job has; ``QUANTITIES`` says what of.

    Attributes:
        job: what it is an estimate of.
        optimizer: the optimizer's name.
        numbers: trained parameters in matrices, and all others.
        by_rank: {quantity: (ranks,)}.
        others: the numbers of AdamW's that each rank steps, (ranks,).
    """

    job: Job
    optimizer: str
    numbers: dict[str, int]
    by_rank: dict[str, Tensor]
    others: Tensor

    def summary(self) -> dict[str, dict[str, float]]:
        """Return {quantity: {"max": over ranks, "mean": over ranks}}."""
        return {
            name: {"max": int(values.max()), "mean": float(values.double().mean())}
            for name, values in self.by_rank.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        job = {k: str(v).removeprefix("torch.") for k, v in asdict(self.job).items()}
        plain = {k: v for k, v in vars(self.job).items() if v is None or isinstance(v, int)}
        return {
            "job": {**job, **plain, "ranks": self.job.ranks},
            "optimizer": self.optimizer,
            "numbers": self.numbers,
            "per_rank": self.summary(),
        }


@explained
def estimate(
    model: nn.Module,
    job: Job,
    optimizer: str = "muon",
    options: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> Estimate:
    """Return what every rank of a job keeps, sends and computes in a step.

    Layouts and plans are made by the functions that training uses; what a rule does with a matrix
    is found by running it on a tensor without memory. The step is one after the first, and under
    strategy 'block' one on blocks.

    Args:
        model: on the meta device or anywhere; for POET as ``spectral_dist.poet.convert`` makes it.
        job: the engine and its ranks.
        optimizer: the optimizer's name, as "muon".
        options: of the optimizer, by name.
        routing: matrices, scalars, split, one_sided and heads, as ``param_groups`` takes them.

    Raises:
        ValueError: an unknown optimizer or option, or a model or job that does not go with them.
    """
    return count(model, job, optimizer, options, routing)[0]


def count(
    model: nn.Module,
    job: Job,
    optimizer: str,
    options: Mapping[str, Any] | None,
    routing: Mapping[str, Any] | None,
) -> tuple[Estimate, list[MatrixCounter]]:
    """Return ``estimate``'s result, and the counters of all units of matrices."""
    entry, options = registry.find(optimizer), dict(options or {})
    if entry.rule is None and job.engine == "megatron":
        raise ValueError(
            f"engine megatron is not estimated for {optimizer}, whose layers are others there;"
            " write another engine"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what training warns of, it warns of then
        as_built = built_as(model, job)
        is_megatron = isinstance(as_built, MegatronModel)
        inspect = attrgetter("inspector") if is_megatron else torch_inspector
        specs = classify(as_built, make_inspector=inspect, **(routing or {}))
        trained = [spec for spec in specs if spec.kind != "frozen"]
        groups = split_by_kind([s.parameter for s in trained], specs, entry.options)
        built = (POET if entry.rule is None else class_of(entry))(groups, **options)
        total = _Total(job, built, specs, places_of(as_built, job, specs))
        return total.estimate(optimizer), total.counters


class _Total:
    """The sum over all parameters, by rank.

    Args:
        job: the engine and its ranks.
        optimizer: with its groups, none of which has been stepped.
        specs: of all parameters of the model.
        plan: which parameters tensor parallelism cuts, and Megatron's stages and buffers.
    """

    def __init__(
        self,
        job: Job,
        optimizer: ShardedOptimizer,
        specs: Sequence[ParamSpec],
        plan: TensorPlan | MegatronPlan,
    ) -> None:
        self.job, self.optimizer, self.specs, self.plan = job, optimizer, specs, plan
        self.others = torch.zeros(job.ranks, dtype=torch.int64)
        self.counters: list[MatrixCounter] = []
        self.by_rank = {name: torch.zeros(job.ranks, dtype=torch.int64) for name in QUANTITIES}

    def estimate(self, name: str) -> Estimate:
        """Return the estimate."""
        numbers, num_units = {"matrices": 0, "others": 0}, 0
        for group in self.optimizer.param_groups:
            routes = self.optimizer.routes[group["id"]]
            is_matrix = group["kind"] == "matrix"
            for unit in place(self.job, routes, self._replicates(), self.plan):
                (self._add_matrices if is_matrix else self._add_others)(group, unit)
                self._add_model(unit)
                num_units += 1
            count = sum(math.prod(route.shape) for route in routes)
            numbers["matrices" if is_matrix else "others"] += count
        self._add_frozen()
        if isinstance(self.plan, MegatronPlan):
            self._add_buffers(self.plan)
        if self.optimizer.options.check_finite:
            self.by_rank["moved"] += AGREEMENT * self._num_agreements(num_units)
        return Estimate(self.job, name, numbers, self.by_rank, self.others)

    def _replicates(self) -> bool:
        return bool(getattr(self.optimizer.options, "replicate_momentum", False))

    def _add_matrices(self, group: dict[str, Any], unit: PlacedUnit) -> None:
        """Add what the rule keeps, sends and computes."""
        optimizer = self.optimizer
        assert isinstance(optimizer, SpectralOptimizer)
        counter = MatrixCounter.of_unit(optimizer.rule, optimizer.rule_options(group), unit)
        counts = counter.count()
        self.counters.append(counter)

        state = counts.momentum * counter.state_dtype.itemsize + counts.state_bytes
        self.by_rank["optimizer_state"] += unit.spread(state + STEP * unit.num_tensors)
        self.by_rank["moved"] += unit.spread(counts.moved_bytes)
        self.by_rank["polar_calls"] += unit.spread(counts.polar_calls)
        self.by_rank["flops"] += unit.spread(counts.flops)
        temporary = torch.maximum(self.by_rank["temporary"], unit.spread(counts.temporary_bytes))
        self.by_rank["temporary"] = temporary

    def _add_others(self, group: dict[str, Any], unit: PlacedUnit) -> None:
        """Add AdamW's two moments, and its wider copies of weights and gradients."""
        wide = torch.promote_types(unit.dtype, LEAST_STATE)
        self.others += unit.by_job_rank
        moments = 2 * wide.itemsize * unit.by_job_rank
        self.by_rank["optimizer_state"] += moments + unit.spread(STEP * unit.num_tensors)
        if wide != unit.dtype:
            temporary = torch.maximum(self.by_rank["temporary"], moments)
            self.by_rank["temporary"] = temporary

    def _num_agreements(self, num_units: int) -> int | Tensor:
        """Return how often each rank agrees with others on going on with a step.

        Args:
            num_units: of all groups.
        """
        if isinstance(self.plan, MegatronPlan):
            return self.plan.num_agreements
        # ZeRO steps group by group, or sub-group by sub-group
        return (num_units if self.job.zero_stage else 1) * (self.job.ranks > 1)

    def _add_buffers(self, plan: MegatronPlan) -> None:
        """Add Megatron's buffers: gradients in float32, and of parameters itself or beside them."""
        self.by_rank["parameters"] += self.job.dtype.itemsize * plan.buffer_numel
        self.by_rank["gradients"] += LEAST_STATE.itemsize * plan.buffer_numel

    def _add_model(self, unit: PlacedUnit) -> None:
        """Add parameters, copies of them in float32, and gradients."""
        stage, size = self.job.zero_stage, self.job.dtype.itemsize
        stored = unit.by_job_rank
        if isinstance(self.plan, MegatronPlan):
            has_masters = self.job.dtype != torch.float32
            self.by_rank["master_weights"] += torch.float32.itemsize * stored * has_masters
            return
        is_flat = stage in (1, 2)  # every rank has the whole flat tensor in the model's dtype
        held = stored * (self.job.ranks if is_flat else 1)
        self.by_rank["parameters"] += size * held
        self.by_rank["gradients"] += size * (held if stage == 1 else stored)
        if stage is not None and (stage > 0 or self.job.dtype != torch.float32):
            self.by_rank["master_weights"] += torch.float32.itemsize * stored

    def _add_frozen(self) -> None:
        """Add frozen parameters, which DeepSpeed keeps whole below stage 3."""
        frozen, size = [s for s in self.specs if s.kind == "frozen"], self.job.dtype.itemsize
        if self.job.zero_stage in (0, 1, 2):
            numel = sum(math.prod(spec.shape) for spec in frozen)
            self.by_rank["parameters"] += size * numel
            return
        for unit in place(self.job, frozen, False, self.plan) if frozen else ():
            self.by_rank["parameters"] += size * unit.by_job_rank
