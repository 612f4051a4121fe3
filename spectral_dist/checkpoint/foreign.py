"""State_dicts of torch.optim.Muon and AdamW, and of dion's Muon: see ``convert``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_dist.checkpoint.plain import load_plain
from spectral_dist.checkpoint.run import MOMENTS, Run
from spectral_dist.rules.group_options import FRAMEWORK_KEYS


@dataclass(frozen=True)
class KeyMapping:
    """How another optimizer's keys of groups and states map to ours, for one kind of parameters.

    Attributes:
        kind: of the parameters, 'matrix' or 'scalar'.
        options, state: their key -> our key.
        fixed: their options that must have this value, because there is nothing like them here.
        dropped: their options that are left out: given where our optimizer is built, or expressed
            by other options.
    """

    kind: str
    options: Mapping[str, str]
    state: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def group(self, theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the options of one of their groups under our keys.

        Args:
            theirs: their group.
            where: the file, for errors.

        Raises:
            ValueError: an option that has no place here.
        """
        ours: dict[str, Any] = {"kind": self.kind}
        for key, value in theirs.items():
            if key in self.fixed and value != self.fixed[key]:
                raise ValueError(
                    f"{where}: {key} is {value!r}; ours knows {self.fixed[key]!r} only"
                )
            if key in self.options or (key in FRAMEWORK_KEYS and key != "param_names"):
                ours[self.options.get(key, key)] = value
            elif key not in (*self.fixed, *self.dropped, "params", "param_names"):
                raise ValueError(f"{where}: unknown option {key!r}")
        return ours

    def to_theirs(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """Return those options of our group that they have, under their keys.

        Learning rates are multiplied by the group's ``lr_ratio``.
        """
        their_key = {ours_: theirs for theirs, ours_ in self.options.items()}
        theirs = {
            their_key.get(k, k): v for k, v in ours.items() if k in their_key or k in FRAMEWORK_KEYS
        }
        for key in theirs.keys() & {"lr", "initial_lr"}:
            theirs[key] *= ours.get("lr_ratio", 1.0)
        if "betas" in theirs:
            theirs["betas"] = tuple(theirs["betas"])
        return theirs

    def add_states(self, run: Run, states: Mapping[str, Mapping[str, Any]], factor: float) -> None:
        """Add their states to a run, in float32 at least; zeros for a parameter that has none.

        Args:
            run: that has the parameters already.
            states: theirs, by parameter.
            factor: by which ``exp_avg`` is multiplied.

        Raises:
            ValueError: a state of no parameter of the model.
        """
        for name, theirs in states.items():
            if name not in run.model:
                raise ValueError(f"{name} has an optimizer state, but is not in the model")
            state = {self.state.get(key, f"({key})"): value for key, value in theirs.items()}
            for key, value in state.items():
                value = torch.as_tensor(value)
                wide = torch.promote_types(value.dtype, torch.float32)
                scaled = value.double() * factor if key == "exp_avg" and factor != 1.0 else value
                state[key] = scaled.to(wide)
            if not state:
                wide = torch.promote_types(run.model[name].dtype, torch.float32)
                zeros = torch.zeros_like(run.model[name], dtype=wide)
                state = {key: zeros.clone() for key in MOMENTS[self.kind]}
                state["step"] = torch.zeros(())
            run.state[name] = state


TORCH_MUON = KeyMapping(
    "matrix",
    {k: k for k in ("lr", "weight_decay", "momentum", "nesterov")} | {"adjust_lr_fn": "scale"},
    {"momentum_buffer": "exp_avg"},
    dropped=("eps", "ns_coefficients", "ns_steps"),
)


TORCH_ADAMW = KeyMapping(
    "scalar",
    {k: k for k in ("lr", "weight_decay", "betas", "eps")},
    {k: k for k in ("step", "exp_avg", "exp_avg_sq")},
    {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True},
    ("foreach", "capturable", "differentiable", "fused"),
)


DION_MUON = KeyMapping(
    "matrix",
    {"lr": "lr", "weight_decay": "weight_decay", "mu": "momentum", "nesterov": "nesterov"}
    | {"adjust_lr": "scale"},
    {"momentum": "exp_avg"},
    {"cautious_wd": False, "num_heads": None},
    ("step", "algorithm", "epsilon", "flatten", "beta1", "beta2"),
)


DION_ADAMW = KeyMapping(
    "scalar",
    {"lr": "lr", "weight_decay": "weight_decay", "epsilon": "eps"},
    {"momentum": "exp_avg", "variance": "exp_avg_sq"},
    {"cautious_wd": False},
    ("step", "algorithm", "mu", "nesterov", "adjust_lr", "flatten", "num_heads", "beta1", "beta2"),
)


TORCH_SCALES = {"original": "original", "match_rms_adamw": "match_rms_adamw"}
"""Our option ``scale`` -> adjust_lr_fn of torch.optim.Muon."""
DION_SCALES = {"spectral": "spectral_norm", "match_rms_adamw": "rms_norm", "none": None}
"""Our option ``scale`` -> adjust_lr of dion's Muon."""
JORDAN = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of every step of ``polar='jordan'``."""
JORDAN_STEPS = 5


def _load(path: Path, required: Sequence[str], allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Return the dict in a file of torch.save; raise a ValueError for missing or unknown keys."""
    content = load_plain(path)
    if not isinstance(content, dict):
        content = {}
    for key in sorted(set(required) - content.keys()):
        raise ValueError(f"{path} has no {key!r}: it must be {{{', '.join(map(repr, required))}}}")
    for key in sorted(content.keys() - {*required, *allowed}):
        raise ValueError(f"{path}: unknown key {key!r}; put what else there is under 'extra'")
    return content


def _save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of torch.save; raise a ValueError if its folder does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for {path.name}; make it first")
    torch.save(dict(content), path)


def _groups(
    state_dict: Mapping[str, Any], where: str
) -> Iterator[tuple[dict[str, Any], list[str], dict[str, dict[str, Any]]]]:
    """Yield (group, names of its parameters, their states by name) of a torch optimizer's state.

    Raises:
        ValueError: the groups have no names of parameters.
    """
    for group in state_dict["param_groups"]:
        names = group.get("param_names")
        if names is None:
            raise ValueError(
                f"{where} does not know its parameters' names; build that optimizer from named"
                " parameters, [(name, parameter), ...], load this into it, and save it again"
            )
        states = [state_dict["state"].get(i, {}) for i in group["params"]]
        yield group, names, dict(zip(names, states, strict=True))


def _own_rates(groups: list[dict[str, Any]]) -> None:
    """Set each group's lr_ratio to 1; raise a KeyError or TypeError if its lr is no number."""
    for group in groups:
        group["lr"], group["lr_ratio"] = group["lr"] * 1.0, 1.0


def _muon_only(group: Mapping[str, Any], scales: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError for a group of matrices that Muon did not train.

    Args:
        group: of ours.
        scales: those values of its option ``scale`` that the other optimizer has.
        where: the other optimizer, for errors.
    """
    if "scale" not in group or "quantile" in group:
        raise ValueError(f"{where} has Muon only, and the run is another rule's: {dict(group)}")
    if group["scale"] not in scales:
        raise ValueError(f"{where} has no scale {group['scale']!r}, but {', '.join(scales)}")


def read_torch(path: Path) -> Run:
    """Return the run in a file of torch's optimizers: {"model", "muon", "adamw", "extra"}.

    "adamw" and "extra" may be missing.
    """
    content = _load(path, ("model", "muon"), ("adamw", "extra"))
    run = Run(content["model"], extra=content.get("extra", {}), rule="Muon")
    for part, mapping in (("muon", TORCH_MUON), ("adamw", TORCH_ADAMW)):
        where = f"{path}: {part}"
        for group, names, states in _groups(content.get(part, {"param_groups": []}), where):
            ours = mapping.group(group, where)
            if part == "muon":
                ours["scale"] = ours["scale"] or "original"
                row, steps = tuple(group["ns_coefficients"]), group["ns_steps"]
                ours["polar"] = "jordan" if row == JORDAN else [list(row)] * steps
                ours["polar_steps"] = steps if row == JORDAN else None
            run.groups.append({**ours, "names": names})
            mapping.add_states(run, states, 1.0)
    _own_rates(run.groups)
    taken = max((float(run.state[n]["step"]) for n in run.names("scalar")), default=0.0)
    for name in run.names("matrix"):
        run.state[name]["step"] = torch.tensor(taken if run.has_moments(name) else 0.0)
    return run


def write_torch(path: Path, run: Run) -> None:
    """Write a run as a file of torch's optimizers.

    States are written by torch's own classes, so that nothing in them is missing.
    """
    content: dict[str, Any] = {"model": run.model, "extra": run.extra}
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "muon": torch.optim.Muon,
        "adamw": torch.optim.AdamW,
    }
    for (part, make), mapping in zip(optimizers.items(), (TORCH_MUON, TORCH_ADAMW), strict=True):
        groups = []
        parameters = {n: nn.Parameter(run.model[n].detach()) for n in run.names(mapping.kind)}
        for group in run.groups:
            if group["kind"] == mapping.kind:
                theirs = mapping.to_theirs(group)
                if part == "muon":
                    theirs |= _torch_options(group, run)
                named = [(name, parameters[name]) for name in group["names"]]
                groups.append({**theirs, "params": named})
        if groups:
            optimizer = make(groups)
            for name, p in parameters.items():
                if run.has_moments(name) or run.state[name]["step"]:
                    optimizer.state[p] = {
                        theirs: run.state[name][ours] for theirs, ours in mapping.state.items()
                    }
            content[part] = optimizer.state_dict()
    _save(path, content)


def _torch_options(group: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return how torch.optim.Muon writes a group's polar factor; ValueError if it has no such."""
    _muon_only(group, TORCH_SCALES, "torch.optim.Muon")
    for name in group["names"]:
        if run.model[name].ndim != 2:
            raise ValueError(
                f"torch.optim.Muon takes 2-D parameters, and {name} is"
                f" {tuple(run.model[name].shape)}"
            )
    polar, steps = group.get("polar", "jordan"), group.get("polar_steps")
    rows = [list(JORDAN)] * JORDAN_STEPS if polar == "jordan" else polar
    if isinstance(rows, str) or any(row != rows[0] for row in rows):
        raise ValueError(
            f"torch.optim.Muon has one (a, b, c) for every step, and no polar {polar!r}"
        )
    return {"ns_coefficients": tuple(rows[0]), "ns_steps": len(rows) if steps is None else steps}


def read_dion(path: Path) -> Run:
    """Return the run in a file of dion's Muon: {"model", "dion", and maybe "extra"}."""
    content = _load(path, ("model", "dion"), ("extra",))
    run = Run(content["model"], extra=content.get("extra", {}), rule="Muon")
    for group, names, states in _groups(content["dion"], f"{path}: dion"):
        mapping = {"muon": DION_MUON, "adamw": DION_ADAMW}.get(group["algorithm"])
        if mapping is None:
            raise ValueError(
                f"{path}: {names[0]} is trained by {group['algorithm']!r}, not by Muon"
            )
        ours = mapping.group(group, f"{path}: dion")
        if mapping.kind == "matrix":
            scales = {theirs: ours for ours, theirs in DION_SCALES.items()}
            ours["scale"] = scales[ours["scale"]]
        else:
            ours["betas"] = [group["beta1"], group["beta2"]]
        run.groups.append({**ours, "names": names})
        mapping.add_states(run, states, 1.0 - group["mu"] if mapping.kind == "matrix" else 1.0)
        for name in names:
            run.state[name]["step"] = torch.tensor(float(group["step"]))
    _own_rates(run.groups)
    return run


def write_dion(path: Path, run: Run) -> None:
    """Write a run as a file of dion's Muon.

    On loading, dion casts moments to the parameters' dtype.
    """
    groups: list[dict[str, Any]] = []
    states: list[dict[str, Tensor]] = []
    betas = next((g["betas"] for g in run.groups if g["kind"] == "scalar"), (0.9, 0.95))
    for group in run.groups:
        mapping = DION_MUON if group["kind"] == "matrix" else DION_ADAMW
        theirs: dict[str, Any] = {
            **{"mu": 0.95, "beta1": betas[0], "beta2": betas[1], "weight_decay": 0.01},
            **{"cautious_wd": False, "algorithm": "muon", "epsilon": 1e-8, "nesterov": False},
            **{"flatten": any(run.model[name].ndim > 3 for name in group["names"])},
            **{"adjust_lr": None, **mapping.to_theirs(group)},
            "step": int(run.steps(group["kind"], group["names"], "dion")),
        }
        factor = 1.0
        if mapping.kind == "matrix":
            _muon_only(group, DION_SCALES, "dion")
            theirs["adjust_lr"] = DION_SCALES[group["scale"]]
            factor = 1.0 / (1.0 - theirs["mu"])
        else:
            theirs |= {"algorithm": "adamw", "beta1": group["betas"][0], "beta2": group["betas"][1]}
        theirs["params"] = list(range(len(states), len(states) + len(group["names"])))
        groups.append({**theirs, "param_names": list(group["names"])})
        for name in group["names"]:
            state = {theirs: run.state[name][ours] for theirs, ours in mapping.state.items()}
            momentum = state["momentum"]
            state["momentum"] = (momentum.double() * factor).to(momentum.dtype)
            states.append(state)
    dion = {"state": dict(enumerate(states)), "param_groups": groups}
    _save(path, {"model": run.model, "dion": dion, "extra": run.extra})
