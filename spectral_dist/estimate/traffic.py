"""What each rank sends and receives for one bucket, within its host and to others, and how long.

All tensors are (replicas, ranks of a replica), or spread to that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from spectral_dist.estimate.placed import PlacedUnit
from spectral_dist.estimate.slabs import Team, shares, stored_in_slab
from spectral_dist.machine import Machine
from spectral_dist.sharding import collectives
from spectral_dist.sharding.boxes import Slabs
from spectral_dist.sharding.cost import ExchangeLoad, exchange_seconds
from spectral_dist.sharding.hosts import Grid, grid_of
from spectral_dist.sharding.layout import Tile
from spectral_dist.sharding.plan import Bucket, first_of

Storage = tuple[Tile, ...]
"""What ranks store of a matrix, ``Layout.storage()``."""
Sent = tuple[Storage, Slabs | None]
"""What is sent of a matrix to a rank: all of it, or of so cut a matrix the rank's slab."""
Jobs = dict[tuple[int, int, int], Counter[Sent]]
"""Matrices by the ranks that get them: (replica, the first of its ranks, their number)."""
EXACT = 256
"""In groups of more ranks a matrix in slabs is taken to be sent evenly to its team."""


@dataclass
class Traffic:
    """Elements that travel in an all-to-all before a bucket's computation, and in that after it.

    Attributes:
        load: what each rank sends, (2, replicas, ranks): before, and after.
        through: what it gets in the first of two steps, for the ranks of its number, likewise.
        grid: of hosts; None: an exchange cannot go in two steps, and of ``load.of_number`` and
            ``through`` nothing is known.
    """

    load: ExchangeLoad
    through: Tensor
    grid: Grid | None

    def is_faster_in_two(self, itemsize: int, machine: Machine) -> bool:
        """Return whether training makes the exchange in two steps; see ``faster_in_two``."""
        if self.grid is None:
            return False
        at_once, in_two = exchange_seconds(self.load, self.grid, itemsize, machine)
        return float(in_two.sum(0).max()) < float(at_once.sum(0).max())

    def sent(self, in_two: bool) -> tuple[Tensor, Tensor]:
        """Return the elements that each rank sends before and after, within hosts and between.

        Args:
            in_two: whether they go in two steps.
        """
        load = self.load
        if in_two:  # the second step leaves a host but for what a rank gets from its own host
            return (load.total - load.of_number).sum(0), (self.through - load.of_host).sum(0)
        return (load.of_host - load.own).sum(0), (load.total - load.of_host).sum(0)

    def seconds(self, itemsize: int, machine: Machine, in_two: bool) -> Tensor:
        """Return each rank's seconds of one of the two: of the slower link, the busier way.

        Args:
            itemsize: bytes of an element.
            machine: the speeds.
            in_two: whether they go in two steps.
        """
        load = self.load
        if in_two:
            assert self.grid is not None
            return exchange_seconds(load, self.grid, itemsize, machine)[1].amax(0)
        sent_between = (load.total - load.of_host).amax(0)
        within = (load.of_host - load.own).amax(0) * (itemsize / machine.bandwidth)
        between = sent_between * (itemsize / machine.host_bandwidth)
        latency = machine.host_latency if bool(sent_between.any()) else machine.latency
        further = (load.messages.amax(0) - 1).clamp(min=0)
        at_once = torch.maximum(within, between) + further * machine.message
        return at_once + latency * bool(load.messages.any())


class BucketTraffic:
    """Counts what travels for the buckets of one unit.

    Args:
        unit: its matrices.
        teams: of the matrices that stay in slabs.
        machine: which says what ranks share a host.
    """

    def __init__(self, unit: PlacedUnit, teams: Mapping[int, Team], machine: Machine) -> None:
        self.unit, self.teams, self.machine = unit, teams, machine
        located = unit.located
        self.shape = (collectives.size(located.replicas), collectives.size(located.group))
        numbers = unit.job_rank_of
        self.hosts = numbers // machine.host_size
        grids = {grid_of(replica, machine.host_size) for replica in numbers.tolist()}
        self.grid = grids.pop() if len(grids) == 1 else None
        self.num_hosts = int(self.hosts.max()) + 1
        self._traffic_of: dict[Any, Traffic] = {}
        self._of_bucket: dict[int, Traffic] = {}  # by identity: storages take long to hash

    @cached_property
    def host_team(self) -> int:
        """Return the size of the largest teams that lie within a host."""
        return self.unit.host_team(self.machine.host_size)

    def near(self, team: int) -> Tensor:
        """Return the share of the other ranks of its team that are in a rank's host.

        Args:
            team: the number of ranks of a team; 1: a team is all ranks of a replica.
        """
        hosts = self.hosts.T if self.shape[1] == 1 else self.hosts
        size = hosts.shape[1] if team == 1 else team
        whole = hosts.shape[1] // size * size
        teams = hosts[:, :whole].reshape(-1, size)
        # of each team the number of its ranks in each of its hosts, which follow each other
        team_of = torch.arange(len(teams)).repeat_interleave(size)
        _, number, counts = torch.unique_consecutive(
            team_of * self.num_hosts + teams.flatten(), return_inverse=True, return_counts=True
        )
        shares = torch.zeros(hosts.shape, dtype=torch.float64)
        near = (counts[number].double() - 1) / max(1, size - 1)
        shares[:, :whole] = near.view(len(hosts), whole)
        return shares.T if self.shape[1] == 1 else shares

    def receivers(self, bucket: Bucket, owner: int) -> tuple[int, int, int]:
        """Return the replica that works on an owner's matrices, and which of its ranks do.

        Returns:
            The replica, the first of its ranks that work on them, and their number.
        """
        replica, rank = divmod(owner, self.shape[1])
        if bucket.gram:
            return replica, 0, self.shape[1]
        if bucket.team > 1 and self.shape[1] > 1:
            first = first_of(owner, self.shape[1], bucket.team)
            return replica, first % self.shape[1], bucket.team
        return replica, rank, 1

    def collected(self, bucket: Bucket) -> Traffic:
        """Return what the all-to-alls before and after a bucket's computation move."""
        if id(bucket) not in self._of_bucket:
            jobs = self._jobs(bucket)
            key = tuple((job, tuple(sent.items())) for job, sent in jobs.items())
            if key not in self._traffic_of:
                self._traffic_of[key] = self._count(jobs)
            self._of_bucket[id(bucket)] = self._traffic_of[key]
        return self._of_bucket[id(bucket)]

    def _count(self, jobs: Jobs) -> Traffic:
        """Return what travels to ranks that work together, and back."""
        total, of_host, of_number, own, messages, through = (
            torch.zeros(2, *self.shape, dtype=torch.float64) for _ in range(6)
        )
        ranks = self.shape[1]
        numbers = torch.arange(ranks) % (self.grid.size if self.grid else ranks)
        for replica in sorted({job[0] for job in jobs}):
            hosts = self.hosts[replica]
            stored, share = self._stored_and_share(
                {job[1:]: sent for job, sent in jobs.items() if job[0] == replica}
            )
            kept = (stored > 0) & (share > 0)
            own[:, replica] = (stored * share).sum(0)
            for way, (mine, theirs) in enumerate(((stored, share), (share, stored))):
                total[way, replica] = theirs.sum(1) @ mine
                of_host[way, replica] = (mine * sums(theirs, hosts)).sum(0)
                messages[way, replica] = (theirs > 0).sum(1).double() @ (mine > 0).double()
                messages[way, replica] -= kept.sum(0)
                if self.grid:
                    of_this_number = sums(theirs, numbers)
                    of_number[way, replica] = (mine * of_this_number).sum(0)
                    through[way, replica] = (sums(mine, hosts) * of_this_number).sum(0)
        load = ExchangeLoad(total, of_host, of_number, own, messages)
        return Traffic(load, through, self.grid)

    def _stored_and_share(
        self, jobs: Mapping[tuple[int, int], Mapping[Sent, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return what each rank has of what is sent, and the share of that that each rank gets.

        Args:
            jobs: of one replica, {(the first of the receivers, their number): what is sent}.

        Returns:
            Two tensors (jobs, ranks).
        """
        ranks = self.shape[1]
        stored, share = torch.zeros(2, len(jobs), ranks, dtype=torch.float64)
        for row, ((first, count), matrices) in enumerate(jobs.items()):
            share[row, first : first + count] = 1 / count
            for (storage, cut), n in matrices.items():
                if cut is None:
                    stored[row] += n * dense(storage, ranks)
                else:
                    stored[row] += n * stored_in_slab(storage, cut, first, ranks)
        return stored, share

    def _jobs(self, bucket: Bucket) -> Jobs:
        """Return what each rank gets, or what those that work together get.

        Empty if nothing of the bucket is sent.
        """
        jobs: Jobs = {}
        for owner, matrices in bucket.matrices.items() if bucket.moves else ():
            replica, first, count = self.receivers(bucket, owner)
            is_exact = count > 1 and self.shape[1] <= EXACT
            for rank in range(first, first + count) if is_exact else (first,):
                sent = jobs.setdefault((replica, rank, 1 if is_exact else count), Counter())
                for i in matrices:
                    cut = self.teams[i].cut if is_exact else None
                    sent[self.unit.located.layouts[i].storage(), cut] += 1
        return jobs

    @cached_property
    def _hosts_of_replicas(self) -> tuple[Tensor, Tensor]:
        """Return, for each rank of a replica, the hosts of its replicas and how many each has."""
        ordered = self.hosts.sort(0).values
        hosts = 1 + (ordered[1:] != ordered[:-1]).sum(0)
        return hosts, self.shape[0] / hosts

    def spread_seconds(self, numel: Tensor, calls: int, itemsize: int) -> Tensor:
        """Return the seconds in which all replicas get what each of them has computed.

        Every host receives what the others have, over the links of those of its ranks that are in
        the group; within a host it is passed on at the same time.

        Args:
            numel: what arrives at every rank, its own part included, (ranks of a replica,).
            calls: of collectives.
            itemsize: bytes of an element.
        """
        if self.shape[0] == 1 or not calls:
            return torch.zeros(())
        machine = self.machine
        hosts, per_host = self._hosts_of_replicas
        arriving = numel * itemsize
        between = arriving * (hosts - 1) / hosts / (per_host * machine.host_bandwidth)
        within = arriving * (per_host - 1) / per_host / machine.bandwidth
        crosses = bool((hosts > 1).any())
        latency = machine.host_latency if crosses else machine.latency
        return torch.maximum(between, within) + calls * latency


def sums(values: Tensor, labels: Tensor) -> Tensor:
    """Return for each value of a row, (rows, n), the sum of those that have its label, (n,)."""
    size = int(labels.max()) + 1
    return values.new_zeros(len(values), size).index_add_(1, labels, values)[:, labels]


@lru_cache(maxsize=1024)
def dense(storage: Storage, ranks: int) -> Tensor:
    """Return the elements of a matrix that each rank stores, float64 (ranks,)."""
    stored = torch.zeros(ranks, dtype=torch.float64)
    holders, numels, _ = shares(storage)
    return stored.index_add_(0, holders, numels.double())
