"""Names, flags, routing and errors of the Megatron integration."""

from __future__ import annotations

import pytest

from spectral_dist.rules import registry
from tests.distributed.megatron import megatron_runs as runs
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

NEW, OLD = "0.19.2", "0.16.1"
WEIGHT = "decoder.layers.0."
LAYER = {
    "self_attention.linear_qkv.weight": [("/0", (64, 64)), ("/1", (32, 64)), ("/2", (32, 64))],
    "self_attention.linear_proj.weight": [("", (64, 64))],
    "mlp.linear_fc1.weight": [("/0", (96, 64)), ("/1", (96, 64))],
    "mlp.linear_fc2.weight": [("", (64, 96))],
}


def matrices(version=NEW, ranks=4, groups=None, **kwargs):
    groups = {"tp": 2} if groups is None else groups
    found = harness.run(ranks, runs.table, version, groups=groups, pool=version, **kwargs)[0]
    return {name: (kind, held) for name, kind, held in found}


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_matrices_are_known_whole_by_megatrons_own_modules(version):
    found = matrices(version)
    for name, held in LAYER.items():
        full = WEIGHT + name
        assert found[full] == ("matrix", [(full + part, shape) for part, shape in held])
    others = {name for name, (kind, _) in found.items() if kind == "scalar"}
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} < others
    assert all("norm" in name for name in others if "layers" in name)


def test_options_route_as_everywhere():
    options = {"scalars": ["linear_fc2"], "split": {"linear_fc1": 1, "linear_qkv": [16]}}
    found = matrices(options=options)
    assert found[WEIGHT + "mlp.linear_fc2.weight"] == ("scalar", [])
    assert [shape for _, shape in found[WEIGHT + "mlp.linear_fc1.weight"][1]] == [(192, 64)]
    assert len(found[WEIGHT + "self_attention.linear_qkv.weight"][1]) == 1
    exact = harness.run(
        2, runs.train, NEW, "spectral_muon", {"tp": 2}, options={"one_sided": ["output_layer"]},
        steps=1, pool=NEW,
    )  # fmt: skip
    assert sum(one["polar_calls"] for one in exact) == 15


def test_heads():
    """Two query groups of two heads of q, one of k and one of v, each of 16 rows."""
    found = matrices(options={"heads": "auto"})
    qkv = found[WEIGHT + "self_attention.linear_qkv.weight"][1]
    assert [shape for _, shape in qkv] == [(16, 64)] * 8
    assert len(found[WEIGHT + "mlp.linear_fc1.weight"][1]) == 2


def test_routers_are_matrices_and_every_expert_has_its_own():
    found = matrices(ranks=2, groups={"ep": 2}, model={"moe_experts": 4})
    assert found[WEIGHT + "mlp.router.weight"][1] == [(WEIGHT + "mlp.router.weight", (4, 64))]
    experts = [name for name in found if "local_experts" in name and WEIGHT in name]
    assert len(experts) == 2 * 2  # this rank's two, fc1 and fc2


ERRORS = {
    "unknown option": ({"options": {"momentun": 0.9}}, "did you mean 'momentum'"),
    "Megatron's own": ({"options": {"lr": 0.1}}, "OptimizerConfig(lr=...), or --lr"),
    "no effect": ({"options": {"scalar_weight_decay": 0.0}}, "wd_mult"),
    "a pattern that matches nothing": ({"options": {"scalars": ["lm_head"]}}, "matches no"),
    "Adam's L2 penalty": ({"config": {"decoupled_weight_decay": False}}, "decoupled_weight_decay"),
    "maximal update parametrization": (
        {"model": {"use_mup": True, "mup_base_hidden_size": 32}}, "use_mup (--use-mup)",
    ),
    "adapting on some ranks": (
        {"groups": {"pp": 2}, "name": "spectral_root", "options": {"adapt_every": 2}},
        "pipeline_model_parallel_size is 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_setting_and_what_to_write(case):
    given, text = ERRORS[case]
    given = {"name": "spectral_muon"} | given
    for message in harness.run(2, runs.error, NEW, pool=NEW, **given):
        assert text in message, message


def test_patterns_may_match_on_another_pipeline_stage_only():
    options = {"scalars": ["output_layer", "linear_fc2"], "one_sided": ["word_embeddings"]}
    first, last = harness.run(
        2, runs.table, NEW, groups={"pp": 2}, options=options, pool=NEW
    )  # fmt: skip
    assert "embedding.word_embeddings.weight" in {n for n, kind, _ in first if kind == "matrix"}
    assert "output_layer.weight" in {name for name, kind, _ in last if kind == "scalar"}


def named(version, name):
    """Building by the name in OptimizerConfig, with Megatron's own function."""
    runs.build(version, "adam")  # groups, and imports
    from megatron.core import optimizer as module

    import spectral_dist.integrations.megatron  # noqa: F401

    ddp = models.wrap(models.gpt())
    try:
        built = module.get_megatron_optimizer(models.optimizer_config(ddp, optimizer=name), [ddp])
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    table = {}
    if version == NEW:
        from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS as table
    return type(runs.inner(built)[0]).__name__, sorted(k for k in table if "spectral" in k)


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_the_name_alone_is_enough(version):
    names = sorted(entry.megatron_name for entry in registry.entries())
    found = harness.run(1, named, version, "spectral_root", pool=version)[0]
    assert found == ("SpectralROOT", names if version == NEW else [])
    assert "spectral_mun" in harness.run(1, named, version, "spectral_mun", pool=version)[0]


def scheduled(version):
    """lr and decay of each group, and how far each kind of parameter has moved in a step."""
    data, ddp, optimizer = runs.build(
        version, "spectral_muon", wrapping={"use_distributed_optimizer": True},
        options={"scalar_lr": 0.002},
    )  # fmt: skip
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=0.01, min_lr=0.0, lr_warmup_steps=2, lr_decay_steps=10,
        lr_decay_style="linear", start_wd=0.1, end_wd=0.1, wd_incr_steps=1,
        wd_incr_style="constant",
    )  # fmt: skip
    schedule.step(1)
    groups = [(g["kind"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    before = models.full_parameters(ddp)
    models.train_step(ddp, optimizer, models.batch(0, *data))
    after = models.full_parameters(ddp)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    return sorted(groups), moved["embedding.word_embeddings.weight"]


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_megatrons_scheduler_drives_every_group(version):
    """Half of the warm-up: lr .005, of which AdamW takes a fifth; biases and norms do not decay."""
    groups, moved = harness.run(2, scheduled, version, pool=version)[0]
    assert groups == [("matrix", 0.005, 0.1), ("scalar", 0.005, 0.0), ("scalar", 0.005, 0.1)]
    assert moved == pytest.approx(0.001, rel=0.3)  # Adam's first step is lr, and decay's is small


def overridden(version, wanted, settings):
    """What config_overrides of some parameters comes to: the group's options, or the error."""
    runs.build(version, "adam")  # groups, and imports
    from megatron.core.optimizer.optimizer_config import ParamKey

    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    ddp = models.wrap(models.gpt())
    config = models.optimizer_config(ddp, optimizer="spectral_muon", adam_eps=1e-4)
    overrides = {ParamKey(name=f"*{wanted}*"): settings}
    try:
        built = get_spectral_megatron_optimizer(config, [ddp], overrides)
    except ValueError as error:
        return str(error)
    return [
        {name: group.get(name) for name in ("kind", "betas", "eps")}
        for leaf in runs.inner(built)
        for group, routes in zip(leaf.param_groups, leaf.routes, strict=True)
        if any(wanted in route.name for route in routes)
    ]


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_overridden_betas_and_eps_are_taken(version):
    """As Megatron's Adam takes them."""
    given = {"betas": (0.8, 0.9), "eps": 1e-3}
    groups = harness.run(1, overridden, version, "word_embeddings", given, pool=version)[0]
    assert groups == [{"kind": "scalar", **given}]
    text = harness.run(1, overridden, version, "linear_fc1", {"eps": 1e-3}, pool=version)[0]
    assert "a parameter group of kind 'matrix' has no option 'eps'" in text


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_an_optimizer_for_some_parameters_is_refused(version):
    text = harness.run(
        1, overridden, version, "linear_fc1", {"optimizer": "adam"}, pool=version
    )[0]  # fmt: skip
    assert "config_overrides has optimizer='adam'" in text
    assert "--spectral-scalars" in text


def registered_late():
    """Names that megatron-core's own registry has, before a rule is registered and after."""
    megatron_cpu.install(NEW)
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    import spectral_dist.integrations.megatron  # noqa: F401

    before = set(_EMERGING_OPTIMIZERS)
    from tests.distributed import outside_rules  # noqa: F401

    return {name: entry.optimizer_cls.__name__
            for name, entry in _EMERGING_OPTIMIZERS.items() if name not in before}  # fmt: skip


@pytest.mark.slow
def test_a_rule_registered_later_is_in_megatrons_registry():
    added = harness.run(1, registered_late, pool="a rule registered later")[0]
    assert added
    assert all(name.startswith("spectral_") for name in added)
    assert all(title.startswith("Spectral") for title in added.values())


def by_collection(version):
    """The same step with the process groups handed over as with Megatron's own."""
    runs.build(version, "spectral_muon", {"tp": 2})
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    given = {"pg_collection": groups, "use_gloo_process_groups": False}
    kwargs = {"wrapping": {"use_distributed_optimizer": True}, "steps": 2}
    plain = runs.train(version, "spectral_muon", {"tp": 2}, **kwargs)
    other = runs.train(version, "spectral_muon", {"tp": 2}, options=given, **kwargs)
    return runs.same_bits(other["parameters"], plain["parameters"])


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_process_groups_may_be_handed_over(version):
    assert harness.run(4, by_collection, version, pool=version) == [True] * 4


def early(version):
    """What a script gets that took Megatron's function before ours was imported."""
    runs.build(version, "spectral_muon")
    from megatron.core import optimizer as module

    taken = module.get_megatron_optimizer.__wrapped__
    ddp = models.wrap(models.gpt())
    try:
        taken(models.optimizer_config(ddp, optimizer="spectral_muon"), [ddp])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
def test_a_function_imported_too_early_never_trains_with_adam(version):
    text = harness.run(1, early, version, pool=version)[0]
    assert "imported before spectral_dist.integrations.megatron" in text


def test_unknown_options_are_told_without_megatrons_own():
    for name in ("spectral_poet", "spectral_muon"):
        given = {"name": name, "options": {"betta": 0.9}}
        text = harness.run(1, runs.error, NEW, pool=NEW, **given)[0]
        known = text.partition("Known: ")[2].rstrip(".").split(", ")
        assert f"{name}: unknown option 'betta'" in text
        assert "scalar_lr" in known
        assert not {"lr", "betas", "eps", "weight_decay", "scalar_weight_decay"} & set(known)


def unmarked(groups, model, attribute, value):
    """What building says if megatron-core called a mark on parameters otherwise."""
    _, ddp, _ = runs.build(NEW, "spectral_muon", groups, model=model)
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    for parameter in ddp.parameters():
        if hasattr(parameter, attribute):
            setattr(parameter, attribute, value)
    try:
        config = models.optimizer_config(ddp, optimizer="spectral_muon")
        get_spectral_megatron_optimizer(config, [ddp])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("groups", "model", "attribute", "value", "said"),
    [
        ({"tp": 2}, {}, "tensor_model_parallel", False, "tensor_model_parallel_size is 2"),
        ({"ep": 2}, {"moe_experts": 4}, "allreduce", True, "expert_model_parallel_size is 2"),
        ({"pp": 2}, {}, "is_embedding_or_output_parameter", False, "is marked as one"),
    ],
)
def test_marks_of_an_unknown_version_are_an_error_on_every_rank(
    groups, model, attribute, value, said
):
    for text in harness.run(2, unmarked, groups, model, attribute, value, pool=NEW):
        assert said in text
        assert "not those of a known megatron-core" in text
