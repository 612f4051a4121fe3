"""Learning rates of parameter groups: one for each group, or one for all."""

from __future__ import annotations

import warnings

from torch import Tensor

from spectral_dist.core.loading import Loading
from spectral_dist.placement.base import ParamGroup
from spectral_dist.rules.fields import plain


class Rates(Loading):
    """The part of ``ShardedOptimizer`` that concerns learning rates.

    ``group["lr"] * group["lr_ratio"]`` is what a step uses. In plain torch the ratio is 1.
    """

    copied = (*Loading.copied, "_built_rates")
    _built_rates: dict[int, float]
    _has_one_lr: bool

    def lr_of(self, group: ParamGroup) -> float:
        """Return the current learning rate of a group's parameters."""
        return float(plain(group["lr"]) * group["lr_ratio"])

    def rate(self, carried: ParamGroup) -> None:
        """Remember the learning rate of a new group.

        If the optimizer's lr is a tensor and the group has the same lr, the group shares the
        tensor: as with torch's optimizers, the user may write into it.
        """
        lr = self.defaults["lr"]
        self._built_rates[carried["id"]] = self.lr_of(carried)
        if isinstance(lr, Tensor) and carried["lr"] == self.options.lr:
            carried["lr"] = lr

    def share_one_lr(self) -> None:
        """Write the optimizer's lr into every group, and its ratio to that as ``lr_ratio``.

        It is for frameworks whose schedulers have one lr. Nothing is written if learning rates were
        changed since the optimizer was built, or a scheduler of torch has the groups: then each
        group keeps its own lr.

        Raises:
            ValueError: the optimizer's lr is zero, and a group's is not.
        """
        self._has_one_lr = True
        for group in self.param_groups:
            if "initial_lr" in group or self.lr_of(group) != self._built_rates[group["id"]]:
                return
        for group in self.param_groups:
            ratio = self.options.lr_ratio_of(self.lr_of(group), "a group's lr")
            group["lr"], group["lr_ratio"] = self.options.lr, ratio

    def warn_of_one_lr(self) -> None:
        """Warn, once, that groups which were built with different learning rates now have one."""
        if "lr" in self._warned or len(set(self._built_rates.values())) < 2:
            return
        if len(self.param_groups) < len(self._built_rates):
            return  # DeepSpeed's stages 1 and 2 step on one group at a time
        now = {self.lr_of(group) for group in self.param_groups}
        if len(now) == 1 and now != {0.0}:
            self._warned.add("lr")
            built = ", ".join(f"{rate:g}" for rate in self._built_rates.values())
            warnings.warn(
                f"the lr of every parameter group is {now.pop():g} now, but they were built with"
                f" {built}: each group's lr is its own here, so what writes one number into all of"
                " them undoes scalar_lr. Give the scheduler a list (OneCycleLR(max_lr=[...])), or"
                " write a multiple of each group's own",
                stacklevel=5,
            )
