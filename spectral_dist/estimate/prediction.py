"""How long an optimizer's step takes on a machine, and what each rank and link has to do in it.

It is what a machine takes whose kernels and links reach the speeds of its description; docs/plan.md
says what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectral_dist._error_help import explained
from spectral_dist.estimate.counts import MatrixCounter
from spectral_dist.estimate.estimate import Estimate, count
from spectral_dist.estimate.job import Job
from spectral_dist.estimate.probe import Probe
from spectral_dist.estimate.slabs import MemberCounts
from spectral_dist.estimate.timeline import BucketSeconds, finish
from spectral_dist.estimate.traffic import BucketTraffic
from spectral_dist.machine import Machine
from spectral_dist.polar.batching import SMALL
from spectral_dist.rules import registry
from spectral_dist.rules.base import Shape
from spectral_dist.sharding.plan import Bucket

ADAMW = 28
"""Bytes that AdamW reads and writes for a number: gradient, weight and two moments, float32."""
PER_BUCKET = 40
"""Operators that the exchange of a bucket starts, those of the rule left out."""


@dataclass(frozen=True)
class Prediction:
    """The seconds of an optimizer's step, and where they come from.

    Attributes:
        estimate: what each rank keeps, sends and computes.
        machine: the speeds.
        seconds: of the step.
        by_rank: {part: (ranks,)}: seconds of "compute" (directions), "exchange", "memory" (all
            elementwise work, AdamW's too) and "launch" (what the host takes to start operators);
            bytes sent "within" a host and "between" hosts.
        counters: of the units of matrices, with their plans.
    """

    estimate: Estimate
    machine: Machine
    seconds: float
    by_rank: dict[str, Tensor]
    counters: tuple[MatrixCounter, ...]

    @property
    def imbalance(self) -> float:
        """Return the most FLOPs of a rank over the mean; 1 is perfect."""
        flops = self.estimate.by_rank["flops"].double()
        return float(flops.max() / flops.mean()) if bool(flops.any()) else 1.0

    def share(self, training_seconds: float) -> float:
        """Return the optimizer's share of a step whose forward and backward take so long."""
        return self.seconds / (self.seconds + training_seconds)


@explained
def predict(
    model: nn.Module,
    job: Job,
    machine: Machine,
    optimizer: str = "muon",
    options: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> Prediction:
    """Return how long a step of an optimizer takes on a machine.

    Args:
        model, job, optimizer, options, routing: as in ``estimate``.
        machine: the speeds; its hosts have ranks in their order.

    Raises:
        ValueError: as in ``estimate``; the strategy is 'block'; the optimizer has no matrices.
    """
    if registry.find(optimizer).rule is None:
        raise ValueError(
            f"optimizer is {optimizer!r}, whose rotations are stepped where they lie, so that there"
            " is nothing to plan; `spectral-dist estimate` has what it keeps"
        )
    estimate, counters = count(model, job, optimizer, options, routing)
    if any(counter.blocks is not None for counter in counters):
        raise ValueError(
            "strategy is 'block', under which steps on blocks and on whole matrices take turns; no"
            " one step is predicted, so write 'owner', 'gram', 'split' or 'auto'"
        )
    on_cpu = job.device.type == "cpu"
    total = _Seconds(job.ranks, machine, on_cpu)
    for counter in counters:
        total.add(counter)
    total.add_elementwise(ADAMW * estimate.others.double())
    launch = total.by_rank["launch"]
    if on_cpu:  # the same cores start operators and run them
        seconds = float((total.device + launch).max())
    else:
        seconds = max(float(total.device.max()), float(launch.max()))
    return Prediction(estimate, machine, seconds, total.by_rank, tuple(counters))


def training_seconds(model: nn.Module, job: Job, machine: Machine, tokens: int) -> float:
    """Return the seconds of a training step's forward and backward pass, 3 multiply-adds a weight.

    Attention's products of tokens with tokens are left out, and so are waits for others.

    Args:
        model: of transformers; of a mixture's experts those count that see a token.
        job: whose ranks share the tokens.
        machine: its ``training_flops``.
        tokens: of all ranks in a step.
    """
    return 3 * active_numbers(model) * tokens / (job.ranks * machine.training_flops)


def active_numbers(model: nn.Module) -> int:
    """Return how many weights a token is multiplied with.

    Raises:
        ValueError: there are experts, and the model's config does not say how many see a token.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    is_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    skipped = set() if is_tied or embedding is None else {id(p) for p in embedding.parameters()}
    by_kind = {False: 0, True: 0}
    for name, parameter in model.named_parameters():
        if id(parameter) not in skipped:
            by_kind[".experts." in name] += parameter.numel()
    return by_kind[False] + round(by_kind[True] * (_active_share(model) if by_kind[True] else 0))


def _active_share(model: nn.Module) -> float:
    """Return the share of experts that see a token."""
    config: Any = getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    experts = [getattr(config, name) for name in names if getattr(config, name, None)]
    if not chosen or not experts:
        raise ValueError(
            f"{type(model).__name__} has experts, but its config says no num_experts_per_tok and"
            " number of experts; leave tokens out"
        )
    return float(chosen) / float(experts[0])


class _Seconds:
    """The sum over all units, by rank of the job.

    Args:
        ranks: of the job.
        machine: the speeds.
        on_cpu: whether ranks compute on CPUs.
    """

    def __init__(self, ranks: int, machine: Machine, on_cpu: bool) -> None:
        self.ranks, self.machine, self.on_cpu = ranks, machine, on_cpu
        parts = ("compute", "exchange", "memory", "launch", "within", "between")
        self.by_rank = {part: torch.zeros(ranks, dtype=torch.float64) for part in parts}
        self.device = torch.zeros(ranks, dtype=torch.float64)

    def add_elementwise(self, touched: Tensor) -> None:
        """Add work that reads and writes so many bytes of each rank's memory."""
        seconds = touched / self.machine.memory_bandwidth
        self.by_rank["memory"] += seconds
        self.device += seconds

    def add(self, counter: MatrixCounter) -> None:
        """Add the step of a unit of matrices."""
        traffic = BucketTraffic(counter.unit, counter.teams, self.machine)
        stages = [_Stages(counter, b, traffic, self.on_cpu) for b in counter.plan.buckets]
        unit = counter.unit
        parts: dict[str, Tensor | float] = dict.fromkeys(self.by_rank, 0.0)
        for stage in stages:
            seconds = stage.seconds
            spread = 0.0 if seconds.spread is None else seconds.spread
            parts["compute"] += stage.computed
            parts["exchange"] += 2 * seconds.collect + spread + stage.reduced
            parts["memory"] += seconds.gather + seconds.apply
            parts["launch"] += stage.launched
            parts["within"] += stage.within
            parts["between"] += stage.between
        shape = (counter.replicas, counter.ranks)
        ended = finish([stage.seconds for stage in stages], shape)
        for part, total in parts.items():
            self.by_rank[part] += unit.spread(torch.as_tensor(total))
        self.device += unit.spread(ended)


class _Stages:
    """What the stages of one bucket take.

    Args:
        counter: of the bucket's unit.
        bucket: the bucket.
        traffic: of the unit.
        on_cpu: whether ranks compute on CPUs.

    Attributes:
        seconds: of the stages.
        computed: seconds of directions, without what their computation sends.
        reduced: seconds of what it sends.
        launched: seconds in which the host starts all operators.
        within, between: bytes sent.
    """

    def __init__(
        self, counter: MatrixCounter, bucket: Bucket, traffic: BucketTraffic, on_cpu: bool
    ) -> None:
        self.counter, self.bucket, self.traffic = counter, bucket, traffic
        self.on_cpu = on_cpu
        self.machine = traffic.machine
        shape = (counter.replicas, counter.ranks)
        self.computed, self.reduced, self.launched, self.within, self.between = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(5)
        )
        self.launched += PER_BUCKET * self.machine.launch
        if bucket.gram or bucket.team > 1:
            self._add_slabs()
        else:
            self._add_owners()
        self.seconds = self._seconds()

    def _seconds(self) -> BucketSeconds:
        """Return the stages' seconds, and add the exchange's bytes."""
        counter, memory = self.counter, self.machine.memory_bandwidth
        wire, wide = counter.wire.itemsize, counter.state_dtype.itemsize
        matrices = [i for indices in self.bucket.matrices.values() for i in indices]
        runs = counter.runs(matrices).double()
        arrived = runs.sum(0) if counter.replicas > 1 else runs
        has_momentum = counter.rule.has_momentum(counter.options)
        accumulated = (3 * wide if has_momentum else 0) + wide + 3 * wire
        gather = runs * (accumulated / memory)
        apply = (arrived * ((4 * wide + 3 * wire) / memory)).expand_as(runs)
        moved = self.traffic.collected(self.bucket)
        in_two = moved.grid is not None and counter.in_two_steps(self.bucket)
        within, between = moved.sent(in_two)
        self.within += wire * within
        self.between += wire * between
        spread = None
        if counter.replicas > 1:
            spread = self._spread(runs, wire)
        collect = moved.seconds(wire, self.machine, in_two)
        return BucketSeconds(gather, collect, self.computed + self.reduced, spread, apply)

    def _spread(self, runs: Tensor, wire: int) -> Tensor:
        """Return the seconds of the exchange among replicas, and add its bytes."""
        counter, in_turn = self.counter, self.bucket.in_turn
        senders = int(runs.any(1).sum()) if in_turn else 1
        numel = runs.sum(0) if in_turn else counter.replicas * runs.amax(0)
        sent = (runs if in_turn else runs.amax(0).expand_as(runs)) * (counter.replicas - 1) * wire
        hosts = self.traffic.num_hosts
        self.within += sent if hosts == 1 else 0
        self.between += sent if hosts > 1 else 0
        return self.traffic.spread_seconds(numel, senders, wire).expand_as(runs)

    def _add_owners(self) -> None:
        """Add the directions of matrices that are whole at their owners."""
        for owner, matrices in self.bucket.matrices.items():
            replica, rank = divmod(owner, self.counter.ranks)
            counts: dict[Shape, int] = {}
            for i in matrices:
                shape = self.counter.layouts[i].matrix.read_shape
                counts[shape] = counts.get(shape, 0) + 1
                probe = self.counter.whole(self.counter.layouts[i])
                self.computed[replica, rank] += device_seconds(probe, self.machine, shape)
                # a CPU computes larger matrices one by one
                is_alone = self.on_cpu and math.prod(shape) > SMALL
                if counts[shape] == 1 or is_alone:
                    self.launched[replica, rank] += probe.operators * self.machine.launch

    def _add_slabs(self) -> None:
        """Add the directions of matrices that stay in slabs of the ranks of a team."""
        counter, machine = self.counter, self.machine
        sent, calls = torch.zeros_like(self.computed), torch.zeros_like(self.computed)
        batches: set[tuple[range, Shape]] = set()
        for i in (i for matrices in self.bucket.matrices.values() for i in matrices):
            layout, team = counter.layouts[i], counter.teams[i]
            counts = counter.members(layout, team)
            seconds = device_seconds(counts, machine, layout.matrix.shape)
            team.of_ranks(self.computed).add_(seconds)
            team.of_ranks(sent).add_(counts.sent_bytes)
            if (team.ranks, layout.matrix.read_shape) not in batches:
                batches.add((team.ranks, layout.matrix.read_shape))
                team.of_ranks(calls).add_(counts.collectives)
                team.of_ranks(self.launched).add_(counts.operators * machine.launch)
        near = self.traffic.near(self.bucket.team)
        within, between = sent * near, sent * (1 - near)
        links = torch.maximum(within / machine.bandwidth, between / machine.host_bandwidth)
        latency = torch.where(between > 0, machine.host_latency, machine.latency)
        self.reduced += links + calls * latency
        self.within += within
        self.between += between


def device_seconds(probe: Probe | MemberCounts, machine: Machine, shape: Shape) -> Any:
    """Return the seconds of a matrix's direction: products, and what else passes memory.

    Args:
        probe: of one rank, or of all ranks of a team.
        machine: the speeds.
        shape: of the matrix.
    """
    half = (probe.flops - probe.wide_flops) / (2 * machine.flops)
    wide = probe.wide_flops / (2 * machine.flops_wide)
    products = (half + wide) * (1 + machine.half_speed_side / min(shape))
    return products + probe.touched_bytes / machine.memory_bandwidth
