"""Optimizer state and temporary memory of one rank, measured and by the formula.

    torchrun --standalone --nproc_per_node 2 -m tests.support.memory.scaling \\
        --layout zero1 --optimizer muon --out /tmp/found.json

Builds a small Llama, takes three steps and writes what every rank had: the exact bytes of its
optimizer's state, of matrices and of the rest (``formula`` says what they must be), those of the
gradients that the step got, the bytes that DDP or FSDP2 reduced for it, and the peak of live
temporary bytes in the last step (``live``). Lists with commas run one after the other.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist import poet
from spectral_dist.core.units import MatrixUnit
from tests.support.memory import formula
from tests.support.memory.formula import FLOAT, adamw_state, gradients, matrix_state, step_peak
from tests.support.memory.live import Live, distinct_bytes

LAYERS = {"small": 11, "large": 35}
"""Equal modulo 8, so that boundaries of ZeRO's partitions cut the same matrices of both."""
LAYOUTS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
NAMES = {"poet": "POET", "muon": "Muon", "polargrad": "PolarGrad", "root": "ROOT", "sumo": "SUMO"}
OPTIMIZERS = ("adamw", *NAMES)
VOCABULARY, WIDTH, FF = 64, 63, 127  # odd, so that every layout has uneven parts or padding
BLOCKS = {"[qkv]_proj": [21, 22], "o_proj": [22, 21], "(gate|up)_proj": [21, FF],
          "down_proj": [FF, 21]}  # fmt: skip
"""POET's: b near 22 on each side, but for the prime 127."""
BUCKET = WIDTH * FF
"""Elements of a bucket: the largest matrix. On CPUs a rule works on one matrix of a bucket at a
time and on GPUs on all at once; here that is the same, so that what is measured holds for both."""
STEPS = 3


@dataclass(frozen=True)
class MemoryCase:
    """What is run. ``rank`` is SUMO's r; ``bucket`` elements; ``refresh``: SUMO's every step."""

    layout: str
    optimizer: str
    rank: int = 16
    size: str = "small"
    bucket: int = BUCKET
    refresh: bool = False


def build_model(case: MemoryCase) -> nn.Module:
    """A Llama with matrices of five shapes, 7 in each layer; the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FF, head_dim=22,
            num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=LAYERS[case.size],
        )
    )  # fmt: skip
    return poet.convert(model, blocks=BLOCKS) if case.optimizer == "poet" else model


def kind(name: str) -> str:
    """Whether a parameter is of a matrix or one of the rest, told here by its name."""
    return "matrix" if "_proj." in name else "scalar"


def shapes_of(model: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kind -> name -> shape, of what is trained."""
    found: dict[str, dict[str, tuple[int, ...]]] = {"matrix": {}, "scalar": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[kind(name)][name] = tuple(parameter.shape)
    return found


def options(case: MemoryCase) -> dict[str, Any]:
    """Of the optimizer, as keywords or JSON."""
    given: dict[str, Any] = {"lr": 1e-3}
    if case.optimizer == "poet":
        given["merge_every"] = 10**6
    elif case.optimizer != "adamw":
        given["bucket_mb"] = case.bucket * FLOAT / 2**20
    if case.optimizer == "sumo":
        given |= {"rank": case.rank, "period": 1 if case.refresh else 10**6}
    return given


def by_kind(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for AdamW, so that its state can be told apart as well."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "scalar": []}
    for name, parameter in model.named_parameters():
        groups[kind(name)].append(parameter)
    return [{"params": found, "kind": which} for which, found in groups.items()]


class Watched:
    """Takes the place of an optimizer's ``step``: notes what it steps on, and measures it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self._step = optimizer, optimizer.step
        self.kinds: dict[Tensor, str] = {}
        self.peak = self.gradients = 0
        optimizer.step = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        grads = []
        for group in self.optimizer.param_groups:
            which = "matrix" if group["kind"] == "skew" else group["kind"]
            self.kinds |= dict.fromkeys(group["params"], which)
            grads += [_local(p.grad) for p in group["params"] if p.grad is not None]
        self.gradients += sum(g.nbytes for g in grads)  # stages 1 and 2 call it for each group
        with Live() as live:
            result = self._step(*args, **kwargs)
        self.peak = max(self.peak, live.peak)
        return result

    def state_bytes(self) -> dict[str, int]:
        """Of the states of matrices and of the rest on this rank."""
        found: dict[str, list[Tensor]] = {"matrix": [], "scalar": []}
        for tensor, state in self.optimizer.state.items():
            found[self.kinds[tensor]] += [_local(x) for x in state.values()]
        if hasattr(self.optimizer, "matrix_state"):
            for state in self.optimizer.matrix_state().values():
                found["matrix"] += [_local(x) for x in state.values()]
        return {which: distinct_bytes(tensors) for which, tensors in found.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Reduced:
    """Bytes that this rank hands to DDP's or FSDP2's reduction of gradients, while it is open."""

    def __init__(self) -> None:
        self.bytes = 0
        self._plain = dist.reduce_scatter_single  # what FSDP2 looks up in every call

    def hook(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations
        """For DistributedDataParallel: what it does by itself."""
        self.bytes += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    def __enter__(self) -> Reduced:
        def counting(output: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += input.nbytes
            return self._plain(output, input, *args, **kwargs)

        dist.reduce_scatter_single = counting
        return self

    def __exit__(self, *error: object) -> None:
        dist.reduce_scatter_single = self._plain


@contextlib.contextmanager
def training(
    case: MemoryCase, model: nn.Module, reduced: Reduced
) -> Iterator[tuple[Any, Callable[[Tensor], None]]]:
    """The optimizer, and what takes a training step."""
    quiet = contextlib.redirect_stderr(io.StringIO())  # the table of what is a matrix
    if case.layout.startswith("zero"):
        with quiet:
            engine = _engine(case, model)

        def iterate(tokens: Tensor) -> None:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

        yield engine.basic_optimizer, iterate
        engine.destroy()
        return
    if case.layout == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, reduced.hook)  # type: ignore[operator]
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    with quiet:
        optimizer = _optimizer(case, wrapped)

    def step(tokens: Tensor) -> None:
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    yield optimizer, step


def _optimizer(case: MemoryCase, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(by_kind(model), **options(case))
    found: torch.optim.Optimizer = getattr(spectral_dist, NAMES[case.optimizer])(
        spectral_dist.param_groups(model), **options(case)
    )
    return found


def _engine(case: MemoryCase, model: nn.Module) -> Any:
    from tests.distributed.deepspeed.engine import engine_for

    params, own = options(case), case.optimizer != "adamw"
    if not own:
        params["torch_adam"] = True  # DeepSpeed's own would be compiled
    configuration = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(case.layout[-1]), "reduce_bucket_size": 10**6},
        "optimizer": {
            "type": f"Spectral{NAMES[case.optimizer]}" if own else "AdamW",
            "params": params,
        },
    }
    return engine_for(configuration, model=model, parameters=None if own else by_kind(model))


def measure(case: MemoryCase) -> dict[str, Any]:
    """Of this rank: bytes of state as found and as the formula has them, and of temporaries.

    ``peak``: the least of the steps after the first, which makes state. All have the same, but
    that a thread of gloo may hold on to a tensor.
    """
    model = build_model(case)
    shapes = shapes_of(model)
    plain = sum(p.numel() for name, p in model.named_parameters() if "skew" not in name)
    where = case.layout, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    peaks = []
    with Reduced() as reduced, training(case, model, reduced) as (optimizer, step):
        watched = Watched(optimizer)
        for _ in range(STEPS):
            watched.peak = watched.gradients = reduced.bytes = 0
            step(torch.randint(VOCABULARY, (1, 8), generator=generator))
            peaks.append(watched.peak)
        owners, buckets = plans(optimizer)
        state = watched.state_bytes()
    own = [name for name, owner in owners.items() if owner == dist.get_rank()]
    return {
        "state": state,
        "formula": {
            "matrix": matrix_state(case.optimizer, shapes["matrix"], *where, own, case.rank),
            "scalar": adamw_state(shapes["scalar"], *where),
        },
        "gradients": watched.gradients,
        "gradients formula": sum(gradients(found, *where) for found in shapes.values()),
        "reduced": reduced.bytes if case.layout in ("ddp", "fsdp") else None,
        "reduced formula": formula.reduced(
            shapes["matrix"] | shapes["scalar"], case.layout, dist.get_world_size()
        ),
        "peak": min(peaks[1:]),
        "bound": bound(case, buckets) if owners else None,
        "buckets": buckets,
        "numbers": {kind: sum(map(math.prod, found.values())) for kind, found in shapes.items()},
        "weights": plain,
    }


def bound(case: MemoryCase, buckets: dict[str, int]) -> int:
    """Bytes that a step may take beside what was there."""
    rule = case.optimizer + " refresh" * case.refresh
    copies = dist.get_world_size() if case.layout in ("ddp", "zero0") else 1
    return math.ceil(FLOAT * step_peak(rule, buckets, copies, WIDTH, case.rank))


def problems(case: MemoryCase, ranks: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as the formulas have it, on any rank or over all."""
    found = []
    for rank, result in enumerate(ranks):
        if result["state"] != result["formula"]:
            found.append(f"rank {rank} keeps {result['state']}, not {result['formula']}")
        if result["gradients"] != result["gradients formula"]:
            found.append(
                f"rank {rank} has gradients of {result['gradients']} bytes, not"
                f" {result['gradients formula']}"
            )
        if result["reduced"] not in (None, result["reduced formula"]):
            found.append(
                f"rank {rank} reduced {result['reduced']}, not {result['reduced formula']}"
            )
        if result["bound"] is not None and result["peak"] > result["bound"]:
            found.append(f"rank {rank} took {result['peak']}, more than {result['bound']}")
    shapes = shapes_of(build_model(case))["matrix"]
    total = sum(
        matrix_state(
            case.optimizer, shapes, case.layout, r, len(ranks), () if r else shapes, case.rank
        )
        for r in range(len(ranks))
    )
    kept = sum(result["state"]["matrix"] for result in ranks)
    if kept != total:  # some matrix has no owner, or two
        found.append(f"all ranks keep {kept} of matrices, not {total}")
    return [f"{case}: {problem}" for problem in found]


def plans(optimizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Each matrix's owner, and the most elements of one bucket that this rank has.

    gives: runs that it sends to owners; takes: of matrices that it computes; returns: runs that it
    gets directions of; whether any moves (1 or 0).
    """
    owners: dict[str, int] = {}
    most = dict.fromkeys(("gives", "takes", "returns", "moves"), 0)
    for units in [getattr(optimizer, "all_units", [])]:
        for unit in units:
            if not isinstance(unit, MatrixUnit):
                continue
            owners |= dict(zip(unit.names, unit.plan.owners, strict=True))
            for route in unit.exchange.routes:
                found = {
                    "gives": sum(piece.length for piece in route.send_runs),
                    "takes": sum(route.recv_counts),
                    "returns": sum(piece.length for piece in route.result_runs),
                    "moves": int(route.moves),
                }
                most = {key: max(most[key], found[key]) for key in most}
    return owners, most


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    layout: Annotated[str, typer.Option(help=", ".join(LAYOUTS))],
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))],
    rank: Annotated[str, typer.Option(help="SUMO's r")] = str(MemoryCase.rank),
    size: Annotated[str, typer.Option(help=", ".join(LAYERS))] = MemoryCase.size,
) -> None:
    """Measure one case, or all of lists with commas, on the ranks that torchrun started."""
    dist.init_process_group("gloo")
    cases = []
    for where, which, big in product(layout.split(","), optimizer.split(","), size.split(",")):
        ranks = rank.split(",") if which == "sumo" else [str(MemoryCase.rank)]
        refreshes = (False, True) if which == "sumo" else (False,)
        cases += [
            MemoryCase(where, which, int(r), big, refresh=refresh)
            for r, refresh in product(ranks, refreshes)
        ]
    found, wrong = [], []
    for case in cases:
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, measure(case))
        found.append({"case": asdict(case), "ranks": everyones})
        wrong += problems(case, everyones)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print("\n".join(wrong), flush=True)
    dist.barrier()
    # without the interpreter's end: a thread of gloo that lets go of a tensor then is an abort
    os._exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
