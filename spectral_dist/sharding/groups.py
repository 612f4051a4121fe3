"""Groups of some ranks of a group: teams of neighbours, ranks of a host, ranks between hosts."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group
from spectral_dist.sharding.hosts import Grid

_TEAMS: WeakKeyDictionary[dist.ProcessGroup, dict[int, Group]] = WeakKeyDictionary()


def team_of(group: Group, ranks: int) -> Group:
    """Return the group of this rank's team: of ``ranks`` neighbours, from a multiple of that on.

    A collective call of the group, the first time.

    Args:
        group: that is divided into teams; its last ranks are in none if they are too few.
        ranks: of a team.
    """
    if group is None or ranks == collectives.size(group):
        return group
    first = collectives.rank(group) // ranks * ranks
    if isinstance(group, collectives.SimulatedGroup):
        return collectives.SimulatedGroup(collectives.rank(group) - first, ranks)
    made = _TEAMS.setdefault(group, {})
    if ranks not in made:
        agree_on_names(group)
        members = dist.get_process_group_ranks(group)[first : first + ranks]
        is_whole = len(members) == ranks
        made[ranks] = dist.new_group(members, use_local_synchronization=True) if is_whole else None
    return made[ranks]


_most_names: list[int] = [0]
"""How many groups there were when a team's was made last."""


def agree_on_names(group: dist.ProcessGroup) -> None:
    """Let all ranks of a group call a new group by one name, which none has had.

    torch names a group that its members alone make after them and after how many groups a rank
    has. Where these numbers differ, as under Megatron, or one comes again because groups were
    destroyed, the members would wait for each other for ever. Groups of one rank make up for it.
    """
    known = dist.distributed_c10d._world.pg_names
    wanted = max(len(known), _most_names[0] + 1)
    most = torch.tensor(wanted, dtype=torch.int64, device=collectives.device_of(group))
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    _most_names[0] = int(most)
    for _ in range(int(most) - len(known)):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


@dataclass(frozen=True)
class HostGroups:
    """The two groups of a rank in which it sends.

    Attributes:
        grid: the hosts of the group that they are made of.
        within: the ranks of its host, by number within the host.
        between: the ranks of its number, by host.
    """

    grid: Grid
    within: Group
    between: Group


_OF_HOSTS: WeakKeyDictionary[dist.ProcessGroup, dict[Grid, HostGroups]] = WeakKeyDictionary()


def host_groups(group: dist.ProcessGroup, grid: Grid) -> HostGroups:
    """Return the groups of this rank; a collective call of the group, the first time.

    Args:
        group: that is divided into hosts.
        grid: of its ranks.
    """
    made = _OF_HOSTS.setdefault(group, {})
    if grid not in made:
        agree_on_names(group)
        members = torch.tensor(collectives.job_ranks(group)).view(grid.hosts, grid.size)
        host, index = divmod(collectives.rank(group), grid.size)
        within, between = (
            dist.new_group(ranks.tolist(), use_local_synchronization=True)
            for ranks in (members[host], members[:, index])
        )
        made[grid] = HostGroups(grid, within, between)
    return made[grid]
