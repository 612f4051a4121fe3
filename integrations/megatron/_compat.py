"""Every private or undocumented name of megatron-core that is used, and the versions that have it.

``_compat_hooks`` has those of Megatron-LM's training scripts. A name that a release could rename
without any error is checked at import. One whose first use would raise anyway has a function here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import megatron.core.dist_checkpointing as dist_checkpointing
import megatron.core.distributed as distributed
import megatron.core.optimizer as megatron_optimizer
from megatron.core import __version__ as version
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

__all__ = ["gather_from_tensor_model_parallel_region", "make_sharded_tensors_for_checkpoint"]

FIRST, END = (0, 16, 1), (0, 20)
KNOWN = "0.16.1 to 0.19.x"
"""The versions from ``FIRST`` on and below ``END``, of which the tests run the first and last."""
LANGUAGE = "megatron.core.models.common.language_module.language_module"
NAMES = {
    "megatron.core.optimizer": (
        "get_megatron_optimizer", "_get_param_groups", "get_standard_config_overrides",
        "_get_megatron_optimizer_based_on_param_groups",
    ),
    "megatron.core.optimizer.optimizer_config": ("ParamKey", "ParamPredicate"),
    "megatron.core.optimizer.optimizer": (
        "MegatronOptimizer.step_with_ready_grads", "ChainedOptimizer.step_with_ready_grads",
        "MegatronOptimizer._filter_and_reorder_param_groups",
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.sharded_state_dict", "DistributedOptimizer.load_state_dict",
    ),
    "megatron.core.distributed": (
        "DistributedDataParallel.start_param_sync", "TorchFullyShardedDataParallel",
    ),
    "megatron.core.dist_checkpointing": ("load", "load_common_state_dict", "ShardedTensor"),
    "megatron.core.tensor_parallel.layers": ("set_tensor_model_parallel_attributes",),
    "megatron.core.tensor_parallel.mappings": ("gather_from_tensor_model_parallel_region",),
    "megatron.core.transformer.utils": ("make_sharded_tensors_for_checkpoint",),
    LANGUAGE: ("LanguageModule.shared_embedding_or_output_weight",),
}  # fmt: skip
"""The names that have to exist in each module: attributes, or attributes of its classes."""
PARAMETERS = {
    "megatron.core.distributed:DistributedDataParallel.start_param_sync": ("force_sync",),
    "megatron.core.tensor_parallel.layers:ColumnParallelLinear": (
        "gather_output", "skip_bias_add", "is_expert", "disable_grad_reduce", "tp_group",
    ),
    "megatron.core.tensor_parallel.layers:RowParallelLinear": (
        "input_is_parallel", "skip_bias_add", "is_expert", "tp_group",
    ),
    "megatron.core.transformer.transformer_layer:TransformerLayer": ("layer_number",),
    "megatron.core.models.gpt:GPTModel": (
        "pre_process", "post_process", "share_embeddings_and_output_weights",
    ),
    "megatron.core.optimizer:OptimizerConfig": (
        "optimizer", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
        "use_distributed_optimizer", "optimizer_cpu_offload", "use_precision_aware_optimizer",
        "decoupled_weight_decay",
    ),
    "megatron.core.distributed:DistributedDataParallelConfig": (
        "use_megatron_fsdp", "num_distributed_optimizer_instances", "fp8_param_gather",
        "overlap_param_gather",
    ),
    "megatron.core.transformer.attention:SelfAttentionSubmodules": ("linear_qkv",),
    "megatron.core.transformer.mlp:MLPSubmodules": ("linear_fc1",),
    "megatron.core.transformer:TransformerConfig": (
        "gated_linear_unit", "num_attention_heads", "num_query_groups", "num_moe_experts",
        "hetereogenous_dist_checkpoint",
    ),
    "megatron.core.dist_checkpointing.mapping:ShardedTensor": (
        "key", "data", "dtype", "local_shape", "global_shape", "global_offset",
        "axis_fragmentations", "replica_id",
    ),
}  # fmt: skip
"""The parameters that each "module:callable" has to have; ours reads attributes of these names."""


def missing() -> list[str]:
    """Return the names that this version of megatron-core does not have."""
    absent = []
    for module, names in NAMES.items():
        absent += [f"{module}.{name}" for name in names if _look_up(module, name) is None]
    for path, expected in PARAMETERS.items():
        module, _, name = path.partition(":")
        function = _look_up(module, name)
        actual = inspect.signature(function).parameters if function is not None else ()
        absent += [f"{module}.{name}({word}=)" for word in expected if word not in actual]
    return absent


def check(number: str, names: Sequence[str] = ()) -> None:
    """Raise unless a version of megatron-core is known, and has every name that is used.

    Args:
        number: the version, as ``megatron.core.__version__`` has it.
        names: the names that it should have and has not.

    Raises:
        ImportError: says which versions work.
    """
    parts = tuple(int(digits) for digits in re.findall(r"\d+", number.partition("+")[0])[:3])
    if not FIRST <= parts < END:
        raise ImportError(
            f"this release of spectral_dist works with megatron-core {KNOWN}, and {number} is"
            " installed: install one of those (pip install 'megatron-core==0.19.2'), or a release"
            " of spectral_dist that knows this one"
        )
    if names:
        raise ImportError(
            f"this release of spectral_dist works with megatron-core {KNOWN}; the installed"
            f" {number} calls itself one, but has no {', '.join(names)}"
        )


def _look_up(module: str, name: str) -> Any:
    """Return a module's attribute "a.b"; None if there is no such module or attribute."""
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


check(version)
check(version, missing())


# --- building an optimizer

Build = Callable[..., Any]


def replace_builders(outer: Callable[[Build], Build], inner: Callable[[Build], Build]) -> Build:
    """Replace the functions by which Megatron builds optimizers.

    Args:
        outer: returns the replacement of ``get_megatron_optimizer``.
        inner: returns the replacement of each function that it calls.

    Returns:
        ``get_megatron_optimizer`` as it was.
    """
    module: Any = megatron_optimizer
    original: Build = module.get_megatron_optimizer
    replaced = {"get_megatron_optimizer": outer(original)}
    for name in ("_get_megatron_optimizer_based_on_param_groups",
                 "_get_megatron_emerging_optimizer"):  # fmt: skip
        if hasattr(module, name):  # the second from 0.17 on
            replaced[name] = inner(getattr(module, name))
    for name, function in replaced.items():
        setattr(module, name, function)
    training: Any = sys.modules.get("megatron.training.training")  # has imported it by name
    if training is not None:
        training.get_megatron_optimizer = module.get_megatron_optimizer
    return original


def register(name: str, cls: type) -> None:
    """Add an optimizer to megatron-core's registry of optimizers, which it has from 0.17 on."""
    try:
        registry: Any = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
    except ModuleNotFoundError:
        return
    registry._EMERGING_OPTIMIZERS[name] = registry.EmergingOptimizerEntry(optimizer_cls=cls)


def standard_overrides(config: Any) -> dict[Any, Any]:
    """Return Megatron's standard overrides for some parameters, such as no decay of biases."""
    overrides: dict[Any, Any] = megatron_optimizer.get_standard_config_overrides(config)
    return overrides


def param_groups(chunks: Sequence[nn.Module], config: Any, overrides: Any) -> list[dict[str, Any]]:
    """Return the parameter groups that Megatron makes, of the parameters of all ranks."""
    groups: list[dict[str, Any]] = megatron_optimizer._get_param_groups(chunks, config, overrides)
    return groups


def leaves(built: Any) -> list[Any]:
    """Return the optimizers that ``get_megatron_optimizer`` has chained, or the one it returned."""
    return list(getattr(built, "chained_optimizers", [built]))


def group_places(leaf: Any) -> dict[int, tuple[int, int]]:
    """Return (index of the group, index in it) of each parameter of this rank, by its id."""
    return {id(p): indices for p, indices in leaf.model_param_group_index_map.items()}


def bucket_places(leaf: Any) -> Iterator[tuple[nn.Parameter, int, int]]:
    """Yield (parameter, its start in its bucket, elements of the bucket that each rank stores)."""
    ranks = leaf.data_parallel_group.size()
    for buffer in leaf.buffers:
        for parameter, (start, _, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            yield parameter, start - bucket.offset, bucket.grad_data.numel() // ranks


def model_parameters(leaf: Any) -> list[list[nn.Parameter]]:
    """Return a non-distributed optimizer's parameters by group: the model's, not master copies."""
    groups = leaf.optimizer.param_groups
    masters = getattr(leaf, "fp32_from_float16_groups", [()] * len(groups))
    halves = getattr(leaf, "float16_groups", [()] * len(groups))
    lists = []
    for group, main, half in zip(groups, masters, halves, strict=True):
        model = {id(m): p for m, p in zip(main, half, strict=True)}
        lists.append([model.get(id(p), p) for p in group["params"]])
    return lists


def call_after_update(built: Any, then: Callable[[], None]) -> None:
    """Make Megatron call a function after each update of the parameters; not in skipped steps."""
    update = built.step_with_ready_grads

    @functools.wraps(update)
    def step_with_ready_grads() -> Any:
        done = update()
        then()
        return done

    built.step_with_ready_grads = step_with_ready_grads


def replace_inner(leaf: Any, inner: Any, prepare: Callable[[Any], None]) -> None:
    """Replace the torch optimizer inside of one of Megatron's, and what creates its states."""
    leaf.optimizer = inner
    leaf.init_state_fn = lambda optimizer, config=None: prepare(optimizer)


def match_groups_by(
    leaf: Any, match: Callable[[Sequence[Any], Sequence[Any]], list[dict[str, Any]]]
) -> None:
    """Make an optimizer match its groups with the saved ones, at loading, by ``match``."""
    leaf._filter_and_reorder_param_groups = match


# --- marks on parameters, and modules


def is_expert(parameter: Any) -> bool:
    """Return whether a parameter is an expert's; those have process groups of their own."""
    return not getattr(parameter, "allreduce", True)


def cut_dimension(parameter: Any) -> int | None:
    """Return the dimension of a parameter that tensor parallelism cuts; None if it cuts none."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)


def stride(parameter: Any) -> int:
    """Return the number of parts of the cut dimension that each rank stores a piece of."""
    return int(getattr(parameter, "partition_stride", 1))


def packs_parts(parameter: Any) -> bool:
    """Return whether a parameter holds parts of different sizes, each cut (Mamba's in_proj)."""
    return hasattr(parameter, "partition_sizes")


def is_embedding_or_output(parameter: Any) -> bool:
    """Return whether Megatron has marked a parameter as an embedding's or the output layer's."""
    return bool(getattr(parameter, "is_embedding_or_output_parameter", False))


def mark_parameter(parameter: Any, cut: int | None, weight: Any) -> None:
    """Mark a parameter as cut along a dimension, if it is, and as an expert's, if ``weight`` is."""
    layers.set_tensor_model_parallel_attributes(
        parameter, cut is not None, -1 if cut is None else cut, 1
    )
    parameter.allreduce = getattr(weight, "allreduce", True)


def sum_over_sequence(parameter: Any, layer: Any) -> None:
    """Make Megatron sum a gradient over tensor-parallel ranks under sequence parallelism."""
    parameter.sequence_parallel = layer.sequence_parallel


def unmarked_heads(models: Iterable[nn.Module]) -> bool:
    """Return whether a language model has an embedding or output layer, but none that is marked."""
    kind = _look_up(LANGUAGE, "LanguageModule")
    for model in models:
        for module in model.modules():
            if not isinstance(module, kind):
                continue
            ends = [getattr(module, name, None) for name in ("embedding", "output_layer")]
            weights = [p for end in ends if isinstance(end, nn.Module) for p in end.parameters()]
            if weights and not any(is_embedding_or_output(p) for p in weights):
                return True
    return False


def head_size(attention: Any) -> int:
    """Return the number of rows that one head of queries, keys or values has in linear_qkv."""
    return int(attention.hidden_size_per_attention_head)


def expert_numbers(module: Any) -> Sequence[int] | None:
    """Return the numbers in the whole model of a layer's experts; None if it has no experts."""
    numbers: Sequence[int] | None = getattr(module, "local_expert_indices", None)
    return numbers


def layer_number(layer: Any) -> int | None:
    """Return a layer's number in the whole model, from 1; None if it does not know it."""
    number: int | None = getattr(layer, "layer_number", None)
    return number


def is_first_stage(model: Any) -> bool:
    """Return whether a part of a model is the first stage, whose embedding is no copy."""
    return bool(getattr(model, "pre_process", True))


def duplicated_ends(model: Any) -> list[nn.Module]:
    """Return the embedding and output layer of a part of a model that are copies of another's."""
    ends = []
    if not is_first_stage(model):
        ends.append(getattr(model, "embedding", None))
    if not getattr(model, "post_process", True):
        ends.append(getattr(model, "output_layer", None))
    return [end for end in ends if isinstance(end, nn.Module)]


def leaves_gradient(layer: Any) -> bool:
    """Return whether a parallel linear layer leaves it to others to reduce its input's gradient."""
    return bool(getattr(layer, "disable_grad_reduce", False))


def cuts_input(layer: Any) -> bool:
    """Return whether a RowParallelLinear cuts its input itself."""
    return not getattr(layer, "input_is_parallel", True)


def tied_weight(module: Any) -> nn.Parameter | None:
    """Return the weight that embedding and output layer share, if a stage has it; else None."""
    if not getattr(module, "share_embeddings_and_output_weights", False):
        return None
    weight = getattr(module, "shared_embedding_or_output_weight", lambda: None)()
    return weight if isinstance(weight, nn.Parameter) else None


def rematerializes() -> bool:
    """Return whether megatron-core (from 0.19 on) shards weights over yet another group."""
    get = getattr(parallel_state, "get_gtp_weight_remat_group", None)
    group = get(check_initialized=False) if get else None
    return group is not None and group.size() > 1


def is_torch_fsdp(chunk: nn.Module) -> bool:
    """Return whether a model is wrapped as --use-torch-fsdp2 wraps it."""
    return isinstance(chunk, distributed.TorchFullyShardedDataParallel)


def finish_param_gathers(chunk: Any) -> None:
    """Gather the parameters that the next forward pass would gather; all data ranks call it."""
    if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
        chunk.start_param_sync(force_sync=True)


def save_layers_separately(model: Any) -> None:
    """Make checkpoints save each layer's tensors by themselves, not stacked over layers."""
    model.config.hetereogenous_dist_checkpoint = True


# --- checkpoints


def sharded_tensor(
    key: str, values: Tensor, shape: Sequence[int], offsets: Sequence[int], grid: Any, is_copy: bool
) -> Any:
    """Return Megatron's description of a box of a tensor, whose ``values`` it saves or loads.

    Args:
        key, shape: of the whole tensor.
        offsets: of the box in it.
        grid: the number of boxes along each dimension; None if they are of different sizes.
        is_copy: whether another rank saves the same box.
    """
    return dist_checkpointing.ShardedTensor(
        key=key, data=values, dtype=values.dtype, local_shape=tuple(values.shape),
        global_shape=tuple(shape), global_offset=tuple(offsets), axis_fragmentations=grid,
        replica_id=int(is_copy),
    )  # fmt: skip
