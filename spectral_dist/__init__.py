"""Orthogonalized optimizers for large-scale training, exact under every way a model is sharded."""

from spectral_dist import calibrate, checkpoint, monitor, poet
from spectral_dist._version import __version__
from spectral_dist.groups import param_groups, tag
from spectral_dist.integrations.fsdp import MeshPlacer
from spectral_dist.optimizer import SpectralOptimizer
from spectral_dist.optimizers import ROOT, SUMO, Muon, PolarGrad
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules.adamw import BACKENDS, Update

__all__ = [
    "POET",
    "ROOT",
    "SUMO",
    "Muon",
    "PolarGrad",
    "__version__",
    "calibrate",
    "checkpoint",
    "monitor",
    "param_groups",
    "poet",
    "tag",
]


def _apex() -> Update:
    from spectral_dist.integrations.apex import FusedAdamW

    return FusedAdamW()


# Here, above all floors, since those below may not know integrations/.
BACKENDS["apex"] = _apex
SpectralOptimizer.placer_type = MeshPlacer
