"""Factors by which a rule multiplies its direction, by the shape of the whole matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

SCALES: dict[str, Callable[[int, int], float]] = {
    # RMS 0.2 for an orthogonal direction: AdamW's lr and decay carry over (2502.16982 eq. 4)
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}
"""Factor of the direction of a whole m x n (out x in) matrix."""
SCALE_ALIASES = {
    "moonlight": "match_rms_adamw",
    "shape_scaling": "original",
    "spectral_norm": "spectral",
    "unit_rms_norm": "spectral",
}
"""Other projects' names of scales, and ours."""
