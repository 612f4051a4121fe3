"""What goes along when an engine saves and loads: its two methods, with ours around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from spectral_dist.integrations.deepspeed import latest
from spectral_dist.integrations.deepspeed._compat import argument

Before: TypeAlias = Callable[[Path, Callable[[str], Any]], Mapping[str, Any]]
"""Of the tag's folder, and of a function from the name of an argument of ``save_checkpoint`` to its
value: what to put into client_state."""
After: TypeAlias = Callable[[str, dict[str, Any], bool], None]
"""Of the path that was loaded, its client_state, and whether optimizer states are wanted."""
BeforeLoad: TypeAlias = Callable[[Path, bool], None]
"""Of the tag's folder, and whether optimizer states are wanted."""


def around_checkpoints(
    engine: Any,
    after_load: After,
    before_save: Before | None = None,
    before_load: BeforeLoad | None = None,
) -> None:
    """Have this engine's ``save_checkpoint`` and ``load_checkpoint`` call these as well.

    ``before_save`` comes first: when DeepSpeed is done `latest` is written, and all of the
    checkpoint must be there then. ``before_load`` is not called if there is no tag to load, and
    ``after_load`` if nothing was found.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        save_dir: str,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        assert before_save is not None
        tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
        given = (save_dir, tag, client_state, *args)
        more = before_save(Path(save_dir, tag), lambda name: argument(save, name, given, kwargs))
        return save(save_dir, tag, {**(client_state or {}), **more}, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if tag is None:
            tag = latest.read(load_dir, engine.load_universal_checkpoint())
        states, module_only = (
            argument(load, name, (load_dir, tag, *args), kwargs)
            for name in ("load_optimizer_states", "load_module_only")
        )
        wanted = states and not module_only
        if before_load is not None and tag is not None:
            before_load(Path(load_dir, str(tag)), wanted)
        path, client_state = load(load_dir, tag, *args, **kwargs)
        if path is not None:
            after_load(path, client_state, wanted)
        return path, client_state

    engine.load_checkpoint = load_checkpoint
    if before_save is not None:
        engine.save_checkpoint = save_checkpoint
