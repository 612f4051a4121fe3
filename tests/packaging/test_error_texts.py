"""Every error text of the source has an anchor on the page, and the errors name theirs."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import polar
from spectral_dist._error_help import PAGE, TEXTS, anchor_of, explained
from spectral_dist.checkpoint import convert
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.sharding import collectives
from tests.packaging.test_documentation import slug

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("spectral_dist", "integrations", "launch")
TYPES = {
    "AssertionError", "FloatingPointError", "ImportError", "KeyError", "NotImplementedError",
    "NotPlain", "RuntimeError", "TimeoutError", "TypeError", "UnpicklingError", "ValueError",
}  # fmt: skip
FOR_AUTHORS = ("spectral_dist/testing.py", "spectral_dist/core/check_placement.py")
"""Whose AssertionErrors are for tests that whoever writes a rule or a placement has."""
VALUE = "X"
"""What stands in a text for a value that the source does not know."""
NO_TEXT = {"A rank died": "a-rank-died"}
"""Headings of what is no error of ours."""
Texts = Mapping[str, list[str]]


def texts_of(node: ast.expr | None, names: Texts) -> list[str]:
    """What an expression may say, with VALUE for what only a run knows.

    Args:
        node: the expression.
        names: what names, and functions that return texts, may say.
    """
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return products(values, names)
        case ast.FormattedValue(value=value):
            return texts_of(value, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return products([left, right], names)
        case ast.BinOp(left=left, op=ast.Mult()):
            return [*texts_of(left, names), ""]
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts_of(body, names), *texts_of(orelse, names)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in texts_of(value, names)]
        case ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name)):
            return names.get(name, [VALUE])
        case ast.Call(func=ast.Attribute(value=value, attr="format")):
            return [re.sub(r"\{.*?\}", VALUE, text) for text in texts_of(value, names)]
        case ast.Call(func=ast.Name(id=name)):
            return names.get(f"{name}()", [VALUE])
    return [VALUE]


def products(parts: list[ast.expr], names: Texts) -> list[str]:
    """What parts may say one after the other."""
    alternatives = [texts_of(part, names)[:6] for part in parts]
    return ["".join(said) for said in itertools.islice(itertools.product(*alternatives), 64)]


def assigned(body: list[ast.stmt], names: Texts) -> dict[str, list[str]]:
    """What names may say by the assignments in a body, those of inner functions too."""
    said: dict[str, list[str]] = {}
    for statement in (node for part in body for node in ast.walk(part)):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(values=values)):
                said.setdefault(name, []).extend(t for v in values for t in texts_of(v, names))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                said.setdefault(name, []).extend(texts_of(value, {**names, **said}))
    return {name: sorted(set(texts)) for name, texts in said.items()}


def returned(function: ast.FunctionDef, names: Texts) -> list[str]:
    """What a function may return, if that is text."""
    values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    known = {**names, **assigned(function.body, names)}
    return [text for value in values for text in texts_of(value, known) if text != VALUE]


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def composed(node: ast.Call, names: Texts) -> list[str]:
    """The texts of errors that a call makes; none if it makes no error."""
    name, arguments = called(node), [*node.args]
    if name in TYPES and arguments:
        return texts_of(arguments[0], names)
    if name == "fail" and len(arguments) == 2:  # of a configuration
        return [f"{VALUE}: {': '.join(said)}" for said in pairs(arguments, names)]
    if name in ("invalid", "_fail") and len(arguments) > 1:  # of an option, or of a setting
        return [f"{VALUE}: {a} is {VALUE}; {b}" for a, b in pairs(arguments[-2:], names)]
    if name == "_told":
        return [f"{said}: {VALUE}" for said in texts_of(arguments[0], names)]
    return []


def pairs(arguments: list[ast.expr], names: Texts) -> Iterator[tuple[str, ...]]:
    """What two arguments may say."""
    return itertools.product(*(texts_of(argument, names) for argument in arguments))


def sources() -> dict[str, ast.Module]:
    """The modules by their paths."""
    paths = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
        for path in paths
        if "__pycache__" not in path.parts
    }


def shared_names(modules: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """What constants of modules, and functions that return texts, may say."""
    said: dict[str, list[str]] = {}
    for tree in modules.values():
        constants = [node for node in tree.body if isinstance(node, ast.Assign)]
        said |= {
            name: texts for name, texts in assigned([*constants], {}).items() if name.isupper()
        }
    for tree in modules.values():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (texts := returned(node, said)):
                said[f"{node.name}()"] = texts
    return said


def functions_of(tree: ast.AST, names: Texts) -> Iterator[tuple[ast.AST, list[ast.AST], Texts]]:
    """Each function (and the module) with its nodes, without inner functions', and its names."""
    nodes: list[ast.AST] = []
    rest = list(ast.iter_child_nodes(tree))
    while rest:
        node = rest.pop()
        nodes.append(node)
        if isinstance(node, ast.FunctionDef):
            arguments = {
                each.arg: [VALUE] for each in ast.walk(node.args) if isinstance(each, ast.arg)
            }
            yield from functions_of(node, {**names, **arguments, **assigned(node.body, names)})
        else:
            rest.extend(ast.iter_child_nodes(node))
    yield tree, nodes, names


def collect() -> tuple[dict[str, str], set[str]]:
    """The texts of errors with where they are made, and those of warnings."""
    modules = sources()
    shared = shared_names(modules)
    errors: dict[str, str] = {}
    warned: set[str] = set()
    for path, tree in modules.items():
        for function, nodes, names in functions_of(tree, shared):
            is_check = getattr(function, "name", "").endswith("problem")
            is_of_option = is_check and ("/rules/" in path or "/poet/" in path)
            for node in nodes:
                texts: list[str] = []
                if isinstance(node, ast.Call):
                    if called(node) != "AssertionError" or path not in FOR_AUTHORS:
                        texts = composed(node, names)
                    if called(node) == "warn":
                        warned |= set(texts_of(node.args[0], names))
                elif isinstance(node, ast.Return) and is_of_option:
                    said = texts_of(node.value, names)
                    texts = [f"{VALUE}: {VALUE} is {VALUE}; {text}" for text in said]
                for text in texts:
                    errors.setdefault(text, f"{path}:{getattr(node, 'lineno', 0)}")
    return errors, warned


ERRORS, WARNINGS = collect()
ELSEWHERE = {
    "launch/engines/megatron.py": {"X: optimizer: X"},
    "launch/yaml_config.py": {"X: X: X"},
    "spectral_dist/checkpoint/convert.py": {"X: X"},
    "spectral_dist/poet/convert.py": {"X", "poet.convert: X"},
    "spectral_dist/poet/layer.py": {"X is X; X"},
    "spectral_dist/rules/fields.py": {"X: X is X; X"},
    "spectral_dist/rules/options.py": {
        "X: machine: X",
        "X: polar: X",
        "X: polar: polar_X",
        "X: polar_X",
        "X: X; or strategy='owner'",
        "X: polar: X; or strategy='owner'",
        "X: polar: polar_X; or strategy='owner'",
        "X: polar_X; or strategy='owner'",
    },
}
"""By module, what passes on the text of another error: of ours, with its anchor, or torch's."""
QUOTED = {"is now (N,) but was (m, n)": "is now ... but was ..."}
"""Where headings have examples of values, the text that they quote."""


def test_the_source_has_as_many_texts_as_are_known() -> None:
    """A change of how errors are written must not hide them from these tests."""
    assert len(ERRORS) >= 480
    assert len({place.partition(":")[0] for place in ERRORS.values()}) >= 90


def test_every_text_has_an_anchor() -> None:
    without: dict[str, set[str]] = {}
    for text, place in ERRORS.items():
        if anchor_of(text) is None:
            without.setdefault(place.partition(":")[0], set()).add(text)
        assert anchor_of(f"{text} (on rank 1 of 2)") == anchor_of(text)
    assert without == ELSEWHERE


def test_every_entry_has_a_text() -> None:
    said = [*ERRORS, *WARNINGS]
    patterns = [pattern for each in TEXTS.values() for pattern in each]
    dead = [p for p in patterns if not any(re.search(p, text, re.DOTALL) for text in said)]
    assert dead == []
    assert TEXTS.keys() - {anchor_of(text) for text in said} == set()


def test_every_anchor_is_a_heading_and_every_heading_is_used() -> None:
    page = (ROOT / PAGE).read_text("utf-8")
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    slugs = [slug(heading) for heading in headings]
    assert len(set(slugs)) == len(slugs)
    assert set(slugs) == TEXTS.keys() | set(NO_TEXT.values())
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert not {slug(section) for section in sections} & set(slugs)


def test_what_headings_quote_is_what_the_errors_say() -> None:
    """A heading in backticks is a part of a text that it explains."""
    page = (ROOT / PAGE).read_text("utf-8")
    explained_by: dict[str, list[str]] = {}
    for text in (*ERRORS, *WARNINGS):
        explained_by.setdefault(anchor_of(text) or "", []).append(text)
    for heading in re.findall(r"^### (`.*`)$", page, re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", heading):
            parts = re.split(r"'?\.\.\.'?", QUOTED.get(quoted, quoted))
            pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
            assert any(pattern.search(text) for text in explained_by[slug(heading)]), quoted


def model() -> nn.Module:
    """Two matrices and their biases."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def notes(error: BaseException) -> list[str]:
    """The notes of an error."""
    return list(getattr(error, "__notes__", []))


def optimizer_with_gradients() -> SpectralOptimizer:
    """An optimizer that can take a step."""
    trained = model()
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(trained))
    trained(torch.ones(2, 4)).sum().backward()
    return optimizer


def test_an_error_names_its_anchor() -> None:
    with pytest.raises(ValueError, match="bare parameters") as caught:
        spectral_dist.Muon(model().parameters())
    note = f"spectral_dist: {PAGE}#bare-parameters-do-not-tell-matrices-from-embeddings"
    assert notes(caught.value) == [note]
    assert note not in str(caught.value)
    assert traceback.format_exception(caught.value)[-1].strip() == note


def test_an_error_of_a_step_names_its_anchor() -> None:
    optimizer = optimizer_with_gradients()
    optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        optimizer.step()
    assert notes(caught.value) == [f"spectral_dist: {PAGE}#the-gradient-of-is-nan-or-infinite"]


ENTRIES: dict[str, Callable[[Path], object]] = {
    "no-parameter-is-trainable": lambda folder: spectral_dist.param_groups(
        model().requires_grad_(False)
    ),
    "model-is-write-the-nnmodule-itself": lambda folder: spectral_dist.tag("model"),
    "unknown-option-did-you-mean": lambda folder: spectral_dist.Muon(
        spectral_dist.param_groups(model()), momentun=0.9
    ),
    "a-setting-is-out-of-its-range": lambda folder: spectral_dist.Muon(
        spectral_dist.param_groups(model()), lr=-1.0
    ),
    "this-is-no-optimizers-state-dict": lambda folder: optimizer_with_gradients().load_state_dict(
        {}
    ),
    "holds-no-checkpoint": lambda folder: spectral_dist.checkpoint.load(
        folder, model(), optimizer_with_gradients()
    ),
    "is-no-plain-data": lambda folder: spectral_dist.checkpoint.save(
        folder, model(), optimizer_with_gradients(), extra=object()
    ),
    "is-no-format-known": lambda folder: convert.convert("safetensors", folder, "dcp", folder),
    "does-not-divide-its-dimension": lambda folder: spectral_dist.poet.convert(model(), block=3),
    "trains-the-rotations-of-a-model-that-has-converted-this-one-has-none": (
        lambda folder: spectral_dist.POET(spectral_dist.param_groups(model())[1:])
    ),
    "unknown-polar-method": lambda folder: polar.polar(torch.eye(2), method="jordam"),
    "recorder-has-no-path": lambda folder: spectral_dist.calibrate.Recorder().save(),
    "a-file-of-spectra-cannot-be-used": lambda folder: spectral_dist.calibrate.read_spectra(
        [folder / "none"]
    ),
    "every-is-it-must-be-a-whole-number-of-steps": lambda folder: spectral_dist.monitor.Monitor(
        0, []
    ),
}
"""Anchor -> a call of a public function that raises what it explains."""


@pytest.mark.parametrize("anchor", ENTRIES)
def test_public_functions_add_the_note_once(anchor: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ENTRIES[anchor](tmp_path)
    assert notes(caught.value) == [f"spectral_dist: {PAGE}#{anchor}"]


def test_an_error_of_another_rank_names_its_anchor() -> None:
    text = "SUMO: rank is 3 here, but 2 in the checkpoint; write the rank that it was saved with"
    with pytest.raises(ValueError, match="on rank 1 of 2") as caught, explained:
        collectives.raise_first(f"ValueError\n{text} (on rank 1 of 2)", [])
    assert notes(caught.value) == [f"spectral_dist: {PAGE}#write-the-rank-that-it-was-saved-with"]


@pytest.mark.parametrize("module", [spectral_dist.checkpoint, spectral_dist.poet])
def test_no_public_function_is_left_out(module: ModuleType) -> None:
    functions = [getattr(module, name) for name in module.__all__]
    plain = {
        f.__name__ for f in functions if inspect.isfunction(f) and not hasattr(f, "__wrapped__")
    }
    assert plain <= {"matrix_state"}  # which raises nothing of its own


def test_nested_calls_add_one_note() -> None:
    text = "params is a str; write spectral_dist.param_groups(model)"
    names = {"__name__": "spectral_dist.anything"}
    exec(f"def fail():\n    raise ValueError({text!r})", names)
    fail: Callable[[], None] = names["fail"]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="params is a str") as caught, explained:
        explained(explained(fail))()
    assert notes(caught.value) == [f"spectral_dist: {PAGE}#params-is"]


def test_errors_of_others_get_no_note() -> None:
    optimizer = optimizer_with_gradients()
    ours = "the gradient of weight is NaN or infinite, and was not applied."

    def closure() -> float:
        raise ValueError(ours)

    assert anchor_of(ours)
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        optimizer.step(closure)
    assert notes(caught.value) == []
    with pytest.raises(RuntimeError, match="size") as from_torch:
        optimizer.step(lambda: torch.ones(2) @ torch.ones(3))
    assert notes(from_torch.value) == []
    with pytest.raises(TypeError) as of_python, explained:
        spectral_dist.param_groups()  # type: ignore[call-arg]
    assert notes(of_python.value) == []


def test_signatures_and_texts_stay() -> None:
    for function in (spectral_dist.param_groups, spectral_dist.checkpoint.save, polar.polar):
        assert "self" not in inspect.signature(function).parameters
        assert inspect.signature(function).parameters
        assert inspect.getdoc(function)
    assert list(inspect.signature(spectral_dist.Muon.step).parameters) == ["self", "closure"]
    assert anchor_of("out of memory") is None


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_an_error_of_a_save_in_the_background_names_its_anchor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    optimizer = optimizer_with_gradients()
    future = spectral_dist.checkpoint.async_save(tmp_path / "file" / "in", model(), optimizer)
    with pytest.raises(RuntimeError, match="was not saved") as caught:
        future.result()
    assert notes(caught.value) == [f"spectral_dist: {PAGE}#was-not-saved"]
