"""Checkpoints of commit 2d3f994: the functions that wrote them there, and those that resume them.

``python -m tests.distributed.old_checkpoints /nowhere`` wrote what is in ``DATA``; the folder is
gone, though Megatron's and DeepSpeed's files name it. A case is a checkpoint of a small model after
``SAVED`` steps and the whole weights of the same run after ``LAST`` steps. Models come from seeds,
and from another seed where a checkpoint is loaded, so that whatever a load leaves out shows in the
weights. An archive has both: as folders they are five times as large.

The functions ``save_*`` and ``resume_*`` run on every rank, through the harness or in this process.
They use what a user may use, and nothing of the optimizers' own.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import spectral_dist
from spectral_dist import checkpoint, poet
from tests.distributed.deepspeed import engine
from tests.distributed.megatron import megatron_runs
from tests.distributed.torch import layouts
from tests.support import harness, megatron_model
from tests.support.quiet import quiet

DATA = Path(__file__).resolve().parents[1] / "data" / "checkpoints_2d3f994"
PARTS = ("torch", "dcp", "deepspeed", "megatron")
SAVED, LAST = 3, 5
VOCABULARY = 17
MEGATRON = "0.19.2"

COMMON: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01,
}  # fmt: skip
POLAR_FIRST = {**COMMON, "lr": 0.1, "polar_first": True}
SUMO = {**COMMON, "lr": 0.01, "rank": 0.5, "period": 4}  # a new basis in the fifth step
# a merge after the second step and one after the fourth: saved in between
POET: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "eps": 1e-4, "merge_every": 2,
}  # fmt: skip
POET_BLOCKS: dict[str, Any] = {"block": 4, "blocks": {"up": [4, 5], "down": [5, 4]}}

TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("Muon", COMMON),
    "polargrad": ("PolarGrad", {**COMMON, "lr": 0.1}),
    "polargrad_polar_first": ("PolarGrad", POLAR_FIRST),
    "root": ("ROOT", COMMON),
    "sumo": ("SUMO", SUMO),
    "poet": ("POET", POET),
}
"""name -> (optimizer, options): ``state_dict()`` of model and optimizer, in one process"""
DCP: dict[str, tuple[str, str, dict[str, Any]]] = {
    "muon_ddp": ("ddp", "Muon", COMMON),
    "muon_fsdp": ("fsdp", "Muon", COMMON),
    "polargrad_polar_first_fsdp": ("fsdp", "PolarGrad", POLAR_FIRST),
    "root_fsdp": ("fsdp", "ROOT", COMMON),
    "sumo_fsdp": ("fsdp", "SUMO", SUMO),
}
"""name -> (layout, optimizer, options): ``spectral_dist.checkpoint.save`` on 2 ranks"""
DEEPSPEED: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{f"muon_stage{stage}": (stage, "SpectralMuon", COMMON) for stage in range(4)},
    "root_stage2": (2, "SpectralROOT", COMMON),
    "sumo_stage2": (2, "SpectralSUMO", SUMO),
    "poet_stage2": (2, "SpectralPOET", {**POET, **POET_BLOCKS}),
}
"""name -> (ZeRO stage, type in the JSON, its params), on 2 ranks"""
UNIVERSAL = ("muon_universal", "muon_stage2")
"""Its name, and which of these it was made of by DeepSpeed's own converter."""
MEGATRON_CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "muon_tp2": (2, "spectral_muon", {}, {}),
    "muon_tp2_dp2_distributed": (4, "spectral_muon", megatron_runs.DISTRIBUTED, {}),
    "sumo_tp2": (2, "spectral_sumo", {}, {"rank": 0.5, "period": 4}),
    "root_tp2": (2, "spectral_root", {}, {}),
}
"""name -> (ranks, --optimizer, options of Megatron's DDP, our options), all at TP 2"""


class Small(nn.Module):
    """One parameter of each kind: embedding, norm, fused qkv, a bias, a stack of experts, a head.

    Gradients are far from singular, so that their exact polar factors are stable.
    """

    def __init__(self, seed: int, width: int = 12, hidden: int = 10) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.experts = nn.Parameter(torch.empty(2, width, 6))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.orthogonal_(self.embed.weight, 5.0)
        for matrix in (*self.qkv.weight.data.split(width), *self.experts.data):
            nn.init.orthogonal_(matrix, 1.5)
        for linear in (self.up, self.down, self.head):
            nn.init.orthogonal_(linear.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        x = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        for expert in self.experts:
            x = x + 0.3 * torch.tanh(x @ expert) @ expert.mT
        logits = self.head(x)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def batch(step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """A data rank's sequences of the step's global batch, (12 / ranks, 8)."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (12, 8), generator=generator).chunk(ranks)[rank]


def fingerprint() -> str:
    """Name the bits that this machine computes: equal ones may be asked of equal machines only."""
    model = Small(0)
    model(batch(0)).backward()
    results = [p.grad for p in model.parameters()]
    matrix = torch.randn(36, 12, generator=torch.Generator().manual_seed(0))
    gram = matrix.mT @ matrix
    results += [gram, *torch.linalg.svd(matrix, False), *torch.linalg.eigh(gram)]
    results += [*torch.linalg.qr(matrix), torch.linalg.solve(gram, matrix.mT)]
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- plain torch, in one process or several


def start_torch(layout: str, name: str, options: dict[str, Any], seed: int) -> Any:
    """The model laid out, and its optimizer."""
    model: nn.Module = Small(seed)
    if name == "POET":
        model = poet.convert(model, **POET_BLOCKS)
    placed = layouts.LAYOUTS[layout][0](model)
    with quiet():
        groups = spectral_dist.param_groups(
            placed.model, split={} if name == "POET" else {"qkv": 3}
        )  # fmt: skip
        return placed, getattr(spectral_dist, name)(groups, **options)


def steps_torch(placed: layouts.Laid, optimizer: Any, first: int, last: int) -> None:
    with quiet():
        for step in range(first, last):
            optimizer.zero_grad()
            placed.model(batch(step, placed.data_rank, placed.data_ranks)).backward()
            optimizer.step()


def weights_torch(placed: layouts.Laid, name: str) -> dict[str, Tensor]:
    """Whole weights; of POET those of the plain model. A collective call."""
    return poet.export(placed.model) if name == "POET" else placed.full()


def save_torch(path: str, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Write a file; the weights with which the run ends."""
    placed, optimizer = start_torch("one", name, options, seed=0)
    steps_torch(placed, optimizer, 0, SAVED)
    content = {"model": placed.model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, path)
    steps_torch(placed, optimizer, SAVED, LAST)
    return weights_torch(placed, name)


def resume_torch(path: str, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Load the file; the weights with which the run ends."""
    placed, optimizer = start_torch("one", name, options, seed=1)
    content = torch.load(path, weights_only=True)
    placed.model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    steps_torch(placed, optimizer, SAVED, LAST)
    return weights_torch(placed, name)


def save_dcp(folder: str, layout: str, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    placed, optimizer = start_torch(layout, name, options, seed=0)
    steps_torch(placed, optimizer, 0, SAVED)
    with quiet():
        checkpoint.save(folder, placed.model, optimizer, step=SAVED, note="written by 2d3f994")
    steps_torch(placed, optimizer, SAVED, LAST)
    return weights_torch(placed, name)


def resume_dcp(folder: str, layout: str, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    placed, optimizer = start_torch(layout, name, options, seed=1)
    with quiet():
        extra = checkpoint.load(folder, placed.model, optimizer)
    assert extra == {"step": SAVED, "note": "written by 2d3f994"}
    steps_torch(placed, optimizer, SAVED, LAST)
    return weights_torch(placed, name)


# -- DeepSpeed


def start_deepspeed(
    stage: int, name: str, options: dict[str, Any], seed: int, universal: bool = False
) -> Any:
    """An engine on float32 weights."""
    changes: dict[str, Any] = {"checkpoint": {"load_universal": True}} if universal else {}
    zero = {"sub_group_size": 600} if stage == 3 else {}  # three of them
    configuration = engine.config(stage, dist.get_world_size(), zero=zero, **changes)
    split = {} if name == "SpectralPOET" else {"split": {"qkv": 3}}
    configuration["optimizer"] = {"type": name, "params": {**options, **split}}
    return engine.engine_for(configuration, model=Small(seed))


def steps_deepspeed(running: Any, first: int, last: int) -> None:
    for step in range(first, last):
        loss = running(batch(step, dist.get_rank(), dist.get_world_size()))
        running.backward(loss)
        running.step()


def weights_deepspeed(running: Any, name: str) -> dict[str, Tensor]:
    """Whole weights; of POET those of the plain model. Ends the engine."""
    if name == "SpectralPOET":
        weights = poet.export(running.module, running.basic_optimizer)
    else:
        weights = engine.full_parameters(running)
    running.destroy()
    return weights


def save_deepspeed(
    folder: str, stage: int, name: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Write tag ``old`` in the folder; the weights with which the run ends."""
    running = start_deepspeed(stage, name, options, seed=0)
    steps_deepspeed(running, 0, SAVED)
    running.save_checkpoint(folder, tag="old", client_state={"note": "written by 2d3f994"})
    steps_deepspeed(running, SAVED, LAST)
    return weights_deepspeed(running, name)


def resume_deepspeed(
    folder: str, stage: int, name: str, options: dict[str, Any], universal: bool = False
) -> dict[str, Tensor]:
    """Load what `latest` (or `latest_universal`) names; the weights with which the run ends."""
    running = start_deepspeed(stage, name, options, seed=1, universal=universal)
    path, client_state = running.load_checkpoint(folder)
    assert path is not None
    assert client_state["note"] == "written by 2d3f994"
    assert running.global_steps == SAVED
    steps_deepspeed(running, SAVED, LAST)
    return weights_deepspeed(running, name)


# -- Megatron

GPT = {"hidden": 16, "layers": 1, "ffn": 24, "vocab": 32}


def start_megatron(
    tp: int, name: str, wrapping: dict[str, Any], options: dict[str, Any]
) -> tuple[tuple[int, int], Any, Any]:
    """(data rank, ranks), the wrapped model, Megatron's optimizer."""
    args = (MEGATRON, name, {"tp": tp}, wrapping, GPT, options)
    return megatron_runs.build(*args)


def steps_megatron(data: Any, ddp: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        tokens, labels = (t % GPT["vocab"] for t in megatron_model.batch(step, *data))
        megatron_model.train_step(ddp, optimizer, (tokens, labels))


def save_megatron(
    folder: str, name: str, wrapping: dict[str, Any], options: dict[str, Any]
) -> dict[str, Tensor]:
    data, ddp, optimizer = start_megatron(2, name, wrapping, options)
    from megatron.core import dist_checkpointing

    steps_megatron(data, ddp, optimizer, 0, SAVED)
    dist.barrier()
    dist_checkpointing.save(megatron_runs.content(ddp, optimizer, False, None), folder)
    steps_megatron(data, ddp, optimizer, SAVED, LAST)
    return megatron_model.full_parameters(ddp)


def resume_megatron(
    folder: str, tp: int, name: str, wrapping: dict[str, Any], options: dict[str, Any]
) -> dict[str, Tensor]:
    data, ddp, optimizer = start_megatron(tp, name, wrapping, options)
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        for p in ddp.parameters():  # weights go by their names: other ones than those of the start
            p.add_(0.125)
    state = dist_checkpointing.load(megatron_runs.content(ddp, optimizer, True, None), folder)
    megatron_model.gpt_of(ddp).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps_megatron(data, ddp, optimizer, SAVED, LAST)
    return megatron_model.full_parameters(ddp)


# -- all of them, and their archives


def write_all(folder: Path) -> None:
    """Write every case: its checkpoint, ``PART/NAME``, and beside it ``PART/NAME_after.pt``."""
    from tests.distributed.deepspeed.universal import to_universal

    def write_after(part: str, name: str, weights: dict[str, Tensor]) -> None:
        content = {n: weight.detach().clone() for n, weight in weights.items()}
        torch.save(content, folder / part / f"{name}_after.pt")

    for part in PARTS:
        (folder / part).mkdir(parents=True)
    for name, case in TORCH.items():
        write_after("torch", name, save_torch(str(folder / "torch" / name), *case))
    for name, dcp in DCP.items():
        target = folder / "dcp" / name
        write_after("dcp", name, harness.run(2, save_dcp, str(target), *dcp)[0])
    for name, deepspeed in DEEPSPEED.items():
        target = folder / "deepspeed" / name
        results = harness.run(2, save_deepspeed, str(target), *deepspeed)
        write_after("deepspeed", name, results[0])
        if name == UNIVERSAL[1]:
            whole = folder / "deepspeed" / UNIVERSAL[0]
            shutil.copytree(target, whole)
            to_universal(whole, "old")
            shutil.rmtree(whole / "old")
            write_after("deepspeed", UNIVERSAL[0], results[0])
    for name, (ranks, *megatron) in MEGATRON_CASES.items():
        target = folder / "megatron" / name
        target.mkdir()
        results = harness.run(ranks, save_megatron, str(target), *megatron, pool=MEGATRON)
        write_after("megatron", name, results[0])


def pack(folder: Path) -> None:
    """Make ``DATA`` of what ``write_all`` wrote.

    Raises:
        ValueError: it is there; what that commit wrote, no other one can write again.
    """
    if DATA.exists():
        raise ValueError(f"{DATA} exists; check out 2d3f994, or leave it as it is")

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    for after in sorted(folder.glob("*/*_after.pt")):
        for program in after.parent.rglob("*.py"):  # of DeepSpeed's own
            program.unlink()
        case = after.with_name(after.name.removesuffix("_after.pt"))
        target = DATA / after.parent.name / f"{case.name}.tar.xz"
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w:xz", preset=9) as archive:
            for path in (case, after):
                archive.add(path, path.name, filter=anonymous)
    (DATA / "fingerprint.txt").write_text(fingerprint() + "\n")


def unpack(part: str, name: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The checkpoint, now in ``folder``, and the weights after ``LAST`` steps."""
    with tarfile.open(DATA / part / f"{name}.tar.xz") as archive:
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4
        archive.extractall(folder, **safely)
    return str(folder / name), torch.load(folder / f"{name}_after.pt", weights_only=True)


if __name__ == "__main__":
    from tests.distributed import old_checkpoints  # ranks import the functions by that name

    old_checkpoints.write_all(Path(sys.argv[1]))
    old_checkpoints.pack(Path(sys.argv[1]))
