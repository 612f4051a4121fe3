"""POET: train rotations of frozen weights (arXiv 2506.08001, 2603.05500).

Call ``poet.convert(model)`` before a framework gets the model, train it with
``spectral_dist.POET``, and call ``poet.export`` at the end.
"""

from spectral_dist.poet.convert import convert, export
from spectral_dist.poet.layer import PoetLayer, PoetLinear, Settings

__all__ = ["PoetLayer", "PoetLinear", "Settings", "convert", "export"]
