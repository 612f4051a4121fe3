"""Linear layers whose frozen W is rotated on both sides: y = R_o W R_i x + bias.

Input-centric (arXiv 2603.05500): the rows of x are rotated, multiplied by W and rotated again, so
that no tensor of W's size is made and no gradient of W. The bias comes after R_o.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from spectral_dist._errors import suggest
from spectral_dist.core.precision import without_autocast
from spectral_dist.poet import cayley
from spectral_dist.poet.cayley import CayleyNeumann, Order
from spectral_dist.poet.product import ProductOptions, RotatedProduct
from spectral_dist.poet.rotation import Places, Rotate, Rotation, rotate

Block: TypeAlias = int | float
FORMS = ("block_stochastic", "fully_stochastic")
VARIANTS = ("fast", "memory")
INITS = ("own", "normalized", "uniform_spectrum")


@dataclass(frozen=True)
class Settings:
    """How layers are rotated; every integration takes these names, with these defaults.

    Args:
        block: the size b of the blocks of both sides; a fraction of the dimension in the fully
            stochastic form.
        blocks: pattern of layer names -> (b_in, b_out), or one size for both, where ``block`` does
            not divide a dimension or another size is wanted.
        segments: number of segments of every dimension: a multiple of every tensor-parallel size to
            be used.
        order: of the Cayley-Neumann map, 1 to 4, or 'exact'. 3 is the papers', and shrinks every
            singular value at each merge; 4 keeps them.
        form: 'block_stochastic' rotates all of a dimension in blocks, 'fully_stochastic' one random
            subset of it in one block.
        variant: 'fast' keeps W R_i x and the rotations for the backward pass, 'memory' recomputes
            them from x.
        init: W to start from. 'own' is the layer's, so that nothing changes; 'normalized' Gaussian
            rows of norm 1; 'uniform_spectrum' singular values that are all 1.
        seed: of permutations and of ``init``.

    Raises:
        ValueError: names the setting, and what to write.
    """

    block: Block = 256
    blocks: Mapping[str, Block | Sequence[Block]] = field(default_factory=dict)
    segments: int = 1
    order: Order = 4
    form: str = "block_stochastic"
    variant: str = "fast"
    init: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        known = {"order": cayley.ORDERS, "form": FORMS, "variant": VARIANTS, "init": INITS}
        for name, values in known.items():
            if getattr(self, name) not in values or isinstance(getattr(self, name), bool):
                self._fail(name, f"unknown{suggest(str(getattr(self, name)), map(str, values))}")
        for name, least in (("segments", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                self._fail(name, f"it must be a whole number, at least {least}")
        if not isinstance(self.blocks, Mapping):
            self._fail("blocks", "write patterns and sizes, as in {'k_proj': [256, 64]}")
        for name, size in (("block", self.block), *self.blocks.items()):
            pair = size if isinstance(size, list | tuple) else (size, size)
            if len(pair) != 2 or not all(self._fits(b) for b in pair):
                what = "a fraction in (0, 1] or a size" if self.fully else "a whole number"
                where = "block" if name == "block" else f"blocks: {name!r}"
                raise ValueError(
                    f"{where} is {size!r}; write {what}, at least 2, or two of them for"
                    " (b_in, b_out)"
                )

    @property
    def fully(self) -> bool:
        """Return whether a random subset of a dimension is rotated, and not all of it."""
        return self.form == "fully_stochastic"

    def _fits(self, size: Any) -> bool:
        """Return whether a block may have this size."""
        if self.fully and isinstance(size, float):
            return 0 < size <= 1
        return isinstance(size, int) and not isinstance(size, bool) and size >= 2

    def _fail(self, name: str, what: str) -> None:
        """Raise the ValueError that a bad setting gets."""
        raise ValueError(f"{name} is {getattr(self, name)!r}; {what}")


FROZEN_WEIGHT = "frozen_weight"
"""In files that hold R_o W R_i as a layer's weight: the name of W."""

_copies: WeakKeyDictionary[PoetLayer, WeakSet[PoetLayer]] = WeakKeyDictionary()
"""The copies of each layer that still exist."""


def _version(weight: Tensor) -> int:
    """Return how often a weight was written in place; 0 where torch does not count."""
    return 0 if weight.is_inference() else int(weight._version)


class PoetLayer(nn.Module):
    """The base of every rotated layer, whoever multiplies by W: see ``PoetLinear``.

    Attributes:
        weight: W in its own order, frozen; all that is learned is merged into it.
        key: the layer's name in the whole model, of which permutations are made.
        inner, outer: the rotations of its inputs and of its outputs (several of a fused weight);
            each names a flat parameter of the layer, block after block of b (b - 1) / 2 numbers,
            in at least float32.
        settings: of the model.
        group: the ranks that hold the other tiles of the matrix, under tensor parallelism.
        merges: the number of merges so far. In checkpoints, with the settings:
            ``get_extra_state``.
    """

    weight: Tensor
    key: str
    inner: tuple[Rotation, ...]
    outer: tuple[Rotation, ...]
    settings: Settings
    merges: int
    group: Any = None
    _left_at: int | None = None
    """Version of a copy's W when the layer that it was copied from merged; None before that."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that a copy has; versions of tensors are not among them."""
        return {**self.__dict__, "_left_at": -1 if self._is_mixed() else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes that ``__getstate__`` has returned."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._expected_version = _version(self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> PoetLayer:
        """Return a copy, and remember it: it may become an average of this layer."""
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        _copies.setdefault(self, WeakSet()).add(duplicate)
        return duplicate

    def averages(self) -> list[PoetLayer]:
        """Return the copies whose W was written by something that does not train or load them."""
        return [c for c in _copies.get(self, ()) if _version(c.weight) != c._expected_version]

    def _is_mixed(self) -> bool:
        """Return whether W may mix values from before and after a merge."""
        return self._left_at is not None and _version(self.weight) != self._left_at

    def _check_average(self) -> None:
        """Raise a ValueError if this is an average over a merge."""
        if self._is_mixed():
            raise ValueError(
                f"{self.key}: this copy has been written from a layer that has merged since, so its"
                " W, its rotations and its permutations do not belong together: parameters of POET"
                " cannot be averaged (AveragedModel, EMA). Average what spectral_dist.poet.export"
                " returns: plain.load_state_dict(export(model)); average.update_parameters(plain)"
            )

    def rotate_by(
        self, key: str, inner: Sequence[Rotation], outer: Sequence[Rotation], settings: Settings
    ) -> None:
        """Add the skew parameters, all zero, and freeze W: the layer stays the same function.

        Args:
            key: the layer's name in the whole model.
            inner: the rotations of its inputs.
            outer: the rotations of its outputs, several of a fused weight.
            settings: of the model.
        """
        self.key, self.inner, self.outer = key, tuple(inner), tuple(outer)
        self.settings, self.merges = settings, 0
        self.drop_indices()
        self.weight.requires_grad_(False)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for rotation in self.rotations:
            # flat, so that FSDP2, which cuts the first dimension, cuts within blocks
            zeros = torch.zeros(rotation.numel, dtype=dtype, device=self.weight.device)
            self.register_parameter(rotation.skew, nn.Parameter(zeros))

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """Return the rotations of both sides, those of inputs first."""
        return (*self.inner, *self.outer)

    def is_skew(self, name: str) -> bool:
        """Return whether a name, in the model or in the layer, is that of one of its skews."""
        return name.rsplit(".", 1)[-1] in {rotation.skew for rotation in self.rotations}

    @property
    def skews(self) -> dict[str, nn.Parameter]:
        """Return the skew parameters by name."""
        return {rotation.skew: getattr(self, rotation.skew) for rotation in self.rotations}

    def rotate_rows(self, x: Tensor, side: Sequence[Rotation]) -> Tensor:
        """Return x R^T of rows x (..., d), by the current skew parameters of one side."""
        x = _autocast(x)
        places = self._places(side, x.device)
        skews = [getattr(self, rotation.skew) for rotation in side]
        blocks = tuple(rotation.block for rotation in side)
        deltas = CayleyNeumann.apply(blocks, self.settings.order, x.dtype, *skews)  # type: ignore[no-untyped-call]
        rows = x.reshape(-1, x.shape[-1])
        rotated: Tensor = Rotate.apply(rows, places.index, places.inverse, *deltas)  # type: ignore[no-untyped-call]
        return rotated.view(x.shape)

    def forward_rotated(self, x: Tensor) -> Tensor:
        """Return R_o W R_i x of rows x (..., n), as (..., m); this rank must have all of W."""
        if self.settings.fully:
            return self.maybe_recompute(self._forward_by_turns, x)  # type: ignore[no-any-return]
        x = _autocast(x)
        inner, outer = (self._places(side, x.device) for side in (self.inner, self.outer))
        blocks = tuple(rotation.block for rotation in self.rotations)
        product: Tensor = RotatedProduct.apply(  # type: ignore[no-untyped-call]
            ProductOptions(blocks, self.settings.order, self.settings.variant == "memory"),
            x.reshape(-1, x.shape[-1]), self.weight,
            inner.index, inner.inverse, outer.index, outer.inverse, *self.skews.values(),
        )  # fmt: skip
        return product.view(*x.shape[:-1], len(self.weight))

    def _forward_by_turns(self, x: Tensor) -> Tensor:
        """Return R_o W R_i x, by one function for each factor."""
        return self.rotate_rows(linear(self.rotate_rows(x, self.inner), self.weight), self.outer)

    def maybe_recompute(self, function: Any, x: Tensor) -> Any:
        """Return ``function(x)``; the memory variant saves only x, and recomputes in backward."""
        if self.settings.variant == "memory" and torch.is_grad_enabled():
            return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
        return function(x)

    def _places(self, side: Sequence[Rotation], device: torch.device) -> Places:
        """Return where one side's blocks lie; cached until a merge."""
        key = (side[0].skew, device)
        self._check_average()
        if key not in self._cached_places:
            with torch.inference_mode(False):  # a training pass may save what this one caches
                index = torch.cat([rotation.index(self.merges) for rotation in side])
                self._cached_places[key] = Places.of(index, not self.settings.fully, device)
        return self._cached_places[key]

    def drop_indices(self) -> None:
        """Drop the cached places of blocks: ``merges`` or the rotations have changed.

        W as it is now counts as belonging to the rotations.
        """
        self._cached_places: dict[tuple[str, torch.device], Places] = {}
        self._expected_version, self._left_at = _version(self.weight), None

    @torch.no_grad()
    def rotated_weight(self, weight: Tensor, skews: Mapping[str, Tensor]) -> Tensor:
        """Return R_o W R_i, (m, n) in at least float32.

        Args:
            weight: all of this rank's tile of W, (m, n).
            skews: all of the tile's skew parameters, by name.
        """
        with without_autocast(weight.device):
            return self._rotated_weight(weight, skews)

    def _rotated_weight(self, weight: Tensor, skews: Mapping[str, Tensor]) -> Tensor:
        """Return R_o W R_i; autocast is off."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for side, transposed in ((self.inner, False), (self.outer, True)):
            packed = [skews[rotation.skew].to(wide.dtype) for rotation in side]
            blocks = [rotation.block for rotation in side]
            changes = cayley.deltas(packed, blocks, self.settings.order, wide.dtype)
            rows = wide.mT.contiguous() if transposed else wide
            deltas = [change if transposed else change.mT for change in changes]
            rotated = rotate(rows, self._places(side, wide.device), deltas)
            wide = rotated.mT if transposed else rotated
        return wide

    @torch.no_grad()
    def merge(self, weight: Tensor, skews: Mapping[str, Tensor]) -> None:
        """Merge the rotations into W in place: W <- R_o W R_i, skew parameters <- 0.

        The next permutations follow from the new count of merges.

        Args:
            weight: the layer's own, wherever a framework has gathered it.
            skews: the layer's own, by name, gathered likewise.
        """
        for duplicate in _copies.get(self, ()):
            if duplicate._left_at is None:
                duplicate._left_at = _version(duplicate.weight)
        weight.copy_(self.rotated_weight(weight, skews))
        for skew in skews.values():
            skew.zero_()
        self.merges += 1
        self.drop_indices()

    def full_weight(self, weight: Tensor) -> Tensor:
        """Return the whole matrix, of which ``weight`` is this rank's tile. A collective call."""
        return weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Load what torch does, and W where a file has R_o W R_i under the weight's name."""
        if prefix + FROZEN_WEIGHT in state_dict:  # torch has copied the dict
            state_dict[f"{prefix}weight"] = state_dict.pop(prefix + FROZEN_WEIGHT)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def get_extra_state(self) -> Tensor:
        """Return the merges, and all settings that permutations and blocks depend on, int64."""
        return torch.tensor([self.merges, *self._fixed_settings().values()], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the number of merges from a checkpoint.

        Raises:
            ValueError: the checkpoint is of a layer that was built with other settings.
        """
        self.check_extra_state(state)
        self.merges = int(state[0])
        self.drop_indices()

    def check_extra_state(self, state: Tensor) -> None:
        """Check that a checkpoint's state is of a layer that was built with the same settings.

        Raises:
            ValueError: it is not, or whoever loads has left the layers' state out.
        """
        if not isinstance(state, Tensor):
            raise ValueError(
                f"{self.key}: a {type(state).__name__} came in place of the layer's extra state"
                " (merges and settings), which whoever loads this checkpoint leaves out; save and"
                " load a sharded checkpoint, or use spectral_dist.checkpoint"
            )
        for (name, value), saved in zip(
            self._fixed_settings().items(), state[1:].tolist(), strict=True
        ):
            if value != saved:
                raise ValueError(
                    f"{self.key}: {name} is {value} here, but {saved} in the checkpoint; convert"
                    " the model with the settings it was saved with"
                )

    def _fixed_settings(self) -> dict[str, int]:
        """Return the settings that permutations and blocks depend on, as numbers by name."""
        s = self.settings
        return {
            "seed": s.seed, "segments": s.segments, "form": FORMS.index(s.form),
            "order": cayley.ORDERS.index(s.order), "the block of inputs": self.inner[0].block,
            "the block of outputs": self.outer[0].block,
        }  # fmt: skip


class PoetLinear(PoetLayer, nn.Linear):
    """An nn.Linear as R_o W R_i, converted in place by ``spectral_dist.poet.convert``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (..., in) -> (..., out).

        Raises:
            ValueError: torch's tensor parallelism has cut the layer.
        """
        if hasattr(self.weight, "placements"):  # FSDP2 has gathered what it shards
            raise ValueError(
                f"{self.key}: POET knows no tensor parallelism by DTensors (parallelize_module);"
                " leave this layer out of the plan and shard it with fully_shard, or train with"
                " Megatron-core, whose column- and row-parallel layers it rotates"
                " (spectral_dist.integrations.megatron)"
            )
        product: Tensor = self.forward_rotated(input)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def _autocast(x: Tensor) -> Tensor:
    """Return x in the dtype to which torch.autocast casts the input of an nn.Linear."""
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if is_on else x
