"""Imports what ranks need, once and for all of them: only in the process that forked.py forks."""

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

import importlib

import torch.distributed.run
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama  # noqa: F401

from spectral_dist.launch.engines import deepspeed as engines

torch.set_num_threads(1)
if os.environ.get("PRELOADED") == "megatron":
    from tests.support import megatron_cpu

    megatron_cpu.install(megatron_cpu.VERSIONS[0])
    importlib.import_module("spectral_dist.launch.engines.megatron")
else:
    engines.prepare_deepspeed()
    importlib.import_module("spectral_dist.integrations.deepspeed")
