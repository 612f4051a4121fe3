"""The optimizers that are compared under torch's own layouts, built as their READMEs say.

All take 5 steps of Newton-Schulz in bfloat16, as most of them do whatever is asked for; learning
rate and weight decay do not matter to what is measured.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import spectral_dist
from benchmarks.fsdp_step import Both
from benchmarks.peers import dedicated
from benchmarks.peers.layouts import LR, Wrapped
from spectral_dist.integrations.torch.reduce_to_owners import reduce_to_owners

OURS = "ours"
HALF = {"polar_dtype": "bfloat16", "wire_dtype": "bfloat16"}


def adamw(wrapped: Wrapped) -> Any:
    """Return torch's, for all parameters."""
    return torch.optim.AdamW(wrapped.model.parameters(), lr=LR, fused=True)


def ours(wrapped: Wrapped, owners: bool = False, **options: Any) -> Any:
    """Return our Muon; ``owners``: with gradients reduced to owners."""
    with contextlib.redirect_stderr(io.StringIO()):  # the table of what is a matrix
        groups = spectral_dist.param_groups(wrapped.model)
    matrices = {id(p) for group in groups if group["kind"] == "matrix" for p in group["params"]}
    assert matrices == {id(p) for p in wrapped.matrices}
    optimizer = spectral_dist.Muon(groups, lr=LR, **{**HALF, **options})
    if owners:
        reduce_to_owners(wrapped.model, optimizer)
    return optimizer


def torch_muon(wrapped: Wrapped) -> Any:
    """Return torch.optim.Muon, which leaves all else to another optimizer."""
    muon = torch.optim.Muon(wrapped.matrices, lr=LR, adjust_lr_fn="match_rms_adamw")
    return Both(muon, torch.optim.AdamW(wrapped.rest, lr=LR, fused=True))


def muon_fsdp2(wrapped: Wrapped) -> Any:
    """Return PyPI's muon-fsdp2."""
    groups = [{"params": wrapped.matrices, "lr": LR, "use_muon": True, "weight_decay": 0.1},
              {"params": wrapped.rest, "lr": LR, "use_muon": False}]  # fmt: skip
    return importlib.import_module("muon_fsdp2").Muon(groups)


def on_dtensors(package: str, wrapped: Wrapped, **options: Any) -> Any:
    """Return the Muon of muonium or of dtensor-muon, which have the same ancestor.

    muonium's ``foreach``, its default on GPUs, takes what lies on CPUs to a GPU first: not here.
    """
    inner = importlib.import_module(f"{package}.optim.optim")
    inner.move_tensors_to_device = lambda tensors, *devices: tensors
    loops = importlib.import_module(f"{package}.orthogonalize.orthogonalize")
    loops.ns_loop_triton = loops.ns_loop  # a GPU's, and the default on CPUs too
    groups = [{"params": wrapped.matrices}, {"params": wrapped.rest, "algorithm": "adamw"}]
    common = {"orthogonalization_strategy": "newton_schulz", "use_cautious_wd": False}
    muon = importlib.import_module(package).Muon
    return muon(groups, lr=LR, fused_adam=True, **common, **options)


def dion(wrapped: Wrapped) -> Any:
    """Return the Muon of microsoft/dion."""
    groups = [{"params": wrapped.matrices}, {"params": wrapped.rest, "algorithm": "adamw"}]
    ranks = wrapped.mesh if wrapped.layout == "fsdp" else wrapped.mesh.get_group()
    options = {"nesterov": True, "adjust_lr": "rms_norm", "use_polar_express": False}
    return importlib.import_module("dion").Muon(groups, distributed_mesh=ranks, lr=LR, **options)


def heavyball(wrapped: Wrapped) -> Any:
    """Return heavyball's Muon; it promises full matrices of DTensors."""
    package = importlib.import_module("heavyball")
    importlib.import_module("heavyball.utils").compile_mode = None
    return Both(package.Muon(wrapped.matrices, lr=LR), package.AdamW(wrapped.rest, lr=LR))


@dataclass(frozen=True)
class Contender:
    """An optimizer under torch's layouts.

    Attributes:
        build: makes it.
        layouts: in which it is there.
        package: that it needs; "": none.
        polar: its function that orthogonalizes, "module:name", for counting.
        wrapped: the class that makes the layout.
    """

    build: Callable[[Wrapped], Any]
    layouts: tuple[str, ...] = ("fsdp",)
    package: str = ""
    polar: str = ""
    wrapped: type[Wrapped] = Wrapped


BOTH = ("fsdp", "ddp")
TORCH = "torch.optim._muon:_zeropower_via_newtonschulz"
CONTENDERS = {
    "AdamW": Contender(adamw, BOTH),
    OURS: Contender(ours, BOTH),
    "ours, float32 wire": Contender(partial(ours, wire_dtype="float32"), BOTH),
    "ours, gram": Contender(partial(ours, strategy="gram")),
    "ours, reduce_to_owners": Contender(partial(ours, owners=True), ("ddp",)),
    "torch.optim.Muon": Contender(torch_muon, BOTH, polar=TORCH),
    "muon_fsdp2": Contender(
        muon_fsdp2, package="muon_fsdp2", polar="muon_fsdp2:zeropower_via_newtonschulz5"
    ),
    "muonium": Contender(
        partial(on_dtensors, "muonium", foreach=True),
        package="muonium",
        polar="muonium.orthogonalize.orthogonalize:ns_loop",
    ),
    "dtensor_muon": Contender(
        partial(on_dtensors, "dtensor_muon"),
        package="dtensor_muon",
        polar="dtensor_muon.orthogonalize.orthogonalize:ns_loop",
    ),
    "dion": Contender(dion, BOTH, "dion", "dion.megabatch_base:muon_update_newton_schulz"),
    "DMuon": Contender(
        dedicated.build,
        package="dmuon",
        polar="dmuon.optim.newton_schulz:NewtonSchulz.local",
        wrapped=dedicated.Dedicated,
    ),
    "heavyball": Contender(
        heavyball, BOTH, "heavyball", "heavyball.utils:zeropower_via_newtonschulz5"
    ),
}
