"""The training loop: steps, evaluation, checkpoints, a sample. It knows no engine's details."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from spectral_dist.launch.batches import Windows, row_numbers, share
from spectral_dist.launch.corpus import Corpus, bits_per_byte
from spectral_dist.launch.engines import Engine
from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.report import Log

VALIDATION_SEED = 0  # all runs are measured on the same windows


@dataclass(frozen=True)
class Job:
    """What to do, whichever engine does it. Steps are optimizer steps; 0 means never."""

    out: Path
    steps: int
    stop_at: int
    seq_len: int
    seed: int
    eval_every: int
    eval_batches: int
    save_every: int
    prompt: str


@dataclass
class Clock:
    """Seconds spent so far, by what they were spent on."""

    forward_backward: float = 0.0
    optimizer: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @staticmethod
    def now() -> float:
        """Seconds, with everything asked of the device done."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


class Trainer:
    """One run of one engine on one corpus."""

    def __init__(self, job: Job, engine: Engine, corpus: Corpus, ranks: Ranks) -> None:
        self.job, self.engine, self.corpus, self.ranks = job, engine, corpus, ranks
        self.train = Windows(corpus.train, job.seq_len, "training")
        self.validation = Windows(corpus.validation, job.seq_len, "validation")
        self.token_bytes = torch.from_numpy(corpus.token_bytes)
        self.clock = Clock()
        self.done = 0  # steps, including those before a resume
        self.started = 0  # steps before a resume
        self.checkpoints = job.out / "checkpoints"

    def resume(self) -> None:
        """Go on where the newest checkpoint stopped. ValueError: none, or of other data."""
        saved = self.engine.load(self.checkpoints)
        for name, now in self._identity().items():
            if saved.get(name) != now:
                raise ValueError(
                    f"cannot resume {self.checkpoints}: its {name} was {saved.get(name)}, now it "
                    f"is {now}, and the data would not go on where it stopped"
                )
        self.done = self.started = int(saved["step"])

    def _identity(self) -> dict[str, Any]:
        """What the data order depends on, and the schedule's length."""
        return {
            "seed": self.job.seed,
            "batch": self.engine.batch,
            "seq_len": self.job.seq_len,
            "corpus": self.corpus.key,
            "steps": self.job.steps,
        }

    def run(self) -> dict[str, Any]:
        """Train to the end (or to stop_at) and return the summary; equal on all ranks."""
        job, first = self.job, self.ranks.first
        end = min(job.stop_at or job.steps, job.steps)
        log = Log(job.out, self.done) if first else None
        if log:
            self.engine.watch(log.matrices)
        validation = None
        if self.done == 0 or self.done >= end:  # a checkpoint was evaluated when it was saved
            validation = self._validate(log)
        bar = tqdm(total=job.steps, initial=self.done, disable=not first, unit="step")
        with bar:
            while self.done < end:
                record = self.step()
                bar.update()
                bar.set_postfix(
                    loss=f"{record['loss']:.3f}",
                    bpb=f"{record['bits_per_byte']:.3f}",
                    tok_s=f"{record['tokens_per_second']:.0f}",
                )
                if log:
                    log.add("train", self.done, record)
                if self.done == end or (job.eval_every and self.done % job.eval_every == 0):
                    validation = self._validate(log)
                if self.done == end or (job.save_every and self.done % job.save_every == 0):
                    state = {"step": self.done, **self._identity()}
                    self.engine.save(self.checkpoints, self.done, state)
        if log:
            log.close()
        assert validation is not None
        return self._summary(validation)

    def _validate(self, log: Log | None) -> dict[str, float]:
        result = self.evaluate()
        if log:
            log.add("validation", self.done, result)
        return result

    def step(self) -> dict[str, float]:
        """One optimizer step. FloatingPointError on every rank when the loss is not finite."""
        engine, ranks, clock = self.engine, self.ranks, self.clock
        numbers = row_numbers(self.done, engine.batch, self.train.count, self.job.seed)
        rows = self.train.rows(numbers)
        mine = share(rows, engine.micro, engine.data_rank, engine.data_ranks)
        lr = engine.lr
        started = clock.now()
        losses = [engine.backward(part, last=part is mine[-1]) for part in mine]
        middle = clock.now()
        engine.step()
        ended = clock.now()
        clock.forward_backward += middle - started
        clock.optimizer += ended - middle
        loss = ranks.total([float(sum(losses))])[0] / (len(mine) * ranks.world)
        self.done += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.done} is {loss}")
        targets = rows[:, 1:]
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, targets.numel(), self._bytes(targets)),
            "lr": lr,
            "tokens": self.done * targets.numel(),
            "seconds": ended - started,
            "tokens_per_second": targets.numel() / (ended - started),
        }

    def _bytes(self, tokens: Tensor) -> int:
        return int(self.token_bytes[tokens].sum())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and bits per byte on up to eval_batches * batch fixed windows held out."""
        engine, ranks = self.engine, self.ranks
        count = min(self.validation.count, self.job.eval_batches * engine.batch)
        chosen = row_numbers(0, self.validation.count, self.validation.count, VALIDATION_SEED)
        rows = self.validation.rows(chosen[:count])
        # All ranks make equally many calls, as ZeRO-3 requires; rows of padding count nothing.
        group = engine.micro * engine.data_ranks
        padding = -count % group
        rows = torch.cat([rows, rows[:1].expand(padding, -1)])
        counted = (torch.arange(len(rows)) < count)[:, None]
        engine.model.eval()
        nats = 0.0
        parts = share(rows, engine.micro, engine.data_rank, engine.data_ranks)
        masks = share(counted, engine.micro, engine.data_rank, engine.data_ranks)
        for part, mask in zip(parts, masks, strict=True):
            nats += float((engine.losses(part).double().cpu() * mask).sum())
        engine.model.train()
        targets = rows[:count, 1:]
        copies = ranks.world // engine.data_ranks
        loss = ranks.total([nats])[0] / copies / targets.numel()
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, targets.numel(), self._bytes(targets)),
        }

    @torch.no_grad()
    def sample(self, length: int = 48, temperature: float = 0.8, top: int = 40) -> str:
        """The prompt and a continuation; every rank computes it, as ZeRO-3 requires."""
        tokenizer = self.corpus.tokenizer
        ids = tokenizer.encode(self.job.prompt).ids or [0]
        generator = torch.Generator().manual_seed(self.job.seed)
        self.engine.model.eval()
        for _ in range(length):
            logits = self.engine.logits(torch.tensor([ids[-self.job.seq_len :]]))[0, -1].cpu()
            best = logits.topk(min(top, len(logits)))
            odds = (best.values / temperature).softmax(-1)
            ids.append(int(best.indices[torch.multinomial(odds, 1, generator=generator)]))
        self.engine.model.train()
        return str(tokenizer.decode(ids))

    def _summary(self, validation: dict[str, float]) -> dict[str, Any]:
        engine, ranks, clock = self.engine, self.ranks, self.clock
        sent, polar_calls = ranks.total([engine.comm_bytes(), engine.polar_calls()])
        return {
            "optimizer": engine.kind,
            "parameters": engine.parameters,
            "trained_parameters": engine.trained,
            "ranks": ranks.world,
            "step": self.done,
            "tokens": self.done * engine.batch * self.job.seq_len,
            "tokens_since_start": (self.done - self.started) * engine.batch * self.job.seq_len,
            "validation_loss": validation["loss"],
            "validation_bits_per_byte": validation["bits_per_byte"],
            "seconds": clock.now() - clock.started,
            "forward_backward_seconds": clock.forward_backward,
            "optimizer_seconds": clock.optimizer,
            "optimizer_bytes_sent": int(sent),
            "matrices_orthogonalized": int(polar_calls),
            "optimizer_state_bytes": ranks.gather(engine.state_bytes()),
            "sample": self.sample(),
        }


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Keep the summary as summary.json in `out`."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
