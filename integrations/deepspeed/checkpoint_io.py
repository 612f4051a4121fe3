"""Hooks around an engine's ``save_checkpoint`` and ``load_checkpoint``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from spectral_dist._error_help import explained
from spectral_dist.integrations.deepspeed import latest
from spectral_dist.integrations.deepspeed._compat import argument

BeforeSave: TypeAlias = Callable[[Path, Callable[[str], Any]], Mapping[str, Any]]
"""A function of (the tag's folder, a function that returns the value of a named argument of
``save_checkpoint``) that returns what to add to client_state."""
AfterLoad: TypeAlias = Callable[[str, dict[str, Any], bool], None]
"""A function of (the loaded path, its client_state, whether optimizer states are to be loaded)."""
BeforeLoad: TypeAlias = Callable[[Path, bool], None]
"""A function of (the tag's folder, whether optimizer states are to be loaded)."""


def wrap_checkpoints(
    engine: Any,
    after_load: AfterLoad,
    before_save: BeforeSave | None = None,
    before_load: BeforeLoad | None = None,
) -> None:
    """Make this engine's ``save_checkpoint`` and ``load_checkpoint`` call the given hooks too.

    Args:
        engine: whose two methods are replaced.
        after_load: called after DeepSpeed has loaded a checkpoint; not if it has found none.
        before_save: called before DeepSpeed saves, since DeepSpeed ends by writing `latest`, and
            all of the checkpoint must be on disk by then.
        before_load: called before DeepSpeed loads; not if there is no tag to load.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    @explained
    def save_checkpoint(
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        assert before_save is not None
        tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
        values = (save_dir, tag, client_state, *args)
        added = before_save(Path(save_dir, tag), lambda name: argument(save, name, values, kwargs))
        return save(save_dir, tag, {**(client_state or {}), **added}, *args, **kwargs)

    @functools.wraps(load)
    @explained
    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if tag is None:
            tag = latest.read(load_dir, engine.load_universal_checkpoint())
        states, module_only = (
            argument(load, name, (load_dir, tag, *args), kwargs)
            for name in ("load_optimizer_states", "load_module_only")
        )
        loads_states = states and not module_only
        if before_load is not None and tag is not None:
            before_load(Path(load_dir, str(tag)), loads_states)
        path, client_state = load(load_dir, tag, *args, **kwargs)
        if path is not None:
            after_load(path, client_state, loads_states)
        return path, client_state

    engine.load_checkpoint = load_checkpoint
    if before_save is not None:
        engine.save_checkpoint = save_checkpoint
