"""The training loop: steps, evaluation, checkpoints, a sample. It knows no engine's details."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from spectral_dist.launch import checkpoints, files, llama
from spectral_dist.launch.batches import Windows, rank_micro_batches, window_indices
from spectral_dist.launch.checkpoints import Checkpoint
from spectral_dist.launch.corpus import Corpus, bits_per_byte
from spectral_dist.launch.engines.base import Engine
from spectral_dist.launch.preemption import Preemption
from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.report import Log
from spectral_dist.launch.run_folder import SUMMARY

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
    save_minutes: float = 0.0
    keep: int = 0  # checkpoints; 0: all


@dataclass
class Clock:
    """Seconds spent so far, by what they were spent on."""

    forward_backward: float = 0.0
    optimizer: float = 0.0
    before: float = 0.0  # all of it, in runs that this one goes on from
    started: float = field(default_factory=time.perf_counter)

    @staticmethod
    def now() -> float:
        """Seconds, with everything asked of the device done."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    @property
    def all(self) -> float:
        """Seconds since the run began, without those between a stop and a resume."""
        return self.before + self.now() - self.started


class Trainer:
    """One run of one engine on one corpus."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        corpus: Corpus,
        ranks: Ranks,
        preemption: Preemption | None = None,
    ) -> None:
        """`preemption`, which the caller has entered, says when to save and end early."""
        self.job, self.engine, self.corpus, self.ranks = job, engine, corpus, ranks
        self.preemption = preemption
        self.train = Windows(corpus.train, job.seq_len, "training")
        self.validation = Windows(corpus.validation, job.seq_len, "validation")
        self.token_bytes = torch.from_numpy(corpus.token_bytes)
        self.clock = Clock()
        self.done = 0  # steps, including those before a resume
        self.before = [0.0, 0.0]  # bytes sent and matrices orthogonalized before a resume
        self.validated = False  # whether this step was, if it has to be
        self.stopping = self.save_due = False  # as all ranks agree
        self.saved_at = time.monotonic()
        self.skipped = 0
        self.checkpoints = job.out / "checkpoints"

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint stopped. ValueError: of another run, or damaged."""
        run, identity = checkpoint.run, self._identity()
        was, identity["model"] = llama.drop_release_fields(run.get("model", {}), identity["model"])
        comparable = replace(checkpoint, run={**run, "model": was})
        checkpoints.load(self.engine, self.ranks, comparable, identity)
        self.done, self.validated = int(run["step"]), bool(run["validated"])
        totals = run["totals"]
        self.before = [totals["optimizer_bytes_sent"], totals["matrices_orthogonalized"]]
        self.clock.before = totals["seconds"]
        self.clock.forward_backward = totals["forward_backward_seconds"]
        self.clock.optimizer = totals["optimizer_seconds"]
        self.skipped = self.engine.skipped_steps

    def _identity(self) -> dict[str, Any]:
        """What numbers depend on, and the data's order: it may not change in a run; JSON."""
        return {
            **self.engine.identity(),
            "seed": self.job.seed,
            "batch": self.engine.batch,
            "seq_len": self.job.seq_len,
            "corpus": self.corpus.key,
            "steps": self.job.steps,
            "model": llama.identity(self.engine.llama),
        }

    def run(self) -> dict[str, Any] | None:
        """Train to the end (or to stop_at) and return the summary; equal on all ranks.

        None: a signal has ended it after the step in hand, which is saved.
        """
        job, first = self.job, self.ranks.first
        end = min(job.stop_at or job.steps, job.steps)
        log = Log(job.out, self.done) if first else None
        if log:
            self.engine.watch(log.matrices)
        self.saved_at = time.monotonic()
        validation = None
        missed = (self.done == 0 or self._to_validate()) and not self.validated
        if self.done >= end or missed:
            validation = self._validate(None if self.validated else log)
        bar = tqdm(total=job.steps, initial=self.done, disable=not first, unit="step")
        with bar:
            while self.done < end and not self.stopping:
                record = self.step()
                bar.update()
                bar.set_postfix(
                    loss=f"{record['loss']:.3f}",
                    bpb=f"{record['bits_per_byte']:.3f}",
                    tok_s=f"{record['tokens_per_second']:.0f}",
                )
                if log:
                    log.add("train", self.done, record)
                self._tell_skipped()
                last = self.done == end
                # a job that is to end has seconds: what is left out here is done by the next one
                if (last or self._to_validate()) and not self.stopping:
                    validation = self._validate(log)
                regular = job.save_every and self.done % job.save_every == 0
                if last or regular or self.save_due or self.stopping:
                    self.save(log)
        if log:
            log.close()
        if self.stopping:
            return None
        assert validation is not None
        return self._summary(validation)

    def _to_validate(self) -> bool:
        return bool(self.job.eval_every) and self.done % self.job.eval_every == 0

    def _tell_skipped(self) -> None:
        """Say so when a framework has left a step out, which is no error to it."""
        skipped = self.engine.skipped_steps
        if skipped > self.skipped and self.ranks.first:
            tqdm.write(
                f"pretrain: step {self.done} was skipped: a gradient is NaN or infinite"
                f" ({skipped} skipped so far)",
                file=sys.stderr,
            )
        self.skipped = skipped

    def save(self, log: Log | None) -> None:
        """Checkpoint this step, with what a resumed run needs; on all ranks."""
        if log:
            log.sync()
        sent, polar_calls = self._counts()
        totals = {
            "seconds": self.clock.all,
            "forward_backward_seconds": self.clock.forward_backward,
            "optimizer_seconds": self.clock.optimizer,
            "optimizer_bytes_sent": sent,
            "matrices_orthogonalized": polar_calls,
        }
        run = {"step": self.done, "validated": self.validated, "totals": totals}
        run |= self._identity()
        checkpoints.save(self.engine, self.ranks, self.checkpoints, run, self.job.keep)
        self.saved_at = time.monotonic()

    def _counts(self) -> tuple[int, int]:
        """Bytes sent and matrices orthogonalized by all ranks since the run began."""
        counts = self.ranks.total([self.engine.comm_bytes(), self.engine.polar_calls()])
        sent, polar_calls = (int(x + y) for x, y in zip(self.before, counts, strict=True))
        return sent, polar_calls

    def _validate(self, log: Log | None) -> dict[str, float]:
        result = self.evaluate()
        self.validated = True
        if log:
            log.add("validation", self.done, result)
        return result

    def _agree(self, loss: float) -> float:
        """Add up the losses of all ranks, and with them whether to stop, and whether to save.

        A signal may reach one rank alone, and clocks differ: what all ranks do after a step is
        decided by numbers that travel with a reduction which every step makes anyway.
        """
        asked = self.preemption is not None and self.preemption.requested
        seconds = 60 * self.job.save_minutes
        due = self.ranks.first and 0 < seconds <= time.monotonic() - self.saved_at
        total, stopping, save_due = self.ranks.total([loss, float(asked), float(due)])
        self.stopping, self.save_due = stopping > 0, save_due > 0
        return total

    def step(self) -> dict[str, float]:
        """One optimizer step. FloatingPointError on every rank when the loss is not finite."""
        engine, ranks, clock = self.engine, self.ranks, self.clock
        numbers = window_indices(self.done, engine.batch, self.train.count, self.job.seed)
        rows = self.train.rows(numbers)
        mine = rank_micro_batches(rows, engine.micro, engine.data_rank, engine.data_ranks)
        lr = engine.lr
        started = clock.now()
        losses = [engine.backward(part, last=part is mine[-1]) for part in mine]
        middle = clock.now()
        engine.step()
        ended = clock.now()
        clock.forward_backward += middle - started
        clock.optimizer += ended - middle
        loss = self._agree(float(sum(losses))) / (len(mine) * ranks.world)
        self.done += 1
        self.validated = False
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.done} is {loss}: look for the cause (lr, which is {lr:g}"
                " here, or the model's initial weights, or the data)"
            )
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
        chosen = window_indices(0, self.validation.count, self.validation.count, VALIDATION_SEED)
        rows = self.validation.rows(chosen[:count])
        # All ranks make equally many calls, as ZeRO-3 requires; rows of padding count nothing.
        group = engine.micro * engine.data_ranks
        padding = -count % group
        rows = torch.cat([rows, rows[:1].expand(padding, -1)])
        counted = (torch.arange(len(rows)) < count)[:, None]
        engine.model.eval()
        nats = 0.0
        parts = rank_micro_batches(rows, engine.micro, engine.data_rank, engine.data_ranks)
        masks = rank_micro_batches(counted, engine.micro, engine.data_rank, engine.data_ranks)
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
        """Of the whole run, however often it was stopped and resumed."""
        engine, ranks, clock = self.engine, self.ranks, self.clock
        sent, polar_calls = self._counts()
        return {
            "optimizer": engine.kind,
            "parameters": engine.num_parameters,
            "trained_parameters": engine.num_trained,
            "ranks": ranks.world,
            "step": self.done,
            "skipped_steps": engine.skipped_steps,
            "tokens": self.done * engine.batch * self.job.seq_len,
            "validation_loss": validation["loss"],
            "validation_bits_per_byte": validation["bits_per_byte"],
            "seconds": clock.all,
            "forward_backward_seconds": clock.forward_backward,
            "optimizer_seconds": clock.optimizer,
            "optimizer_bytes_sent": sent,
            "matrices_orthogonalized": polar_calls,
            "optimizer_state_bytes": ranks.gather(engine.state_bytes()),
            "sample": self.sample(),
        }


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Keep the summary as summary.json in `out`."""
    files.replace(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
