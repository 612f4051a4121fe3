"""POET: train rotations of frozen weights (arXiv 2506.08001, 2603.05500).

poet.convert(model) before a framework gets it, then ``spectral_dist.POET``; ``poet.export`` at the
end.
"""

from spectral_dist.poet.convert import convert, export
from spectral_dist.poet.layer import PoetLayer, PoetLinear, Settings

__all__ = ["PoetLayer", "PoetLinear", "Settings", "convert", "export"]
