"""The few torch.distributed calls the core makes, each counted in calls and bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NoReturn, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed all_gather_into_tensor, and warns of the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
Group: TypeAlias = dist.ProcessGroup | None
"""A process group; None stands for a group of this process only, in which nothing is ever sent."""


@dataclass
class Meter:
    """The calls of each collective, and the bytes that this rank has sent to other ranks by it."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, sent: int) -> None:
        """Add one call of ``name`` that sends ``sent`` bytes to other ranks."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.bytes[name] = self.bytes.get(name, 0) + sent


@dataclass
class Pending:
    """A tensor that a collective in flight is filling.

    Attributes:
        tensor: the tensor, to be used after ``wait``.
        work: the collective; None if it has ended.
        sent: what the collective reads, kept alive until it has ended.
    """

    tensor: Tensor
    work: dist.Work | None = None
    sent: Tensor | None = None

    def wait(self) -> Tensor:
        """Wait for the collective, and return the filled tensor."""
        if self.work is not None:
            self.work.wait()
            self.work = self.sent = None
        return self.tensor


class SimulatedGroup(dist.ProcessGroup):
    """A group of ranks of a job that does not run, to plan for it and to count what it would send.

    Collective calls of such a group count bytes as any other's do, send nothing, and leave what
    they would receive unset. They are for tensors on the meta device.

    Args:
        rank: that of this process in the group.
        ranks: the number of ranks.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank, ranks)  # type: ignore[call-arg]
        self.simulated_rank, self.num_ranks = rank, ranks


def size(group: Group) -> int:
    """Return the number of ranks of the group."""
    if isinstance(group, SimulatedGroup):
        return group.num_ranks
    return 1 if group is None else dist.get_world_size(group)


def job_size() -> int:
    """Return the number of ranks of the whole job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank(group: Group) -> int:
    """Return this process's rank in the group."""
    if isinstance(group, SimulatedGroup):
        return group.simulated_rank
    return 0 if group is None else dist.get_rank(group)


def job_ranks(group: Group) -> Sequence[int]:
    """Return the group's ranks by their numbers in the job, in the order of the group.

    Those of a simulated group count as the first ones of the job.
    """
    if isinstance(group, SimulatedGroup):
        return range(group.num_ranks)
    return [job_rank()] if group is None else dist.get_process_group_ranks(group)


def is_first() -> bool:
    """Return whether this process is rank 0 of the job (or its only process)."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # torchrun's, before init_process_group


def all_to_all(
    sent: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: Group,
    meter: Meter,
) -> Pending:
    """Begin sending consecutive elements of a flat tensor to each rank of the group.

    Args:
        sent: the flat tensor, ordered by receiving rank.
        send_counts: the elements for each rank.
        recv_counts: the elements that each rank sends to this one.
        group: the ranks.
        meter: counts the bytes.

    Returns:
        The flat tensor of what is received, ordered by sending rank.
    """
    received = sent.new_empty(sum(recv_counts))
    num_sent = sent.numel() - send_counts[rank(group)]
    meter.count("all_to_all", num_sent * sent.element_size())
    if isinstance(group, SimulatedGroup):
        return Pending(received)
    work = dist.all_to_all_single(
        received, sent, list(recv_counts), list(send_counts), group=group, async_op=True
    )
    return Pending(received, work, sent)


def all_gather(sent: Tensor, group: Group, meter: Meter) -> Pending:
    """Begin gathering every rank's flat tensor, all of one length, in the order of ranks."""
    received = sent.new_empty(size(group) * sent.numel())
    meter.count("all_gather", (size(group) - 1) * sent.numel() * sent.element_size())
    if isinstance(group, SimulatedGroup):
        return Pending(received)
    work = _all_gather(received, sent, group=group, async_op=True)
    return Pending(received, work, sent)


def any_rank(flag: Tensor, groups: Sequence[Group], meter: Meter, number: int = 0) -> bool:
    """Return whether a flag is set on any rank, or a number is not the same on all.

    Waits for the device.

    Args:
        flag: a 0-d bool tensor.
        groups: that span the ranks, one after the other.
        meter: counts the bytes.
        number: below 2^24, which float32 holds exactly.
    """
    raised, largest, smallest = compare(flag.float(), number, groups, meter).tolist()
    return bool(raised) or largest != -smallest


def compare(level: Tensor, number: int, groups: Sequence[Group], meter: Meter) -> Tensor:
    """Return [largest level, largest number, largest minus number] of all ranks, without waiting.

    Args:
        level: 0-d float32.
        number: below 2^24, which float32 holds exactly.
        groups: that span the ranks, one after the other.
        meter: counts the bytes.
    """
    values = torch.stack([level, *(torch.full_like(level, n) for n in (number, -number))])
    for group in groups:
        max_ranks(values, group, meter)
    return values


def broadcast(values: Tensor, sender: int, group: Group, meter: Meter) -> Pending:
    """Begin to send a flat tensor of one rank to all others, into tensors of its length.

    Args:
        values: what is sent, or on other ranks what is overwritten.
        sender: the rank in the group.
        group: the ranks.
        meter: counts the bytes, at the sender.
    """
    is_sender = rank(group) == sender
    meter.count("broadcast", is_sender * (size(group) - 1) * values.numel() * values.element_size())
    if isinstance(group, SimulatedGroup) or not values.numel():
        return Pending(values)
    assert group is not None
    root = dist.get_global_rank(group, sender)
    return Pending(values, dist.broadcast(values, root, group=group, async_op=True))


def sum_ranks(values: Tensor, group: Group, meter: Meter) -> None:
    """Replace ``values`` by their sum over all ranks of the group."""
    if size(group) > 1:
        meter.count("all_reduce", values.numel() * values.element_size())
        if not isinstance(group, SimulatedGroup):
            dist.all_reduce(values, group=group)


def max_ranks(values: Tensor, group: Group, meter: Meter) -> None:
    """Replace each of ``values`` by its largest value on any rank of the group."""
    if size(group) > 1:
        meter.count("all_reduce", values.numel() * values.element_size())
        if not isinstance(group, SimulatedGroup):
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)


def gather_texts(text: str, group: Group) -> list[str]:
    """Return every rank's text, in the order of ranks. For error paths only: it pickles."""
    texts = [""] * size(group)
    if size(group) == 1:
        return [text]
    dist.all_gather_object(texts, text, group=group)
    return texts


def all_equal(values: Tensor, group: Group) -> list[bool]:
    """Return for each element of a 1-D tensor whether it is the same on all ranks.

    For set-up, not for every step: it waits for the device.
    """
    gathered = values.new_empty(size(group) * len(values))
    if size(group) == 1:
        return [True] * len(values)
    _all_gather(gathered, values, group=group)
    rows = gathered.view(size(group), len(values))
    return [bool(same) for same in (rows == rows[0]).all(0).tolist()]


def assert_same(
    lines: Sequence[str], groups: Sequence[Group], device: torch.device, what: str = ""
) -> None:
    """Raise on every rank of all groups if lines differ on any of them, naming the first that does.

    A collective call: one number is compared, and the lines are sent only if it differs.

    Args:
        lines: the texts that must be the same on all ranks.
        groups: that of the shards, then that of the replicas; each replica has its own group of
            shards.
        device: of the groups' collectives.
        what: the words after "the ranks do not agree" in the error; empty: ``WHERE``.

    Raises:
        RuntimeError: on every rank.
    """
    if all(size(group) == 1 for group in groups):
        return
    digest = hashlib.sha256("\n".join(lines).encode()).digest()[:7]
    checksum = torch.tensor([int.from_bytes(digest, "big"), 0], dtype=torch.int64, device=device)
    for group in groups:
        if size(group) == 1:
            continue
        gathered = checksum.new_empty(2 * size(group))
        _all_gather(gathered, checksum, group=group)
        rows = gathered.view(-1, 2)
        checksum[1] = ((rows[:, 0] != rows[0, 0]) | (rows[:, 1] != 0)).any()
    if not checksum[1].item():
        return
    split = [text.split("\n") for text in gather_all("\n".join(lines), groups)]
    for other, text in enumerate(split):
        for i, (a, b) in enumerate(zip_longest(split[0], text, fillvalue="nothing")):
            if a != b:
                raise RuntimeError(
                    f"the ranks do not agree {what or WHERE}:"
                    f" entry {i} is `{a}` on rank 0 but `{b}` on rank {other}."
                    " Build the same model, with the same options, on every rank."
                )


WHERE = "where the matrices live, so they cannot exchange them"
"""The words of ``assert_same``'s error unless its caller has others."""


def raise_together(error: Exception | None, groups: Sequence[Group]) -> None:
    """Raise on every rank of all groups if there is an error on any of them; a collective call.

    Every rank gets the first error's text with the rank that had it, and this rank's own error as
    its cause. For checks that are made rarely: the ranks first agree on one number.

    Args:
        error: this rank's, if it has one.
        groups: that span the ranks, one after the other, such as that of shards, then of replicas.

    Raises:
        ValueError: or the error itself, if there is no other rank.
    """
    groups = [group for group in groups if size(group) > 1]
    if not groups:
        if error is not None:
            raise error
        return
    device = device_of(groups[0])
    flag = torch.tensor(error is not None, device=device)
    if any_rank(flag, groups, Meter()):
        raise_first("" if error is None else f"{type(error).__name__}\n{error}", groups, error)


def raise_first(text: str, groups: Sequence[Group], cause: Exception | None = None) -> NoReturn:
    """Raise the error of the first rank that has one, on all ranks, which all know of it.

    Args:
        text: this rank's error as "Type\\nmessage", or nothing.
        groups: as in ``raise_together``.
        cause: this rank's error itself.
    """
    texts = gather_all(f"{text}\0{job_rank()}" if text else "", groups)
    # rank -> text
    failed = dict(reversed([one.split("\0")[::-1] for one in texts if one]))
    first = next(iter(sorted(failed, key=int)))
    kind, message = failed[first].split("\n", 1)
    if len(failed) == 1 and len(texts) > 1:
        message = f"{message} (on rank {first} of {job_size()})"
    if cause is not None and len(failed) == len(texts):
        raise cause
    raise ERRORS.get(kind, ValueError)(message) from cause


ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, RuntimeError, TypeError, NotImplementedError)
}
"""The types that an error of another rank is raised as; an error of any other is a ValueError."""


def gather_all(text: str, groups: Sequence[Group]) -> list[str]:
    """Return the text of every rank of all groups. For error paths only: it pickles.

    Args:
        text: this rank's.
        groups: that span the ranks, one after the other.
    """
    texts = [text]
    for group in groups:
        if size(group) > 1:
            gathered = gather_texts("\1".join(texts), group)
            texts = [one for several in gathered for one in several.split("\1")]
    return texts


def device_of(group: Group) -> torch.device:
    """Return the device of tensors that the group's collectives take."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def world() -> Group:
    """Return the group of all ranks of the job; None if there is one process."""
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None


def job_rank() -> int:
    """Return this process's rank in the job."""
    return dist.get_rank() if dist.is_initialized() else 0


def host_group() -> Group:
    """Make another group of all ranks of the job, for tensors of the host. A collective call."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group
