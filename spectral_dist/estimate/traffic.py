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

from spectral_dist.estimate.counts import MatrixCounter
from spectral_dist.estimate.slabs import shares
from spectral_dist.machine import Machine
from spectral_dist.sharding.hosts import Grid, grid_of
from spectral_dist.sharding.layout import Tile
from spectral_dist.sharding.plan import Bucket, first_of

Storage = tuple[Tile, ...]
"""What ranks store of a matrix, ``Layout.storage()``."""
Jobs = dict[tuple[int, int, int], Counter[Storage]]
"""Matrices by the ranks that work on them: (replica, the first of its ranks, their number)."""


@dataclass
class Traffic:
    """Elements that travel in one all-to-all, by rank.

    Attributes:
        within: sent and received within the rank's host, (2, replicas, ranks).
        between: sent to and received from other hosts, (2, replicas, ranks).
        messages: the ranks that it sends to, and those that it receives from.
    """

    within: Tensor
    between: Tensor
    messages: Tensor

    def seconds(self, itemsize: int, machine: Machine, grid: Grid | None = None) -> Tensor:
        """Return the seconds of each rank: of the slower link in the busier direction.

        Args:
            itemsize: bytes of an element.
            machine: the speeds.
            grid: of hosts, if the exchange may be made in two steps, where that is faster.
        """
        within = self.within.amax(0) * (itemsize / machine.bandwidth)
        between = self.between.amax(0) * (itemsize / machine.host_bandwidth)
        crosses = bool(self.between.any())
        latency = machine.host_latency if crosses else machine.latency
        further = (self.messages.amax(0) - 1).clamp(min=0)
        at_once = torch.maximum(within, between) + further * machine.message
        at_once += latency * bool(self.messages.any())
        if grid is None or not crosses:
            return at_once
        # as cost.exchange_seconds, whose counts of single ranks are not there
        sent = (self.within + self.between).amax(0) * itemsize
        passed = sent * (1 - 1 / grid.size) / machine.bandwidth
        copied = 4 * sent / machine.memory_bandwidth
        most = (grid.size + grid.hosts - 4) * machine.message
        in_two = latency + between + machine.latency + passed + copied + most
        return in_two if float(in_two.max()) < float(at_once.max()) else at_once


class BucketTraffic:
    """Counts what travels for the buckets of one unit.

    Args:
        counter: of the unit.
        machine: which says what ranks share a host.
    """

    def __init__(self, counter: MatrixCounter, machine: Machine) -> None:
        self.counter, self.machine = counter, machine
        self.shape = (counter.replicas, counter.ranks)
        numbers = counter.unit.job_rank_of
        self.hosts = numbers // machine.host_size
        self.grid = grid_of(numbers[0].tolist(), machine.host_size)
        self.num_hosts = int(self.hosts.max()) + 1
        self._traffic_of: dict[Any, Traffic] = {}
        self._members_of: dict[tuple[int, int, int], Tensor] = {}

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
        replica, rank = divmod(owner, self.counter.ranks)
        if bucket.gram:
            return replica, 0, self.counter.ranks
        if bucket.team > 1 and self.counter.ranks > 1:
            first = first_of(owner, self.counter.ranks, bucket.team)
            return replica, first % self.counter.ranks, bucket.team
        return replica, rank, 1

    def collected(self, bucket: Bucket) -> Traffic:
        """Return what the all-to-all before a bucket's computation moves; that after it is equal.

        Where several ranks work on a matrix, each sender's elements are spread evenly over them.
        """
        jobs = self._jobs(bucket)
        key = tuple((job, tuple(storages.items())) for job, storages in jobs.items())
        if key not in self._traffic_of:
            self._traffic_of[key] = self._count(jobs)
        return self._traffic_of[key]

    def _count(self, jobs: Jobs) -> Traffic:
        """Return what travels to ranks that work together."""
        # a rank's all, and what of that stays in its host or with itself, both ways
        total, near, messages = (torch.zeros(2, *self.shape, dtype=torch.float64) for _ in range(3))
        stored: Counter[tuple[int, Storage]] = Counter()
        senders: Counter[tuple[int, int, frozenset[Storage]]] = Counter()
        for job, storages in jobs.items():
            replica, first, count = job
            stored.update({(replica, storage): n for storage, n in storages.items()})
            senders[replica, count, frozenset(storages)] += 1
            members = self._members(job)
            hosts = self.hosts[replica, members]
            numels = self._stored(storages)[members] / count
            receives = (members >= first) & (members < first + count)
            receivers, own = members[receives], numels[receives]
            sent_by_host = numels.new_zeros(self.num_hosts).index_add_(0, hosts, numels)
            receivers_by_host = torch.bincount(hosts[receives], minlength=self.num_hosts)
            near[0, replica, members] += numels * receivers_by_host[hosts]
            near[1, replica, receivers] += sent_by_host[hosts[receives]]
            total[1, replica, receivers] += self._stored(storages).sum() / count
            messages[1, replica, receivers] += (self._stored(storages) > 0).sum()
            for counts, kept in ((near, own), (total, own), (messages, (own > 0).double())):
                counts[:, replica, receivers] -= kept
        for (replica, storage), n in stored.items():
            total[0, replica] += n * dense(storage, self.shape[1])
        for (replica, count, kinds), n in senders.items():
            messages[0, replica] += n * count * (self._stored(dict.fromkeys(kinds, 1)) > 0)
        return Traffic(near, total - near, messages)

    def _stored(self, storages: Mapping[Storage, int]) -> Tensor:
        """Return the elements that each rank stores of so many matrices of each storage."""
        stored = torch.zeros(self.shape[1], dtype=torch.float64)
        for storage, n in storages.items():
            stored += n * dense(storage, self.shape[1])
        return stored

    def _jobs(self, bucket: Bucket) -> Jobs:
        """Return {(replica, first of the ranks that work together, their number): storages}.

        Empty if nothing of the bucket is sent.
        """
        jobs: Jobs = {}
        for owner, matrices in bucket.matrices.items() if bucket.moves else ():
            storages = jobs.setdefault(self.receivers(bucket, owner), Counter())
            storages.update(self.counter.layouts[i].storage() for i in matrices)
        return jobs

    def _members(self, job: tuple[int, int, int]) -> Tensor:
        """Return the ranks of a replica whose host has one of those that work together."""
        if job not in self._members_of:
            replica, first, count = job
            hosts = self.hosts[replica]
            touched = torch.zeros(self.num_hosts, dtype=torch.bool)
            touched[hosts[first : first + count]] = True
            self._members_of[job] = touched[hosts].nonzero().flatten()
        return self._members_of[job]

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


@lru_cache(maxsize=1024)
def dense(storage: Storage, ranks: int) -> Tensor:
    """Return the elements of a matrix that each rank stores, float64 (ranks,)."""
    stored = torch.zeros(ranks, dtype=torch.float64)
    holders, numels, _ = shares(storage)
    return stored.index_add_(0, holders, numels.double())
