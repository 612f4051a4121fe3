"""The report of a merge: how far rotations had turned, and how W's singular values changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectral_dist._host_copy import HostCopy
from spectral_dist.monitor import Monitor, Report
from spectral_dist.poet import cayley
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter

QUANTITIES = {
    "skew_norm": "the largest ||Q||_2 of the layer's blocks, as they were merged",
    "rotation_error": "the largest ||G G^T - I||_F / sqrt(b) of its blocks",
    "singular_value_drift": "max |s / s0 - 1| of W's singular values over the merge",
}
LIMIT = 0.5
"""The ||Q||_2 above which a warning is given: at 1 the Cayley-Neumann series no longer is Cayley's
map."""


def rotations(layer: PoetLayer, skews: Mapping[str, Tensor]) -> Tensor:
    """Return (skew_norm, rotation_error) of the blocks on this rank, (2,) float32; no host sync.

    Args:
        layer: before it is merged.
        skews: all of this rank's skew parameters of the layer, by name.
    """
    packed = [skews[rotation.skew] for rotation in layer.rotations]
    blocks = [rotation.block for rotation in layer.rotations]
    norms, errors = [], []
    for block, rows in cayley.by_size(packed, blocks).items():
        change = cayley.delta(rows, block, layer.settings.order)
        norms.append(cayley.norms(rows, block).max())
        errors.append(cayley.orthogonality_errors(change).max())
    return torch.stack([torch.stack(norms).max(), torch.stack(errors).max()]).float()


def max_over_ranks(layers: Sequence[PoetLayer], numbers: Sequence[Tensor], meter: Meter) -> Tensor:
    """Return the results of ``rotations``, maximal over all ranks that have a tile of the layer.

    One reduction for all layers that are cut over the same ranks; it does not wait for the device.

    Args:
        layers: of the model.
        numbers: of each layer, (2,).
        meter: counts the bytes.

    Returns:
        (layers, 2).
    """
    rows = list(numbers)
    for group in {id(layer.group): layer.group for layer in layers}.values():
        members = [i for i, layer in enumerate(layers) if layer.group is group]
        largest = torch.stack([numbers[i] for i in members])
        collectives.max_ranks(largest, group, meter)
        for i, row in zip(members, largest.unbind(), strict=True):
            rows[i] = row
    return torch.stack(rows)


def drift(before: Tensor, after: Tensor) -> Tensor:
    """Return max |s / s0 - 1| between the singular values of two matrices, computed in float64.

    Singular values that are zero in float32, as all are of a layer that starts from zero, are left
    out.
    """
    s0, s = (torch.linalg.svdvals(w.double()) for w in (before, after))
    is_null = s0 <= torch.finfo(torch.float32).eps * max(before.shape) * s0.amax()
    largest: Tensor = (s / s0 - 1).masked_fill(is_null, 0.0).abs().max().float()
    return largest


class MergeReport:
    """The numbers of a merge, on their way to the host.

    On a GPU they are copied without waiting for it, and are written when they have arrived.
    """

    def __init__(
        self, layers: Sequence[PoetLayer], numbers: Tensor, drifts: Sequence[Tensor], step: int
    ) -> None:
        """Begin to copy the numbers.

        Args:
            layers: of the model.
            numbers: skew_norm and rotation_error of each layer, (layers, 2).
            drifts: of each layer, if a monitor watches.
            step: of the merge.
        """
        self.keys, self.step = [layer.key for layer in layers], step
        columns = [numbers, torch.stack(list(drifts)).unsqueeze(1)] if drifts else [numbers]
        self.table = HostCopy(torch.cat(columns, 1))

    def is_here(self) -> bool:
        """Return whether ``write`` would not wait."""
        return self.table.is_here()

    def write(self, monitor: Monitor | None) -> None:
        """Warn of rotations that went too far; write all numbers to the monitor's sinks.

        It waits for the copy.

        Args:
            monitor: or None.
        """
        rows = self.table.values().tolist()
        norms = [(row[0], key) for key, row in zip(self.keys, rows, strict=True)]
        largest, name = max(norms)
        if not largest < LIMIT:
            count = sum(not norm < LIMIT for norm, _ in norms)
            warnings.warn(
                f"POET: at the merge after step {self.step} ||Q|| was {largest:.2f} in {name},"
                f" above {LIMIT} in {count} of {len(norms)} layers; at 1 the series of the rotation"
                " no longer is one. Lower lr or merge_every, or convert with order='exact'",
                stacklevel=5,
            )
        if monitor is None or not collectives.is_first():
            return
        columns = zip(*rows, strict=True)
        report: Report = {
            name: dict(zip(self.keys, values, strict=True))
            for name, values in zip(QUANTITIES, columns, strict=True)
        }
        for sink in monitor.sinks:
            sink(self.step, report)
