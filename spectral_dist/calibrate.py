"""AdaNewton's coefficients for each shape of matrix: fitted, recorded for, kept in a JSON file.

ROOT, arXiv 2511.20626. The file:

    {"steps": 5, "coefficients": {"512x2048": [a, b, c], ...},
     "origin": {"512x2048": {"error": .., "jordan": .., "spectra": ..}, ...}}

``error`` and ``jordan`` are the relative errors to the exact polar factor that (a, b, c) and
jordan's coefficients have on the singular values that were fitted to; ``spectra`` says how many
captured spectra were among these.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.polar.coefficients import Shape, check_row, key, parse_shape, read, row_of_shape
from spectral_dist.polar.fit import FALLBACK, PUBLISHED, fit, random_spectrum, relative_error
from spectral_dist.polar.schedules import Row
from spectral_dist.polar.spectra import singular_values
from spectral_dist.polar.stability import check_fixed

__all__ = [
    "FALLBACK",
    "PUBLISHED",
    "Calibration",
    "Recorder",
    "calibrate",
    "key",
    "parse_shape",
    "read",
    "row_of_shape",
    "singular_values",
]

REAL_SHARE = 0.25
"""The weight of captured spectra where there are any; the rest is that of random matrices, as in
the paper, which has 1:3."""

_FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """The coefficients fitted to one shape, and how good they are.

    Attributes:
        row: (a, b, c).
        error: the row's relative error on what it was fitted to.
        jordan: jordan's relative error on the same.
        spectra: captured spectra among what it was fitted to; 0: random matrices alone.
    """

    row: Row
    error: float
    jordan: float
    spectra: int


@explained
def calibrate(shape: Sequence[int], spectra: Tensor | None = None, steps: int = 5) -> Calibration:
    """Fit the coefficients of one shape, to random matrices and to captured spectra.

    Captured spectra, where there are any, have a weight of one part in four.

    Args:
        shape: (m, n) in any orientation.
        spectra: singular values over the Frobenius norm of their matrix, one matrix a row, (k,
            min), as ``Recorder`` keeps them.
        steps: number of steps that the coefficients are for.

    Raises:
        ValueError: as in ``polar.fit``.
    """
    sigmas, weights = fit_data(shape, spectra)
    row = fit(sigmas, weights, steps=steps)
    error = relative_error(sigmas, row, steps, weights)
    jordan = relative_error(sigmas, FALLBACK, steps, weights)
    return Calibration(row, error, jordan, 0 if spectra is None else len(spectra))


def fit_data(shape: Sequence[int], spectra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the singular values and weights that ``calibrate`` fits to: float64, of one length."""
    gaussian = random_spectrum(shape)
    if spectra is None or spectra.numel() == 0:
        return gaussian, torch.full_like(gaussian, 1.0 / len(gaussian))
    captured = _quantiles(spectra)
    shares = [(captured, REAL_SHARE), (gaussian, 1.0 - REAL_SHARE)]
    weights = [torch.full_like(values, share / len(values)) for values, share in shares]
    return torch.cat([captured, gaussian]), torch.cat(weights)


def published_error(shape: Sequence[int], spectra: Tensor | None, steps: int) -> str:
    """Return the relative error of ROOT's own row for the shape, as text for a table.

    The text ends with * if the row is unstable, and is - if ROOT has published none.

    Args:
        shape: (m, n) in any orientation.
        spectra: as ``calibrate`` takes them.
        steps: number of steps.
    """
    row = PUBLISHED.get((min(shape), max(shape)))
    if row is None:
        return "-"
    sigmas, weights = fit_data(shape, spectra)
    text = f"{relative_error(sigmas, row, steps, weights):.4f}"
    try:
        check_fixed(row)
    except ValueError:
        text += "*"
    return text


def _quantiles(spectra: Tensor, count: int = 2048) -> Tensor:
    """Return at most ``count`` quantiles of all singular values in ``spectra``."""
    values = spectra.detach().to("cpu", torch.float64).reshape(-1).sort().values
    if len(values) <= count:
        return values
    positions = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(values)
    return values[positions.long()]


@explained
def write(path: Path | str, calibrations: Mapping[Shape, Calibration], steps: int) -> None:
    """Write a coefficients file, all of it or nothing.

    Args:
        path: of the file.
        calibrations: the coefficients by shape.
        steps: number of steps that they are for.

    Raises:
        ValueError: coefficients are unstable, or the file cannot be written.
    """
    for shape, calibration in calibrations.items():
        check_row(calibration.row, key(shape))
    ordered = sorted((min(shape), max(shape), c) for shape, c in calibrations.items())
    origins = {}
    for short, long, calibration in ordered:
        origins[key((short, long))] = asdict(calibration)
        del origins[key((short, long))]["row"]
    content = {
        "steps": steps,
        "coefficients": {key((short, long)): list(c.row) for short, long, c in ordered},
        "origin": origins,
    }
    _replace(Path(path), lambda new: new.write_text(json.dumps(content, indent=2) + "\n", "utf-8"))


class Recorder:
    """Keeps the normalised singular values of what is orthogonalized during training.

    Call it with the names and the batch (k, m, n) of the matrices that are about to be
    orthogonalized; it reads them and changes nothing. Of each name the first, the ``every``-th
    further, ... matrix is recorded, at the cost of an eigvalsh of its short side in float64. The
    spectra are pooled by shape, and where there are more than ``limit`` a uniform sample is kept.
    Matrices that are zero or not finite are left out.

    Attributes:
        path: where ``save`` and ``load`` go unless told otherwise.
        every: calls with a name from one recorded matrix to the next.
        limit: the most spectra of a shape that are kept.
    """

    @explained
    def __init__(self, path: Path | str | None = None, every: int = 100, limit: int = 256) -> None:
        for name, value in (("every", every), ("limit", limit)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
        self.path, self.every, self.limit = path, every, limit
        self._calls: dict[str, int] = {}
        self._kept: dict[Shape, list[Tensor]] = {}
        self._offered: dict[Shape, int] = {}
        self._random = random.Random(0)

    @explained
    @torch.no_grad()
    def __call__(self, names: Sequence[str], x: Tensor) -> None:
        """Keep the spectra of the matrices whose turn it is.

        Args:
            names: of the k matrices.
            x: (k, m, n), any floating dtype and device.

        Raises:
            ValueError: there is not one name for each matrix.
        """
        if x.ndim != 3 or len(names) != len(x):
            raise ValueError(
                f"{len(names)} names for x of shape {tuple(x.shape)}; give one for each"
            )
        due = []
        for i, name in enumerate(names):
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if call % self.every == 0:
                due.append(i)
        if due and x.numel():
            for values in singular_values(x[due]).cpu():
                if values.any():
                    self._offer((min(x.shape[1:]), max(x.shape[1:])), values)

    @property
    def spectra(self) -> dict[Shape, Tensor]:
        """Return the recorded spectra by (min, max).

        Each is (count, min) float64; rows are ascending and of norm 1.
        """
        return {shape: torch.stack(kept) for shape, kept in sorted(self._kept.items())}

    @explained
    def save(self, path: Path | str | None = None) -> None:
        """Write what was recorded to a file for ``load``, ``read_spectra`` or torch.load.

        Raises:
            ValueError: there is no path, or no such folder.
        """
        content = {"format": _FORMAT, "spectra": {key(s): v for s, v in self.spectra.items()}}
        _replace(self._resolve_path(path), lambda new: torch.save(content, new))

    @explained
    def load(self, path: Path | str | None = None) -> None:
        """Add the spectra of a file, as if they had been recorded here.

        Raises:
            ValueError: there is no path, or no such file.
        """
        for shape, rows in read_spectra([self._resolve_path(path)]).items():
            for values in rows:
                self._offer(shape, values)

    def _resolve_path(self, path: Path | str | None) -> Path:
        """Return the path of ``save`` and ``load``."""
        path = self.path if path is None else path
        if path is None:
            raise ValueError("Recorder has no path; write save(path), or Recorder(path)")
        return Path(path)

    def _offer(self, shape: Shape, values: Tensor) -> None:
        """Keep a spectrum, or let chance decide which one it replaces, if any.

        Every spectrum that was offered is kept with the same probability.
        """
        kept = self._kept.setdefault(shape, [])
        self._offered[shape] = self._offered.get(shape, 0) + 1
        if len(kept) < self.limit:
            kept.append(values)
        elif (index := self._random.randrange(self._offered[shape])) < self.limit:
            kept[index] = values


@explained
def read_spectra(paths: Iterable[Path | str]) -> dict[Shape, Tensor]:
    """Read the spectra of all files that ``Recorder.save`` wrote.

    Returns:
        (count, min) float64 by (min, max).

    Raises:
        ValueError: a file cannot be read or is no such file; names it.
    """
    rows_by_shape: dict[Shape, list[Tensor]] = {}
    for path in paths:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            is_ours = content["format"] == _FORMAT
            spectra = dict(content["spectra"])
        except OSError as error:
            raise ValueError(f"cannot read the spectra {path}: {error}") from None
        except Exception:  # of any kind; for some of them torch advises to trust the file
            is_ours, spectra = False, {}
        if not is_ours:
            raise ValueError(
                f"cannot read the spectra {path}: spectral_dist.calibrate.Recorder did not save it"
            )
        for name, rows in spectra.items():
            shape = parse_shape(name, f"{path}: ")
            has_shape = isinstance(rows, Tensor) and rows.ndim == 2 and rows.shape[1] == shape[0]
            if not has_shape or not bool(((rows >= 0.0) & (rows <= 1.0 + 1e-6)).all()):
                raise ValueError(
                    f"{path}: {name}: expected rows of {shape[0]} singular values in [0, 1]"
                )
            rows_by_shape.setdefault(shape, []).append(rows.double())
    return {shape: torch.cat(rows) for shape, rows in sorted(rows_by_shape.items())}


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that ``path`` is never half of one.

    Args:
        path: of the file.
        write_to: writes the content to the path that it gets.

    Raises:
        ValueError: the file cannot be written.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write_to(new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError for a missing folder
        new.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error}") from None
