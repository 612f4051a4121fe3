"""Where a rank stores the elements of a tile, for tests that compare them with a definition."""

from __future__ import annotations

from spectral_dist.sharding.layout import Tile


def length_of(tile: Tile, rank: int) -> int:
    """Return how many elements of a tile a rank stores."""
    begin, end = tile.part(rank)
    return end - begin


def run_of(tile: Tile, rank: int) -> tuple[int, int]:
    """Return (first element in the rank's local tensor, length) of a tile without a pitch."""
    assert not tile.pitch
    return tile.local(tile.part(rank)[0], rank), length_of(tile, rank)
