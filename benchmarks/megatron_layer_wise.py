"""Bytes of Megatron's layer-wise layout (``dist_muon``) and of ours in its distributed optimizer.

``PYTHONPATH=. .venv/bin/python -m benchmarks.megatron_layer_wise`` prints two tables. The first is
for the matrices of real models: Megatron's own function lays their buffers out, and our estimate
says what ours moves. The second counts a step of a small GPT on four CPU ranks where torch
dispatches its collectives; Megatron's optimizer has SGD inside, which sends what Muon does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.dispatched_traffic import DispatchedTraffic
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

VERSION = "0.19.2"
CONFIGS = Path(__file__).parents[1] / "configs" / "models"
GIB = 2**30
BUCKET = 40_000_000
"""Megatron-LM's --ddp-bucket-size where reductions overlap, but for very many ranks."""
SMALL = {"hidden": 128, "layers": 4, "ffn": 384, "bf16": True}
STEPS = 2
"""The second is counted, as the first also finds groups and plans."""


def padded(name: str, ranks: int, bucket: int | None) -> tuple[int, int]:
    """(elements of the matrices, elements of Megatron's layer-wise buffer for them)."""
    megatron_cpu.install(VERSION)
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    c = json.loads((CONFIGS / f"{name}.json").read_text())
    hidden, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    width = c.get("head_dim") or hidden // heads
    qkv = (heads + 2 * c["num_key_value_heads"]) * width
    shapes = [(qkv, hidden), (hidden, heads * width), (2 * ffn, hidden), (hidden, ffn)]
    layers = c["num_hidden_layers"]
    weights = [nn.Parameter(torch.empty(s, device="meta")) for _ in range(layers) for s in shapes]
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    layout = LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(
        weights, bucket, ranks, settings
    )
    return sum(w.numel() for w in weights), layout.bucket_indices[-1][1]


def moved(name: str, ranks: int, bucket: int | None) -> float:
    """Bytes that ours sends beyond AdamW's, on the rank that sends most."""
    from spectral_dist.estimate.estimate import estimate
    from spectral_dist.estimate.job import Job
    from spectral_dist.launch import llama

    job = Job.from_user("megatron", dp=ranks, distributed_optimizer=True, ddp_bucket_size=bucket)
    model = llama.build_empty(CONFIGS / f"{name}.json")
    found = estimate(model, job, "muon")
    return float(found.by_rank["moved"].max())


class Inside(torch.optim.SGD):
    """What stands where Muon would, with the method by which Megatron creates states."""

    def _init_group(self, group: Any, *args: Any, skip_non_grad_params: bool = True) -> Any:
        return super()._init_group(group, *args) if args else None


def layer_wise(settings: Any, model: Any) -> tuple[Any, Any]:
    """(the model under Megatron's DDP in the layer-wise layout, Megatron's optimizer for it)."""
    import megatron.core.optimizer as optimizers
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import emerging_optimizers as registry
    from megatron.core.optimizer import layer_wise_optimizer as layer
    from megatron.core.transformer.module import Float16Module

    entry = registry.EmergingOptimizerEntry(Inside, config_to_kwargs=lambda *_: {"lr": 0.01})
    registry._EMERGING_OPTIMIZERS["counted"] = entry
    optimizers.HAVE_EMERGING_OPTIMIZERS = True
    wrapped = Float16Module(model.config, model)  # first, as norms are float32 before it
    layer.tag_params_for_buffer_routing([model])
    ranks = torch.distributed.get_world_size()
    layout = layer.LayerWiseDistributedOptimizer.compute_full_param_layout(
        list(model.parameters()), settings.bucket_size, ranks, settings
    )
    ddp = DistributedDataParallel(model.config, settings, wrapped, full_param_layout=layout)
    config = models.optimizer_config(
        ddp, optimizer="counted", use_layer_wise_distributed_optimizer=True
    )
    config.use_distributed_optimizer = False
    return ddp, optimizers.get_megatron_optimizer(config, [ddp])


def counted(kind: str, bucket: int | None) -> dict[str, int]:
    """Bytes by collective that this rank sends in a step."""
    megatron_cpu.install(VERSION)
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer

    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    data = models.parallel()
    overlap = {"overlap_grad_reduce": True, "bucket_size": bucket} if bucket else {}
    model = models.gpt(**SMALL)
    if kind == "layer-wise":
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, **overlap)
        ddp, optimizer = layer_wise(settings, model)
    else:
        ddp = models.wrap(model, use_distributed_optimizer=True, **overlap)
        config = models.optimizer_config(ddp, optimizer=kind)
        build = get_megatron_optimizer if kind == "adam" else get_spectral_megatron_optimizer
        optimizer = build(config, [ddp])
    for step in range(STEPS):  # a count of its own each
        with DispatchedTraffic() as traffic:
            models.train_step(ddp, optimizer, models.batch(step, *data))
    return dict(traffic.bytes)


def main() -> None:
    """Print the tables."""
    print("model, DP, bucket: GiB beyond AdamW's that a rank sends in a step, layer-wise; ours")
    for name in ("llama_1b", "llama_8b", "llama_70b"):
        for ranks in (8, 32, 128):
            for bucket in (None, max(BUCKET, 1_000_000 * ranks)):
                total, size = harness.run(1, padded, name, ranks, bucket, pool=VERSION)[0]
                # of padding: float32 gradients are reduced, bf16 weights gathered
                padding = (4 + 2) * (size - total) * (ranks - 1) / ranks
                ours = moved(name, ranks, bucket)
                print(
                    f"{name:9} {ranks:4} {bucket or 'one':>10}: {padding / GIB:7.3f};"
                    f" {ours / GIB:7.3f} (padding {size / total - 1:.3f} of N)",
                    flush=True,
                )
    print("four ranks, a small GPT in bf16: bytes that all ranks send in a step, by collective")
    for bucket in (None, 100_000):
        for kind in ("adam", "spectral_muon", "layer-wise"):
            found = harness.run(4, counted, kind, bucket, pool=VERSION)
            names = sorted({name for one in found for name in one})
            sums = {name: sum(one.get(name, 0) for one in found) for name in names}
            print(f"{kind}, bucket {bucket or 'one'}: {sum(sums.values())} {sums}", flush=True)


if __name__ == "__main__":
    main()
