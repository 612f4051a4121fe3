"""How far two steps move a matrix when the gradient is clipped: ours and DeepSpeed's own Muon.

    .venv/bin/python -m benchmarks.clipping

Orthogonalized updates do not depend on the gradient's size, so the ratio to the unclipped run is
right at 1. DeepSpeed 0.19.8's Muon clips the orthogonalized update instead. CPU, 2 ranks, ZeRO-1.
"""

from __future__ import annotations

from tests.support import harness
from tests.support.clipping import moves

if __name__ == "__main__":
    for kind in ("SpectralMuon", "Muon"):
        free = harness.run(2, moves, 1, 0.0, kind, 2)[0]
        for clip in (1.0, 0.1, 0.01):
            clipped = harness.run(2, moves, 1, clip, kind, 2)[0]
            ratios = [clipped[name] / free[name] for name in free]
            print(f"{kind:>12} clipped to {clip}: x {min(ratios):.3f} to {max(ratios):.3f}")
