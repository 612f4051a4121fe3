"""The optimizers that users name: each is a rule with its options."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_dist import calibrate
from spectral_dist.groups import Route
from spectral_dist.optimizer import SpectralOptimizer
from spectral_dist.options import MuonOptions, PolarGradOptions, ROOTOptions, SUMOOptions
from spectral_dist.polar import fit, stability
from spectral_dist.rules import muon, polargrad, root, sumo
from spectral_dist.sharding import collectives


class Muon(SpectralOptimizer):
    """``SpectralOptimizer`` by Muon's rule; ``spectral_dist.options.MuonOptions``."""

    rule, option_type = muon.Muon(), MuonOptions


class PolarGrad(SpectralOptimizer):
    """``SpectralOptimizer`` by PolarGrad's rule; ``spectral_dist.options.PolarGradOptions``."""

    rule, option_type = polargrad.PolarGrad(), PolarGradOptions


class ROOT(SpectralOptimizer):
    """``SpectralOptimizer`` by ROOT's rule; ``spectral_dist.options.ROOTOptions``.

    Its coefficients are in the groups, shape by shape, and so in checkpoints. With ``adapt_every``
    k, the spectra that owners hold in every k-th step are pooled over ranks, and the coefficients
    fitted to them serve from the next step on.
    """

    rule, option_type = root.ROOT(), ROOTOptions
    options: ROOTOptions

    def complete(self, options: dict[str, Any], routes: Sequence[Route]) -> dict[str, Any]:
        """Coefficients for each shape of a group, by the name or file that it was given."""
        if options["kind"] == "matrix" and isinstance(options["coefficients"], str):
            shapes = {m.shape for route in routes for m in route.matrices}
            options["coefficients"] = coefficients(
                options["coefficients"], sorted(shapes), options["polar_steps"]
            )
        return options

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As every optimizer's; every ``adapt_every``-th one adapts the coefficients after it."""
        every = self.options.adapt_every
        if not every or (self.steps_taken() + 1) % every:
            return super().step(closure)
        self._check_whole()
        spectra = Spectra(self)
        self.observers.append(spectra)
        before = self.steps_taken()
        try:
            loss = super().step(closure)
        finally:
            self.observers.remove(spectra)
        if self.steps_taken() > before:
            self._adapt(spectra)
        return loss

    def _check_whole(self) -> None:
        """ValueError if a step gets a part of a group: coefficients would change in its middle."""
        for group in self.param_groups:
            if group["kind"] == "matrix" and group["params"]:
                here = sum(len(unit.placement.layouts) for unit in self.units(group))
                if here < sum(len(route.matrices) for route in self.routes[group["id"]]):
                    raise ValueError(
                        f"adapt_every is {self.options.adapt_every}, but ZeRO-3 steps on a part of"
                        " the matrices at a time; set zero_optimization.sub_group_size above the"
                        " number of parameters, or adapt_every to 0"
                    )

    def _adapt(self, spectra: Spectra) -> None:
        """Refit every shape that any rank has seen; the same everywhere, from the same sums."""
        counts = spectra.pooled(self)
        for key, weights in zip(spectra.keys, counts, strict=True):
            if not weights.any():
                continue
            for group in self.param_groups:
                table = group.get("coefficients", {})
                if key in table:
                    start = tuple(table[key])
                    steps = group["polar_steps"]
                    table[key] = list(fit.fit(spectra.centers, weights, steps=steps, start=start))


class SUMO(SpectralOptimizer):
    """``SpectralOptimizer`` by SUMO's rule; ``spectral_dist.options.SUMOOptions``."""

    rule, option_type = sumo.SUMO(), SUMOOptions

    def complete(self, options: dict[str, Any], routes: Sequence[Route]) -> dict[str, Any]:
        """Say which matrices have no smaller subspace at this rank."""
        if options["kind"] == "matrix":
            matrices = [m for route in routes for m in route.matrices]
            full = [m for m in matrices if sumo.rank_of(options, m.shape) == min(m.shape)]
            if full:
                names = ", ".join(m.name for m in full[:3]) + ", ..." * (len(full) > 3)
                warnings.warn(
                    f"SUMO with rank {options['rank']} has no smaller subspace in {len(full)} of"
                    f" {len(matrices)} matrices ({names}): there it is Muon with an exact polar"
                    " factor, and keeps a momentum as large as the matrix",
                    stacklevel=5,
                )
        return options

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's.

        Raises:
            ValueError: it was saved with another rank, of which the state has not the shape.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            ranks = own.get("rank"), saved.get("rank")
            if own["kind"] == saved.get("kind") and ranks[0] != ranks[1]:
                raise ValueError(
                    f"rank is {ranks[0]} here, but {ranks[1]} in the checkpoint; write the rank"
                    " that it was saved with"
                )
        super().load_state_dict(state_dict)


class Spectra:
    """Counts of the singular values of what is orthogonalized, shape by shape, in 512 bins."""

    BINS = 512
    LOWEST = 1e-5

    def __init__(self, optimizer: SpectralOptimizer) -> None:
        shapes = {root.shape_key(m.shape) for r in optimizer.all_routes for m in r.matrices}
        self.keys = sorted(shapes)
        edges = torch.logspace(torch.tensor(self.LOWEST).log10().item(), 0.0, self.BINS + 1)
        self.edges = edges.double()
        self.centers = (self.edges[:-1] * self.edges[1:]).sqrt()
        self.counts: dict[str, Tensor] = {}

    def __call__(self, names: Sequence[str], matrices: Tensor) -> None:
        """Count those of (k, m, n), each matrix scaled to Frobenius norm 1."""
        values = calibrate.singular_values(matrices)
        bins = torch.bucketize(values, self.edges.to(values.device)).clamp_(1, self.BINS) - 1
        found = torch.zeros(self.BINS, dtype=torch.float64, device=values.device)
        # what is below stays small whatever the coefficients
        found.scatter_add_(0, bins.flatten(), (values >= self.LOWEST).double().flatten())
        key = root.shape_key(matrices.shape[-2:])
        self.counts[key] = self.counts.get(key, 0.0) + found

    def pooled(self, optimizer: SpectralOptimizer) -> Tensor:
        """(shapes, bins) of all ranks, float64 on the CPU, by one reduction."""
        none = torch.zeros(self.BINS, dtype=torch.float64)
        device = next((c.device for c in self.counts.values()), none.device)
        table = torch.stack([self.counts.get(key, none.to(device)) for key in self.keys])
        table = table.to(optimizer.device)
        for group in optimizer.placer.everyone():
            collectives.sum_ranks(table, group, optimizer.meter)
        return table.cpu()


def coefficients(
    source: str, shapes: Sequence[tuple[int, int]], steps: int
) -> dict[str, list[float]]:
    """ "MINxMAX" -> (a, b, c) for each shape: ``source`` is 'published', 'jordan' or a file.

    As in the paper, a shape that is not published gets jordan's. A published triple that diverges
    is replaced by it as well, with a warning. ValueError: a file that cannot be read, is not sound,
    is for another number of steps or lacks a shape.
    """
    published = {"published": calibrate.PUBLISHED, "jordan": {}}
    table = published[source] if source in published else calibrate.read(source, steps)
    chosen: dict[str, list[float]] = {}
    for shape in shapes:
        name = root.shape_key(shape)
        if source not in published and (min(shape), max(shape)) not in table:
            raise ValueError(
                f"coefficients: {source} has none for {name}; run `spectral-dist calibrate` with"
                f" --shape {name}, or with the model's --model"
            )
        row = calibrate.choose(shape, table)
        try:
            stability.check_fixed(row)
        except ValueError as error:
            warnings.warn(
                f"coefficients: ROOT's published triple for {name} is unsafe, so jordan's"
                f" {calibrate.FALLBACK} is used instead; `spectral-dist calibrate` makes a better"
                f" one. {error}",
                stacklevel=5,
            )
            row = calibrate.FALLBACK
        chosen[name] = list(row)
    return chosen
