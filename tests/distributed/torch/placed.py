"""Real DTensor parameters: what a placement says of them, against what each rank's tensor holds."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import spectral_dist
from spectral_dist.sharding import collectives
from spectral_dist.sharding.exchange import MatrixTask
from tests.support.tiles import run_of


@cache
def mesh(shape, names):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


class Holder(nn.Module):
    """Parameters of any shape, each in a module of its own: 2-D Linears, stacks, convolutions."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, self.module(shape))
        number(self)

    @staticmethod
    def module(shape):
        if isinstance(shape, nn.Module):
            return shape
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias=False)
        inner = nn.Module()
        inner.weight = nn.Parameter(torch.empty(shape))
        inner.experts = True
        return inner


def number(model):
    """Every element of every parameter another number, exact in float32."""
    count = 1.0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(count, count + p.numel()).view(p.shape))
            count += p.numel()


class Doubling(MatrixTask):
    """Directions are twice the matrices; which must be the true ones."""

    def __init__(self, views, outputs, layouts, truths):
        self.views, self.outputs, self.layouts, self.truths = views, outputs, layouts, truths
        self.owned = []

    def update_input(self, pieces):
        return [self.views[piece] for piece in pieces]

    def direction(self, matrices, which):
        for i, matrix in zip(which, matrices, strict=True):
            name = self.layouts[i].matrix.name
            assert torch.equal(matrix, self.truths[name]), name
            self.owned.append(name)
        return 2 * matrices

    def slab_direction(self, slabs, reduction):
        raise AssertionError("no matrix is in slabs")

    def apply(self, pieces, directions):
        for piece, part in zip(pieces, directions, strict=True):
            self.outputs[piece].copy_(part)


def local(p):
    return (p.to_local() if isinstance(p, DTensor) else p).detach()


def check_runs(layout, rank, tensors, truth, covered):
    """What the layout says this rank has of a matrix, element by element, against its tensors."""
    matrix = layout.matrix
    seen = torch.zeros(matrix.shape)
    for tile in layout.tiles:
        seen[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] += 1
        start, length = run_of(tile, rank)
        if not length:
            continue
        at = max(0, tile.cut.run(rank)[0] - tile.offset)
        block = truth[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
        mine = tensors[tile.tensor].reshape(-1)[start : start + length]
        assert torch.equal(mine, block.reshape(-1)[at : at + length]), matrix.name
        covered[tile.tensor][start : start + length] += 1
    assert (seen == 1).all(), matrix.name  # the tiles are the matrix


def inspect(model, wholes, group=None, **options):
    """(ranks of the group, ranks of the replicas, owners of) each matrix; after all was checked.

    ``wholes``: the parameters before they were sharded, by name.
    """
    found = spectral_dist.param_groups(model, **options)
    optimizer = spectral_dist.Muon(found, lr=0.1, process_group=group, bucket_mb=1e-4)
    result = {}
    for param_group in optimizer.param_groups:
        if param_group["kind"] != "matrix":
            continue
        routes = optimizer.routes[param_group["id"]]
        truths = {
            m.name: torch.cat([
                wholes[route.name].reshape(-1)[start : start + rows * m.shape[1]]
                for start, rows in m.blocks
            ]).view(m.shape)
            for route in routes for m in route.matrices
        }  # fmt: skip
        units = optimizer.units(param_group)
        assert sorted(i for u in units for i in u.tensors) == list(
            range(len(param_group["params"]))
        )
        for unit in units:
            tensors = [local(param_group["params"][i]) for i in unit.tensors]
            covered = [torch.zeros(t.numel()) for t in tensors]
            placement, layouts = unit.located, unit.located.layouts
            rank = collectives.rank(placement.group)
            for layout in layouts:
                check_runs(layout, rank, tensors, truths[layout.matrix.name], covered)
            assert all((c == 1).all() for c in covered)
            outputs = [torch.zeros_like(t) for t in tensors]
            views = unit.exchange.local_runs.views
            task = Doubling(views(tensors), views(outputs), layouts, truths)
            unit.exchange.run(task)
            for out, tensor in zip(outputs, tensors, strict=True):
                assert torch.equal(out, 2 * tensor)
            ranks = [[dist.get_rank()] if g is None else dist.get_process_group_ranks(g)
                     for g in (placement.group, placement.replicas)]  # fmt: skip
            here = collectives.rank(placement.replicas) * len(ranks[0]) + rank
            for layout, owner in zip(layouts, unit.plan.owners, strict=True):
                assert (layout.matrix.name in task.owned) == (owner == here)
                result[layout.matrix.name] = (*ranks, owner)
    return result


def wholes_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
