"""What owners' replicas keep alone, brought to every replica: for checkpoints, not for steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import Exchange, Piece


def from_owners(
    exchange: Exchange, kept: Mapping[Piece, Tensor], into: Mapping[Piece, Tensor]
) -> None:
    """Fill ``into``, this rank's runs of all matrices, from every replica's ``kept``.

    A collective call of the replicas; a bucket at a time.
    """
    for route in exchange.routes:
        mine = [kept[piece].reshape(-1) for piece in route.send_runs]
        values = [*mine, torch.zeros(0, dtype=exchange.state_dtype, device=exchange.state_device)]
        flat = torch.cat(values).to(exchange.device)
        most = max(route.counts_per_replica)
        padded = torch.nn.functional.pad(flat, (0, most - flat.numel()))
        if exchange.num_replicas > 1:
            padded = collectives.all_gather(padded, exchange.replicas, exchange.meter).wait()
        parts = padded.view(exchange.num_replicas, most)
        whole = torch.cat([p[:n] for p, n in zip(parts, route.counts_per_replica, strict=True)])
        runs = torch.split(whole, [piece.length for piece in route.result_runs])
        for piece, run in zip(route.result_runs, runs, strict=True):
            into[piece].copy_(run)
