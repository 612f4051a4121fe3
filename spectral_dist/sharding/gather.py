"""Bring state that only the owner's replica stores to every replica: for checkpoints, not steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import Exchange, Piece


def from_owners(
    exchange: Exchange, owned: Mapping[Piece, Tensor], targets: Mapping[Piece, Tensor]
) -> None:
    """Fill this rank's runs of all matrices with the values of the replicas that own the matrices.

    A collective call of the replicas; one bucket is in memory at a time.

    Args:
        exchange: of the matrices.
        owned: the values of this rank's runs of the matrices that its replica owns.
        targets: this rank's runs of all matrices, which are written.
    """
    for route in exchange.routes:
        runs = [owned[piece].reshape(-1) for piece in route.send_runs]
        # an empty tensor gives the dtype if there are no runs
        runs.append(torch.zeros(0, dtype=exchange.state_dtype, device=exchange.state_device))
        flat = torch.cat(runs).to(exchange.device)
        for k in route.senders:
            replica = collectives.rank(exchange.replicas)
            values = flat if k == replica else flat.new_empty(route.counts_per_replica[k])
            values = collectives.broadcast(values, k, exchange.replicas, exchange.meter).wait()
            _write(targets, route.runs_of_replicas[k], values)
        if route.senders:
            continue
        longest = max(route.counts_per_replica)
        padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        if exchange.num_replicas > 1:
            padded = collectives.all_gather(padded, exchange.replicas, exchange.meter).wait()
        parts = padded.view(exchange.num_replicas, longest)
        result = torch.cat([p[:n] for p, n in zip(parts, route.counts_per_replica, strict=True)])
        _write(targets, route.result_runs, result)


def _write(targets: Mapping[Piece, Tensor], pieces: Sequence[Piece], values: Tensor) -> None:
    """Write values, one piece after the other, into the pieces' targets."""
    for piece, run in zip(pieces, torch.split(values, [p.length for p in pieces]), strict=True):
        targets[piece].copy_(piece.shaped(run))
