"""What a user reads: help() and signatures of optimizers, README, and the pages of docs/."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib.util
import inspect
import json
import pydoc
import re
import shlex
import unicodedata
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist.launch import cli, pretrain
from spectral_dist.poet.options import POETOptions
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING
from tests.support.weights import give_gradients, same, values

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
TESTED_ELSEWHERE = {"docs/extending.md", "CONTRIBUTING.md"}
"""Their blocks of Python: the first by test_extending.py, the second are pieces of tests."""
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FOLDERS = "spectral_dist|integrations|launch|configs|tests|examples|benchmarks|docs"
A_PATH = re.compile(rf"^(?:{FOLDERS})/[\w./*-]+$")
A_COMMAND = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:bash|sbatch|torchrun|python|spectral-dist|\.venv/bin/python|launch/)\b"
)

ENTRIES = {entry.title: entry for entry in registry.builtin_entries()}
OURS = ("params", "process_group", "placement")


@pytest.mark.parametrize("title", ENTRIES)
def test_help(title: str) -> None:
    """The formula of the step, the paper, and a sentence about every argument."""
    text = pydoc.plain(pydoc.render_doc(getattr(spectral_dist, title)))
    assert re.search(r"arXiv \d{4}\.\d{5}|https?://", text)
    assert re.search(r"W <- .*W.* - lr", text)
    for name in (*OURS, *(each.name for each in fields(ENTRIES[title].options))):
        assert re.search(rf"^[ |]+{name}: \S.*\S", text, re.MULTILINE), name


@pytest.mark.parametrize("title", ENTRIES)
def test_signature(title: str) -> None:
    """Every option by keyword, with the default that the optimizer then has."""
    parameters = inspect.signature(getattr(spectral_dist, title)).parameters
    for each in fields(ENTRIES[title].options):
        assert parameters[each.name].default == each.default
        if each.name != "lr":
            assert parameters[each.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters)[:2] == ["params", "lr"]
    assert set(parameters) == {*OURS, *(each.name for each in fields(ENTRIES[title].options))}


@pytest.mark.parametrize("title", ENTRIES)
def test_the_example_runs(title: str) -> None:
    """As it stands, on a model; the optimizer that it leaves takes a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8))
    examples = doctest.DocTestParser().get_examples(getattr(spectral_dist, title).__doc__)
    assert examples
    names = {"model": model, "spectral_dist": spectral_dist}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in examples:
            exec(example.source, names)  # as doctest does, but quietly
    optimizer = names["optimizer"]
    assert isinstance(optimizer, getattr(spectral_dist, title))
    before = values(model)
    give_gradients(model, 0)
    optimizer.step()
    assert not same(before, values(model))


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language on a page."""
    return [code for _, found, code in BLOCK.findall(PAGES[page]) if found == language]


def prose(page: str) -> str:
    """A page without its blocks."""
    return BLOCK.sub("", PAGES[page])


def inline(page: str) -> list[str]:
    """What stands between backticks in the prose of a page, on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def slug(heading: str) -> str:
    """The anchor of a heading, as mkdocs makes it."""
    plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore")
    text = re.sub(r"[^\w\s-]", "", plain.decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def test_the_readme_is_a_landing_page_and_the_site_has_every_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    in_nav = [f"docs/{name}" for name in re.findall(r"- ([\w-]+\.md)", nav)]
    assert sorted(in_nav) == sorted(set(PAGES) - {"README.md", "CONTRIBUTING.md"})
    linked = set(re.findall(r"\(([\w./-]+\.md)", PAGES["README.md"]))
    assert set(in_nav) - linked == {"docs/index.md"}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"https?://", target):
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), (page, target)
            if anchor:
                assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), (
                    page,
                    target,
                )


def test_files_that_pages_name_are_there() -> None:
    for page in PAGES:
        named = [code for code in inline(page) if A_PATH.match(code)]
        for name in named:
            assert list(ROOT.glob(name.rstrip("/"))), (page, name)


def commands(page: str) -> Iterator[list[str]]:
    """The words of each command on a page, in blocks of bash or in the prose."""
    lines = [line for code in blocks(page, "bash") for line in code.splitlines()]
    for line in [*lines, *(code for code in inline(page) if A_COMMAND.match(code))]:
        words = shlex.split(line, comments=True)
        yield [word for word in words if not re.match(r"[A-Z_]+=", word)]


def flags_of(words: list[str]) -> set[str] | str:
    """What a command takes: its flags, or a text that has them; "--" where it is not ours."""
    if words[0] == "spectral-dist":
        command = typer.main.get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
        return {flag for parameter in command.params for flag in parameter.opts}
    if "launch/pretrain.py" in words:
        command = typer.main.get_command(pretrain.app)
        own = {flag for parameter in command.params for flag in parameter.opts}
        return own | {"--standalone", "--nproc_per_node"}
    if "-m" in words and (module := words[words.index("-m") + 1]).startswith("benchmarks."):
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        return "-m" + file.read_text()
    if words[0] == "bash" or words[0].startswith("launch/"):
        script = words[words[0] == "bash"]
        return (ROOT / script).read_text()
    return "--"


def test_commands_are_real() -> None:
    seen = 0
    for page in PAGES:
        for words in commands(page):
            known = flags_of(words)
            for word in words:
                if A_PATH.match(word):
                    assert list(ROOT.glob(word.partition("::")[0])), (page, word)
                    seen += 1
                elif word.startswith("-") and known != "--":
                    assert word.partition("=")[0] in known, (page, words, word)
    assert seen > 20


def test_names_of_options_are_real() -> None:
    options = registry.option_names() | {*ROUTING}
    for page in set(PAGES) - {"docs/extending.md"}:
        for flag in re.findall(r"--spectral-([a-z0-9-]+)", PAGES[page]):
            assert flag.replace("-", "_") in options, (page, flag)
    types = {entry.deepspeed_type: entry for entry in registry.entries()}
    seen = 0
    for page in set(PAGES) - {"docs/extending.md"}:
        for code in blocks(page, "json"):
            written = json.loads(code if code.startswith("{") else f"{{{code}}}")["optimizer"]
            entry, params = types[written["type"]], dict(written["params"])
            beside = [*ROUTING]
            if entry.options is POETOptions:
                beside += [each.name for each in fields(spectral_dist.poet.Settings)]
            entry.options.from_user({k: v for k, v in params.items() if k not in beside})
            seen += 1
    assert seen >= 3


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scope(folder: Path) -> dict[str, Any]:
    """What the blocks of Python on the pages have before them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(7, 256),
            qkv_proj=nn.Linear(256, 768, bias=False),
            router=nn.Linear(768, 256),
        )
    )
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model))
    return {
        "DistributedDataParallel": DistributedDataParallel,
        "ddp": DistributedDataParallel(copy.deepcopy(model)),
        "folder": folder / "saved",
        "model": model,
        "optimizer": optimizer,
        "plain": copy.deepcopy(model),
        "schedule": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "spectral_dist": spectral_dist,
    }


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted(set(PAGES) - TESTED_ELSEWHERE))
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself; of what needs a framework, whether it names what is there."""
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(blocks(page, "python")):
        tree = ast.parse(code)
        if page == "docs/trainers.md" or re.search("deepspeed|megatron", code):
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert all(is_there(name) for name in imported(node)), (page, code)
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        exec(compile(tree, f"{page}, block {number}", "exec"), scope(folder))


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The dotted names that a statement imports."""
    before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [before + each.name for each in node.names]


def is_there(name: str) -> bool:
    """Whether a dotted name of this package is a module, or in one, without importing it."""
    if not name.startswith("spectral_dist."):
        return True
    if file_of(name) is not None:
        return True
    module, _, leaf = name.rpartition(".")
    file = file_of(module)
    return file is not None and bool(re.search(rf"\b{leaf}\b", file.read_text()))


def file_of(module: str) -> Path | None:
    """The file of a module, or None."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in files if file.is_file()), None)


def test_the_option_reference_is_what_the_registry_says() -> None:
    spec = importlib.util.spec_from_file_location("docs_options", ROOT / "docs" / "options.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, _, printed = PAGES["docs/options.md"].partition(module.MARK)
    assert printed.strip() == module.reference().strip(), "run docs/options.py"
