"""Megatron-LM's pretrain (0.19.2) as pretrain_gpt.py calls it: importing ours is enough."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FLAGS = [
    "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "96",
    "--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2",
    "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear",
    "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
    "--attention-dropout", "0", "--hidden-dropout", "0", "--seq-length", "16",
    "--max-position-embeddings", "16", "--micro-batch-size", "1", "--global-batch-size", "4",
    "--train-iters", "8", "--lr", "0.003", "--min-lr", "0.0003", "--lr-decay-style", "cosine",
    "--lr-warmup-iters", "2", "--weight-decay", "0.1", "--clip-grad", "1.0", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--vocab-size", "127",
    "--make-vocab-size-divisible-by", "64", "--log-interval", "1",
    "--eval-iters", "0", "--eval-interval", "1000", "--transformer-impl", "local",
    "--distributed-backend", "gloo", "--use-cpu-initialization", "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion",
    "--no-gradient-accumulation-fusion", "--no-persist-layer-norm", "--ckpt-format", "torch_dist",
]  # fmt: skip
MUON = ["--optimizer", "spectral_muon", "--spectral-momentum", ".9"]
DISTRIBUTED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
TP = ["--tensor-model-parallel-size", "2"]


def start(ranks: int, *flags: str | Path) -> list[str]:
    """What each rank printed, its status first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.distributed.megatron.megatron_pretrain",
             *FLAGS, *map(str, flags)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [f"{p.returncode}\n{text}" for p, text in zip(processes, printed, strict=True)]


def losses(ranks: int, *flags: str | Path) -> list[float]:
    """The loss of each iteration, over all ranks, which have as many sequences each."""
    printed = start(ranks, *flags)
    assert all(text.startswith("0\n") for text in printed), printed[-1][-5000:]
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    return [statistics.mean(each) for each in zip(*found, strict=True)]


def errors(ranks: int, *flags: str | Path) -> list[str]:
    """The last line that begins with an error's name, of each rank."""
    texts = start(ranks, *flags)
    assert all(not text.startswith("0\n") for text in texts)
    return [re.findall(r"(?m)^(?:\[rank\d\]: )?(\w+Error: .*)", text)[-1] for text in texts]


def stopped(saved: Path, folder: Path) -> list[str | Path]:
    """Flags that load the checkpoint of iteration 3."""
    shutil.copytree(saved / "iter_0000003", folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return ["--load", folder]


@pytest.mark.slow
def test_pretrain_trains_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    flags = [*MUON, *DISTRIBUTED]
    whole = losses(1, *flags, "--save", tmp_path / "a", "--save-interval", "3")
    assert len(whole) == 8
    assert whole[-1] < whole[0] - 0.4
    load = stopped(tmp_path / "a", tmp_path / "b")
    rest = pytest.approx(whole[3:], rel=0, abs=1e-5)
    assert losses(2, *flags, *load, *TP) == rest
    assert losses(2, *flags, *load) == rest
    # the checkpoint knows the optimizer and its options
    assert losses(1, *DISTRIBUTED, *load, "--use-checkpoint-args") == rest
    for text in errors(2, *load):  # without, it would be Adam
        assert "saved with another optimizer: spectral_muon" in text
        assert "--no-load-optim" in text
    anew = losses(1, *load, "--no-load-optim")
    assert anew[0] == pytest.approx(whole[3], abs=1e-5)
    assert len(anew) == 5


@pytest.mark.slow
def test_poet_is_converted_by_a_hook_of_the_model(tmp_path: Path) -> None:
    flags = ["--optimizer", "spectral_poet", "--spectral-merge-every", "3"]
    assert "model_cfg.pre_wrap_hooks" in errors(1, *flags)[0]
    flags += ["--rotate", "16"]
    whole = losses(1, *flags, "--save", tmp_path / "a", "--save-interval", "3")
    assert whole[-1] < whole[0] - 0.05
    load = stopped(tmp_path / "a", tmp_path / "b")
    assert losses(2, *flags, *load, *TP) == pytest.approx(whole[3:], rel=0, abs=1e-4)
