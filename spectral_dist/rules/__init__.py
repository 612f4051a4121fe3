"""Rules: one optimizer's mathematics per file, on whole matrices.

What rules are written with can be imported from here.
"""

from spectral_dist.rules.base import MatrixOps, PolarSpec, Pooling, Rule, StateSpec
from spectral_dist.rules.fields import choice, flag, number, option, whole
from spectral_dist.rules.nesterov import NesterovRule
from spectral_dist.rules.options import (
    MatrixOptions,
    NesterovOptions,
    PolarOptions,
    ScaledOptions,
)
from spectral_dist.rules.registry import register

__all__ = [
    "MatrixOps",
    "MatrixOptions",
    "NesterovOptions",
    "NesterovRule",
    "PolarOptions",
    "PolarSpec",
    "Pooling",
    "Rule",
    "ScaledOptions",
    "StateSpec",
    "choice",
    "flag",
    "number",
    "option",
    "register",
    "whole",
]
