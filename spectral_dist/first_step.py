"""What a rule's first step must subtract from one whole matrix, for `spectral-dist doctor`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_dist.handles import Handle
from spectral_dist.polar import polar
from spectral_dist.polar.reductions import quantile
from spectral_dist.rules.muon import SCALES
from spectral_dist.rules.root import shape_key
from spectral_dist.rules.sumo import SUMO
from spectral_dist.sharding.layout import Matrix


def expected(options: dict[str, Any], g: Tensor, name: str) -> Tensor:
    """What the first step must subtract from a matrix over lr, from its gradient; float64."""
    shape = (g.shape[-2], g.shape[-1])
    if "rank" in options:  # SUMO
        return _first_of_sumo(options, g, name)
    size = SCALES[options["scale"]](*shape) if "scale" in options else 1.0
    if "coefficients" in options:  # ROOT
        limit = quantile(g.abs()[None], options["quantile"])
        rows = [options["coefficients"][shape_key(shape)]] * options["polar_steps"]
        return polar(g.clamp(-limit, limit), method=rows).mul_(size)
    factor = polar(g, method=options["polar"], steps=options["polar_steps"])
    if "nu_power" in options:  # PolarGrad: momentum is (1 - beta) G, or (1 - beta) U
        power, keeps = options["nu_power"], 1 - options["momentum"]
        size = (
            keeps ** (1 if options["polar_first"] else power) * float((g * factor).sum()) ** power
        )
    return factor.mul_(size)


def _first_of_sumo(options: dict[str, Any], g: Tensor, name: str) -> Tensor:
    """By the rule itself, on one whole matrix: a sketched subspace is no other's exactly."""
    rule, shape = SUMO(), (g.shape[-2], g.shape[-1])
    handle = Handle(options, [name], ())
    kept = rule.keeps(options, shape)
    state = {k: torch.zeros(1, *v.shape, dtype=v.dtype or torch.float32) for k, v in kept.items()}
    handle.take([0], shape, state)
    direction, _ = rule.direction(options, g.float().cpu()[None], handle)
    return direction[0].to(g)


def of(matrix: Matrix, parameter: Tensor) -> Tensor:
    """The matrix's elements of its parameter, float64."""
    flat, n = parameter.reshape(-1), matrix.shape[1]
    return torch.cat([flat[s : s + r * n] for s, r in matrix.blocks]).view(matrix.shape).double()


def how(options: dict[str, Any]) -> str:
    """Its polar factor is found, in a few words."""
    if "rank" in options:
        return f"of which SUMO's has rank {options['rank']}"
    return f"polar={options.get('polar', 'AdaNewton')}"
