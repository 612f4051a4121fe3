"""Every option's check: the error names the option, the nearest known name, and where it was.

Most tests go through every option of every registered optimizer, by the type of its field, so that
a new rule's options are among them.
"""

from __future__ import annotations

import json
import re
from types import NoneType, UnionType
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import spectral_dist
from spectral_dist.rules import registry
from spectral_dist.rules.muon import MuonOptions
from spectral_dist.rules.options import MatrixOptions, specs_of
from spectral_dist.rules.polargrad import PolarGradOptions
from spectral_dist.rules.root import ROOTOptions
from tests.unit.rules.registered_rules import ENTRIES, RULES, model

ROUTING = ("matrices", "scalars", "split", "one_sided", "heads")


def fields_of(*kinds):
    """(options, name, whether None is allowed) of all fields of these types."""
    found = []
    for entry in ENTRIES:
        for name, hint in get_type_hints(entry.options).items():
            members = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
            if members - {NoneType} == set(kinds) and name in specs_of(entry.options):
                found.append((entry.options, name, NoneType in members))
    assert found
    return found


def having(name):
    """The options of every optimizer that has one of this name."""
    found = [entry.options for entry in ENTRIES if name in specs_of(entry.options)]
    assert found
    return found


def refuses(match, where="Muon", kind=None, **given):
    """By every optimizer that has the options, or by one."""
    known = [e.options for e in ENTRIES if given.keys() <= specs_of(e.options).keys()]
    for cls in [kind] if kind else known or [MuonOptions]:
        _refuses(cls, match, where, given)


def _refuses(cls, match, where, given):
    told = "nothing"
    try:
        cls.from_user(given, where)
    except ValueError as error:
        told = str(error)
    assert told.startswith(f"{where}: "), (cls, given, told)
    assert re.search(match, told), (cls, given, match, told)


# -- defaults and JSON


def test_defaults():
    options = MuonOptions.from_user({})
    assert options == MuonOptions(
        lr=1e-3, momentum=0.95, nesterov=True, weight_decay=0.1, scale="match_rms_adamw",
        polar="jordan", polar_steps=None, polar_dtype="auto", wire_dtype=None, strategy="auto",
        scalar_lr=None, scalar_weight_decay=None, betas=(0.9, 0.95), eps=1e-8,
        scalar_backend="torch", check_finite=True, bucket_mb=64.0, replicate_momentum=False,
    )  # fmt: skip


def test_defaults_of_the_other_optimizers():
    """What they share has one default; the rest is their papers'."""
    shared = {name: getattr(MuonOptions(), name) for name in specs_of(MatrixOptions)}
    for entry in RULES:
        options = entry.options.from_user({})
        assert {name: getattr(options, name) for name in shared} == shared, entry.name
    assert PolarGradOptions.from_user({}) == PolarGradOptions(
        **shared, polar="qdwh", polar_first=False, nu_power=1.0
    )
    assert ROOTOptions.from_user({}) == ROOTOptions(
        **{**shared, "polar_steps": 5}, nesterov=True, scale="match_rms_adamw", quantile=0.9,
        coefficients="published", adapt_every=0,
    )  # fmt: skip


def test_json_values():
    text = """{"lr": 0.02, "momentum": 0, "nesterov": false, "weight_decay": 0, "scale": "none",
        "polar": "polar_express", "polar_steps": 8, "polar_dtype": "bfloat16",
        "wire_dtype": "bfloat16", "strategy": "owner", "scalar_lr": 1e-3,
        "scalar_weight_decay": null, "betas": [0.9, 0.999], "eps": 1e-10,
        "scalar_backend": "torch", "check_finite": false, "bucket_mb": 16,
        "replicate_momentum": true}"""
    given = json.loads(text)
    options = MuonOptions.from_user(given)
    assert options.betas == (0.9, 0.999)
    for name, value in given.items():
        if name != "betas":
            assert getattr(options, name) == value
    assert given["betas"] == [0.9, 0.999]  # the caller's dict is left alone


# -- names


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_unknown_names(entry):
    """Options of the others among them; each with the list, and the nearest if one is near."""
    known = specs_of(entry.options)
    for name in registry.option_names() - known.keys():
        refuses(f"unknown option '{name}'.* Known: .*betas", kind=entry.options, **{name: 1})
    for name in known:
        for wrong in (name.upper(), f"{name}_", name.title()):
            said = f"unknown option '{wrong}'; did you mean '{name}'\\? Known: .*{name}"
            refuses(said, kind=entry.options, **{wrong: 1})
    refuses(r"unknown option 'xyzzy'\. Known: ", kind=entry.options, xyzzy=1)
    for name in ROUTING:
        refuses(rf"param_groups\(model, {name}=\.\.\.\)", kind=entry.options, **{name: []})


def test_misspelt_names_give_the_nearest_and_the_list():
    for wrong, right in (
        ("momentun", "momentum"), ("wieght_decay", "weight_decay"), ("LR", "lr"),
        ("beta", "betas"), ("polar_step", "polar_steps"), ("Nesterov", "nesterov"),
        ("scalarlr", "scalar_lr"), ("matrix", "matrices"), ("bucket_size_mb", "bucket_mb"),
    ):  # fmt: skip
        said = f"unknown option '{wrong}'; did you mean '{right}'\\? Known: .*betas, .*wire_dtype"
        refuses(said, **{wrong: 1})


def test_where_is_said():
    refuses("unknown option", where="SpectralMuon", lrr=1)
    refuses("lr is -1", where="a parameter group", lr=-1)
    with pytest.raises(
        ValueError, match="Muon: unknown option 'momentun'; did you mean 'momentum'"
    ):
        spectral_dist.Muon(spectral_dist.param_groups(model()), lr=0.1, momentun=0.9)


# -- values, by the type of the field

texts = st.text(max_size=8)
containers = st.one_of(
    st.lists(st.floats() | texts, max_size=2), st.dictionaries(texts, st.integers(), max_size=2),
    st.just(torch.ones(2)), st.tuples(st.floats()),
)  # fmt: skip


@given(st.one_of(texts, st.booleans(), st.sampled_from([float("nan"), float("inf")]), containers))
@example("1e-3")
@example("fast")
@example(True)
@example([0.1])
@example({})
@example(float("nan"))
@example(float("inf"))
@example(-float("inf"))
@example(torch.ones(2))
@example(None)
def test_what_is_no_number(value):
    for cls, name, optional in [*fields_of(float), *fields_of(float, int)]:
        if value is not None or not optional:
            refuses(f"{name} is ", kind=cls, **{name: value})


@given(st.one_of(texts, st.floats(), st.booleans(), containers))
@example(-(2**70))
@example(2.0)
@example(2.5)
@example("3")
@example(True)
@example(None)
@example([5])
def test_what_is_no_whole_number(value):
    for cls, name, optional in fields_of(int):
        if value is not None or not optional:
            said = f"{name} is .*whole number"
            if name == "polar_steps":  # of which some methods take none
                said = "steps is .*whole number|steps=.* would have no effect"
            refuses(said, kind=cls, **{name: value})


@given(st.one_of(texts, st.integers(), st.floats(), st.none(), containers))
@example("true")
@example(1)
@example(0)
@example(None)
def test_what_is_no_switch(value):
    for cls, name, _ in fields_of(bool):
        refuses(f"{name} is .*true or false", kind=cls, **{name: value})


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), containers))
@example(3)
@example("")
@example(["torch"])
@example({"none": 1})
def test_what_is_no_name(value):
    for cls, name, optional in fields_of(str):
        if value is not None or not optional:
            refuses(f"{name} is ", kind=cls, **{name: value})


def test_names_give_the_nearest_and_the_list():
    """The list is of what is taken; each of it is suggested for what is near it."""
    for cls, name, optional in fields_of(str):
        if optional:
            continue
        with pytest.raises(ValueError, match=r"xyzzy'; unknown .*Known: ") as error:
            cls.from_user({name: "xyzzy"}, "Muon")
        listed = str(error.value).split("Known: ")[1].rstrip(".").split(", ")
        assert getattr(cls(), name) in listed
        for known in listed:
            assert specs_of(cls)[name].problem(known) is None
            refuses(rf"{known.upper()}'.* did you mean '{known}'\? Known: .*{known}",
                    kind=cls, **{name: known.upper()})  # fmt: skip
    for name, value, near in (
        ("scale", "match_rms_adam", "match_rms_adamw"), ("scale", "Original", "original"),
        ("scalar_backend", "Torch", "torch"), ("scalar_backend", "apx", "apex"),
        ("polar_dtype", "bf16", "bfloat16"), ("polar_dtype", "flaot32", "float32"),
        ("polar", "jordon", "jordan"), ("polar", "polarexpress", "polar_express"),
    ):  # fmt: skip
        refuses(rf"{value}.* did you mean '{near}'\? Known: .*{near}", **{name: value})
    for value in ("grams", "local", "whole"):
        refuses(f"strategy is '{value}'; unknown strategy.* Known: auto, block", strategy=value)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_option_is_told_what_it_is_and_refuses_what_is_nothing(entry):
    """Of whatever type: those with a check of their own, too; and takes its default."""
    for name, spec in specs_of(entry.options).items():
        assert spec.doc.endswith("."), name
        refuses("steps" if name == "polar_steps" else name, kind=entry.options, **{name: object()})
        default = getattr(entry.options(), name)
        assert getattr(entry.options.from_user({name: default}), name) == default


# -- the ranges of those there are

AT_LEAST_0 = {"lr", "weight_decay", "scalar_lr", "scalar_weight_decay", "momentum", "eps", "beta2",
              "nu_power", "limiter", "perp_scale", "refresh_below"}  # fmt: skip
ABOVE_0 = {"bucket_mb", "row_eps", "quantile", "rank"}


def test_ranges():
    for name in AT_LEAST_0 | ABOVE_0:
        for value in (-0.1, -1):
            refuses(f"{name} is ", **{name: value})
    for name in AT_LEAST_0:
        for cls in having(name):
            if (cls.__name__, name) != ("POETOptions", "scalar_weight_decay"):
                assert getattr(cls.from_user({name: 0}), name) == 0
    for name in ABOVE_0:
        refuses(f"{name} is 0", **{name: 0})
    refuses("bucket_mb is 0; it must be above 0", bucket_mb=0)
    for name in ("momentum", "beta2"):
        for value in (1, 1.0, 1.5):
            refuses(f"{name} is .* below 1", **{name: value})
    refuses(r"quantile is 1\.01", quantile=1.01)
    assert ROOTOptions.from_user({"quantile": 1}).quantile == 1
    for name, least in (("adapt_every", 0), ("block_period", 1), ("period", 1), ("seed", 0),
                        ("merge_every", 1)):  # fmt: skip
        refuses(f"{name} is .*whole number.*at least", **{name: least - 1})


def test_numbers_that_may_not_be_missing():
    for cls, name, optional in fields_of(float):
        if optional:
            assert getattr(cls.from_user({name: None}), name) is None
        else:
            refuses(f"{name} is None; it must be a number", kind=cls, **{name: None})


def test_quoted_numbers_are_explained():
    refuses("lr is '1e-3'; it must be a number.*if it is quoted", lr="1e-3")


def test_bad_betas():
    for value in (
        0.9, None, [], [0.9], [0.9, 0.95, 0.99], "ab", ["a", "b"], [0.9, 1.0], [-0.1, 0.9],
        [0.9, float("nan")], {"a": 1, "b": 2}, [True, 0.9], [None, None], [[0.9], [0.9]],
    ):  # fmt: skip
        refuses(r"betas is .*in \[0\.9, 0\.95\]", betas=value)


def test_bad_wire():
    for value in ("float16", "fp32", "auto", "", 16, ["float32"], {}):
        refuses("wire_dtype is .*'float32' or 'bfloat16'", wire_dtype=value)


def test_scales_by_the_names_of_others_are_explained_not_guessed():
    for theirs, ours in (
        ("moonlight", "match_rms_adamw"), ("shape_scaling", "original"),
        ("spectral_norm", "spectral"), ("unit_rms_norm", "spectral"),
    ):  # fmt: skip
        refuses(f"scale is '{theirs}'; here that is '{ours}'", scale=theirs)


def test_polar_methods_and_their_steps_and_dtypes():
    for value in (None, 3, "", ["torch"], {"none": 1}, True):
        refuses(".", polar=value)
    for method, why in (
        ("svd", "is exact"), ("eigh", "is exact"), ("qdwh", "takes the steps that it converges in"),
        ("zolo", "takes the steps that it converges in"),
    ):  # fmt: skip
        refuses(f"steps=5 would have no effect.*'{method}' {why}", polar=method, polar_steps=5)
        for cls in having("polar"):
            assert cls.from_user({"polar": method}).polar_steps is None
    for value in (0, -1, 5.0, "5", True, [5]):
        for cls in having("polar_steps"):
            said = "would have no effect.*'qdwh'" if cls is PolarGradOptions else "whole number"
            refuses(f"steps.*{said}", kind=cls, polar_steps=value)
    refuses("steps is 6; cubic5 has exactly 5", polar="cubic5", polar_steps=6)
    for method, dtype in (
        ("gram_jordan", "bfloat16"), ("cans", "float16"), ("eigh", "float32"), ("svd", "bfloat16"),
    ):  # fmt: skip
        refuses(f"'{method}' .*{dtype}", polar=method, polar_dtype=dtype)
