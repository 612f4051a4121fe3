"""AdamW for the non-matrices by FusedAdam of NVIDIA's apex (``scalar_backend: apex``)."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spectral_dist.rules.adamw import AdamWOptions

APEX_NEEDED = (
    "scalar_backend is 'apex', but {problem}. Build the real one from its source,"
    " github.com/NVIDIA/apex, with its CUDA extensions (--cpp_ext --cuda_ext); the package named"
    " apex on PyPI is an unrelated web toolkit. Or write scalar_backend: 'torch'"
)


def fused_adam() -> Any:
    """Return the class ``apex.optimizers.FusedAdam``.

    Raises:
        ValueError: apex is missing, is PyPI's unrelated package, or lacks its CUDA extensions.
    """
    if importlib.util.find_spec("apex") is None:
        raise ValueError(APEX_NEEDED.format(problem="apex is not installed"))
    try:
        spec = importlib.util.find_spec("apex.optimizers")
    except Exception:  # PyPI's apex of 2013 may fail in any way when it is imported
        spec = None
    if spec is None:
        raise ValueError(APEX_NEEDED.format(problem="the installed apex is not NVIDIA's"))
    try:
        importlib.import_module("amp_C")
        return importlib.import_module("apex.optimizers").FusedAdam
    except ImportError as error:
        raise ValueError(
            APEX_NEEDED.format(problem=f"its CUDA extensions do not load ({error})")
        ) from error


class FusedAdamW:
    """AdamW by apex's kernels, on the states of ``rules.adamw``, so that checkpoints agree."""

    def __init__(self) -> None:
        self.optimizer_class = fused_adam()
        self.optimizer: Any = None

    def __call__(
        self,
        options: AdamWOptions,
        lr: float,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        skip: Tensor | None = None,
    ) -> None:
        """Take one AdamW step in place, as ``rules.adamw.update`` does.

        The weights need not all have taken the same number of steps. Apex's kernels know no
        ``skip``, so that an optimizer with this backend never passes it.
        """
        assert skip is None
        by_step: dict[int, list[int]] = {}
        for i, state in enumerate(states):
            by_step.setdefault(int(state["step"]), []).append(i)
            state["step"] += 1
        if self.optimizer is None:
            self.optimizer = self.optimizer_class(list(weights), adam_w_mode=True)
        for step, indices in by_step.items():
            for i in indices:
                weights[i].grad = grads[i]
            self.optimizer.state = defaultdict(dict, {weights[i]: states[i] for i in indices})
            self.optimizer.param_groups = [
                {
                    "params": [weights[i] for i in indices],
                    "lr": lr,
                    "betas": options.betas,
                    "eps": options.eps,
                    "weight_decay": options.weight_decay,
                    "bias_correction": True,
                    "step": step,
                }
            ]
            self.optimizer.step()
