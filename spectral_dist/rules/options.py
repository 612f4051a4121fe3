"""Options that several optimizers have: frozen dataclasses, from which a rule's own derives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch

from spectral_dist import polar
from spectral_dist._errors import suggest
from spectral_dist.machine import Machine
from spectral_dist.polar import DTYPES, of_gram
from spectral_dist.rules.backends import BACKENDS
from spectral_dist.rules.fields import (
    betas_problem,
    choice,
    flag,
    number,
    option,
    plain,
    specs_of,
    whole,
)
from spectral_dist.rules.scales import SCALE_ALIASES, SCALES

STRATEGIES = {
    "auto": "gram where tensor parallelism has cut matrices so that it is faster; with a machine"
    " given split where it is faster; else owner",
    "owner": "one rank gets the whole matrix",
    "gram": "matrices stay cut along their long side, and Gram matrices travel",
    "split": "where there are fewer large matrices than ranks, several ranks share each",
    "block": "what each rank holds is orthogonalized alone, but for every block_period-th step",
}
ROUTING = ("matrices", "scalars", "split", "one_sided", "heads")
"""The options of ``param_groups``, which DeepSpeed's JSON takes beside those of the optimizer."""


def _wire_problem(value: object) -> str | None:
    """Return what is wrong with a dtype for sending, or None."""
    if value is None or value in ("float32", "bfloat16"):
        return None
    return "write 'float32' or 'bfloat16' (float16 would overflow unnormalised)"


def _machine_problem(value: object) -> str | None:
    """Return what is wrong with a machine's numbers, or None; ``Machine`` checks each of them."""
    if value is not None and not isinstance(value, Mapping):
        return "write numbers by name, as in {'bandwidth': 4e10}"
    return None


@dataclass(frozen=True)
class BaseOptions:
    """Options of every optimizer; every integration takes these names, with these defaults."""

    lr: float = number(1e-3, "Learning rate.", scope="all")
    weight_decay: float = number(0.1, "Decoupled weight decay, times lr.", scope="all")
    scalar_lr: float | None = number(
        None, "Learning rate of what AdamW trains; None: lr.", scope="optimizer"
    )
    scalar_weight_decay: float | None = number(
        None, "Weight decay of what AdamW trains; None: weight_decay.", scope="optimizer"
    )
    betas: tuple[float, float] = option(
        (0.9, 0.95), "AdamW's decay of its two moments.", betas_problem, scope="scalar"
    )
    eps: float = number(1e-8, "AdamW's addition to the denominator.", scope="scalar")
    scalar_backend: str = choice(
        "torch", BACKENDS, "What computes AdamW.", "backend", scope="optimizer"
    )
    check_finite: bool = flag(
        True, "Refuse NaN and infinite gradients, on every rank.", scope="optimizer"
    )

    @classmethod
    def from_user(cls, values: Mapping[str, Any], where: str = "options") -> Self:
        """Build options from keywords or JSON, and check them.

        Args:
            values: by name.
            where: who takes them, for errors.

        Raises:
            ValueError: an unknown name or a bad value.
        """
        known = specs_of(cls)
        for name in values:
            if not isinstance(name, str):
                raise ValueError(f"{where}: {name!r} is no name of an option; write names as text")
            if name in ROUTING:
                raise ValueError(
                    f"{where}: {name} decides which parameters are matrices, so it belongs to"
                    f" param_groups: {where}(spectral_dist.param_groups(model, {name}=...))"
                )
            if name not in known:
                raise ValueError(
                    f"{where}: unknown option {name!r}{suggest(name, {*known, *ROUTING})}"
                )
        options = cls(**{name: plain(value) for name, value in values.items()})
        try:
            object.__setattr__(options, "betas", tuple(map(plain, options.betas)))
        except TypeError:
            options.invalid(where, "betas", "write two numbers, as in [0.9, 0.95]")
        options.check(where)
        return options

    def invalid(self, where: str, name: str, what: str) -> NoReturn:
        """Raise the ValueError that a bad option gets.

        Args:
            where: who takes the option.
            name: of the option.
            what: what is wrong with its value, or what to write.
        """
        raise ValueError(f"{where}: {name} is {getattr(self, name)!r}; {what}")

    def check(self, where: str) -> None:
        """Check every value; subclasses add checks that concern several options.

        Args:
            where: who takes the options; errors begin with it.

        Raises:
            ValueError: for the first bad value.
        """
        for name, spec in specs_of(type(self)).items():
            problem = spec.problem(getattr(self, name))
            if problem:
                self.invalid(where, name, problem)

    @classmethod
    def names(cls, kind: str) -> frozenset[str]:
        """Return the names of the options that a parameter group of this kind carries."""
        specs = specs_of(cls).items()
        return frozenset(name for name, spec in specs if spec.scope in (kind, "all"))

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Return the kinds of parameters that the optimizer can have."""
        return ("scalar",)

    def group_fields(self, kind: str) -> dict[str, Any]:
        """Return the fields of a parameter group of one of ``kinds``, as plain values by name."""
        if kind == "scalar":
            return self.scalar_group()
        values = {name: getattr(self, name) for name in specs_of(type(self))}
        carried = {name: values[name] for name in values if name in self.names(kind)}
        return {"kind": kind, "lr_ratio": 1.0, **carried}

    def scalar_group(self) -> dict[str, Any]:
        """Return the fields of a parameter group that AdamW trains."""
        decay = self.scalar_weight_decay
        return {
            "kind": "scalar",
            "lr": self.lr,
            "lr_ratio": self.lr_ratio_of(self.scalar_lr, "scalar_lr"),
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay if decay is None else decay,
        }

    def lr_ratio_of(self, lr: float | None, name: str) -> float:
        """Return ``lr`` over the base lr: schedulers may then write one lr into every group.

        Args:
            lr: None is the base lr.
            name: of the option, for the error.

        Raises:
            ValueError: the base lr is 0, and ``lr`` is not.
        """
        if lr is None or lr == self.lr:
            return 1.0
        if self.lr == 0:
            raise ValueError(f"{name} is {lr}, but it is kept as a ratio to lr, which is 0; set lr")
        return lr / self.lr


@dataclass(frozen=True)
class MatrixOptions(BaseOptions):
    """Options of every optimizer that orthogonalizes matrices."""

    momentum: float = number(0.95, "Decay of the momentum.", below=1.0)
    wire_dtype: str | None = option(
        None, "Dtype in which matrices travel; None: bfloat16 if they are computed so, else that"
        " of momentum.", _wire_problem,
    )  # fmt: skip
    strategy: str = choice(
        "auto", STRATEGIES, "Where cut matrices are orthogonalized.", "strategy", scope="optimizer"
    )
    block_period: int = whole(
        5, "Under strategy 'block': every so many steps, whole matrices.", unit="steps",
        scope="optimizer",
    )  # fmt: skip
    machine: Mapping[str, float] | None = option(
        None, "Numbers of the machine, by which strategies, teams and exchanges are chosen.",
        _machine_problem, scope="optimizer",
    )  # fmt: skip
    bucket_mb: float = number(
        64.0, "MiB of matrices that a rank works on at a time.", above=True, scope="optimizer"
    )
    replicate_momentum: bool = flag(
        False, "Keep all momentum on every replica, and not at owners alone.", scope="optimizer"
    )

    def check(self, where: str) -> None:
        """Check all options, and those that have an effect under one strategy only.

        Raises:
            ValueError: names the option; begins with ``where``.
        """
        super().check(where)
        if self.block_period != MatrixOptions.block_period and self.strategy != "block":
            self.invalid(where, "block_period", "it has an effect with strategy='block' only")
        try:
            Machine.from_user(self.machine or {})
        except ValueError as error:
            raise ValueError(f"{where}: machine: {error}") from None

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Return the kinds of parameters that the optimizer can have."""
        return ("matrix", "scalar")


@dataclass(frozen=True)
class ComputedOptions(MatrixOptions):
    """Options of the optimizers that compute polar factors by polynomials."""

    polar_steps: int | None = option(
        None, "Steps of the polar method; None: its own number.", lambda value: None
    )
    polar_dtype: str = choice(
        "auto", ("auto", *DTYPES), "Dtype in which polar factors are computed.", "dtype"
    )


@dataclass(frozen=True)
class PolarOptions(ComputedOptions):
    """Options of the optimizers whose polar method can be chosen."""

    polar: str | Sequence[Sequence[float]] = option(
        "jordan", "Polar method, or a schedule of your own, [[a, b, c], ...].", lambda value: None
    )

    def check(self, where: str) -> None:
        """Check all options, and the polar method with its steps and dtype.

        Raises:
            ValueError: names the option; begins with ``where``.
        """
        super().check(where)
        try:
            polar.check(self.polar, self.polar_steps, self.polar_dtype)
            if self.strategy == "split" and polar.rows_of(self.polar, self.polar_steps) is None:
                raise ValueError(
                    f"polar is {self.polar!r}, which strategy 'split' does not share among ranks;"
                    " write a method of polynomials, as 'polar_express', or strategy='owner'"
                )
            if self.strategy == "gram":
                dtype = DTYPES.get(self.polar_dtype, torch.float32)
                of_gram.gram_dtype(self.polar, self.polar_steps, dtype)
        except ValueError as error:
            text = f"{'polar_' * str(error).startswith('steps')}{error}"
            text = text if "polar" in text else f"polar: {text}"
            in_slabs = "; or strategy='owner'" * ("Gram matrix" in text)
            raise ValueError(f"{where}: {text}{in_slabs}") from None


@dataclass(frozen=True)
class ScaledOptions(MatrixOptions):
    """Options of the optimizers whose direction is multiplied by a factor of the shape."""

    scale: str = choice(
        "match_rms_adamw", SCALES, "Factor of the direction.", "scale", SCALE_ALIASES
    )


@dataclass(frozen=True)
class NesterovOptions(ScaledOptions):
    """Options of the optimizers that orthogonalize a momentum."""

    nesterov: bool = flag(True, "Orthogonalize Nesterov's form of the momentum.")
