"""Every option's check: the error names the option, the nearest known name, and where it was."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist.rules.muon import MuonOptions
from spectral_dist.rules.options import MatrixOptions
from spectral_dist.rules.polargrad import PolarGradOptions
from spectral_dist.rules.root import ROOTOptions

ALL = (MuonOptions, PolarGradOptions, ROOTOptions)
OF_ALL = {f.name for f in fields(MatrixOptions)}


def refuses(match, where="Muon", kind=None, **given):
    """By every optimizer that has the options, or by one."""
    known = [cls for cls in ALL if given.keys() <= {f.name for f in fields(cls)}] or [MuonOptions]
    for cls in [kind] if kind else known:
        _refuses(cls, match, where, given)


def _refuses(cls, match, where, given):
    with pytest.raises(ValueError, match=match) as error:
        cls.from_user(given, where)
    assert str(error.value).startswith(f"{where}: ")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False))


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
    shared = {name: getattr(MuonOptions(), name) for name in OF_ALL}
    assert PolarGradOptions.from_user({}) == PolarGradOptions(
        **shared, polar="qdwh", polar_first=False, nu_power=1.0
    )
    assert ROOTOptions.from_user({}) == ROOTOptions(
        **{**shared, "polar_steps": 5}, nesterov=True, scale="match_rms_adamw", quantile=0.9,
        coefficients="published", adapt_every=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "name"),
    [(MuonOptions, "quantile"), (MuonOptions, "polar_first"), (MuonOptions, "nu_power"),
     (PolarGradOptions, "nesterov"), (PolarGradOptions, "scale"), (PolarGradOptions, "adapt_every"),
     (ROOTOptions, "polar"), (ROOTOptions, "polar_first")],
)  # fmt: skip
def test_options_of_another_optimizer_are_unknown(cls, name):
    refuses(f"unknown option '{name}'.* Known: ", kind=cls, **{name: 1})


@pytest.mark.parametrize("value", ["1", True, None, -1, float("nan"), [1.0]])
def test_bad_nu_power(value):
    refuses("nu_power is ", nu_power=value)


@pytest.mark.parametrize("value", ["0.9", True, 0, 1.01, -0.5, float("nan")])
def test_bad_quantile(value):
    with pytest.raises((ValueError, TypeError)):
        ROOTOptions.from_user({"quantile": value})
    assert ROOTOptions.from_user({"quantile": 1}).quantile == 1


@pytest.mark.parametrize("value", [-1, 2.0, "3", True, None])
def test_bad_adapt_every(value):
    refuses("adapt_every is .*whole number", adapt_every=value)


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


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("momentun", "momentum"), ("wieght_decay", "weight_decay"), ("LR", "lr"), ("beta", "betas"),
     ("polar_step", "polar_steps"), ("Nesterov", "nesterov"), ("scalarlr", "scalar_lr"),
     ("matrix", "matrices"), ("bucket_size_mb", "bucket_mb")],
)  # fmt: skip
def test_unknown_option_gives_the_nearest_and_the_list(wrong, right):
    refuses(f"unknown option '{wrong}'; did you mean '{right}'\\? Known: .*betas, .*wire_dtype",
            **{wrong: 1})  # fmt: skip


def test_unknown_option_that_is_near_nothing():
    refuses(r"unknown option 'xyzzy'\. Known: ", **{"xyzzy": 1})


def test_where_is_said():
    refuses("unknown option", where="SpectralMuon", lrr=1)
    refuses("lr is -1", where="a parameter group", lr=-1)
    with pytest.raises(
        ValueError, match="Muon: unknown option 'momentun'; did you mean 'momentum'"
    ):
        spectral_dist.Muon(spectral_dist.param_groups(model()), lr=0.1, momentun=0.9)


@pytest.mark.parametrize("name", ["matrices", "scalars", "split"])
def test_routing_options_belong_elsewhere(name):
    refuses(rf"param_groups\(model, {name}=\.\.\.\)", **{name: []})


NUMBERS = ("lr", "weight_decay", "scalar_lr", "scalar_weight_decay", "momentum", "eps", "bucket_mb")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["1e-3", "fast", True, [0.1], {}, -0.1, float("nan"), float("inf"), torch.ones(())]
)
def test_bad_numbers(name, value):
    refuses(f"{name} is ", **{name: value})


def test_quoted_numbers_are_explained():
    refuses("lr is '1e-3'; it must be a number.*if it is quoted", lr="1e-3")


@pytest.mark.parametrize("name", [n for n in NUMBERS if not n.startswith("scalar_")])
def test_numbers_that_may_not_be_missing(name):
    refuses(f"{name} is None; it must be a number", **{name: None})


def test_zero():
    for name in set(NUMBERS) - {"bucket_mb"}:
        assert getattr(MuonOptions.from_user({name: 0}), name) == 0
    refuses("bucket_mb is 0; it must be above 0", bucket_mb=0)


@pytest.mark.parametrize("value", [1, 1.0, 1.5])
def test_momentum_is_below_one(value):
    refuses("momentum is .* below 1", momentum=value)


@pytest.mark.parametrize(
    "value", [0.9, None, [], [0.9], [0.9, 0.95, 0.99], "ab", ["a", "b"], [0.9, 1.0], [-0.1, 0.9],
              [0.9, float("nan")], {"a": 1, "b": 2}, [True, 0.9], [None, None], [[0.9], [0.9]]],
)  # fmt: skip
def test_bad_betas(value):
    refuses(r"betas is .*in \[0\.9, 0\.95\]", betas=value)


@pytest.mark.parametrize("name", ["nesterov", "check_finite", "replicate_momentum", "polar_first"])
@pytest.mark.parametrize("value", ["true", 1, 0, None, [], 0.5])
def test_bad_switches(name, value):
    refuses(f"{name} is .*true or false", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [("scale", "match_rms_adam", "match_rms_adamw"), ("scale", "Original", "original"),
     ("scalar_backend", "Torch", "torch"), ("scalar_backend", "apx", "apex"),
     ("polar_dtype", "bf16", "bfloat16"), ("polar_dtype", "flaot32", "float32"),
     ("polar", "jordon", "jordan"), ("polar", "polarexpress", "polar_express")],
)  # fmt: skip
def test_bad_words_give_the_nearest_and_the_list(name, value, near):
    refuses(rf"{value}.* did you mean '{near}'\? Known: .*{near}", **{name: value})


@pytest.mark.parametrize("name", ["scale", "scalar_backend", "polar", "polar_dtype", "strategy"])
@pytest.mark.parametrize("value", [None, 3, "", ["torch"], {"none": 1}, True])
def test_words_that_are_none(name, value):
    refuses(".", **{name: value})


@pytest.mark.parametrize("value", ["float16", "fp32", "auto", "", 16, ["float32"], {}])
def test_bad_wire(value):
    refuses("wire_dtype is .*'float32' or 'bfloat16'", wire_dtype=value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("moonlight", "match_rms_adamw"), ("shape_scaling", "original"),
     ("spectral_norm", "spectral"), ("unit_rms_norm", "spectral")],
)  # fmt: skip
def test_scales_by_the_names_of_others_are_explained_not_guessed(theirs, ours):
    refuses(f"scale is '{theirs}'; here that is '{ours}'", scale=theirs)


@pytest.mark.parametrize("value", ["grams", "local", "whole"])
def test_unknown_strategies(value):
    refuses(f"strategy is '{value}'; unknown strategy.* Known: auto, block", strategy=value)


@pytest.mark.parametrize(
    ("method", "why"),
    [("svd", "is exact"), ("eigh", "is exact"), ("qdwh", "takes the steps that it converges in"),
     ("zolo", "takes the steps that it converges in")],
)  # fmt: skip
def test_steps_of_an_exact_method(method, why):
    refuses(f"steps=5 would have no effect.*'{method}' {why}", polar=method, polar_steps=5)
    assert MuonOptions.from_user({"polar": method}).polar_steps is None


@pytest.mark.parametrize("value", [0, -1, 5.0, "5", True, [5]])
def test_bad_steps(value):
    for cls in (MuonOptions, ROOTOptions):
        refuses("steps is .*whole number", kind=cls, polar_steps=value)
    refuses("would have no effect.*'qdwh'", kind=PolarGradOptions, polar_steps=value)
    refuses("steps is 6; cubic5 has exactly 5", polar="cubic5", polar_steps=6)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("gram_jordan", "bfloat16"), ("cans", "float16"), ("eigh", "float32"), ("svd", "bfloat16")],
)
def test_methods_that_refuse_a_dtype(method, dtype):
    refuses(f"'{method}' .*{dtype}", polar=method, polar_dtype=dtype)


# -- of parameter groups


def grouped(changes, which=0, **options):
    groups = spectral_dist.param_groups(model())
    groups[which].update(changes)
    return spectral_dist.Muon(groups, **{"lr": 0.01, **options})


@pytest.mark.parametrize(
    ("which", "wrong", "right"),
    [(0, "momentun", "momentum"), (0, "weigth_decay", "weight_decay"), (1, "beta", "betas"),
     (0, "polar_step", "polar_steps"), (1, "weight_decays", "weight_decay")],
)  # fmt: skip
def test_misspelt_option_of_a_group(which, wrong, right):
    with pytest.raises(
        ValueError, match=f"group: unknown option '{wrong}'; did you mean '{right}'"
    ):
        grouped({wrong: 0.5}, which)


@pytest.mark.parametrize("name", ["wd", "learning_rate", "ns_steps"])
def test_a_groups_unknown_option_is_not_ignored_in_silence(name):
    """Frameworks keep keys of their own in groups, so a warning would do."""
    with pytest.raises((ValueError, UserWarning), match=name):
        grouped({name: 0.5})


@pytest.mark.parametrize("name", ["name", "initial_lr", "swa_lr", "is_expert_group"])
def test_keys_of_frameworks_stay(name):
    assert grouped({name: "x"}).param_groups[0][name] == "x"


@pytest.mark.parametrize(
    ("which", "name", "value"),
    [(0, "betas", (0.8, 0.9)), (0, "eps", 1e-6), (1, "momentum", 0.9), (1, "scale", "none"),
     (0, "replicate_momentum", True), (0, "strategy", "owner"),
     (0, "check_finite", False), (1, "bucket_mb", 1.0), (1, "scalar_lr", 0.1)],
)  # fmt: skip
def test_option_that_a_group_of_this_kind_does_not_have(which, name, value):
    with pytest.raises(ValueError, match=rf"has no option '{name}'"):
        grouped({name: value}, which)


@pytest.mark.parametrize(
    ("which", "name", "value"),
    [(0, "betas", (0.8, 0.9)), (1, "momentum", 0.9), (0, "check_finite", False),
     (1, "scalar_lr", 0.1), (1, "scalar_weight_decay", 0.0)],
)  # fmt: skip
def test_option_that_no_parameter_of_a_tagged_group_has(which, name, value):
    """A mixed group gives each half what it knows; what neither knows must not vanish."""
    tagged = model()
    spectral_dist.tag(tagged)
    first, rest = [], []
    for p in tagged.parameters():
        (first if p.ndim == 2 else rest).append(p)
    with pytest.raises(ValueError, match=name):
        spectral_dist.Muon([{"params": (first, rest)[which], name: value}], lr=0.01)


@pytest.mark.parametrize(
    ("which", "changes", "match"),
    [(0, {"lr": -1}, "lr is -1"), (0, {"momentum": 2}, "momentum is 2"),
     (1, {"betas": 0.9}, "betas is 0.9"), (0, {"scale": "spectral_norm"}, "that is 'spectral'"),
     (0, {"polar": "svd", "polar_steps": 3}, "no effect"), (1, {"eps": "1e-8"}, "quoted")],
)  # fmt: skip
def test_bad_values_of_a_group(which, changes, match):
    with pytest.raises(ValueError, match=f"a parameter group: .*{match}"):
        grouped(changes, which)


def test_a_groups_exact_method_and_the_optimizers_steps():
    """They do not go together: said when the optimizer is built, not in the first step."""
    with pytest.raises(ValueError, match="no effect"):
        grouped({"polar": "svd"}, polar_steps=7)
    with pytest.raises(ValueError, match="cubic5 has exactly 5"):
        grouped({"polar": "cubic5"}, polar_steps=7)


def test_lr_of_groups_is_a_ratio():
    optimizer = grouped({"lr": 0.005}, 1, scalar_lr=0.001)
    matrix, scalar = optimizer.param_groups
    assert (matrix["lr"], scalar["lr"]) == (0.01, 0.01)
    assert matrix["lr_ratio"] == 1
    assert scalar["lr_ratio"] == 0.5  # the group's own beats scalar_lr


def test_lr_zero_has_no_ratio():
    with pytest.raises(
        ValueError, match=r"scalar_lr is 0\.1, but it is kept as a ratio to lr, which is 0"
    ):
        grouped({}, lr=0, scalar_lr=0.1)
    with pytest.raises(ValueError, match=r"a group's lr is 0\.1, but"):
        grouped({"lr": 0.1}, lr=0)
    assert grouped({}, lr=0).param_groups[1]["lr_ratio"] == 1
    assert grouped({}, lr=0.1, scalar_lr=0).param_groups[1]["lr_ratio"] == 0


def test_scalar_weight_decay_is_the_base_unless_given():
    assert grouped({}, weight_decay=0.3).param_groups[1]["weight_decay"] == 0.3
    optimizer = grouped({}, weight_decay=0.3, scalar_weight_decay=0.0)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_no_parameters():
    with pytest.raises(ValueError, match="empty"):
        spectral_dist.Muon([], lr=0.1)
