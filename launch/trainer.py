"""Train a model with any engine: steps, evaluation, checkpoints, and a sample of text."""

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
from spectral_dist.launch.progress import Progress
from spectral_dist.launch.ranks import Ranks
from spectral_dist.launch.report import Log
from spectral_dist.launch.run_folder import SUMMARY

VALIDATION_SEED = 0  # the same windows for all runs


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that are the same for every engine.

    Attributes:
        out: the folder of the run.
        steps, stop_at: optimizer steps of the whole run, and where to stop early; 0: do not.
        seq_len: tokens of a row.
        seed: of the order of the text and of the sample.
        eval_every, eval_batches: steps between evaluations (0: only at the start and the end), and
            their size in batches.
        save_every, save_minutes: steps and minutes between checkpoints; 0: only at the end, never.
        prompt: what the sample continues.
        keep: how many checkpoints to keep; 0: all.
    """

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
    keep: int = 0


@dataclass
class Clock:
    """Seconds spent so far, by purpose."""

    forward_backward: float = 0.0
    optimizer: float = 0.0
    before_resume: float = 0.0  # in all, by the runs that this one resumes
    started: float = field(default_factory=time.perf_counter)

    @staticmethod
    def now() -> float:
        """Return the time in seconds, once the device has finished its work."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    @property
    def all(self) -> float:
        """Return the seconds since the run began, without those between a stop and a resume."""
        return self.before_resume + self.now() - self.started


class Trainer:
    """One run of one engine on one corpus."""

    def __init__(
        self,
        settings: RunSettings,
        engine: Engine,
        corpus: Corpus,
        ranks: Ranks,
        preemption: Preemption | None = None,
    ) -> None:
        """Set up a run that begins at step 0.

        Args:
            settings: of the run.
            engine: the model and optimizer to train.
            corpus: the text.
            ranks: all ranks of the job.
            preemption: an entered context that says when to save and end early.
        """
        self.settings, self.engine, self.corpus, self.ranks = settings, engine, corpus, ranks
        self.preemption = preemption
        self.train = Windows(corpus.train, settings.seq_len, "training")
        self.validation = Windows(corpus.validation, settings.seq_len, "validation")
        self.token_bytes = torch.from_numpy(corpus.token_bytes)
        self.clock = Clock()
        self.done = 0  # steps, including those before a resume
        self.counts_before = [0.0, 0.0]  # bytes sent and matrices orthogonalized before a resume
        self.validated = False  # whether the model has been evaluated at this step
        self.stopping = self.save_due = False  # the same on all ranks
        self.saved_at = time.monotonic()
        self.skipped = 0  # steps that the framework has skipped
        self.checkpoints = settings.out / "checkpoints"

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it belongs to another run, or is damaged.
        """
        run, identity = checkpoint.run, self._identity()
        saved_model, model = llama.drop_release_fields(run.get("model", {}), identity["model"])
        identity["model"] = model
        comparable = replace(checkpoint, run={**run, "model": saved_model})
        checkpoints.load(self.engine, self.ranks, comparable, identity)
        self.done, self.validated = int(run["step"]), bool(run["validated"])
        totals = run["totals"]
        self.counts_before = [totals["optimizer_bytes_sent"], totals["matrices_orthogonalized"]]
        self.clock.before_resume = totals["seconds"]
        self.clock.forward_backward = totals["forward_backward_seconds"]
        self.clock.optimizer = totals["optimizer_seconds"]
        self.skipped = self.engine.skipped_steps

    def _identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change, as JSON.

        The run's numbers and the order of its text depend on them.
        """
        return {
            **self.engine.identity(),
            "seed": self.settings.seed,
            "batch": self.engine.batch,
            "seq_len": self.settings.seq_len,
            "corpus": self.corpus.key,
            "steps": self.settings.steps,
            "model": llama.identity(self.engine.llama),
        }

    def run(self) -> dict[str, Any] | None:
        """Train to the end, or to ``stop_at``, and return the summary, which is equal on all ranks.

        Returns:
            The summary; None: a signal has ended the run, after a step that is saved.
        """
        settings, first = self.settings, self.ranks.first
        end = min(settings.stop_at or settings.steps, settings.steps)
        log = Log(settings.out, self.done) if first else None
        if log:
            self.engine.watch(log.matrices)
        self.saved_at = time.monotonic()
        validation = None
        not_yet_validated = (self.done == 0 or self._is_validation_step()) and not self.validated
        if self.done >= end or not_yet_validated:
            validation = self._validate(None if self.validated else log)
        with Progress(self.done, settings.steps, first) as progress:
            while self.done < end and not self.stopping:
                record = self.step()
                progress.advance(record, last=self.done == end)
                if log:
                    log.add("train", self.done, record)
                self._warn_of_skipped()
                last = self.done == end
                # a job that is to end has only seconds left; the resumed run will evaluate
                if (last or self._is_validation_step()) and not self.stopping:
                    validation = self._validate(log)
                regular = settings.save_every and self.done % settings.save_every == 0
                if last or regular or self.save_due or self.stopping:
                    self.save(log)
        if log:
            log.close()
        if self.stopping:
            return None
        assert validation is not None
        return self._summary(validation)

    def _is_validation_step(self) -> bool:
        """Return whether ``eval_every`` asks for an evaluation at this step."""
        return bool(self.settings.eval_every) and self.done % self.settings.eval_every == 0

    def _warn_of_skipped(self) -> None:
        """Print a warning when the framework has skipped a step, which is no error to it."""
        skipped = self.engine.skipped_steps
        if skipped > self.skipped and self.ranks.first:
            tqdm.write(
                f"pretrain: step {self.done} was skipped: a gradient is NaN or infinite"
                f" ({skipped} skipped so far)",
                file=sys.stderr,
            )
        self.skipped = skipped

    def save(self, log: Log | None) -> None:
        """Save a checkpoint of this step, with what a resumed run needs; all ranks call this."""
        if log:
            log.sync()
        sent, polar_calls = self._total_counts()
        totals = {
            "seconds": self.clock.all,
            "forward_backward_seconds": self.clock.forward_backward,
            "optimizer_seconds": self.clock.optimizer,
            "optimizer_bytes_sent": sent,
            "matrices_orthogonalized": polar_calls,
        }
        run = {"step": self.done, "validated": self.validated, "totals": totals}
        run |= self._identity()
        checkpoints.save(self.engine, self.ranks, self.checkpoints, run, self.settings.keep)
        self.saved_at = time.monotonic()

    def _total_counts(self) -> tuple[int, int]:
        """Return the bytes sent and matrices orthogonalized by all ranks since the run began."""
        counts = self.ranks.total([self.engine.comm_bytes(), self.engine.polar_calls()])
        sent, polar_calls = (int(x + y) for x, y in zip(self.counts_before, counts, strict=True))
        return sent, polar_calls

    def _validate(self, log: Log | None) -> dict[str, float]:
        """Evaluate the model, and log the result."""
        result = self.evaluate()
        self.validated = True
        if log:
            log.add("validation", self.done, result)
        return result

    def _sum_and_agree(self, loss: float) -> float:
        """Sum the losses of all ranks, and with them whether to stop and whether to save.

        A signal may reach one rank alone, and clocks differ: what all ranks do after a step is
        decided by numbers that travel with a reduction which every step makes anyway.
        """
        signalled = self.preemption is not None and self.preemption.requested
        seconds = 60 * self.settings.save_minutes
        time_to_save = self.ranks.first and 0 < seconds <= time.monotonic() - self.saved_at
        total, stopping, save_due = self.ranks.total([loss, float(signalled), float(time_to_save)])
        self.stopping, self.save_due = stopping > 0, save_due > 0
        return total

    def step(self) -> dict[str, float]:
        """Take one optimizer step, and return its record for the log.

        Raises:
            FloatingPointError: on every rank: the loss is not finite.
        """
        engine, ranks, clock = self.engine, self.ranks, self.clock
        indices = window_indices(self.done, engine.batch, self.train.count, self.settings.seed)
        rows = self.train.rows(indices)
        micro_batches = rank_micro_batches(rows, engine.micro, engine.data_rank, engine.data_ranks)
        lr = engine.lr
        started = clock.now()
        losses = [engine.backward(rows, last=rows is micro_batches[-1]) for rows in micro_batches]
        gradients_done = clock.now()
        engine.step()
        ended = clock.now()
        clock.forward_backward += gradients_done - started
        clock.optimizer += ended - gradients_done
        loss = self._sum_and_agree(float(sum(losses))) / (len(micro_batches) * ranks.world)
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
        """Return the bytes of text that tokens stand for."""
        return int(self.token_bytes[tokens].sum())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute loss and bits per byte on the held-out text.

        It has up to eval_batches * batch windows, the same at each evaluation.
        """
        engine, ranks = self.engine, self.ranks
        count = min(self.validation.count, self.settings.eval_batches * engine.batch)
        indices = window_indices(0, self.validation.count, self.validation.count, VALIDATION_SEED)
        rows = self.validation.rows(indices[:count])
        # All ranks make equally many calls, as ZeRO-3 requires; the loss leaves out padding rows.
        rows_at_once = engine.micro * engine.data_ranks
        padding = -count % rows_at_once
        rows = torch.cat([rows, rows[:1].expand(padding, -1)])
        is_counted = (torch.arange(len(rows)) < count)[:, None]
        engine.model.eval()
        nats = 0.0
        micro_batches = rank_micro_batches(rows, engine.micro, engine.data_rank, engine.data_ranks)
        masks = rank_micro_batches(is_counted, engine.micro, engine.data_rank, engine.data_ranks)
        for micro_batch, mask in zip(micro_batches, masks, strict=True):
            nats += float((engine.losses(micro_batch).double().cpu() * mask).sum())
        engine.model.train()
        targets = rows[:count, 1:]
        ranks_per_row = ranks.world // engine.data_ranks
        loss = ranks.total([nats])[0] / ranks_per_row / targets.numel()
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, targets.numel(), self._bytes(targets)),
        }

    @torch.no_grad()
    def sample(self, length: int = 48, temperature: float = 0.8, top: int = 40) -> str:
        """Return the prompt and a continuation; all ranks compute it, as ZeRO-3 requires.

        Args:
            length: tokens to add.
            temperature: of the softmax.
            top: how many of the likeliest tokens to choose from.
        """
        tokenizer = self.corpus.tokenizer
        ids = tokenizer.encode(self.settings.prompt).ids or [0]
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.engine.model.eval()
        for _ in range(length):
            logits = self.engine.logits(torch.tensor([ids[-self.settings.seq_len :]]))[0, -1].cpu()
            candidates = logits.topk(min(top, len(logits)))
            probabilities = (candidates.values / temperature).softmax(-1)
            choice = torch.multinomial(probabilities, 1, generator=generator)
            ids.append(int(candidates.indices[choice]))
        self.engine.model.train()
        return str(tokenizer.decode(ids))

    def _summary(self, validation: dict[str, float]) -> dict[str, Any]:
        """Return the summary of the whole run, however often it was stopped and resumed."""
        engine, ranks, clock = self.engine, self.ranks, self.clock
        sent, polar_calls = self._total_counts()
        return {
            "optimizer": engine.kind,
            "parameters": engine.num_parameters,
            "trained_parameters": engine.num_trained,
            "ranks": ranks.world,
            "step": self.done,
            "skipped_steps": engine.skipped_steps,
            "tokens": self.done * engine.batch * self.settings.seq_len,
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
    """Write the summary as summary.json into ``out``."""
    files.replace(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
