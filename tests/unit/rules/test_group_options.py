"""What a parameter group may set: the checks of its options, and its learning rate."""

from __future__ import annotations

import functools

import pytest

import spectral_dist
from spectral_dist.placement.dtensor import MeshPlacement
from spectral_dist.rules.options import specs_of
from tests.unit.rules.registered_rules import RULES, model


def grouped(changes, which=0, entry=None, **options):
    """With group 0 of matrices, or 1 of the rest, changed."""
    groups = spectral_dist.param_groups(model())
    groups[which].update(changes)
    make = getattr(spectral_dist, entry.title if entry else "Muon")
    return make(groups, **{"lr": 0.01, **options})


@pytest.mark.parametrize("entry", RULES, ids=lambda entry: entry.name)
def test_what_a_group_may_set(entry):
    """What its kind carries, checked; never what belongs to the other kind or to the optimizer."""
    for name, spec in specs_of(entry.options).items():
        for which, kind in enumerate(("matrix", "scalar")):
            if spec.scope in (kind, "all"):
                said = f"a parameter group: .*{'steps' if name == 'polar_steps' else name}"
                with pytest.raises(ValueError, match=said):
                    grouped({name: object()}, which, entry)
            else:
                default = getattr(entry.options(), name)
                with pytest.raises(ValueError, match=rf"has no option '{name}'"):
                    grouped({name: default}, which, entry)
                # a mixed group gives each half what it knows; what neither knows must not vanish
                tagged = model()
                spectral_dist.tag(tagged)
                params = [p for p in tagged.parameters() if (p.ndim != 2) == which]
                with pytest.raises(ValueError, match=name):
                    getattr(spectral_dist, entry.title)([{"params": params, name: default}])


def test_misspelt_option_of_a_group():
    for which, wrong, right in (
        (0, "momentun", "momentum"), (0, "weigth_decay", "weight_decay"), (1, "beta", "betas"),
        (0, "polar_step", "polar_steps"), (1, "weight_decays", "weight_decay"),
    ):  # fmt: skip
        said = f"group: unknown option '{wrong}'; did you mean '{right}'"
        with pytest.raises(ValueError, match=said):
            grouped({wrong: 0.5}, which)


def test_a_groups_unknown_option_is_not_ignored_in_silence():
    """Frameworks keep keys of their own in groups, so a warning would do."""
    for name in ("wd", "learning_rate", "ns_steps"):
        with pytest.raises((ValueError, UserWarning), match=name):
            grouped({name: 0.5})


def test_keys_of_frameworks_stay():
    for name in ("name", "initial_lr", "swa_lr", "is_expert_group"):
        assert grouped({name: "x"}).param_groups[0][name] == "x"


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
    """Options that do not go together are named when the optimizer is built, no later."""
    with pytest.raises(ValueError, match="no effect"):
        grouped({"polar": "svd"}, polar_steps=7)
    with pytest.raises(ValueError, match="cubic5 has exactly 5"):
        grouped({"polar": "cubic5"}, polar_steps=7)


def test_lr_of_groups_is_their_own():
    optimizer = grouped({"lr": 0.005}, 1, scalar_lr=0.001)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.005]  # it beats scalar_lr
    assert [g["lr_ratio"] for g in optimizer.param_groups] == [1, 1]
    assert grouped({}, lr=0, scalar_lr=0.1).param_groups[1]["lr"] == 0.1
    assert grouped({}, lr=0.1, scalar_lr=0).param_groups[1]["lr"] == 0


def test_lr_of_groups_is_a_ratio_where_a_framework_knows_one_lr():
    optimizer = grouped({"lr": 0.005}, 1, scalar_lr=0.001, placement=MeshPlacement())
    matrix, scalar = optimizer.param_groups
    assert (matrix["lr"], scalar["lr"]) == (0.01, 0.01)
    assert matrix["lr_ratio"] == 1
    assert scalar["lr_ratio"] == 0.5


def test_lr_zero_has_no_ratio():
    grouped = functools.partial(globals()["grouped"], placement=MeshPlacement())
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
