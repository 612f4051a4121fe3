"""torchtitan: ``optimizer=SpectralOptimizers.Config(name="muon", lr=1e-3)`` in a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer.utils import get_flat_optim_state_dict
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter

from spectral_dist._error_help import explained
from spectral_dist.core.named import class_of
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.params.classify import classify
from spectral_dist.params.modules import torch_inspector
from spectral_dist.params.param_groups import split_by_kind
from spectral_dist.params.spec import Inspector, ParamInfo, ParamSpec
from spectral_dist.params.table import show
from spectral_dist.poet.convert import rotate
from spectral_dist.poet.layer import PoetLayer, PoetLinear
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING
from spectral_dist.sharding import collectives

PLACE = "id"
"""Key of a group's place among those of its optimizer, which differs between layouts."""


class SpectralOptimizers(OptimizersContainer):  # type: ignore[misc]
    """The optimizers of a model's parts, as torchtitan's Trainer builds, steps and saves them.

    Their checkpoints load on another number of ranks, and under another layout, as torchtitan's
    own ones do; state of whole matrices is in them as well.

    Args:
        config: of the optimizer.
        model_parts: of this rank, sharded; several under interleaved pipeline parallelism.

    Raises:
        ValueError: an unknown optimizer or option, a field of torchtitan's own optimizers, or
            POET for a model without rotations.

    Example:
        >>> optimizer = SpectralOptimizers.Config(name="muon", lr=1e-3, options={"momentum": 0.9})
        >>> Trainer.Config(..., optimizer=optimizer)
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """What torchtitan's ``Trainer.Config`` takes as its optimizer."""

        name: str = "muon"
        """Name of the optimizer: "muon", "polargrad", "root", "sumo", "normuon", "poet", or that
        of a registered rule."""

        lr: float = 1e-3
        """Learning rate of matrices, and of all else unless options has a scalar_lr."""

        options: dict[str, Any] = field(default_factory=dict)
        """The optimizer's other options, and those of spectral_dist.param_groups."""

    optimizers: list[SpectralOptimizer]

    @explained
    def __init__(self, config: SpectralOptimizers.Config, *, model_parts: list[nn.Module]) -> None:
        _check_own_fields(config)
        options = dict(config.options)
        if "lr" in options:
            raise ValueError(
                f"{_where(config)}: options has lr; write it beside them, as in"
                ' SpectralOptimizers.Config(name="muon", lr=1e-3)'
            )
        routing = {name: options.pop(name) for name in ROUTING if name in options}
        entry = registry.find(config.name)
        is_rotated = any(isinstance(m, PoetLayer) for part in model_parts for m in part.modules())
        if entry.rule is None and not is_rotated:
            raise ValueError(
                f"{_where(config)}: {entry.title} trains the rotations of a model that is built"
                " with converters=[PoetConverter.Config()], of"
                " spectral_dist.integrations.torchtitan; this one has none"
            )
        made_of: Any = POET if entry.rule is None else class_of(entry)
        made_of.options_type.from_user({"lr": config.lr, **options}, _where(config))
        self.model_parts = model_parts
        self.optimizers = []
        for index, specs in enumerate(_specs_of(model_parts, routing)):
            trained = [spec.parameter for spec in specs if spec.kind != "frozen"]
            optimizer = made_of(split_by_kind(trained, specs), config.lr, **options)
            named = model_parts[index].named_parameters()
            names = {id(parameter): canonical_fqn(name) for name, parameter in named}
            for group in optimizer.param_groups:
                group["param_names"] = [names[id(p)] for p in group["params"]]
            self._log_optimizer(optimizer, index, [g["kind"] for g in optimizer.param_groups])
            self.optimizers.append(optimizer)
        all_params = [
            p for each in self.optimizers for group in each.param_groups for p in group["params"]
        ]
        self._validate_params(all_params)
        self._post_init(all_params)

    @explained
    def state_dict(self) -> dict[str, Any]:
        """Return the state of all optimizers under names of parameters; a collective call.

        Before the first step it is the state that the first step starts from.
        """
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            optimizer.initialize_state()
            flat.update(get_flat_optim_state_dict(optimizer))
            for group in optimizer.param_groups:
                for name in group["param_names"]:
                    del flat[f"param_groups.{name}.{PLACE}"]
        return flat

    @explained
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` has returned, under this or another layout; a collective call.

        Raises:
            ValueError: the state is of another optimizer or of other matrices.
        """
        states: dict[str, dict[str, Any]] = {}
        for key, value in state_dict.items():
            what, _, rest = key.partition(".")
            name, _, quantity = rest.rpartition(".")
            if what == "state":
                states.setdefault(name, {})[quantity] = value
        for optimizer in self.optimizers:
            optimizer.initialize_state()
            optimizer.load_state_dict(_numbered(optimizer, states, state_dict))


class RotatedLinear(PoetLinear, Linear):  # type: ignore[misc]
    """torchtitan's Linear as R_o W R_i; torchtitan initializes it once it has memory."""

    _param_init: dict[str, Callable[..., Any]] | None

    def _init_self_parameters(self) -> None:
        """Initialize W as torchtitan does, and the rotations as none."""
        if self._param_init is not None:
            self._param_init = {**self._param_init, **dict.fromkeys(self.skews, nn.init.zeros_)}
        super()._init_self_parameters()  # by name, or all of W alone
        for skew in self.skews.values():
            nn.init.zeros_(skew)
        self.drop_indices()

    @explained
    def parallelize(self, parallel_dims: Any) -> None:
        """Do nothing where a layer has no sharding config.

        Raises:
            ValueError: it has one, and the rotations are not in it.
        """
        if self._sharding_config is not None:
            raise ValueError(
                f"{self.key}: POET does not run under torchtitan's tensor parallelism, nor with"
                " spmd_backend='spmd_types', which shard each parameter as its layer declares:"
                " write ParallelismConfig(spmd_backend='partial_dtensor', tensor_parallel_degree=1)"
            )
        super().parallelize(parallel_dims)


class PoetConverter(ModelConfigConverter):  # type: ignore[misc]
    """What has torchtitan build a model whose Linears are rotated, for ``poet``.

    Example:
        >>> llama3.model_registry("8B", converters=[PoetConverter.Config(settings={"block": 256})])
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):  # type: ignore[misc]
        """What ``model_registry`` takes in its list of converters."""

        settings: dict[str, Any] = field(default_factory=dict)
        """Keywords of ``spectral_dist.poet.convert``, but ``init``: torchtitan initializes W."""

    def __init__(self, config: PoetConverter.Config) -> None:
        self.settings = dict(config.settings)
        if "init" in self.settings:
            raise ValueError(
                "PoetConverter.Config: settings has init, but torchtitan itself initializes W, when"
                " the model is sharded; leave it out"
            )

    def convert(self, model_config: Any) -> Any:
        """Return a config that builds what ``model_config`` does, with rotated layers."""
        config_type: Any = type(model_config)
        settings = dict(self.settings)
        matrices, scalars = (settings.pop(name, ()) for name in ("matrices", "scalars"))

        class Rotated(config_type):  # type: ignore[misc]
            def build(self, **kwargs: Any) -> nn.Module:
                model = config_type.build(self, **kwargs)
                return rotate(model, {Linear: RotatedLinear}, matrices, scalars, settings)

        Rotated.__name__ = Rotated.__qualname__ = f"Rotated{config_type.__name__}"
        return Rotated(**{f.name: getattr(model_config, f.name) for f in fields(model_config)})


def _where(config: SpectralOptimizers.Config) -> str:
    """Return what errors begin with."""
    return f"SpectralOptimizers.Config(name={config.name!r})"


def _check_own_fields(config: SpectralOptimizers.Config) -> None:
    """Raise a ValueError if fields of torchtitan's own optimizers are set, which do nothing here.

    Args:
        config: of the optimizer.
    """
    instead = {
        "param_groups": "options has matrices and scalars, which are patterns of names",
        "implementation": "options has scalar_backend",
        "optimizer_factory_kwargs_by_name": "write options",
    }
    own = OptimizersContainer.Config()
    for name, advice in instead.items():
        if getattr(config, name) != getattr(own, name):
            raise ValueError(
                f"{_where(config)}: {name} is of torchtitan's own optimizers; leave it out:"
                f" {advice}"
            )


def _specs_of(parts: Sequence[nn.Module], routing: Mapping[str, Any]) -> list[list[ParamSpec]]:
    """Return what the parameters of each part are; a collective call of all stages.

    A pattern need not match in every part, nor need every part have a matrix: one of any stage is
    enough.

    Args:
        parts: of the model, on this rank.
        routing: options of ``param_groups``.
    """
    seen: list[list[bool]] = []

    def of_this_rank(flags: list[bool]) -> list[bool]:
        seen.append(flags)
        return [True] * len(flags)

    error: Exception | None = None
    try:
        for part in parts:
            classify(part, make_inspector=_inspector, any_stage=of_this_rank, **routing)
    except (ValueError, TypeError) as raised:
        error = raised
    collectives.raise_together(error, (collectives.world(),))
    flags_of_parts = ["".join(str(int(flag)) for flag in flags) for flags in seen]
    texts = collectives.gather_texts(" ".join(flags_of_parts), collectives.world())
    everywhere = [flags for text in texts for flags in text.split()]
    on_any = [any(flag == "1" for flag in column) for column in zip(*everywhere, strict=True)]
    specs_of_parts = [
        classify(part, make_inspector=_inspector, any_stage=lambda _: on_any, **routing)
        for part in parts
    ]
    show([spec for specs in specs_of_parts for spec in specs])
    return specs_of_parts


def _inspector(part: nn.Module) -> Inspector:
    """Return torch's inspector, which knows torchtitan's head on a stage without the embedding."""
    inspect = torch_inspector(part)
    head = getattr(part, "lm_head", None)
    of_head = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()

    def inspect_part(name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
        info = inspect(name, parameter, module)
        if id(parameter) in of_head and info.kind == "matrix":
            return replace(info, kind="scalar", reason="torchtitan's output head")
        return info

    return inspect_part


def _numbered(
    optimizer: SpectralOptimizer,
    states: Mapping[str, Mapping[str, Any]],
    flat: Mapping[str, Any],
) -> dict[str, Any]:
    """Return an optimizer's part of a state dict, as its own ``load_state_dict`` takes it.

    Args:
        optimizer: whose parameters are looked up.
        states: {parameter: {quantity: value}}.
        flat: values of groups, as ``param_groups.PARAMETER.KEY``.

    Raises:
        ValueError: a parameter was of another kind when the state was saved.
    """
    numbered: dict[int, Mapping[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        first = len(numbered)
        for name in group["param_names"]:
            kind = flat.get(f"param_groups.{name}.kind", group["kind"])
            if kind != group["kind"]:
                raise ValueError(
                    f"{name} is of kind {group['kind']!r}, and was of kind {kind!r} when this state"
                    " was saved; give the same matrices and scalars in options"
                )
            numbered[len(numbered)] = states.get(name, {})
        prefix = f"param_groups.{group['param_names'][0]}."
        values = {key: flat[prefix + key] for key in group if prefix + key in flat}
        values[PLACE] = group[PLACE]
        values["params"] = list(range(first, len(numbered)))
        groups.append(values)
    return {"state": numbered, "param_groups": groups}
