"""The calls of Megatron-LM's pretrain_gpt.py (0.19), through the megatron.training of its wheel.

A script: one process a rank, with RANK and so on in the environment and Megatron's flags as
arguments. Its last line is JSON: the mean loss of this rank's sequences in each iteration.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch

from tests.support import megatron_cpu

megatron_cpu.install_training()  # here, so that processes that checkpoints spawn have it too

SEEN: list[float] = []
"""Of each micro-batch. What Megatron logs is a mean over two iterations, in the second one after a
start in which it has loaded a checkpoint."""


def batch(iterator: Any) -> dict[str, Any]:
    """The first tensor-parallel rank's next one, on all of them."""
    from megatron.core import mpu

    found = [next(iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None]
    group, first = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_src_rank()
    torch.distributed.broadcast_object_list(found, first, group)
    assert found[0] is not None
    return found[0]


def loss_of(mask: Any, output: Any) -> Any:
    loss, tokens = (output.float() * mask).sum(), mask.sum().int()
    SEEN.append(float(loss / tokens))
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(iterator: Any, model: Any) -> Any:
    row = batch(iterator)
    output = model(row["tokens"], row["position_ids"], row["attention_mask"], labels=row["labels"])
    return output, lambda output: loss_of(row["loss_mask"], output)


def datasets(samples: Any, vp_stage: Any = None) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, split=args.split,
        tokenizer=build_tokenizer(args), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=True, mid_level_dataset_surplus=0.005,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


def provider(parser: Any) -> Any:
    """A flag of the script's own, beside ours."""
    parser.add_argument("--rotate", type=int)
    return parser


def main() -> None:
    """As the end of pretrain_gpt.py, in its order."""
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from spectral_dist.integrations.megatron import poet  # the last import; or the first

    wrapped, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(provider, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    model = gpt_config_from_args(args)
    if args.rotate:
        settings = {"block": args.rotate, "segments": 2}
        model.pre_wrap_hooks.append(lambda models: poet.convert(models, **settings))
    config = pretrain_cfg_container_from_args(args, model)
    datasets.is_distributed = True  # type: ignore[attr-defined]
    wrapped(config, datasets, ModelType.encoder_or_decoder, forward_step, store=store)
    size = args.global_batch_size // args.data_parallel_size
    print(json.dumps([statistics.mean(SEEN[i : i + size]) for i in range(0, len(SEEN), size)]))


if __name__ == "__main__":
    main()
