"""Models of a few named children, and what classify says of their parameters."""

from __future__ import annotations

from torch import nn

V = 61


class ModelOf(nn.Module):
    """Children by keyword, in their order."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def blocks(*sizes):
    return nn.ModuleList(ModelOf(up=nn.Linear(8, n), down=nn.Linear(n, 8)) for n in sizes)


def linear(rows, cols=4):
    return nn.Linear(cols, rows, bias=False)
