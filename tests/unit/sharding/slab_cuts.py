"""How the tests of ``gram`` cut matrices over ranks."""

from __future__ import annotations

from tests.support import sharded_model

SHAPES = {"wide": (12, 40), "wide2": (12, 40), "tall": (44, 10), "square": (16, 16), "row": (1, 9)}


def cuts(kind, ranks, shapes=None):
    """name -> (shape, parts), of each kind of cut."""
    found = {}
    for name, shape in (shapes or SHAPES).items():
        along = int(kind == "columns")
        if kind == "uneven":
            along = int(shape[1] > shape[0])
            size = shape[along]
            edges = [0, *([1] * (ranks > 2)), *[size // 3] * (ranks - 1 - (ranks > 2)), size]
            parts = sharded_model.strips(shape, ranks, along, edges)
        elif kind == "flat":
            parts = sharded_model.flat(shape, ranks)
        elif kind == "tp_flat":
            parts = sharded_model.tp_flat(shape, int(shape[0] == 1 or name == "tall"))
        elif kind == "groups":
            parts = sharded_model.strips(
                shape, ranks, int(shape[1] > shape[0]), groups=min(2, shape[0])
            )
        else:
            parts = sharded_model.strips(shape, ranks, along)
        found[name] = (shape, parts)
    return found
