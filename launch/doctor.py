"""`spectral-dist doctor`: take a few real steps on the user's own DeepSpeed config and check them.

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
    kept_norms,
    length,
    matrices_of,
    relative,
    snapshot,
    whole,
    whole_dtype,
)
from spectral_dist.polar import polar
from spectral_dist.rules import registry
from spectral_dist.rules.scales import SCALES

RANKS = 2
LENGTH = 256
"""Of a row: the gradients need full rank, or their exact polar factor is that of rounding."""
LR = 0.05
"""Large against bfloat16's rounding of a weight, so that a step can be read off the weights."""


@dataclass(frozen=True)
class Row:
    """One check: what was looked at, whether it held, and what was seen."""

    check: str
    passed: bool
    seen: str


def examine(config: dict[str, Any], model: Any) -> list[Row]:
    """Run every check of ``config`` (a DeepSpeed config) on ``model`` (a LlamaConfig), on 2 ranks.

    Raises:
        ValueError: the config names no spectral optimizer or POET, or the engine cannot be built
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
            for said in sorted(answer.parent.glob("error*")):
                raise ValueError(said.read_text()) from None
            raise
        found = json.loads(answer.read_text())
    return [Row(*row) for row in found["rows"]]


def adapted(
    config: dict[str, Any], lr: float = LR, accumulation: int | None = None
) -> dict[str, Any]:
    """The user's config with what depends on the job's size set for two ranks and a fixed lr."""
    result = copy.deepcopy(config)
    per_rank = accumulation_of(config)
    result.pop("scheduler", None)
    params = result["optimizer"].setdefault("params", {})
    if params.get("scalar_lr", AUTO) != AUTO and params.get("lr", AUTO) not in (AUTO, 0):
        params["scalar_lr"] *= lr / params["lr"]
    params["lr"] = lr
    chosen = accumulation or per_rank
    result["gradient_accumulation_steps"] = chosen
    result["train_micro_batch_size_per_gpu"] = per_rank // chosen
    result["train_batch_size"] = RANKS * per_rank
    result["steps_per_print"] = 10**9
    return result


def accumulation_of(config: dict[str, Any]) -> int:
    """Micro-batches a step to check with: the user's number, at least 2 and at most 4."""
    asked = config.get("gradient_accumulation_steps", 1)
    return min(4, max(2, asked if isinstance(asked, int) else 1))


def _rank(rank: int, port: int, config: dict[str, Any], model: dict[str, Any], out: str) -> None:
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
        rows = Examination(config, model).run()
    except ValueError as raised:
        # the other rank may wait for this one in a collective: it is ended from outside
        Path(out).with_name(f"error{rank}").write_text(str(raised))
        raise
    content = {"rows": [list(vars(row).values()) for row in rows]}
    if rank == 0:
        Path(out).write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


class Examination:
    """The checks, on one rank of two; every rank gets the same rows."""

    def __init__(self, config: dict[str, Any], model: dict[str, Any]) -> None:
        from transformers import LlamaConfig

        self.config, self.model = config, LlamaConfig.from_dict(model)
        self.lr = LR
        self.sized = False

    def run(self) -> list[Row]:
        """All checks. Each engine starts from the same weights and sees the same batch."""
        engine = self.engine(adapted(self.config))
        gradients = self.gradients(engine)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        self.clip(gradients, norm)
        self.sized = self.follows_size(engine, gradients)
        if self.sized:
            self.lr = self.visible_lr(engine, gradients)
            engine.destroy()
            engine = self.engine(adapted(self.config, self.lr))
        before = whole(engine)
        calls = self.calls(engine)
        self.step(engine)
        calls = self.calls(engine) - calls
        after, kept = whole(engine), kept_norms(engine)
        matrices = {m.name: m for r in engine.basic_optimizer.all_routes for m in r.matrices}
        rows = [self.once(calls, len(matrices)), self.direction(engine, gradients, before, after)]
        rows.append(self.accumulation(before, after))
        rows.append(self.clipping(norm, before, after, kept, gradients))
        rows.append(self.overflow(engine))
        return rows

    def engine(self, config: dict[str, Any]) -> Any:
        """A real engine on the model's first weights."""
        import deepspeed

        import spectral_dist.integrations.deepspeed  # noqa: F401  registers the names
        from spectral_dist.launch import llama

        return deepspeed.initialize(model=llama.build(self.model, 0), config=config)[0]

    def step(self, engine: Any, factor: float = 1.0) -> None:
        """One optimizer step on the fixed batch; fp16 may first have to lower its loss scale."""
        for _ in range(40):
            skipped = engine.skipped_steps
            for rows in self.micro_batches(engine):
                rows = rows.to(engine.device)
                engine.backward(engine(input_ids=rows, labels=rows).loss * factor)
                engine.step()
            if engine.skipped_steps == skipped or factor != 1.0:
                return
        raise ValueError("40 steps in a row overflowed; is the fp16 loss scale fixed too high?")

    def batch(self) -> Tensor:
        """The global batch, one row per rank and micro-batch."""
        rows = RANKS * accumulation_of(self.config)
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.model.vocab_size, (rows, LENGTH), generator=generator)

    def micro_batches(self, engine: Any) -> list[Tensor]:
        """This rank's part of it."""
        rows = self.batch()[dist.get_rank() :: RANKS]
        return list(rows.chunk(engine.gradient_accumulation_steps()))

    def calls(self, engine: Any) -> int:
        """Matrices orthogonalized so far, over all ranks."""
        number = torch.tensor(engine.basic_optimizer.polar_calls, device=engine.device)
        dist.all_reduce(number)
        return int(number)

    def once(self, calls: int, matrices: int) -> Row:
        """Each matrix must be orthogonalized once per step, not per micro-batch or rank."""
        return Row(
            "every matrix orthogonalized once per step",
            calls == matrices,
            f"{calls} orthogonalizations for {matrices} matrices in one step of"
            f" {accumulation_of(self.config)} micro-batches on {RANKS} ranks",
        )

    def gradients(self, engine: Any) -> dict[str, Tensor]:
        """Of the whole batch, without DeepSpeed."""
        from spectral_dist.launch import llama

        plain = llama.build(self.model, 0).to(engine.device, whole_dtype(engine))
        rows = self.batch().to(engine.device)
        plain(input_ids=rows, labels=rows).loss.backward()
        return {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}

    def clip(self, gradients: dict[str, Tensor], norm: float) -> None:
        """As the config does, in place: it changes the size of PolarGrad's steps."""
        limit = float(self.config.get("gradient_clipping", 1.0))
        for gradient in gradients.values():
            if 0 < limit < norm:
                gradient.mul_(limit / norm)

    def follows_size(self, engine: Any, gradients: dict[str, Tensor]) -> bool:
        """Return whether a step is larger for a larger gradient, as PolarGrad's is."""
        optimizer = engine.basic_optimizer
        route, matrix, options = next(matrices_of(optimizer))
        g = matrix_of(matrix, gradients[route.name])
        one, ten = (
            float(first_step(optimizer.rule, options, x, matrix.name)[0].norm())
            for x in (g, 10 * g)
        )
        return ten > 2 * one

    def visible_lr(self, engine: Any, gradients: dict[str, Tensor]) -> float:
        """For PolarGrad: the lr at which every matrix moves at least as far as with Muon at LR."""
        optimizer = engine.basic_optimizer
        factors: list[float] = []
        for route, matrix, options in matrices_of(optimizer):
            g = matrix_of(matrix, gradients[route.name])
            step, _ = first_step(optimizer.rule, options, g, matrix.name)
            wanted = SCALES["match_rms_adamw"](*matrix.shape) * min(matrix.shape) ** 0.5
            factors.append(wanted / max(float(step.norm()), 1e-30))
        return LR * max(factors)

    def direction(
        self,
        engine: Any,
        gradients: dict[str, Tensor],
        before: dict[str, Tensor],
        after: dict[str, Tensor],
    ) -> Row:
        """The first step against the rule on an independent whole gradient."""
        optimizer = engine.basic_optimizer
        worst, lowest, name, how = 0.0, 1.0, "", ""
        for route, matrix, options in matrices_of(optimizer):
            g, w0, w1 = (
                matrix_of(matrix, tensors[route.name]) for tensors in (gradients, before, after)
            )
            moved = ((1 - self.lr * options.weight_decay) * w0 - w1) / self.lr
            wanted, _ = first_step(optimizer.rule, options, g, matrix.name)
            error = float((moved - wanted).norm() / wanted.norm())
            if error > worst or not name:
                worst, name, how = (
                    error,
                    matrix.name,
                    describe_method(optimizer.rule, options, matrix),
                )
                exact = polar(g, method="svd").flatten()
                cosine = torch.nn.functional.cosine_similarity
                lowest = float(cosine(moved.flatten(), exact, dim=0))
        limit = 0.02 if whole_dtype(engine) == torch.float32 else 0.5
        return Row(
            "direction = polar factor of the whole gradient",
            worst < limit,
            f"largest error {worst:.1e} ({name}; limit {limit:g}); its cosine to the exact polar"
            f" factor is {lowest:.3f}, {how}",
        )

    def accumulation(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> Row:
        """The same batch in one micro-batch must give the same step."""
        engine = self.engine(adapted(self.config, self.lr, accumulation=1))
        self.step(engine)
        error = relative(whole(engine), after, before)
        limit = 1e-3 if whole_dtype(engine) == torch.float32 else 0.5
        engine.destroy()
        return Row(
            f"accumulation 1 = accumulation {accumulation_of(self.config)}",
            error < limit,
            f"steps differ by {error:.1e} of a step (limit {limit:g})",
        )

    def clipping(
        self,
        norm: float,
        before: dict[str, Tensor],
        after: dict[str, Tensor],
        kept: dict[str, float],
        gradients: dict[str, Tensor],
    ) -> Row:
        """Clipping must act on the gradient: the update shrinks with it under PolarGrad alone."""
        norm = min(norm, float(self.config.get("gradient_clipping", 1.0)) or norm)
        factor = 0.1 if self.sized else 1e-4 / norm
        config = adapted(self.config, self.lr)
        config["gradient_clipping"] = factor * norm
        engine = self.engine(config)
        self.step(engine)
        clipped, small = whole(engine), kept_norms(engine)
        wanted = self.kept_ratios(engine, gradients, factor)
        decay = 1 - self.lr * engine.basic_optimizer.options.weight_decay
        names = [r.name for r in engine.basic_optimizer.all_routes if r.kind == "matrix"]
        engine.destroy()
        start = {name: decay * before[name] for name in names}
        ratio = length(clipped, start, names) / length(after, start, names)
        right = factor if self.sized else 1.0
        ratios = {name: small[name] / max(kept[name], 1e-30) for name in wanted}
        follows = all(0.5 * w < ratios[name] < 2 * w for name, w in wanted.items())
        said = ", ".join(f"{name} x {value:.1e}" for name, value in ratios.items())
        return Row(
            "clipping acts on the gradient",
            abs(ratio / right - 1) < (0.1 if self.sized else 0.02) and follows,
            f"clipped to {factor:.1e} of its norm: update x {ratio:.3f} (right: {right:g}), {said}",
        )

    def kept_ratios(
        self, engine: Any, gradients: dict[str, Tensor], factor: float
    ) -> dict[str, float]:
        """Return how much smaller what the rule keeps gets with the gradient, by quantity."""
        optimizer = engine.basic_optimizer
        sums: dict[str, list[float]] = {}
        for route, matrix, options in matrices_of(optimizer):
            g = matrix_of(matrix, gradients[route.name])
            for place, x in enumerate((g, factor * g)):
                _, norms = first_step(optimizer.rule, options, x, matrix.name)
                for name, norm in norms.items():
                    sums.setdefault(name, [0.0, 0.0])[place] += norm**2
        return {name: math.sqrt(b / a) for name, (a, b) in sums.items() if a}

    def overflow(self, engine: Any) -> Row:
        """A step with infinite gradients must change nothing: weights, momentum, counters."""
        states = snapshot(engine)
        weights = whole(engine)
        try:
            self.step(engine, factor=math.inf)
            how = "skipped"
        except ValueError as error:
            how = f"refused: {str(error)[:60]}..."
        same = states == snapshot(engine)
        same = same and all(torch.equal(weights[n], w) for n, w in whole(engine).items())
        engine.destroy()
        return Row("an overflowing step changes nothing", same, how if same else f"{how}, changed")
