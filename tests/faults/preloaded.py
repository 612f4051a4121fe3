"""Imports what ranks need, once and for all of them: only in the process that forked.py forks."""

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")

import importlib

import torch.distributed.run
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama  # noqa: F401

from spectral_dist.launch import corpus, engines, report, torch_engine, trainer  # noqa: F401

engines.prepare_deepspeed()
importlib.import_module("spectral_dist.integrations.deepspeed")  # which the line above prepares
torch.set_num_threads(1)
