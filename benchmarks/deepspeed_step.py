"""Whole training iterations of SpectralMuon, DeepSpeed's built-in Muon and AdamW, side by side.

    .venv/bin/python benchmarks/deepspeed_step.py --json step.json

At each ZeRO stage all of them live on the same gloo ranks (one thread each) and take turns, so
that a noisy machine is noisy for all. An iteration is forward, backward and step of a small float32
Llama on one sequence per rank; no clipping; 5 Newton-Schulz steps of the same polynomial.

time: median of the ratios of iterations of the same turn. cpu: the same of CPU time, summed over
ranks: less disturbed by other processes, blind to imbalance. The built-in picks its dtype: bfloat16
for "standard", float16 for "gram" (its default) if the CPU has it, else float32; each of ours is
compared with that of its dtype. At stage 3 the built-in needs "reduce_scatter": false, so all have
that; "rs" is with it, DeepSpeed's default. MB: of one iteration, mean over ranks, by the convention
in traffic.py. NS: matrices orthogonalized in one, sum over ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.update(TORCHDYNAMO_DISABLE="1", DS_ACCELERATOR="cpu")  # before their imports
os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from traffic import Traffic


@dataclass(frozen=True)
class DeepSpeedContender:
    """An optimizer of the JSON, and the rows that it is compared with."""

    type: str
    params: dict[str, Any]
    base: str = "AdamW"
    peer: str = ""
    reduce_scatter: bool = False


def _ours(dtype: str, wire: str, polar: str = "jordan") -> dict[str, Any]:
    return {"polar": polar, "polar_steps": 5, "polar_dtype": dtype, "wire_dtype": wire}


ADAM = {"torch_adam": True}  # DeepSpeed's own would be compiled
BF16, F32, MUON, VOCABULARY = "bfloat16", "float32", "SpectralMuon", 1024
CONTENDERS = {
    "AdamW": DeepSpeedContender("AdamW", ADAM),
    "built-in bf16": DeepSpeedContender("Muon", {**ADAM, "ns_method": "standard"}),
    "ours bf16, wire bf16": DeepSpeedContender(MUON, _ours(BF16, BF16), peer="built-in bf16"),
    "ours bf16, wire f32": DeepSpeedContender(MUON, _ours(BF16, F32), peer="built-in bf16"),
    "built-in gram": DeepSpeedContender("Muon", {**ADAM, "ns_method": "gram"}),
    "ours gram f32": DeepSpeedContender(MUON, _ours(F32, F32, "gram_jordan"), peer="built-in gram"),
    "ours f32": DeepSpeedContender(MUON, _ours(F32, F32), peer="built-in gram"),
    "AdamW rs": DeepSpeedContender("AdamW", ADAM, "AdamW rs", "", True),
    "ours bf16 rs": DeepSpeedContender(MUON, _ours(BF16, BF16), "AdamW rs", "built-in bf16", True),
}


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What is run: ``model`` goes to LlamaConfig, ``seconds`` are those of measuring a stage."""

    ranks: int
    sequence: int
    seconds: float
    model: dict[str, int]


class DeepSpeedRunner:
    """One contender's engine on this rank, and what its iterations took."""

    def __init__(self, contender: DeepSpeedContender, stage: int, s: DeepSpeedSettings) -> None:
        import deepspeed
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        scatter = contender.reduce_scatter or stage < 3
        model = LlamaForCausalLM(LlamaConfig(**s.model, vocab_size=VOCABULARY))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_scatter": scatter},
            "optimizer": {"type": contender.type, "params": {"lr": 1e-3, **contender.params}},
        }
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            self.engine = deepspeed.initialize(model=model, config=config)[0]
        self.times: list[tuple[float, float]] = []  # (barrier to barrier, CPU of this rank), s

    def iterate(self, tokens: Tensor) -> None:
        """One whole training iteration, timed."""
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        self.engine.backward(self.engine(input_ids=tokens, labels=tokens).loss)
        self.engine.step()
        cpu = time.process_time() - cpu
        dist.barrier()
        self.times.append((time.perf_counter() - start, cpu))

    def observe(self, tokens: Tensor, traffic: Traffic, built_in: Counter[str]) -> dict[str, Any]:
        """Of one iteration, untimed: bytes, and matrices orthogonalized, on this rank."""
        built_in.clear()
        self.engine.basic_optimizer.polar_calls = 0
        traffic.bytes.clear()
        traffic.on = True
        self.iterate(tokens)
        traffic.on = False
        self.times.clear()
        polar = self.engine.basic_optimizer.polar_calls + built_in.total()
        return {"bytes": dict(traffic.bytes), "polar": polar, "times": self.times}


def count_built_in() -> Counter[str]:
    """What the built-in has orthogonalized on this rank, in a counter that follows it."""
    from deepspeed.runtime.zero.muon import original_muon

    count: Counter[str] = Counter()

    def call(name: str, original: Any, *args: Any, **options: Any) -> Tensor:
        count[name] += 1
        return original(*args, **options)

    for name in ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz"):
        setattr(original_muon, name, partial(call, name, getattr(original_muon, name)))
    return count


def rank_main(rank: int, stage: int, s: DeepSpeedSettings, output: str) -> None:
    """Everything of one stage on one rank; what was measured goes to output.RANK."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(s.ranks))
    traffic = Traffic()
    import deepspeed.ops

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for 45 s
    import spectral_dist.integrations.deepspeed  # noqa: F401

    dist.init_process_group("gloo", f"file://{output}", rank=rank, world_size=s.ranks)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    built_in = count_built_in()
    tokens = torch.randint(VOCABULARY, (1, s.sequence))
    names = [n for n, contender in CONTENDERS.items() if stage == 3 or not contender.reduce_scatter]
    runners = [DeepSpeedRunner(CONTENDERS[name], stage, s) for name in names]
    for runner in (*runners, *runners):  # stage 3 learns the order of the modules, then checks it
        runner.iterate(tokens)
    found = {n: r.observe(tokens, traffic, built_in) for n, r in zip(names, runners, strict=True)}
    begin, elapsed, turn = time.monotonic(), torch.zeros(()), 0
    while turn < 3 or elapsed.item() < s.seconds:
        for k in range(2 * len(runners)):  # two iterations each
            runners[(k // 2 + turn) % len(runners)].iterate(tokens)
        elapsed, turn = torch.tensor(time.monotonic() - begin), turn + 1
        dist.broadcast(elapsed, 0)
    Path(f"{output}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_stage(stage: int, s: DeepSpeedSettings) -> dict[str, dict[str, Any]]:
    """The rows of one stage, measured in processes of their own: nothing stays in memory."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (stage, s, f"{folder}/out"), nprocs=s.ranks)
        ranks = [json.loads(Path(f"{folder}/out.{r}").read_text()) for r in range(s.ranks)]
    rows: dict[str, dict[str, Any]] = {}
    for name in ranks[0]:
        parts, row = [found[name] for found in ranks], asdict(CONTENDERS[name])
        row["seconds"] = [wall for wall, _ in parts[0]["times"]]
        row["cpu"] = [sum(c for _, c in t) for t in zip(*(p["times"] for p in parts), strict=True)]
        row["sent"] = statistics.mean(sum(p["bytes"].values()) for p in parts)
        row["polar"] = sum(p["polar"] for p in parts)
        rows[name] = {**row, "bytes": parts[0]["bytes"]}
    for row in rows.values():
        row["over AdamW"] = row["sent"] - rows[row["base"]]["sent"]
        for key, other in (("AdamW", row["base"]), ("built-in", row["peer"])):
            if other:
                row[f"bytes/{key}"] = row["sent"] / rows[other]["sent"]
                for name, times in (("time", "seconds"), ("cpu", "cpu")):
                    pairs = zip(row[times], rows[other][times], strict=True)
                    row[f"{name}/{key}"] = statistics.median(a / b for a, b in pairs)
    return rows


def show(stage: int, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Print one stage's table; the targets that ours misses in it."""
    ratios = ("time/AdamW", "time/built-in", "cpu/built-in", "bytes/built-in")
    titles = ("median ms", "least ms", "cpu ms", *ratios, "MB sent", "over AdamW", "NS")
    print(f"\n| {f'stage {stage}':<20} | {' | '.join(titles)} |\n|---|{'--:|' * len(titles)}")
    limits = {"time/built-in": 1.0} | ({"bytes/built-in": 0.5} if stage == 3 else {})
    missed: list[str] = []
    for name, row in rows.items():
        times = (statistics.median(row["seconds"]), min(row["seconds"]), min(row["cpu"]))
        cells = [f"{1e3 * x:.0f}" for x in times]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ratios]
        cells += [f"{row['sent'] / 1e6:.2f}", f"{row['over AdamW'] / 1e6:+.2f}", str(row["polar"])]
        cells = [cell.rjust(len(title)) for cell, title in zip(cells, titles, strict=True)]
        print(f"| {name:<20} | {' | '.join(cells)} |")
        bad = [f"{k} is {row[k]:.4f}" for k, limit in limits.items() if row.get(k, 0) > limit]
        missed += [f"missed at stage {stage} by {name}: {what}" for what in bad]
    return missed


def main(
    stages: Annotated[str, typer.Option(help="ZeRO stages, comma-separated")] = "1,2,3",
    seconds: Annotated[float, typer.Option(help="of measuring a stage, at least 3 turns")] = 50,
    ranks: int = 4,
    layers: int = 7,
    width: int = 384,
    ff: int = 1024,
    sequence: int = 32,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
) -> None:
    """Measure, print a table per stage, and say which targets are missed."""
    model = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ff}
    s = DeepSpeedSettings(ranks, sequence, seconds, {**model, "num_attention_heads": width // 64})
    n = layers * (4 * width**2 + 3 * width * ff)
    print(f"{ranks} ranks, {7 * layers} matrices of {n:,} numbers in all, float32")
    results, missed = {}, []
    for stage in map(int, stages.split(",")):
        results[stage] = run_stage(stage, s)
        missed += show(stage, results[stage])
    print("\n", *(missed or ["no slower than the built-in, half its bytes at stage 3"]), sep="\n")
    if json_path is not None:
        json_path.write_text(json.dumps({"settings": asdict(s), "stages": results}, indent=1))


if __name__ == "__main__":
    typer.run(main)
