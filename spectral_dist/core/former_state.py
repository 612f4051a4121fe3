"""Matrix state of checkpoints in which an older release kept it as shard state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from spectral_dist.core import matrix_state
from spectral_dist.core.first_step import matrix_of

if TYPE_CHECKING:
    from spectral_dist.core.optimizer import SpectralOptimizer


def load_without_matrix_state(optimizer: SpectralOptimizer) -> None:
    """Take matrix state out of the shard state that an older release has kept in its place.

    Raises:
        ValueError: steps have been taken, and what the rule keeps of them is not there.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    former, missing = former_names(optimizer), []
    for group in optimizer.param_groups:
        if group["kind"] != "matrix":
            continue
        for route, p in zip(optimizer.routes[group["id"]], group["params"], strict=True):
            state = optimizer.state.get(p, {})
            whole[route.name] = {n: state.pop(n) for n in former.values() if n in state}
            taken = float(state.get("step", 0.0)) > 0
            if taken and not (former and whole[route.name]):
                missing.append(route.name)
    if missing:
        raise ValueError(
            f"this state dict has no matrix_state, in which {type(optimizer).__name__} keeps what it"
            f" knows of {missing[0]} ({len(missing)} parameters): torch's"
            " get_optimizer_state_dict leaves it out. Save optimizer.state_dict() itself, or"
            " write spectral_dist.checkpoint.save(folder, model, optimizer)"
        )
    if any(whole.values()):
        load_former_state(optimizer, whole)


def former_names(optimizer: SpectralOptimizer) -> dict[str, str]:
    """Return {quantity: shard state} of what older releases had as shard state."""
    former: dict[str, str] = {}
    for group in optimizer.param_groups:
        if group["kind"] == "matrix":
            options = optimizer.rule_options(group)
            for matrix in (m for route in optimizer.routes[group["id"]] for m in route.matrices):
                specs = optimizer.rule.state(options, matrix.shape)
                former |= {name: s.formerly for name, s in specs.items() if s.formerly}
    return former


def load_former_state(
    optimizer: SpectralOptimizer, whole: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Load matrix state from {parameter: {shard state: its whole tensor}}."""
    former = former_names(optimizer)
    saved = {
        matrix.name: {
            name: matrix_of(matrix, whole[route.name][old]) for name, old in former.items()
        }
        for route in optimizer.all_routes
        for matrix in route.matrices
        if whole.get(route.name)
    }
    optimizer.locate()
    parts = [part for part in optimizer.matrix_parts() if part.matrix in saved]
    matrix_state.load(parts, saved)
