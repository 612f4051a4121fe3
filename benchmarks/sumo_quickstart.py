"""The quickstart's job with SUMO at r = 1/4 and 1/8 beside Muon, AdamW and GaLore, in one process.

    .venv/bin/pip install --no-deps --target /tmp/peers galore-torch==1.0
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.sumo_quickstart --peers /tmp/peers

Model, corpus, tokenizer, batches, schedule, clipping and evaluation are launch/'s own: what
`pretrain.py --engine ddp --config configs/torch/adamw.yaml --eval-every 40` does on one rank, with
another optimizer in the engine (--data code: on the installed Python source). betas, eps and weight
decay are that file's for all; embeddings, head and norms are on AdamW with the same lr as the
matrices for all. r is a part of a matrix's short side.

Every run is a whole one with seed 0. Each optimizer gets three lrs a factor of 2 apart, around the
shipped one (GaLore: around the .01 of its paper), and more beyond while the best is the last, with
its published period of the subspace (SUMO 250, GaLore 200). At the best lr, the other periods; at
the best of these, the variants: SUMO without the gradient outside of its subspace, GaLore with
betas, eps and weight decay of its own.

GaLore is GaLoreAdamW of galore-torch, unchanged: scale .25, gap 200, projection "std". The
package's __init__ needs bitsandbytes, so that its modules are imported by themselves.

state: bytes of all storages that an optimizer keeps, each once, and those of matrices alone; the
numbers in GaLore's projections are views of whole SVD factors, which stay alive, so that what the
views themselves would need is given too.

A run takes about three minutes alone on a core, and there are some thirty. Each is a line of the
file --json; what is there is not run again, and --show prints it all, without a run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import spectral_dist
from benchmarks.fsdp_step import matrices_and_rest
from spectral_dist.launch import corpus, llama, ranks, torch_config, trainer
from spectral_dist.launch.engines.torch import TorchEngine

ROOT = Path(__file__).resolve().parents[1]
PERIOD = {"SUMO": "period", "GaLore": "update_proj_gap"}


@dataclass(frozen=True)
class QuickstartContender:
    """An optimizer, the middle of its lrs, its options, and other options to try in the end.

    ``options`` are of the matrices; GaLore's ``rank`` is, as SUMO's, a part of the short side.
    """

    name: str
    kind: str
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    periods: tuple[int, ...] = ()
    variants: tuple[Mapping[str, Any], ...] = ()

    def given(self, options: Mapping[str, Any]) -> QuickstartContender:
        """With these options instead of its own, and nothing more to try."""
        return replace(self, options={**self.options, **options}, periods=(), variants=())


GALORE = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
OWN = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
SUMO = {"period": 250, "perp_scale": 1.0}
INSIDE = {"perp_scale": 0.0}
CONTENDERS = (
    QuickstartContender("AdamW", "AdamW", 0.006),
    QuickstartContender("Muon", "Muon", 0.006),
    QuickstartContender(
        "GaLore, r = 1/4", "GaLore", 0.01, {"rank": 1 / 4, **GALORE}, (50, 20), (OWN,)
    ),
    QuickstartContender("GaLore, r = 1/8", "GaLore", 0.01, {"rank": 1 / 8, **GALORE}, (20,)),
    QuickstartContender(
        "SUMO, r = 1/4", "SUMO", 0.006, {"rank": 1 / 4, **SUMO}, (50, 20), (INSIDE,)
    ),
    QuickstartContender("SUMO, r = 1/8", "SUMO", 0.006, {"rank": 1 / 8, **SUMO}, (20,), (INSIDE,)),
)


def galore(folder: str) -> Any:
    """GaLoreAdamW of galore-torch in a folder. ImportError: it is not there, and how to get it."""
    package = Path(folder) / "galore_torch"
    if not package.is_dir():
        raise ImportError(
            f"no galore_torch in {folder}: pip install --no-deps --target {folder} galore-torch"
        )
    shell = types.ModuleType("galore_torch")  # its __init__ would import bitsandbytes
    shell.__path__ = [str(package)]
    sys.modules["galore_torch"] = shell
    return importlib.import_module("galore_torch.adamw").AdamW


def build(
    kind: str, model: nn.Module, lr: float, adam: Mapping[str, Any], options: Mapping[str, Any],
    peers: str = "",
) -> Any:  # fmt: skip
    """An optimizer of all parameters; ``adam``: betas, eps and weight_decay. ImportError."""
    common = {"lr": lr, **adam, **{k: v for k, v in options.items() if k in adam}}
    own = {k: v for k, v in options.items() if k not in adam}
    if kind == "AdamW":
        return torch.optim.AdamW(model.parameters(), **common)
    if kind == "GaLore":
        make = galore(peers)
        matrices, rest = matrices_and_rest(model)
        groups = [{"params": rest}]
        for short in sorted({min(m.shape) for m in matrices}):
            rank = max(1, round(own["rank"] * short))
            found = [m for m in matrices if min(m.shape) == short]
            groups.append({"params": found, **own, "rank": rank})
        return make(groups, **common, no_deprecation_warning=True)
    with contextlib.redirect_stderr(io.StringIO()):  # the table of what is a matrix
        groups = spectral_dist.param_groups(model)
    return getattr(spectral_dist, kind)(groups, **common, **own)


def tensors(value: Any) -> Iterator[Tensor]:
    """All in a state, in objects too: GaLore keeps a projector beside its moments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def state_bytes(optimizer: Any, model: nn.Module) -> dict[str, int]:
    """Of all state, of matrices' alone, and of that the numbers themselves."""
    _, rest = matrices_and_rest(model)
    matrix_state = optimizer.matrix_state() if hasattr(optimizer, "matrix_state") else {}
    kept = {id(t): t for t in tensors([dict(optimizer.state), matrix_state])}
    others = {id(t) for p in rest for t in tensors(optimizer.state[p])}
    storages = {i: t.untyped_storage() for i, t in kept.items()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
    not_matrices = {storages[i].data_ptr() for i in others}
    return {
        "all": sum(sizes.values()),
        "matrices": sum(size for at, size in sizes.items() if at not in not_matrices),
        "numbers": sum(t.nbytes for i, t in kept.items() if i not in others),
    }


class QuickstartEngine(TorchEngine):
    """The torch engine with a contender's optimizer; it keeps no checkpoint."""

    def __init__(self, contender: QuickstartContender, peers: str, *args: Any) -> None:
        self.contender, self.peers = contender, peers
        super().__init__(*args, sharded=False)
        self.kind = contender.name

    def make_optimizer(self) -> Any:
        """The contender's."""
        options, own = self.config.options, self.contender
        adam = {name: getattr(options, name) for name in ("betas", "eps", "weight_decay")}
        return build(own.kind, self.model, own.lr, adam, own.options, self.peers)

    def save(self, folder: Path, step: int, state: Any) -> None:
        """Nothing."""


class QuickstartRuns:
    """Runs, each done once: those in the file are taken from there."""

    engine = QuickstartEngine

    def __init__(
        self, path: Path, model: Path, peers: str, data: Sequence[str] | None = None
    ) -> None:
        self.path, self.peers = path, peers
        self.model = llama.load_config(model)
        self.config = torch_config.read(ROOT / "configs/torch/adamw.yaml")
        self.here = ranks.start()
        self.text = corpus.load(data or [], self.model.vocab_size)
        self.done = {self._key(found): found for found in read(path)}

    @staticmethod
    def _key(found: Mapping[str, Any]) -> str:
        names = ("kind", "lr", "options", "seed", "steps", "corpus")
        return json.dumps({name: found[name] for name in names}, sort_keys=True)

    def run(self, contender: QuickstartContender, seed: int = 0) -> dict[str, Any]:
        """Train to the end; bits_per_byte is infinite if it diverged."""
        config = self.config
        record = {name: getattr(contender, name) for name in ("name", "kind", "lr", "options")}
        record |= {"seed": seed, "steps": config.steps, "corpus": self.text.key}
        record = json.loads(json.dumps(record))
        if (key := self._key(record)) in self.done:
            return self.done[key]
        started = time.perf_counter()
        torch.manual_seed(seed)
        engine = self.engine(contender, self.peers, config, self.model, seed, self.here)
        settings = trainer.RunSettings(
            out=self.path.with_suffix("") / contender.kind, steps=config.steps, stop_at=0,
            seq_len=256, seed=seed, eval_every=40, eval_batches=8, save_every=0,
            prompt="To create",
        )  # fmt: skip
        try:
            summary = trainer.Trainer(settings, engine, self.text, self.here).run()
            record["bits_per_byte"] = summary["validation_bits_per_byte"]
            record["optimizer_seconds"] = summary["optimizer_seconds"]
        except FloatingPointError:
            record["bits_per_byte"] = math.inf
        record["state"] = state_bytes(engine.optimizer, engine.model)
        record["seconds"] = time.perf_counter() - started
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.done[key] = record
        print(line(record), flush=True)
        return self.done[key]

    def bits(self, contender: QuickstartContender) -> float:
        """Per byte, at the end."""
        return float(self.run(contender)["bits_per_byte"])

    def best_lr(self, contender: QuickstartContender) -> QuickstartContender:
        """Of the given lr, half and twice that, and on while the last is the best."""
        middle = contender.lr
        tried = [replace(contender, lr=lr) for lr in (middle / 2, middle, 2 * middle)]
        best = min(tried, key=self.bits)
        factor = best.lr / middle
        while factor != 1:
            further = replace(best, lr=best.lr * factor)
            if self.bits(further) >= self.bits(best):
                break
            best = further
        return best

    def finals(self, contender: QuickstartContender) -> list[dict[str, Any]]:
        """The best lr; at it, the other periods; at the best of them, the variants."""
        tuned = self.best_lr(contender)
        periods = [tuned, *(tuned.given({PERIOD[tuned.kind]: k}) for k in tuned.periods)]
        best = min(periods, key=self.bits)
        return [self.run(c) for c in (*periods, *(best.given(v) for v in tuned.variants))]


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def line(record: Mapping[str, Any]) -> str:
    """One run, for the log."""
    options = " ".join(f"{k}={v}" for k, v in record["options"].items())
    return (
        f"{record['name']}: {record['steps']} steps, lr {record['lr']:g} {options}, seed"
        f" {record['seed']}: {record['bits_per_byte']:.4f} bits per byte, {record['seconds']:.0f} s"
    )


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the lr, the period, bits per byte, and state in MB."""
    titles = ("optimizer", "lr", "period", "bits per byte", "state MB", "of matrices", "numbers")
    rows = [titles, ("---", *["--:"] * (len(titles) - 1))]
    for r in records:
        name = r["name"]
        plain = {c.name: c.options for c in CONTENDERS}[name]
        period = PERIOD.get(r["kind"], "")
        changed = {k: v for k, v in r["options"].items() if plain.get(k) != v and k != period}
        name += "".join(f", {k} {v}" for k, v in changed.items())
        state = [f"{r['state'][key] / 1e6:.1f}" for key in ("all", "matrices", "numbers")]
        bits = f"{r['bits_per_byte']:.3f}"
        rows.append((name, f"{r['lr']:g}", str(r["options"].get(period, "")), bits, *state))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(
    peers: Annotated[str, typer.Option(help="folder of galore-torch")] = "/tmp/peers",
    only: Annotated[str, typer.Option(help="comma-separated kinds")] = "AdamW,Muon,GaLore,SUMO",
    path: Annotated[
        Path, typer.Option("--json", help="a line for each run; those in it are not run again")
    ] = Path("runs/sumo_quickstart.jsonl"),
    shown: Annotated[bool, typer.Option("--show", help="all that is in the file, and no run")] = (
        False
    ),
    data: Annotated[
        list[str] | None, typer.Option(help="as pretrain.py's; default: its default corpus")
    ] = None,
) -> None:
    """Search, run, and print the table."""
    if shown:
        order = {c.name: place for place, c in enumerate(CONTENDERS)}
        print(table(sorted(read(path), key=lambda r: (order[r["name"]], r["bits_per_byte"]))))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = QuickstartRuns(path, ROOT / "configs/models/quickstart.json", peers, data)
    records = []
    for contender in CONTENDERS:
        if contender.kind in only.split(","):
            try:
                records += bench.finals(contender)
            except ImportError as error:
                print(f"without {contender.name}: {error}")
    ranks.stop()
    print(table(records))


if __name__ == "__main__":
    typer.run(main)
