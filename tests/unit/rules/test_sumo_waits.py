"""SUMO's step on an accelerator waits for nothing: seen on the meta device, which has no numbers.

What would be copied from the host shows there as an operator of tensors of both devices, and what
would be read as an error.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectral_dist.core.matrix_ops import StepContext, WholeMatrixOps
from spectral_dist.rules.sumo import SUMO, SUMOOptions, is_refresh_step

MATRICES, SHAPES = 6, [(96, 48), (48, 96), (64, 64)]
WAITS = ("_local_scalar_dense", "nonzero", "equal", "linalg_eigh", "linalg_svd", "check_errors")
"""Parts of the names of operators that wait for a device."""


class Watch(TorchDispatchMode):
    """Counts operators on the meta device, and keeps those that wait or copy from the host."""

    def __init__(self):
        super().__init__()
        self.launched, self.waits = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if "meta" in devices:
            self.launched[func.overloadpacket.__name__] += 1
            if len(devices) > 1 or any(part in str(func) for part in WAITS):
                self.waits.append(str(func))
        return out


def batch(options, shape, step):
    """A batch on the meta device whose matrices have taken this many steps."""
    rule, names = SUMO(), [f"layer{k}" for k in range(MATRICES)]
    state = {
        name: torch.zeros(
            MATRICES, *spec.shape, dtype=spec.dtype or torch.float32,
            device="cpu" if spec.dtype == torch.int64 else "meta",
        )
        for name, spec in rule.state(options, shape).items()
    }  # fmt: skip
    state["step"].fill_(step)
    return rule, WholeMatrixOps(StepContext(rule, options, names), range(MATRICES), shape, state)


def seen(options, shape, step):
    rule, ops = batch(options, shape, step)
    with Watch() as watch:
        d = rule.direction(options, torch.empty(MATRICES, *shape, device="meta"), ops)
    assert d.shape == (MATRICES, *shape)
    assert ops.state["step"].tolist() == [step + 1] * MATRICES
    return watch


@pytest.mark.parametrize("rank", [0.25, 3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.fast_cases("shape0-0.25", "shape1-3")
def test_no_step_waits(shape, rank):
    """Neither a step in between nor one with new bases, of some matrices or of all."""
    options = SUMOOptions(lr=0.02, rank=rank, period=8)
    counts = set()
    for step in range(3, 11):
        counts.add(sum(is_refresh_step(options, f"layer{k}", step) for k in range(MATRICES)))
        assert seen(options, shape, step).waits == []
    assert 0 in counts
    assert len(counts) > 1
    assert seen(SUMOOptions(lr=0.02, rank=rank, period=1), shape, 3).waits == []


def test_the_first_steps_read_which_matrices_have_begun():
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        seen(SUMOOptions(lr=0.02), (96, 48), 0)


@pytest.mark.parametrize("waiting", [{"basis": "svd"}, {"refresh_below": 0.1}])
def test_options_that_wait_do(waiting):
    """So the watch sees it."""
    options = SUMOOptions(lr=0.02, period=1, **waiting)
    try:
        assert any("eigh" in name for name in seen(options, (96, 48), 3).waits)
    except NotImplementedError:
        assert "refresh_below" in waiting


def test_launches_of_a_step_do_not_grow_with_the_batch():
    """40 of the products' schedule, and a few beside them, for all matrices of a batch at once."""
    options = SUMOOptions(lr=0.02, period=10**9)
    watch = seen(options, (2048, 2048), 3)
    products = watch.launched["bmm"] + watch.launched["baddbmm"]
    assert products <= 45, watch.launched
    assert sum(watch.launched.values()) <= 160, watch.launched
