"""DESIGN.md's floors: a room imports only from floors below it; few know torch.distributed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "spectral_dist"

# room -> floor; a module belongs to the longest name that it begins with
FLOORS = {
    "spectral_dist._version": 0,
    "spectral_dist.configs": 0,  # data
    "spectral_dist.polar": 1,
    "spectral_dist.rules": 2,
    "spectral_dist.sharding": 2,
    "spectral_dist": 3,  # groups, options, optimizer, checkpoint, monitor, estimate, poet
    "spectral_dist.integrations": 4,
    "spectral_dist.launch": 5,
    "spectral_dist.cli": 5,
    "spectral_dist.doctor": 5,
}
COMMANDS = ("spectral_dist.launch", "spectral_dist.cli", "spectral_dist.doctor")
MAY_DISTRIBUTE = (
    "spectral_dist.sharding",
    "spectral_dist.checkpoint",  # torch's own distributed checkpoints
    "spectral_dist.convert",  # which it reads and writes
    "spectral_dist.integrations",
    *COMMANDS,
)
ALLOWED = {"spectral_dist.polar": {"scipy"}}  # Zolotarev's elliptic functions
"""room of the core -> what it may import beside torch"""
FRAMEWORKS = ("spectral_dist.integrations", *COMMANDS)


def files():
    """Module name -> file, through the links to integrations/, launch/ and configs/."""
    found = {}
    folders = [(ROOT / PACKAGE, PACKAGE)]
    for folder, name in folders:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and (path / "__init__.py").exists():  # follows symbolic links
                folders.append((path, f"{name}.{path.name}"))
            elif path.suffix == ".py":
                found[name if path.stem == "__init__" else f"{name}.{path.stem}"] = path
    return found


FILES = files()


def room(module):
    """The room a module belongs to; rooms of the top floor are one."""
    parts = module.split(".")
    while ".".join(parts) not in FLOORS:
        parts.pop()
    found = ".".join(parts)
    return "commands" if found in COMMANDS else found


def floor(module):
    return 5 if room(module) == "commands" else FLOORS[room(module)]


def imports(module, text, modules):
    """What it imports anywhere, in functions too: modules, and names used as torch.distributed."""
    package = (
        module if modules.get(module, Path("x")).stem == "__init__" else module.rpartition(".")[0]
    )
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in modules or inner == "torch.distributed"
                found.add(inner if is_module else base)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return found


def violations(module, text, modules=FILES):
    problems = []
    for name in imports(module, text, modules):
        if name.split(".")[0] == PACKAGE:
            # the root above all floors counts as floor 3, which it gathers
            if room(name) != room(module) and floor(name) >= floor(module):
                problems.append(f"{module} (floor {floor(module)}) imports {name} ({floor(name)})")
        elif f"{name}.".startswith("torch.distributed."):
            if not f"{module}.".startswith(tuple(f"{allowed}." for allowed in MAY_DISTRIBUTE)):
                problems.append(f"{module} imports {name}")
        elif name.split(".")[0] not in {
            *sys.stdlib_module_names,
            "torch",
            *ALLOWED.get(room(module), ()),
        } and not module.startswith(FRAMEWORKS):
            problems.append(f"{module} imports {name}, which is no part of the core")
    return problems


def test_every_room_is_there():
    wanted = ("polar.schedules", "sharding.plan", "rules.muon", "optimizer", "optimizers",
              "matrix_step", "placement", "monitor", "configs", "integrations.fsdp",
              "integrations.deepspeed.placement", "launch.pretrain")  # fmt: skip
    assert {f"{PACKAGE}.{name}" for name in wanted} <= set(FILES)


# spectral_dist/__init__.py is exempt: it is the root above all floors, where what users call is
# gathered and where the apex backend, of floor 4, is put within reach of rules/, of floor 2
@pytest.mark.parametrize("module", sorted(set(FILES) - {PACKAGE}))
def test_imports_point_down(module):
    assert violations(module, FILES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("spectral_dist.polar.new", "from spectral_dist.rules import muon", True),
        ("spectral_dist.polar.new", "import spectral_dist.sharding.plan", True),
        ("spectral_dist.polar.new", "from spectral_dist.polar import exact", False),
        ("spectral_dist.polar.new", "import torch.distributed as dist", True),
        ("spectral_dist.polar.new", "def f():\n    from torch import distributed", True),
        ("spectral_dist.polar.new", "import torch\ntorch.distributed.get_rank()", True),
        ("spectral_dist.polar.new", "import math, torch", False),
        ("spectral_dist.polar.new", "import scipy", False),
        ("spectral_dist.polar.new", "from scipy.special import ellipk", False),
        ("spectral_dist.polar.new", "import numpy", True),
        ("spectral_dist.rules.new", "import scipy", True),
        ("spectral_dist.sharding.new", "import scipy", True),
        ("spectral_dist.optimizer", "import scipy", True),
        ("spectral_dist.checkpoint", "import torch.distributed.checkpoint as dcp", False),
        ("spectral_dist.checkpoint", "from spectral_dist.sharding import collectives", False),
        ("spectral_dist.checkpoint", "from spectral_dist.integrations import fsdp", True),
        ("spectral_dist.checkpoints", "import torch.distributed", True),
        ("spectral_dist.convert", "from torch.distributed.checkpoint import load", False),
        ("spectral_dist.convert", "import deepspeed", True),
        ("spectral_dist.monitor", "import torch.distributed", True),
        ("spectral_dist.matrix_step", "from torch.distributed.tensor import DTensor", True),
        ("spectral_dist.placement", "from torch.distributed.tensor import DTensor", True),
        ("spectral_dist.optimizers", "from spectral_dist.integrations import fsdp", True),
        ("spectral_dist.rules.new", "from spectral_dist.sharding.layout import Matrix", True),
        ("spectral_dist.rules.new", "from spectral_dist import sharding", True),
        ("spectral_dist.rules.new", "from ..sharding import plan", True),
        ("spectral_dist.rules.new", "from . import muon", False),
        ("spectral_dist.rules.new", "from ..polar import polar", False),
        ("spectral_dist.rules.new", "from spectral_dist.options import Options", True),
        ("spectral_dist.rules.new", "from spectral_dist import Muon", True),
        ("spectral_dist.sharding.new", "from spectral_dist.rules.muon import SCALES", True),
        ("spectral_dist.sharding.new", "from torch.distributed import ReduceOp", False),
        ("spectral_dist.groups", "from spectral_dist.sharding import layout", False),
        ("spectral_dist.groups", "from spectral_dist import options", False),
        ("spectral_dist.groups", "from torch.distributed.tensor import DTensor", True),
        ("spectral_dist.optimizer", "from spectral_dist.integrations import apex", True),
        ("spectral_dist.optimizer", "import deepspeed", True),
        ("spectral_dist.integrations.new", "import deepspeed, torch.distributed", False),
        ("spectral_dist.integrations.new", "from spectral_dist import Muon", False),
        ("spectral_dist.integrations.new", "from spectral_dist.launch import corpus", True),
        ("spectral_dist.launch.new", "from spectral_dist.integrations import mpi", False),
        ("spectral_dist.launch.new", "from spectral_dist import doctor", False),
    ],
)
def test_the_check_itself(module, text, wrong):
    modules = {**FILES, "spectral_dist.doctor": Path("doctor.py")}
    assert bool(violations(module, text, modules)) is wrong


@pytest.mark.parametrize("module", sorted(FILES))
def test_files_are_short(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_no_command_bears_the_name_of_a_module():
    """launch/deepspeed.py would be imported for `import deepspeed` when run from there."""
    taken = {*sys.stdlib_module_names, "torch", "deepspeed", "megatron", "mpi4py", "transformers"}
    for path in (ROOT / "launch").glob("*.py"):
        assert path.stem not in taken
