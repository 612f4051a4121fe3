"""Optimizers of DeepSpeed's JSON under its stages 1 to 3: ours, its built-in Muon, AdamW."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import deepspeed.ops
from torch import Tensor
from typing_extensions import override

import spectral_dist.integrations.deepspeed  # noqa: F401
from benchmarks.peers.contenders import HALF
from benchmarks.peers.layouts import LR
from benchmarks.peers.models import Form, build, matrix_names
from benchmarks.peers.runners import Runner

deepspeed.utils.logger.setLevel("ERROR")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for 45 s
ADAM = {"torch_adam": True}  # DeepSpeed's own would be compiled
BUCKET = 1 << 20  # numbers; the default's would hide all other memory
STAGES = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class ZeroContender:
    """An optimizer of the JSON.

    Attributes:
        scatter: ``reduce_scatter`` at stage 3, which is DeepSpeed's default.
        layouts, polar: as of ``Contender``.
    """

    type: str
    params: dict[str, Any] = field(default_factory=lambda: ADAM)
    layouts: tuple[str, ...] = STAGES
    scatter: bool = True
    polar: str = ""
    package: str = ""


PLACE = "deepspeed.runtime.zero.muon.original_muon:zeropower_via_newtonschulz5"
BUILT_IN = {**ADAM, "ns_method": "standard"}  # in bfloat16
FLOAT = {**HALF, "wire_dtype": "float32"}
CONTENDERS = {
    "AdamW": ZeroContender("AdamW"),
    "ours": ZeroContender("SpectralMuon", HALF),
    "ours, float32 wire": ZeroContender("SpectralMuon", FLOAT),
    "ours, no reduce_scatter": ZeroContender("SpectralMuon", HALF, ("zero3",), scatter=False),
    "DeepSpeed's Muon": ZeroContender("Muon", BUILT_IN, ("zero1", "zero2"), polar=PLACE),
    "DeepSpeed's Muon, no reduce_scatter": ZeroContender(
        "Muon", BUILT_IN, ("zero3",), scatter=False, polar=PLACE
    ),
}
"""The built-in refuses ``reduce_scatter`` at stage 3."""


class ZeroRunner(Runner):
    """A contender's engine on this rank."""

    def __init__(self, name: str, layout: str, form: Form) -> None:
        contender, model = CONTENDERS[name], build(form)
        self.names = matrix_names(model)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(layout[-1]), "reduce_bucket_size": BUCKET},
            "optimizer": {"type": contender.type, "params": {"lr": LR, **contender.params}},
        }
        if not contender.scatter:
            config["zero_optimization"]["reduce_scatter"] = False
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            self.engine = deepspeed.initialize(model=model, config=config)[0]

    @override
    def forward_and_backward(self, tokens: Tensor) -> None:
        self.engine.backward(self.engine(tokens))

    @override
    def step(self) -> None:
        self.engine.step()

    @override
    def whole(self) -> dict[str, Tensor]:
        found = {n: p for n, p in self.engine.module.named_parameters() if n in self.names}
        with deepspeed.zero.GatheredParameters(list(found.values())):
            return {name: p.detach().clone() for name, p in found.items()}

    @override
    def state(self) -> Any:
        return [dict(s) for s in self.engine.basic_optimizer.state.values()]

    @override
    def own_polar(self) -> int:
        return getattr(self.engine.basic_optimizer, "polar_calls", 0)
