"""DESIGN.md's floors: a room imports only from floors below it; few know torch.distributed."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "spectral_dist"

# room -> floor. A module imports from its own room and from floors below it, never from another
# room of its floor. A room is a folder or a module of the package, or modules of LOOSE.
FLOORS = {
    "launch": 11,
    "testing": 10,  # public checks, of all of the below
    "": 10,  # spectral_dist/__init__.py: where what users call is gathered
    "estimate": 9,
    "integrations": 8,
    "optimizers": 7,
    "checkpoint": 7,
    "poet": 6,
    "core": 5,
    "placement": 4,
    "params": 3,
    "calibrate": 3,
    "rules": 2,
    "sharding": 2,
    "polar": 1,
    "configs": 0,
    "machine": 0,
    "_error_help": 0,
    "_errors": 0,
    "_host_copy": 0,
    "_log": 0,
    "_version": 0,
}
# modules outside the folder of their room
LOOSE = {
    "monitor": "core",  # the public path of core/monitor.py
}
FRAMEWORKS = {"integrations", "launch"}
"""rooms that may import more than torch, the standard library and ALLOWED"""
ALLOWED: dict[str, set[str]] = {"polar": {"triton"}}
MAY_DISTRIBUTE = {"sharding", "placement", "checkpoint", "testing", *FRAMEWORKS}
STANDARD = sys.stdlib_module_names
LINES = 400


def files(folder: Path, name: str) -> dict[str, Path]:
    """Module name -> file, through the links to integrations/, launch/ and configs/."""
    modules: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():  # follows symbolic links
            modules |= files(path, f"{name}.{path.name}")
        elif path.suffix == ".py":
            modules[name if path.stem == "__init__" else f"{name}.{path.stem}"] = path
    return modules


FILES = files(ROOT / PACKAGE, PACKAGE)


def room(module: str) -> str | None:
    """The room that a module of the package belongs to, if it belongs to one."""
    name = module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]
    name = LOOSE.get(name, name)
    return name if name in FLOORS else None


def imports(module: str, text: str, modules: Iterable[str], is_package: bool = False) -> set[str]:
    """What it imports anywhere, in functions too: modules, and names used as torch.distributed."""
    package = module if is_package else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in modules or inner == "torch.distributed"
                names.add(inner if is_module else base)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> what it imports."""
    return {
        module: imports(
            module, path.read_text(encoding="utf-8"), modules, path.stem == "__init__"
        )
        for module, path in modules.items()
    }  # fmt: skip


def violations(module: str, imported: Iterable[str]) -> list[str]:
    """What a module of the package may not import, or that it has no room."""
    here = room(module)
    if here is None:
        return [f"{module} belongs to no room: FLOORS has none of its name, nor has LOOSE"]
    problems = []
    for name in sorted(imported):
        top = name.partition(".")[0]
        if top == PACKAGE:
            there = room(name)
            if there is None:
                problems.append(f"{module} imports {name}, which belongs to no room")
            elif there != here and FLOORS[there] >= FLOORS[here]:
                problems.append(
                    f"{module} ({here or 'root'}, floor {FLOORS[here]}) imports {name}"
                    f" ({there or 'root'}, floor {FLOORS[there]})"
                )
        elif f"{name}.".startswith("torch.distributed."):
            if here not in MAY_DISTRIBUTE:
                problems.append(f"{module} imports {name}")
        elif here not in FRAMEWORKS and top not in {"torch", *STANDARD, *ALLOWED.get(here, ())}:
            problems.append(f"{module} imports {name}, which is no part of the core")
    return problems


def circle(imported: Mapping[str, Iterable[str]]) -> str:
    """Modules that import each other in a circle, or nothing."""
    within = {
        module: [name for name in names if name in imported and name != module]
        for module, names in imported.items()
    }
    try:
        TopologicalSorter(within).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_imports_point_down() -> None:
    imported = graph(FILES)
    assert [text for module in FILES for text in violations(module, imported[module])] == []
    assert circle(imported) == ""


def test_the_table_names_what_is_there() -> None:
    """A line for what has been moved or misspelt guards nothing."""
    assert [name for name in LOOSE if f"{PACKAGE}.{name}" not in FILES] == []
    assert set(FLOORS) - {room(module) for module in FILES} == set()


MAY = """
polar: from spectral_dist.polar import exact
polar: import math, torch
polar: import triton
sharding: from torch.distributed import ReduceOp
rules: from . import muon
rules: from ..polar import polar
params: from spectral_dist.sharding import layout
params: from spectral_dist.rules import options
placement: from torch.distributed.tensor import DTensor
checkpoint: import torch.distributed.checkpoint as dcp
checkpoint: from torch.distributed.checkpoint import load
checkpoint: from spectral_dist.sharding import collectives
integrations: import deepspeed, torch.distributed
integrations: from spectral_dist.optimizers import Muon
launch: from spectral_dist.integrations.torch import mpi
launch: from spectral_dist import poet, Muon
launch: import typer
"""
MAY_NOT = """
polar: from spectral_dist.rules import muon
polar: import spectral_dist.sharding.plan
polar: import torch.distributed as dist
polar: def f(): from torch import distributed
polar: import torch; torch.distributed.get_rank()
polar: import numpy
polar: import scipy
rules: import scipy
rules: import triton
rules: from spectral_dist.sharding.matrix import Matrix
rules: from spectral_dist import sharding
rules: from ..sharding import plan
rules: from spectral_dist.params.spec import ParamSpec
rules: from spectral_dist import Muon
rules: from spectral_dist.no_such_module import Muon
sharding: import scipy
sharding: from spectral_dist.rules.muon import SCALES
params: from torch.distributed.tensor import DTensor
params: from spectral_dist.core import optimizer
params: from spectral_dist import calibrate
core: import scipy
core: import deepspeed
core: import torch.distributed
core: from torch.distributed.tensor import DTensor
core: from spectral_dist.integrations import apex
optimizers: from spectral_dist.integrations import apex
checkpoint: from spectral_dist.integrations import apex
checkpoint: import deepspeed
integrations: from spectral_dist import Muon
integrations: from spectral_dist.launch import corpus
no_such_room: import math
"""


def test_the_check_itself() -> None:
    def problems(line: str) -> list[str]:
        where, text = line.split(": ", 1)
        loose = [name for name, its_room in LOOSE.items() if its_room == where]
        module = f"{PACKAGE}.{loose[0]}" if loose else f"{PACKAGE}.{where}.new"
        if loose:  # `from . import` is another thing there
            assert "from ." not in text
        return violations(module, imports(module, text, FILES))

    assert [line for line in MAY.strip().splitlines() if problems(line)] == []
    assert [line for line in MAY_NOT.strip().splitlines() if not problems(line)] == []
    first, second, third = (f"{PACKAGE}.polar.{name}" for name in ("a", "b", "c"))
    straight = {first: {second, third}, second: {third}, third: {"math", third}}
    assert circle(straight) == ""
    assert set(circle({**straight, third: {first}}).split(" <- ")) >= {first, third}


def test_files_are_short() -> None:
    lines = {module: len(path.read_text("utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: number for module, number in lines.items() if number > LINES} == {}


def test_no_benchmark_imports_a_test() -> None:
    """Nor do what it imports; what tests and benchmarks share is in tests/support."""
    beside = files(ROOT / "tests", "tests")
    imported = graph({**beside, **files(ROOT / "benchmarks", "benchmarks")})
    own = [name for name in imported if name.startswith("benchmarks.")]
    shared = {name for module in own for name in imported[module] if name in beside}
    assert shared
    wrong = {
        n for n in shared if n != "tests.support.harness" and not n.startswith("tests.support")
    }
    assert wrong == set()
    reached, rest = set(shared), list(shared)
    while rest:
        further = (imported[rest.pop()] & set(beside)) - reached
        reached |= further
        rest += further
    assert {n for n in reached if n.rpartition(".")[2].startswith(("test_", "conftest"))} == set()


def test_no_command_bears_the_name_of_a_module() -> None:
    """launch/ comes first on sys.path when a file in it is run as a script."""
    taken = {*STANDARD, *importlib.metadata.packages_distributions()}
    taken |= {"torch", "deepspeed", "megatron", "mpi4py", "transformers"}
    commands = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert commands
    assert commands & taken == set()
