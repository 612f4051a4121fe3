"""Names, defaults and checks of every option, in this one place for all frameworks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NoReturn, Self

import torch

from spectral_dist import polar
from spectral_dist.polar import DTYPES, of_gram
from spectral_dist.rules.adamw import BACKENDS
from spectral_dist.rules.muon import SCALES
from spectral_dist.rules.sumo import BASES
from spectral_dist.sharding.cost import Machine

SCALE_ALIASES = {
    "moonlight": "match_rms_adamw",
    "shape_scaling": "original",
    "spectral_norm": "spectral",
    "unit_rms_norm": "spectral",
}
NOT_OF_MATRICES = (
    *("scalar_lr", "scalar_weight_decay", "betas", "eps"),  # of the rest
    *("strategy", "block_period", "machine", "scalar_backend", "check_finite", "bucket_mb",
      "replicate_momentum", "adapt_every"),  # of the optimizer as a whole
)  # fmt: skip
STRATEGIES = {
    "auto": "gram where tensor parallelism has cut matrices so that it is faster, else owner",
    "owner": "one rank gets the whole matrix",
    "gram": "matrices stay cut along their long side, and Gram matrices travel",
    "block": "what each rank holds is orthogonalized alone, but for every block_period-th step",
}
ROUTING = ("matrices", "scalars", "split", "one_sided")
"""Options of ``param_groups``, which DeepSpeed's JSON takes beside those of ``Options``."""


def suggest(word: str, words: Iterable[str]) -> str:
    """'; did you mean X?' if a name is near, then the list."""
    words = sorted(words)
    lowered = {w.lower(): w for w in words}
    near = difflib.get_close_matches(word.lower(), lowered, n=1)
    meant = f"; did you mean {lowered[near[0]]!r}?" if near else "."
    return f"{meant} Known: {', '.join(words)}."


def _no_whole_number(value: object, least: int) -> bool:
    return isinstance(value, bool) or not isinstance(value, int) or value < least


@dataclass(frozen=True)
class BaseOptions:
    """What every optimizer takes; every integration takes these names, with these defaults."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    scalar_lr: float | None = None
    scalar_weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    scalar_backend: str = "torch"
    check_finite: bool = True

    @classmethod
    def from_user(cls, given: Mapping[str, Any], where: str = "Muon") -> Self:
        """Options from keywords or JSON, checked; unknown names and bad values are ValueErrors."""
        known = {f.name for f in fields(cls)}
        for name in given:
            if name in ROUTING:
                raise ValueError(
                    f"{where}: {name} decides which parameters are matrices, so it belongs to"
                    f" param_groups: {where}(spectral_dist.param_groups(model, {name}=...))"
                )
            if name not in known:
                raise ValueError(
                    f"{where}: unknown option {name!r}{suggest(name, known.union(ROUTING))}"
                )
        values = dict(given)
        try:
            values["betas"] = tuple(values.get("betas", cls.betas))
        except TypeError:
            raise ValueError(
                f"{where}: betas is {values['betas']!r}; write two numbers, as in [0.9, 0.95]"
            ) from None
        options = cls(**values)
        options.check(where)
        return options

    def numbers(self) -> dict[str, tuple[float, float]]:
        """The options that are numbers, and their bounds: at least the first, below the second."""
        names = ("lr", "weight_decay", "scalar_lr", "scalar_weight_decay", "eps")
        return dict.fromkeys(names, (0.0, math.inf))

    def fail(self, where: str, name: str, what: str) -> NoReturn:
        """Raise the ValueError that a bad option gets."""
        raise ValueError(f"{where}: {name} is {getattr(self, name)!r}; {what}")

    def check(self, where: str) -> None:
        """ValueError for the first bad value; subclasses add their own."""
        fail = partial(self.fail, where)
        for name, (low, high) in self.numbers().items():
            value = getattr(self, name)
            if value is None and name.startswith("scalar_"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                hint = " (YAML and JSON read 1e-3 as text if it is quoted)" * isinstance(value, str)
                fail(name, f"it must be a number{hint}")
            if not low <= value < high:
                fail(name, f"it must be at least {low:g}" + f" and below {high:g}" * (high == 1.0))
        if len(self.betas) != 2 or not all(
            isinstance(b, int | float) and 0 <= b < 1 for b in self.betas
        ):
            fail("betas", "write two numbers in [0, 1), as in [0.9, 0.95]")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "str" and not isinstance(value, str):
                fail(field.name, "it must be a name")
            if field.type == "bool" and not isinstance(value, bool):
                fail(field.name, "it must be true or false")
        if self.scalar_backend not in BACKENDS:
            fail("scalar_backend", f"unknown backend{suggest(str(self.scalar_backend), BACKENDS)}")

    def group(self, kind: str) -> dict[str, Any]:
        """What a parameter group of this kind carries; plain values, so that checkpoints can.

        Raises:
            ValueError: this optimizer has no use for that kind.
        """
        if kind != "scalar":
            raise ValueError(
                "the model has been converted by spectral_dist.poet.convert, so its weights are"
                " frozen, and only spectral_dist.POET (SpectralPOET, spectral_poet) trains their"
                " rotations; name that one, or leave the conversion out"
                if kind == "skew"
                else "POET orthogonalizes no matrix; it trains the rotations of a model that"
                " spectral_dist.poet.convert(model) has converted: do that first, and name no"
                " matrices"
            )
        return self.scalar_group()

    def scalar_group(self) -> dict[str, Any]:
        """What a parameter group on AdamW carries."""
        decay = self.scalar_weight_decay
        return {
            "kind": "scalar",
            "lr": self.lr,
            "lr_ratio": self.ratio(self.scalar_lr, "scalar_lr"),
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay if decay is None else decay,
        }

    def ratio(self, lr: float | None, name: str) -> float:
        """``lr`` over the base lr: schedulers may then write one lr into every group."""
        if lr is None or lr == self.lr:
            return 1.0
        if self.lr == 0:
            raise ValueError(f"{name} is {lr}, but it is kept as a ratio to lr, which is 0; set lr")
        return lr / self.lr


@dataclass(frozen=True)
class Options(BaseOptions):
    """What every optimizer takes that orthogonalizes matrices."""

    momentum: float = 0.95
    wire_dtype: str | None = None
    strategy: str = "auto"
    block_period: int = 5
    machine: Mapping[str, float] | None = None
    bucket_mb: float = 64.0
    replicate_momentum: bool = False

    def numbers(self) -> dict[str, tuple[float, float]]:
        """Also momentum and the bucket."""
        return {**super().numbers(), "bucket_mb": (0.0, math.inf), "momentum": (0.0, 1.0)}

    def check(self, where: str) -> None:
        """Also what the exchange needs."""
        super().check(where)
        fail = partial(self.fail, where)
        self._check_strategy(where)
        if self.bucket_mb <= 0:
            fail("bucket_mb", "it must be above 0")
        if self.wire_dtype is not None and self.wire_dtype not in ["float32", "bfloat16"]:
            fail(
                "wire_dtype", "write 'float32' or 'bfloat16' (float16 would overflow unnormalised)"
            )

    def _check_strategy(self, where: str) -> None:
        if self.strategy not in STRATEGIES:
            self.fail(where, "strategy", f"unknown strategy{suggest(self.strategy, STRATEGIES)}")
        if _no_whole_number(self.block_period, 1):
            self.fail(where, "block_period", "it must be a whole number of steps, at least 1")
        if self.block_period != Options.block_period and self.strategy != "block":
            self.fail(where, "block_period", "it has an effect with strategy='block' only")
        if self.machine is None:
            return
        if not isinstance(self.machine, Mapping):
            self.fail(where, "machine", "write numbers by name, as in {'bandwidth': 4e10}")
        if self.strategy != "auto":
            self.fail(where, "machine", "it has an effect with strategy='auto' only")
        try:
            Machine.from_user(self.machine)
        except ValueError as error:
            raise ValueError(f"{where}: machine: {error}") from None

    def group(self, kind: str) -> dict[str, Any]:
        """Also of matrices."""
        return self.matrix_group() if kind == "matrix" else super().group(kind)

    def matrix_group(self) -> dict[str, Any]:
        """What a parameter group of matrices carries; plain values, so that checkpoints can."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_OF_MATRICES}
        return {"kind": "matrix", "lr_ratio": 1.0, **own}


@dataclass(frozen=True)
class _ComputedOptions(Options):
    polar_steps: int | None = None
    polar_dtype: str = "auto"

    def check(self, where: str) -> None:
        """Also the dtype."""
        super().check(where)
        known = ("auto", *DTYPES)
        if self.polar_dtype not in known:
            what = f"unknown dtype{suggest(str(self.polar_dtype), known)}"
            self.fail(where, "polar_dtype", what)


@dataclass(frozen=True)
class PolarOptions(_ComputedOptions):
    """Of the optimizers whose polar factor can be chosen."""

    polar: str | Sequence[Sequence[float]] = "jordan"

    def check(self, where: str) -> None:
        """Also the polar method, with its steps and dtype."""
        super().check(where)
        try:
            polar.check(self.polar, self.polar_steps, self.polar_dtype)
            if self.strategy == "gram":
                dtype = DTYPES.get(self.polar_dtype, torch.float32)
                of_gram.dtype_of(self.polar, self.polar_steps, dtype)
        except ValueError as error:
            in_slabs = "; or strategy='owner'" * ("Gram matrix" in str(error))
            raise ValueError(f"{where}: {error}{in_slabs}") from None


@dataclass(frozen=True)
class _ScaledOptions(Options):
    scale: str = "match_rms_adamw"

    def check(self, where: str) -> None:
        """Also the scale."""
        super().check(where)
        if self.scale not in SCALES:
            alias = SCALE_ALIASES.get(self.scale)
            meant = f"here that is {alias!r}" if alias else "unknown scale"
            self.fail(where, "scale", meant + suggest(self.scale, SCALES) * (alias is None))


@dataclass(frozen=True)
class MuonOptions(_ScaledOptions, PolarOptions):
    """Muon's options."""

    nesterov: bool = True


@dataclass(frozen=True)
class PolarGradOptions(PolarOptions):
    """PolarGrad's options."""

    polar: str | Sequence[Sequence[float]] = "qdwh"
    polar_first: bool = False
    nu_power: float = 1.0

    def numbers(self) -> dict[str, tuple[float, float]]:
        """Also nu_power."""
        return {**super().numbers(), "nu_power": (0.0, math.inf)}


@dataclass(frozen=True)
class ROOTOptions(_ScaledOptions, _ComputedOptions):
    """ROOT's options. ``coefficients``: 'published', 'jordan' or a file of `calibrate`'s."""

    nesterov: bool = True
    polar_steps: int = 5
    quantile: float = 0.9
    coefficients: str = "published"
    adapt_every: int = 0

    def check(self, where: str) -> None:
        """Also quantile and whole numbers."""
        super().check(where)
        if isinstance(self.quantile, bool) or not 0 < self.quantile <= 1:
            self.fail(where, "quantile", "it must be above 0 and at most 1, which clamps nothing")
        for name, least in (("polar_steps", 1), ("adapt_every", 0)):
            if _no_whole_number(getattr(self, name), least):
                self.fail(where, name, f"it must be a whole number, at least {least}")
        if self.strategy == "block":
            why = "ROOT's quantile and coefficients are those of whole matrices"
            self.fail(where, "strategy", f"{why}; write 'owner' or 'gram'")
        if self.strategy == "gram" and self.adapt_every:
            why = "no rank has a whole matrix to take the spectrum of"
            self.fail(where, "strategy", f"{why}; write 'owner', or adapt_every=0")


@dataclass(frozen=True)
class SUMOOptions(_ScaledOptions):
    """SUMO's options. ``rank``: a number, or as a float a fraction of the short side."""

    rank: int | float = 0.25
    period: int = 250
    refresh_below: float = 0.0
    limiter: float = 1.1
    perp_scale: float = 1.0
    basis: str = "randomized"
    seed: int = 0

    def numbers(self) -> dict[str, tuple[float, float]]:
        """Also those of its own."""
        own = ("refresh_below", "limiter", "perp_scale")
        return {**super().numbers(), **dict.fromkeys(own, (0.0, math.inf))}

    def check(self, where: str) -> None:
        """Also the subspace, and what has no effect on it."""
        super().check(where)
        fraction = isinstance(self.rank, float) and 0 < self.rank <= 1
        if not fraction and _no_whole_number(self.rank, 1):
            what = "write a whole number, at least 1, or a fraction of the short side in (0, 1]"
            self.fail(where, "rank", what)
        for name, least in (("period", 1), ("seed", 0)):
            if _no_whole_number(getattr(self, name), least):
                self.fail(where, name, f"it must be a whole number, at least {least}")
        if 0 < self.limiter < 1:
            self.fail(where, "limiter", "write the growth allowed, at least 1; 0 turns it off")
        if self.basis not in BASES:
            self.fail(where, "basis", f"unknown basis{suggest(self.basis, BASES)}")
        if self.strategy == "block":
            self.fail(where, "strategy", "SUMO's bases are those of whole matrices; write 'owner'")
        if self.replicate_momentum:
            why = "SUMO has none: its state is at owners, and spectral_dist.checkpoint saves it"
            self.fail(where, "replicate_momentum", why)


@dataclass(frozen=True)
class POETOptions(BaseOptions):
    """POET's options. ``lr`` is the skew's; ``weight_decay`` that of the rest, as it has none."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    merge_every: int = 400
    clip_ramp: int = 0

    def check(self, where: str) -> None:
        """Also whole numbers of steps."""
        super().check(where)
        for name, least in (("merge_every", 1), ("clip_ramp", 0)):
            if _no_whole_number(getattr(self, name), least):
                self.fail(where, name, f"it must be a whole number of steps, at least {least}")
        if self.clip_ramp > self.merge_every:
            self.fail(where, "clip_ramp", f"it must be at most merge_every, {self.merge_every}")
        if self.scalar_weight_decay is not None:
            self.fail(where, "scalar_weight_decay", "write weight_decay: the skew has none")

    def group(self, kind: str) -> dict[str, Any]:
        """Also of skew parameters."""
        if kind != "skew":
            return super().group(kind)
        own = {"kind": "skew", "lr": self.lr, "lr_ratio": 1.0, "weight_decay": 0.0}
        return {**own, "betas": self.betas, "eps": self.eps, "merge_every": self.merge_every}
