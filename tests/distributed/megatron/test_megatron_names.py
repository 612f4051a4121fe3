"""A parameter of Megatron's has one name, however the model is cut."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.distributed.megatron import megatron_runs as runs
from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

NEW, OLD = "0.19.2", "0.16.1"
VIRTUAL = {"pp": 2, "virtual_pipeline_model_parallel_size": 2}
MODELS = {
    "dense": {"layers": 4},
    "tied": {"layers": 4, "tied": True},
    "experts": {"layers": 2, "moe_experts": 4},
    "experts in some layers": {"layers": 4, "moe_experts": 4, "moe_layer_freq": [0, 1, 0, 1]},
}
CASES = [
    ("dense", (2, {"pp": 2})),
    ("dense", (2, {"tp": 2})),
    ("dense", (2, VIRTUAL)),
    ("tied", (2, {"pp": 2})),
    ("experts", (2, {"ep": 2})),
    ("experts", (4, {"ep": 2, "pp": 2})),
    ("experts in some layers", (4, {"ep": 2, "pp": 2})),
]


def chunks(version, groups, model):
    """This rank's parts of the model."""
    megatron_cpu.install(version)
    models.parallel(**groups)
    stages = range(groups.get("virtual_pipeline_model_parallel_size") or 0) or [None]
    freq = model.get("moe_layer_freq")
    if freq is None:
        return [models.gpt(vp_stage=stage, **model) for stage in stages]
    from megatron.core.models.gpt import gpt_layer_specs as specs

    plain = specs.get_gpt_layer_local_spec
    specs.get_gpt_layer_local_spec = lambda **given: mixed(specs, plain, freq, given)
    try:
        return [models.gpt(vp_stage=stage, **model) for stage in stages]
    finally:
        specs.get_gpt_layer_local_spec = plain


def mixed(specs, plain, freq, given):
    """A block in which only some layers have experts."""
    from megatron.core import parallel_state
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    here = len(freq) // parallel_state.get_pipeline_model_parallel_world_size()
    first = here * parallel_state.get_pipeline_model_parallel_rank()
    layers = [
        plain(**{**given, "num_experts": given["num_experts"] if has else None})
        for has in freq[first : first + here]
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)


def named(version, groups, model):
    """{name: which weight it is, by what the test's own naming has filled it with}."""
    parts = chunks(version, groups, model)
    from spectral_dist.integrations.megatron.names import global_names, stage_copies

    names, copied = global_names(parts), stage_copies(parts)
    found, twice = {}, []
    for part in parts:
        for name, parameter in models.named_parameters(part):
            full = models.gathered(parameter.data, parameter)
            found[names[id(parameter)]] = name if full.ndim == 1 else float(full.double().norm(p=1))
            if id(parameter) in copied:
                twice.append(names[id(parameter)])
    return found, twice


@functools.cache
def alone(version, model):
    return harness.run(1, named, version, {}, MODELS[model], pool=version)[0][0]


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "layout"), CASES, ids=[f"{m}-{n}" for m, (_, n) in CASES])
def test_names_are_those_of_one_process(version, model, layout):
    ranks, groups = layout
    wanted = alone(version, model)
    assert len(set(wanted.values())) == len(wanted)  # no two weights are the same
    together, copied = {}, []
    for found, twice in harness.run(ranks, named, version, groups, MODELS[model], pool=version):
        for name, value in found.items():
            assert wanted[name] == value, name
        together |= found
        copied += twice
    assert together.keys() == wanted.keys()
    assert copied == (["embedding.word_embeddings.weight"] if model == "tied" else [])


def offsets(version, groups, model):
    """(our name, Megatron's key, its numbers of layer and expert) of every parameter."""
    (part,) = chunks(version, groups, model)
    from spectral_dist.integrations.megatron.names import global_names

    names, found = global_names([part]), []
    for entry in part.sharded_state_dict().values():
        name = names.get(id(getattr(entry, "data", None)))
        if name is not None:
            tensors = entry.build() if hasattr(entry, "build") else [entry]
            first = next(iter(tensors.values() if isinstance(tensors, dict) else tensors))
            found.append((name, entry.key, first.global_offset[: first.prepend_axis_num]))
    assert len(found) == len(names)
    return found


@pytest.mark.parametrize("version", [NEW, pytest.param(OLD, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["tied", "experts", "experts in some layers"])
def test_numbers_are_those_of_megatrons_checkpoints(version, model):
    """Its keys go by metadata and layer spec (norms under other names); numbers are the same."""
    groups = {"pp": 2} | ({"ep": 2} if "experts" in model else {})
    for found in harness.run(4, offsets, version, groups, MODELS[model], pool=version):
        for name, key, numbers in found:
            if model == "experts in some layers":  # then the layer is in the key
                numbers = [*map(int, re.findall(r"layers\.(\d+)", key)), *numbers]
            assert [int(n) for n in re.findall(r"\.(\d+)(?=\.)", name)] == list(numbers), name
            if "norm" not in name:
                plain = re.sub(r"\.\d+(?=\.)", "", key).replace("experts.experts", "experts")
                assert re.sub(r"\.\d+(?=\.)", "", name) == plain


def test_matrices_have_them_and_patterns_see_the_local_ones():
    model = {"layers": 2, "moe_experts": 4}
    options = {"scalars": [r"layers\.0\.self_attention.linear_proj"]}
    found = harness.run(
        4, runs.table, NEW, groups={"pp": 2, "ep": 2}, model=model, options=options, pool=NEW
    )
    held = [{n: [m for m, _ in ms] for n, _, ms in one} for one in found]
    assert held[3]["decoder.layers.0.self_attention.linear_proj.weight"] == []
    local = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    own = "decoder.layers.1.mlp.experts.3.linear_fc1.weight"
    assert held[3][local] == [f"{own}/0", f"{own}/1"]


class Grouped(nn.Module):
    """Parameters as Transformer Engine's grouped layers have them."""

    def __init__(self, number):
        super().__init__()
        for i in range(number):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.zeros(2, 2)))


def layer(number, experts):
    """Stands in for a layer whose experts need Transformer Engine, so a GPU."""
    grouped = nn.Module()
    grouped.linear_fc1 = Grouped(len(experts))
    moe = nn.Module()
    moe.local_expert_indices, moe.experts = experts, grouped
    made = nn.Module()
    made.layer_number, made.mlp = number, moe
    return made


def names_of(*parts):
    from spectral_dist.integrations.megatron.names import global_names

    return list(global_names(parts).values())


def by_themselves():
    megatron_cpu.install(NEW)
    found = SimpleNamespace()
    model = nn.Module()
    model.layers = nn.ModuleList([layer(3, [4, 5])])
    found.grouped = names_of(model)
    lists = nn.Module()
    lists.layers = nn.ModuleList([layer(1, [0]), layer(1, [1])])
    found.default_numbers = names_of(lists)
    try:
        found.error = names_of(model, model_of(layer(3, [4, 5])))
    except ValueError as error:
        found.error = str(error)
    return vars(found)


def model_of(one):
    model = nn.Module()
    model.layers = nn.ModuleList([one])
    return model


def test_grouped_experts_are_named_like_a_sequence_of_them():
    found = harness.run(1, by_themselves, pool=NEW)[0]
    assert found["grouped"] == [f"layers.2.mlp.experts.{i}.linear_fc1.weight" for i in (4, 5)]
    assert found["default_numbers"] == [
        f"layers.{i}.mlp.experts.{i}.linear_fc1.weight" for i in (0, 1)
    ]
    assert "number layers by layer_number" in found["error"]
