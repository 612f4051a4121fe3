"""A few weights under any layout of tiles, for tests that compare an optimizer with one process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist

import spectral_dist
from spectral_dist.placement.base import ReplicatedPlacement
from spectral_dist.sharding import collectives
from spectral_dist.sharding.layout import Cut, Layout, Located, Tile
from spectral_dist.sharding.matrix import Matrix
from tests.support.weights import Weights


@cache
def grid(ranks, replicas):
    """(group, replicas) of this rank; the ranks of a replica are neighbours."""
    rows = torch.arange(ranks * replicas).view(replicas, ranks)
    found = []
    for lines, length in ((rows.tolist(), ranks), (rows.T.tolist(), replicas)):
        groups = [dist.new_group(line) if length > 1 else None for line in lines]
        where = [dist.get_rank() in line for line in lines].index(True)
        found.append(groups[where])
    return tuple(found)


@dataclass
class Part:
    """A tile, and the ranks that have its runs: ``bounds`` of ``members``."""

    row: int
    col: int
    rows: int
    cols: int
    bounds: tuple[int, ...]
    members: tuple[int, ...]
    block: int = 0


def even(length, ranks):
    return [length * r // ranks for r in range(ranks + 1)]


def strips(shape, ranks, along, edges=None, groups=1):
    """Each rank has whole tiles: rows (along 0) or columns; ``groups``: tiles in each strip."""
    edges = edges or even(shape[along], ranks)
    parts = []
    for rank in range(ranks):
        first, size = edges[rank], edges[rank + 1] - edges[rank]
        box = (first, 0, size, shape[1]) if along == 0 else (0, first, shape[0], size)
        inner = even(box[2], groups)
        for g in range(groups):
            rows = inner[g + 1] - inner[g]
            if rows and box[3]:
                where = (box[0] + inner[g], box[1], rows, box[3])
                parts.append(Part(*where, (0, rows * box[3]), (rank,), rank))
    return parts


def flat(shape, ranks):
    """One tile in runs that begin in mid-row, the second empty if there are three or more."""
    numel = shape[0] * shape[1]
    bounds = [numel * r // ranks + (r % ranks > 0) for r in range(ranks + 1)]
    if ranks > 2:
        bounds[2] = bounds[1]
    return [Part(0, 0, *shape, tuple(bounds), tuple(range(ranks)))]


def tp_flat(shape, along):
    """Two tiles, each in two flat runs: tensor parallelism 2 x distributed optimizer 2."""
    parts = strips(shape, 2, along, even(shape[along], 2))
    for t, part in enumerate(parts):
        numel = part.rows * part.cols
        part.bounds, part.members = (0, numel // 2 - 1, numel), (t, t + 2)
    return parts


def indices(parts, shape, rank):
    """Which elements of the flattened matrix the rank has, in the order of its tensor."""
    every = torch.arange(shape[0] * shape[1]).view(shape)
    found = [torch.empty(0, dtype=torch.int64)]
    for p in parts:
        if rank in p.members:
            i = p.members.index(rank)
            tile = every[p.row : p.row + p.rows, p.col : p.col + p.cols].flatten()
            found.append(tile[p.bounds[i] : p.bounds[i + 1]])
    return torch.cat(found)


def layout(name, parts, shape, rank, tensor):
    tiles, base = [], 0
    for p in parts:
        cut = Cut(p.bounds, p.members)
        tiles.append(Tile(p.row, p.col, p.rows, p.cols, cut, 0, base, tensor, p.block))
        begin, end = cut.run(rank)
        base += end - begin
    return Layout(Matrix(name, shape, ((0, shape[0]),)), tuple(tiles))


class Placed(ReplicatedPlacement):
    """A placement of given layouts."""

    knows_blocks = True

    def __init__(self, layouts, group, replicas, replicate_momentum):
        super().__init__(replicas, replicate_momentum)
        self.shards, self.layouts = group, tuple(layouts)

    def check(self, routes, tensors):
        pass

    def locate(self, group, routes, tensors):
        indices = tuple(range(len(tensors)))
        device = torch.device("cpu")
        copies, everywhere = self.replicas, self.replicate_momentum
        return [Located(self.layouts, self.shards, device, (), copies, everywhere, indices)]

    def world_groups(self):
        return [self.shards, self.replicas]


def gradient(shape, step, name, dtype=torch.float32):
    seed = 7919 * step + sum(map(ord, name))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class ShardedModel:
    """An optimizer over laid out weights; ``cuts``: name -> (shape, parts)."""

    def __init__(self, cuts, kind="Muon", ranks=1, replicas=1, dtype=torch.float32, **options):
        group, copies = grid(ranks, replicas) if ranks * replicas > 1 else (None, None)
        rank = collectives.rank(group)
        self.shapes = {name: shape for name, (shape, _) in cuts.items()}
        model = Weights(dtype=dtype, **self.shapes)
        groups = spectral_dist.param_groups(model)
        everywhere = options.get("replicate_momentum", False)
        self.weights = {name.split(".")[0]: p for name, p in model.named_parameters()}
        self.places, layouts = {}, []
        for tensor, (name, (shape, parts)) in enumerate(cuts.items()):
            self.places[name] = indices(parts, shape, rank)
            layouts.append(layout(name, parts, shape, rank, tensor))
            self.weights[name].data = self.weights[name].data.flatten()[self.places[name]].clone()
        placement = Placed(layouts, group, copies, everywhere)
        options = {"lr": 0.02, **options}
        self.optimizer = getattr(spectral_dist, kind)(groups, placement=placement, **options)

    def step(self, number, make=gradient, skip=()):
        for name, p in self.weights.items():
            whole = make(self.shapes[name], number, name, p.dtype)
            p.grad = None if name in skip else whole.flatten()[self.places[name]]
        self.optimizer.step()

    @property
    def unit(self):
        (unit,) = self.optimizer.all_units
        return unit

    def difference(self, alone):
        """The largest from a trial in one process, over the size of a whole weight's change."""
        worst = 0.0
        for name, p in self.weights.items():
            wanted = alone.weights[name].detach().flatten()[self.places[name]]
            if p.numel():
                worst = max(worst, (p.detach() - wanted).abs().max().item())
        return worst


def whole(shapes):
    """``cuts`` of one process."""
    return {n: (s, [Part(0, 0, *s, (0, s[0] * s[1]), (0,))]) for n, s in shapes.items()}
