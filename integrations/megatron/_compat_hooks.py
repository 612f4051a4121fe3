"""Functions of Megatron-LM's training scripts, and of loading, that are wrapped for our optimizers.

They are functions of ``megatron.training`` and ``megatron.core.dist_checkpointing`` that are not
documented as hooks. Nothing of ``megatron.training`` is imported here: its modules are wrapped when
the script imports them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import megatron.core.dist_checkpointing as dist_checkpointing

from spectral_dist.integrations.after_import import after_import


def extend_parser(add: Callable[[Any], Any]) -> None:
    """Make Megatron-LM pass every parser that it makes through ``add``.

    Megatron-LM parses several times: before ``pretrain``, in it, and where it takes an
    ``extra_args_provider``, which it still calls with the same parser.

    Args:
        add: adds flags to a parser, and returns it.
    """

    def wrap(module: Any) -> None:
        original = module.add_megatron_arguments

        def add_megatron_arguments(parser: Any) -> Any:
            return add(original(parser))

        module.add_megatron_arguments = add_megatron_arguments

    after_import("megatron.training.arguments", wrap)


def extend_checkpoint_args(restore: Callable[[Any, Any], Mapping[str, Any]]) -> None:
    """Make --use-checkpoint-args call ``restore`` as well.

    Args:
        restore: called with (arguments of this run, arguments in the checkpoint); returns the
            arguments that it has set, by name, for Megatron to print.
    """

    def wrap(module: Any) -> None:
        original = module.load_args_from_checkpoint

        def load_args_from_checkpoint(args: Any, *rest: Any, **kwargs: Any) -> Any:
            result = original(args, *rest, **kwargs)
            if isinstance(result, tuple):  # else there is no checkpoint, or it has no arguments
                for name, value in restore(*result[:2]).items():
                    module.print_rank_0(f"Setting {name} to {value} from checkpoint")
            return result

        module.load_args_from_checkpoint = load_args_from_checkpoint
        # up to 0.17 it imports the function by name
        initialize: Any = sys.modules.get("megatron.training.initialize")
        if hasattr(initialize, "load_args_from_checkpoint"):
            initialize.load_args_from_checkpoint = load_args_from_checkpoint

    after_import("megatron.training.checkpointing", wrap)


def guard_loading(check: Callable[[Any, Any], None], select: Callable[[Any], Any]) -> None:
    """Make every load of a distributed checkpoint call ``check`` before anything is loaded.

    Args:
        check: called with (the sharded state dict to be loaded, a part of the checkpoint); first
            with the part that all ranks share, then with what ``select`` has chosen.
        select: returns the part of a sharded state dict that ``check`` needs beside the shared
            part; empty for nothing.
    """
    module: Any = dist_checkpointing
    original = module.load

    @functools.wraps(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        check(sharded_state_dict, module.load_common_state_dict(checkpoint_dir))
        selected = select(sharded_state_dict)
        if selected:
            loaded = original(selected, checkpoint_dir, validate_access_integrity=False)
            check(sharded_state_dict, loaded)
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    module.load = load
