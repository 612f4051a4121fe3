"""What of Megatron-LM's training scripts, and of loading, ours goes along with.

Names of ``megatron.training`` and ``megatron.core.dist_checkpointing`` that are no documented
hooks. Nothing of ``megatron.training`` is imported here: it is met when the script imports it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

import megatron.core.dist_checkpointing as dist_checkpointing


class _AfterImport(MetaPathFinder):
    """Calls a function with a module of one name, as soon as that has been imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec that the other finders have, with a loader that calls the function."""
        if name != self.name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: Any = find(name, path, target) if find else None
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = self._followed(spec.loader.exec_module)
                return cast(ModuleSpec, spec)
        return None

    def _followed(self, load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def load_and_call(module: ModuleType) -> None:
            load(module)
            self.then(module)

        return load_and_call


def after_import(name: str, then: Callable[[Any], None]) -> None:
    """Call a function with a module: now if it has been imported, else when it is.

    Args:
        name: of the module; one that is not installed is never imported, and nothing happens.
        then: called once for each time that the module is loaded.
    """
    module = sys.modules.get(name)
    if module is not None:
        then(module)
    sys.meta_path.insert(0, _AfterImport(name, then))


def extend_parser(add: Callable[[Any], Any]) -> None:
    """Have every parser that Megatron-LM makes go through ``add``.

    It parses several times: before ``pretrain``, in it, and where an ``extra_args_provider`` is
    taken, which is still called, on the same parser.
    """

    def wrap(module: Any) -> None:
        plain = module.add_megatron_arguments

        def add_megatron_arguments(parser: Any) -> Any:
            return add(plain(parser))

        module.add_megatron_arguments = add_megatron_arguments

    after_import("megatron.training.arguments", wrap)


def extend_checkpoint_args(restore: Callable[[Any, Any], Mapping[str, Any]]) -> None:
    """Have --use-checkpoint-args go through ``restore``, too.

    Args:
        restore: called with (arguments of this run, those of the checkpoint); it returns what it
            has set, by name.
    """

    def wrap(module: Any) -> None:
        plain = module.load_args_from_checkpoint

        def load_args_from_checkpoint(args: Any, *rest: Any, **kwargs: Any) -> Any:
            result = plain(args, *rest, **kwargs)
            if isinstance(result, tuple):  # else there was no checkpoint, or none with arguments
                for name, value in restore(*result[:2]).items():
                    module.print_rank_0(f"Setting {name} to {value} from checkpoint")
            return result

        module.load_args_from_checkpoint = load_args_from_checkpoint
        initialize: Any = sys.modules.get("megatron.training.initialize")  # to 0.17, by name
        if hasattr(initialize, "load_args_from_checkpoint"):
            initialize.load_args_from_checkpoint = load_args_from_checkpoint

    after_import("megatron.training.checkpointing", wrap)


def guard_loading(look: Callable[[Any, Any], None], part: Callable[[Any], Any]) -> None:
    """Have every load of a distributed checkpoint be looked at before anything of it is taken.

    Args:
        look: called with (what is to be loaded, what of it is in the checkpoint).
        part: returns what of a sharded state dict is to be loaded for ``look``, beside what all
            ranks have in common; empty for nothing.
    """
    module: Any = dist_checkpointing
    plain = module.load

    @functools.wraps(plain)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        look(sharded_state_dict, module.load_common_state_dict(checkpoint_dir))
        first = part(sharded_state_dict)
        if first:
            look(sharded_state_dict, plain(first, checkpoint_dir, validate_access_integrity=False))
        return plain(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    module.load = load
