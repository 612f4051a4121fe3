"""Take a few real steps on the user's own DeepSpeed config and check them: `spectral-dist doctor`.

Each row of its table is a silent failure that some implementation has shipped.
"""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from spectral_dist.core.first_step import describe_method, first_step, matrix_of
from spectral_dist.launch.doctor_config import AUTO, check_scheduler, check_values
from spectral_dist.launch.doctor_readings import (
    full_parameters,
    iterate_matrices,
    norm_of_difference,
    parameter_dtype,
    relative_difference,
    state_norms,
    state_sums,
)
from spectral_dist.polar import polar
from spectral_dist.rules import registry
from spectral_dist.rules.scales import SCALES

RANKS = 2
ROW_LENGTH = 256
"""Tokens of a row: with fewer, a gradient lacks full rank, and rounding makes its polar factor."""
LR = 0.05
"""Large against bfloat16's rounding of a weight, so that weights tell what a step subtracted."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: what was checked, whether it passed, and what was seen."""

    check: str
    passed: bool
    seen: str


def examine(config: dict[str, Any], model: Any) -> list[CheckResult]:
    """Run every check of a configuration, on 2 ranks.

    Args:
        config: the content of a DeepSpeed JSON.
        model: a LlamaConfig.

    Raises:
        ValueError: the config names no optimizer that orthogonalizes, or the engine cannot be built
            with it; the message is the first rank's.
    """
    kind = config.get("optimizer", {}).get("type", "")
    if not str(kind).lower().startswith("spectral"):
        raise ValueError(
            f'optimizer.type is "{kind}"; doctor checks spectral optimizers, as "SpectralMuon"'
        )
    checked = [entry.deepspeed_type for entry in registry.entries() if entry.rule is not None]
    others = [entry.deepspeed_type for entry in registry.entries() if entry.rule is None]
    if str(kind).lower() in map(str.lower, others):
        raise ValueError(
            f'optimizer.type is "{kind}", which orthogonalizes no matrix, so none of what'
            f" doctor checks applies to it; it checks {', '.join(checked)}"
        )
    check_values(config)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if torch.cuda.device_count() < RANKS:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        try:
            mp.spawn(  # type: ignore[attr-defined,no-untyped-call]
                _rank, (port, config, model.to_dict(), str(answer)), nprocs=RANKS
            )
        except mp.ProcessRaisedException:  # type: ignore[attr-defined]
            for error_file in sorted(answer.parent.glob("error*")):
                raise ValueError(error_file.read_text()) from None
            raise
        results = json.loads(answer.read_text())
    return [CheckResult(*result) for result in results]


def adapt_config(
    config: dict[str, Any], lr: float = LR, accumulation: int | None = None
) -> dict[str, Any]:
    """Copy the user's config, with the batch sizes of two ranks, a fixed lr and no scheduler."""
    result = copy.deepcopy(config)
    per_rank = checked_accumulation(config)
    result.pop("scheduler", None)
    params = result["optimizer"].setdefault("params", {})
    if params.get("scalar_lr", AUTO) != AUTO and params.get("lr", AUTO) not in (AUTO, 0):
        params["scalar_lr"] *= lr / params["lr"]
    params["lr"] = lr
    micro_batches = accumulation or per_rank
    result["gradient_accumulation_steps"] = micro_batches
    result["train_micro_batch_size_per_gpu"] = per_rank // micro_batches
    result["train_batch_size"] = RANKS * per_rank
    result["steps_per_print"] = 10**9
    return result


def checked_accumulation(config: dict[str, Any]) -> int:
    """Return the micro-batches per step to check with: the user's, but from 2 to 4."""
    written = config.get("gradient_accumulation_steps", 1)
    return min(4, max(2, written if isinstance(written, int) else 1))


def _rank(rank: int, port: int, config: dict[str, Any], model: dict[str, Any], out: str) -> None:
    """Run the examination on one rank; rank 0 writes the results to a file, as JSON."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from spectral_dist.launch.engines.deepspeed import prepare_deepspeed

    deepspeed = prepare_deepspeed()
    from spectral_dist.integrations.deepspeed import _compat

    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        torch.set_num_threads(1)
        _compat.allow_fp16_on_cpu()
    else:
        accelerator.set_device(rank)
    deepspeed.init_distributed(verbose=False)
    try:
        check_scheduler(config)
        results = Examination(config, model).run()
    except ValueError as error:
        # the other rank may wait for this one in a collective: ``examine`` ends it
        Path(out).with_name(f"error{rank}").write_text(str(error))
        raise
    if rank == 0:
        Path(out).write_text(json.dumps([list(vars(result).values()) for result in results]))
    dist.barrier()
    dist.destroy_process_group()


class Examination:
    """The checks, as one of two ranks makes them; both return the same results.

    Attributes:
        config, model: a DeepSpeed config, and a LlamaConfig.
        lr: the learning rate of all engines that are built.
        grows_with_gradient: whether the rule's update does, as PolarGrad's.
    """

    def __init__(self, config: dict[str, Any], model: dict[str, Any]) -> None:
        from transformers import LlamaConfig

        self.config, self.model = config, LlamaConfig.from_dict(model)
        self.lr = LR
        self.grows_with_gradient = False

    def run(self) -> list[CheckResult]:
        """Run all checks; each engine starts from the same weights and sees the same batch."""
        engine = self.build_engine(adapt_config(self.config))
        gradients = self.reference_gradients(engine)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        self.clip_gradients(gradients, norm)
        self.grows_with_gradient = self.update_grows_with_gradient(engine, gradients)
        if self.grows_with_gradient:
            self.lr = self.visible_lr(engine, gradients)
            engine.destroy()
            engine = self.build_engine(adapt_config(self.config, self.lr))
        before = full_parameters(engine)
        calls_before = self.count_polar_calls(engine)
        self.take_step(engine)
        calls = self.count_polar_calls(engine) - calls_before
        after, norms = full_parameters(engine), state_norms(engine)
        matrices = {m.name: m for s in engine.basic_optimizer.all_routes for m in s.matrices}
        return [
            self.check_polar_calls(calls, len(matrices)),
            self.check_direction(engine, gradients, before, after),
            self.check_accumulation(before, after),
            self.check_clipping(norm, before, after, norms, gradients),
            self.check_overflow(engine),
        ]

    def build_engine(self, config: dict[str, Any]) -> Any:
        """Build a real DeepSpeed engine on the model's initial weights."""
        import deepspeed

        import spectral_dist.integrations.deepspeed  # noqa: F401  registers the names
        from spectral_dist.launch import llama

        return deepspeed.initialize(model=llama.build(self.model, 0), config=config)[0]

    def take_step(self, engine: Any, factor: float = 1.0) -> None:
        """Take one optimizer step on the fixed batch, however often fp16 lowers its scale first."""
        for _ in range(40):
            skipped = engine.skipped_steps
            for rows in self.micro_batches(engine):
                rows = rows.to(engine.device)
                engine.backward(engine(input_ids=rows, labels=rows).loss * factor)
                engine.step()
            if engine.skipped_steps == skipped or factor != 1.0:
                return
        raise ValueError("40 steps in a row overflowed; is the fp16 loss scale fixed too high?")

    def global_batch(self) -> Tensor:
        """Return the tokens of the global batch, one row per rank and micro-batch."""
        rows = RANKS * checked_accumulation(self.config)
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.model.vocab_size, (rows, ROW_LENGTH), generator=generator)

    def micro_batches(self, engine: Any) -> list[Tensor]:
        """Return this rank's micro-batches of the global batch."""
        rows = self.global_batch()[dist.get_rank() :: RANKS]
        return list(rows.chunk(engine.gradient_accumulation_steps()))

    def count_polar_calls(self, engine: Any) -> int:
        """Return the number of matrices orthogonalized so far by all ranks."""
        count = torch.tensor(engine.basic_optimizer.polar_calls, device=engine.device)
        dist.all_reduce(count)
        return int(count)

    def check_polar_calls(self, calls: int, matrices: int) -> CheckResult:
        """Check that each matrix is orthogonalized once per step, not per micro-batch or rank."""
        return CheckResult(
            "every matrix orthogonalized once per step",
            calls == matrices,
            f"{calls} orthogonalizations for {matrices} matrices in one step of"
            f" {checked_accumulation(self.config)} micro-batches on {RANKS} ranks",
        )

    def reference_gradients(self, engine: Any) -> dict[str, Tensor]:
        """Compute the gradients of the global batch without DeepSpeed, by name of the parameter."""
        from spectral_dist.launch import llama

        model = llama.build(self.model, 0).to(engine.device, parameter_dtype(engine))
        rows = self.global_batch().to(engine.device)
        model(input_ids=rows, labels=rows).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def clip_gradients(self, gradients: dict[str, Tensor], norm: float) -> None:
        """Clip gradients in place as the config says, since PolarGrad's steps grow with them."""
        limit = float(self.config.get("gradient_clipping", 1.0))
        for gradient in gradients.values():
            if 0 < limit < norm:
                gradient.mul_(limit / norm)

    def update_grows_with_gradient(self, engine: Any, gradients: dict[str, Tensor]) -> bool:
        """Return whether a larger gradient makes a larger update, as PolarGrad's does."""
        optimizer = engine.basic_optimizer
        spec, matrix, options = next(iterate_matrices(optimizer))
        g = matrix_of(matrix, gradients[spec.name])
        norm, norm_of_tenfold = (
            float(first_step(optimizer.rule, options, x, matrix.name)[0].norm())
            for x in (g, 10 * g)
        )
        return norm_of_tenfold > 2 * norm

    def visible_lr(self, engine: Any, gradients: dict[str, Tensor]) -> float:
        """Return the lr at which every matrix moves at least as far as with Muon at LR.

        It is needed where the size of the update depends on the gradient's, as PolarGrad's.
        """
        optimizer = engine.basic_optimizer
        factors: list[float] = []
        for spec, matrix, options in iterate_matrices(optimizer):
            g = matrix_of(matrix, gradients[spec.name])
            step, _ = first_step(optimizer.rule, options, g, matrix.name)
            norm_of_muon = SCALES["match_rms_adamw"](*matrix.shape) * min(matrix.shape) ** 0.5
            factors.append(norm_of_muon / max(float(step.norm()), 1e-30))
        return LR * max(factors)

    def check_direction(
        self,
        engine: Any,
        gradients: dict[str, Tensor],
        before: dict[str, Tensor],
        after: dict[str, Tensor],
    ) -> CheckResult:
        """Check the first step against the rule's on an independently computed gradient."""
        optimizer = engine.basic_optimizer
        largest_error, cosine_to_exact, name, method = 0.0, 1.0, "", ""
        for spec, matrix, options in iterate_matrices(optimizer):
            g, w0, w1 = (
                matrix_of(matrix, tensors[spec.name]) for tensors in (gradients, before, after)
            )
            step = ((1 - self.lr * options.weight_decay) * w0 - w1) / self.lr
            expected, _ = first_step(optimizer.rule, options, g, matrix.name)
            error = float((step - expected).norm() / expected.norm())
            if error > largest_error or not name:
                largest_error, name = error, matrix.name
                method = describe_method(optimizer.rule, options, matrix)
                exact = polar(g, method="svd").flatten()
                cosine_similarity = torch.nn.functional.cosine_similarity
                cosine_to_exact = float(cosine_similarity(step.flatten(), exact, dim=0))
        limit = 0.02 if parameter_dtype(engine) == torch.float32 else 0.5
        return CheckResult(
            "direction = polar factor of the whole gradient",
            largest_error < limit,
            f"largest error {largest_error:.1e} ({name}; limit {limit:g}); its cosine to the exact"
            f" polar factor is {cosine_to_exact:.3f}, {method}",
        )

    def check_accumulation(
        self, before: dict[str, Tensor], after: dict[str, Tensor]
    ) -> CheckResult:
        """Check that the same batch in one micro-batch gives the same step."""
        engine = self.build_engine(adapt_config(self.config, self.lr, accumulation=1))
        self.take_step(engine)
        error = relative_difference(full_parameters(engine), after, before)
        limit = 1e-3 if parameter_dtype(engine) == torch.float32 else 0.5
        engine.destroy()
        return CheckResult(
            f"accumulation 1 = accumulation {checked_accumulation(self.config)}",
            error < limit,
            f"steps differ by {error:.1e} of a step (limit {limit:g})",
        )

    def check_clipping(
        self,
        norm: float,
        before: dict[str, Tensor],
        after: dict[str, Tensor],
        norms: dict[str, float],
        gradients: dict[str, Tensor],
    ) -> CheckResult:
        """Check that clipping acts on the gradient: only PolarGrad's update shrinks with it."""
        norm = min(norm, float(self.config.get("gradient_clipping", 1.0)) or norm)
        factor = 0.1 if self.grows_with_gradient else 1e-4 / norm
        config = adapt_config(self.config, self.lr)
        config["gradient_clipping"] = factor * norm
        engine = self.build_engine(config)
        self.take_step(engine)
        clipped, clipped_norms = full_parameters(engine), state_norms(engine)
        expected_ratios = self.expected_state_ratios(engine, gradients, factor)
        decay = 1 - self.lr * engine.basic_optimizer.options.weight_decay
        names = [spec.name for spec in engine.basic_optimizer.all_routes if spec.kind == "matrix"]
        engine.destroy()
        start = {name: decay * before[name] for name in names}
        ratio = norm_of_difference(clipped, start, names) / norm_of_difference(after, start, names)
        expected = factor if self.grows_with_gradient else 1.0
        ratios = {name: clipped_norms[name] / max(norms[name], 1e-30) for name in expected_ratios}
        states_follow = all(0.5 * r < ratios[n] < 2 * r for n, r in expected_ratios.items())
        described = ", ".join(f"{name} x {value:.1e}" for name, value in ratios.items())
        return CheckResult(
            "clipping acts on the gradient",
            abs(ratio / expected - 1) < (0.1 if self.grows_with_gradient else 0.02)
            and states_follow,
            f"clipped to {factor:.1e} of its norm: update x {ratio:.3f} (right: {expected:g}),"
            f" {described}",
        )

    def expected_state_ratios(
        self, engine: Any, gradients: dict[str, Tensor], factor: float
    ) -> dict[str, float]:
        """Return the factor by which clipping must shrink each state of the rule, by name."""
        optimizer = engine.basic_optimizer
        sums: dict[str, list[float]] = {}
        for spec, matrix, options in iterate_matrices(optimizer):
            g = matrix_of(matrix, gradients[spec.name])
            for index, x in enumerate((g, factor * g)):
                _, norms = first_step(optimizer.rule, options, x, matrix.name)
                for name, norm in norms.items():
                    sums.setdefault(name, [0.0, 0.0])[index] += norm**2
        return {name: math.sqrt(b / a) for name, (a, b) in sums.items() if a}

    def check_overflow(self, engine: Any) -> CheckResult:
        """Check that a step with infinite gradients changes no weight, momentum or counter."""
        sums_before = state_sums(engine)
        weights = full_parameters(engine)
        try:
            self.take_step(engine, factor=math.inf)
            outcome = "skipped"
        except ValueError as error:
            outcome = f"refused: {str(error)[:60]}..."
        unchanged = sums_before == state_sums(engine)
        unchanged = unchanged and all(
            torch.equal(weights[name], weight) for name, weight in full_parameters(engine).items()
        )
        engine.destroy()
        seen = outcome if unchanged else f"{outcome}, changed"
        return CheckResult("an overflowing step changes nothing", unchanged, seen)
