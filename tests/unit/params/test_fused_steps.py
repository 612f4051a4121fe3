"""Rows of q, k, v, gate and up as transformers' own forward reads them, and steps on them.

Which rows of a weight make up a head is found by differentiating what the attention function gets:
a head's query depends on the rows of that head, and on no others. The registry is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectral_dist
from spectral_dist.params.classify import classify
from spectral_dist.params.spec import ParamSpec
from tests.reference import rules
from tests.unit.params.tiny_transformers import CONFIGS, build

transformers = pytest.importorskip("transformers")
Rows = frozenset[int]
Record = list[tuple[Tensor, Tensor, Tensor]]
OPTIONS = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "nesterov": True, "scale": "spectral"}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Phi-3": ("Phi3ForCausalLM", {}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {}),
    "Falcon, multi-query": ("FalconForCausalLM", {}),
    "Falcon, of a head": ("FalconForCausalLM", {"multi_query": False}),
    "Falcon, of a group": ("FalconForCausalLM", {"new_decoder_architecture": True,
                                                 "num_kv_heads": 2}),
    "Persimmon": ("PersimmonForCausalLM", {"qk_layernorm": False}),
    "CodeGen": ("CodeGenForCausalLM", {}),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", {}),
    "GPT-BigCode, of a head": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "DBRX": ("DbrxForCausalLM", {}),
    "ModernBERT": ("ModernBertForMaskedLM", {}),
    "JetMoE": ("JetMoeForCausalLM", {}),
    "SAM": ("SamVisionModel", {}),
    "Whisper": ("WhisperModel", {}),
    "T5": ("T5ForConditionalGeneration", {}),
    "BERT": ("BertForMaskedLM", {}),
    "GPT-OSS": ("GptOssForCausalLM", {}),
    "Mixtral": ("MixtralForCausalLM", {}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {}),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-2 as a decoder": ("GPT2LMHeadModel", {"add_cross_attention": True}),
}  # fmt: skip
GATED = {"Phi-3": "activation_fn", "ModernBERT": "act"}


def example(model: Any) -> dict[str, Tensor]:
    """Inputs of a model, which is told to take its experts one by one: in float64, too."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    torch.manual_seed(5)
    name = type(model).__name__
    if "Vision" in name:
        return {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
    tokens = torch.randint(3, 60, (1, 5))
    if name == "WhisperModel":
        features = torch.randn(1, 8, 32, dtype=torch.float64)
        return {"input_features": features, "decoder_input_ids": tokens}
    if name == "T5ForConditionalGeneration":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    if getattr(model.config, "add_cross_attention", False):
        states = torch.randn(1, 4, 32, dtype=torch.float64)
        return {"input_ids": tokens, "encoder_hidden_states": states}
    return {"input_ids": tokens}


@contextmanager
def recorded() -> Iterator[Record]:
    """Yield a list that is filled with q, k and v of each attention, as (batch, head, token, n)."""
    record: Record = []
    original = functional.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record.append((q, k, v))
        return original(q, k, v, *args, **kwargs).detach()  # what comes later is of other weights

    functional.scaled_dot_product_attention = attend
    try:
        yield record
    finally:
        functional.scaled_dot_product_attention = original


def probe(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """An attention function of transformers' that gives q, k and v to ``recorded``."""
    repeats = q.shape[1] // k.shape[1]
    for record in RECORDS:
        record.append((q, k, v))
    wide_k, wide_v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    weights = (q @ wide_k.mT).softmax(-1)
    return (weights @ wide_v).transpose(1, 2).contiguous().detach(), None


RECORDS: list[Record] = []


def attention_heads(model: Any) -> list[list[Tensor]]:
    """Return the heads of q, k and v of each attention of a model, as its forward has them."""
    transformers.AttentionInterface.register("probe", probe)
    with recorded() as record:
        RECORDS.append(record)
        if not type(model).__name__.startswith(("Falcon", "Sam")):
            model.set_attn_implementation("probe")
        model(**example(model))
        RECORDS.pop()
    assert record
    return [list(part.unbind(1)) for parts in record for part in parts]


def rows_behind(number: Tensor, weight: Tensor, inputs: int = 1) -> Rows:
    """The rows (outputs) of a weight that some numbers depend on; ``inputs``: its other dim."""
    weighted = (number * torch.randn_like(number)).sum()
    (gradient,) = torch.autograd.grad(
        weighted, weight, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return frozenset(gradient.abs().amax(inputs).nonzero().flatten().tolist())


def attention_rows(model: nn.Module, weight: Tensor, per_head: bool, inputs: int = 1) -> set[Rows]:
    """The rows of q, k and v in a weight of attention, each over all heads or each of a head."""
    result = set()
    for heads in attention_heads(model):
        each = [rows_behind(head, weight, inputs) for head in heads]
        result |= set(each) if per_head else {frozenset().union(*each)}
    return result - {frozenset()}


def gate_rows(model: Any, name: str, act: str, weight: Tensor) -> set[Rows]:
    """The rows of gate, which are what the activation gets, and the rest."""
    given: list[Tensor] = []
    mlp = model.get_submodule(name.rsplit(".", 2)[0])
    hook = getattr(mlp, act).register_forward_pre_hook(lambda _, x: given.append(x[0]))
    model(**example(model))
    hook.remove()
    gate = rows_behind(given[0], weight)
    return {gate, frozenset(range(len(weight))) - gate}


def rows_of(spec: ParamSpec) -> set[Rows]:
    """The rows of each matrix of a parameter of two dimensions, as classify has found them."""
    width = spec.shape[1]
    if spec.matrices[0].transposed:
        return {
            frozenset(
                first + k for _, first, count in m.column_runs(0, width) for k in range(count)
            )
            for m in spec.matrices
        }
    return {
        frozenset(row for first, count in m.blocks for row in range(first // width,
                                                                    first // width + count))
        for m in spec.matrices
    }  # fmt: skip


def is_attention(name: str) -> bool:
    words = "q_proj k_proj v_proj qkv_proj qkv Wqkv query key value query_key_value kv_proj"
    words += " c_attn q_attn"
    leaf = name.split(".")[-2]
    return leaf in words.split() or ("Attention." in name and leaf in "qkv")


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "DeepSeek-V3"])
def test_rows_are_those_of_forward(name: str, per_head: bool) -> None:
    class_name, changes = MODELS[name]
    model = build(class_name, **changes).double().eval()
    checked = 0
    for spec in classify(model, heads="auto" if per_head else None):
        if spec.kind == "matrix" and len(spec.shape) == 2 and is_attention(spec.name):
            inputs = 0 if spec.matrices[0].transposed else 1
            rows = attention_rows(model, spec.parameter, per_head, inputs)
            assert rows_of(spec) == rows, spec.name
            checked += 1
        elif len(spec.matrices) == 2 and name in GATED:
            expected = gate_rows(model, spec.name, GATED[name], spec.parameter)
            assert rows_of(spec) == expected
            checked += 1
    assert checked


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("class_name", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"])
def test_rows_of_gated_queries(class_name: str, per_head: bool) -> None:
    """Between the heads of q lie those of the output gate, which attention does not get."""
    model = build(class_name).double().eval()
    specs = classify(model, heads="auto" if per_head else None)
    (spec,) = (s for s in specs if s.name.endswith("q_proj.weight"))
    queries = attention_rows(model, spec.parameter, per_head)
    gates = rows_of(spec) - queries
    assert queries < rows_of(spec)
    assert [len(rows) for rows in gates] == [len(rows) for rows in queries]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("class_name", ["BloomForCausalLM", "DebertaModel"])
def test_rows_where_attention_is_not_a_function(class_name: str, per_head: bool) -> None:
    """These cut the output of their fused layer by a method of their own."""
    model: Any = build(class_name).double().eval()
    specs = classify(model, heads="auto" if per_head else None)
    (spec,) = (s for s in specs if len(s.shape) == 2 and s.name.endswith(FUSED_LEAVES))
    attention = model.get_submodule(spec.name.rsplit(".", 2)[0])
    fused = torch.randn(1, 5, 32, dtype=torch.float64) @ spec.parameter.mT
    if class_name == "BloomForCausalLM":
        parts = attention._reshape(fused)
    else:
        parts = attention.transpose_for_scores(fused).chunk(3, dim=-1)
    heads = [[rows_behind(head, spec.parameter) for head in part.unbind(1)] for part in parts]
    expected = {rows for part in heads for rows in part}
    assert rows_of(spec) == (expected if per_head else {frozenset().union(*p) for p in heads})


FUSED_LEAVES = ("query_key_value.weight", "in_proj.weight")


def latent_rows(model: nn.Module, per_head: bool) -> dict[str, set[Rows]]:
    """The rows of MLA's weights in the first layer, by the names of their layers."""
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    q, k, v = attention_heads(model)[:3]
    up, down = attention.kv_b_proj.weight, attention.kv_a_proj_with_mqa.weight
    queries = [rows_behind(head, attention.q_b_proj.weight) for head in q]
    parts = [[rows_behind(head, up) for head in heads] for heads in (k, v)]
    latent = rows_behind(v[0], down)
    return {
        "q_b_proj": set(queries) if per_head else {frozenset().union(*queries)},
        "kv_b_proj": {rows for part in parts for rows in part}
        if per_head
        else {frozenset().union(*part) for part in parts},
        "kv_a_proj_with_mqa": {latent, rows_behind(k[0], down) - latent},
    }


@pytest.mark.parametrize("per_head", [False, True])
def test_rows_of_latent_attention(per_head: bool) -> None:
    model = build("DeepseekV3ForCausalLM").double().eval()
    specs = {s.name: s for s in classify(model, heads="auto" if per_head else None)}
    for leaf, rows in latent_rows(model, per_head).items():
        assert rows_of(specs[f"model.layers.0.self_attn.{leaf}.weight"]) == rows, leaf


def test_gate_and_up_of_experts() -> None:
    """The activation gets the rows of gate."""
    model: Any = build("MixtralForCausalLM").double().eval()
    experts = model.model.layers[0].mlp.experts
    (spec,) = (s for s in classify(model) if s.name.endswith("experts.gate_up_proj"))
    given: list[Tensor] = []
    experts.act_fn.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    model(**example(model))
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in given), experts.gate_up_proj)
    used = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
    rows = [(first // 32 % 96, count) for m in spec.matrices[:2] for first, count in m.blocks]
    assert used == list(range(48))
    assert rows == [(0, 48), (48, 48)]


# -- steps


def by_hand(weight: Tensor, gradient: Tensor, rows: set[Rows]) -> Tensor:
    """A weight after one step on each matrix that some rows of it are."""
    result = weight.clone()
    for each in rows:
        index = torch.tensor(sorted(each))
        part, g = weight[index].clone(), gradient[index]
        rules.muon(part, g, torch.zeros_like(part), OPTIONS, rules.svd)
        result[index] = part
    return result


def step(model: nn.Module, heads: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take one step of Muon with random gradients; return those, and the weights before it."""
    torch.manual_seed(9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = spectral_dist.param_groups(model, heads=heads)
    optimizer = spectral_dist.Muon(groups, polar="qdwh", **OPTIONS)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients, before


def check(after: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("heads", [None, "auto"])
@pytest.mark.parametrize(
    "name", ["Llama", "GPT-NeoX", "Falcon, of a group", "Phi-3", "DeepSeek-V3", "GPT-OSS"]
)
@pytest.mark.fast_cases("GPT-OSS-auto", "DeepSeek-V3-auto", "Phi-3-auto")
def test_a_step_is_that_of_the_plain_matrices(name: str, heads: str | None) -> None:
    class_name, changes = MODELS[name]
    model = build(class_name, **changes).double().eval()
    expected_rows: dict[str, set[Rows]] = {}
    if name == "DeepSeek-V3":
        prefix = "model.layers.0.self_attn."
        latent = latent_rows(model, heads is not None)
        expected_rows = {f"{prefix}{leaf}.weight": rows for leaf, rows in latent.items()}
    else:
        for key, weight in model.named_parameters():
            if weight.ndim == 2 and is_attention(key):
                expected_rows[key] = attention_rows(model, weight, heads is not None)
            elif key.endswith("gate_up_proj.weight"):
                expected_rows[key] = gate_rows(model, key, GATED[name], weight)
    gradients, before = step(model, heads)
    assert expected_rows
    for key, after in model.named_parameters():
        if key in expected_rows:
            check(after, by_hand(before[key], gradients[key], expected_rows[key]), key)
        elif key.endswith(("o_proj.weight", "down_proj.weight", "dense.weight")):
            check(after, by_hand(before[key], gradients[key], {frozenset(range(len(after)))}), key)
        elif name == "GPT-OSS" and key.endswith("experts.down_proj"):
            for w, g, moved in zip(before[key], gradients[key], after, strict=True):
                check(moved.mT, by_hand(w.mT, g.mT, {frozenset(range(w.shape[1]))}), key)


@pytest.mark.parametrize("heads", [None, "auto"])
def test_a_step_of_gpt2(heads: str | None) -> None:
    """A Conv1D gives what a Linear of its transpose gives, and steps as that does."""
    model = build("GPT2LMHeadModel").double().eval()
    x = torch.randn(2, 32, dtype=torch.float64)
    conv: Any = model.get_submodule("transformer.h.0.mlp.c_fc")
    torch.testing.assert_close(conv(x), functional.linear(x, conv.weight.mT, conv.bias))
    key = "transformer.h.0.attn.c_attn.weight"
    parts = attention_rows(model, model.get_parameter(key), heads is not None, 0)
    gradients, before = step(model, heads)
    names = [n for n, p in model.named_parameters() if ".h.0." in n and p.ndim == 2]
    assert len(names) == 4
    for key in names:
        rows = parts if "c_attn" in key else {frozenset(range(before[key].shape[1]))}
        expected = by_hand(before[key].mT, gradients[key].mT, rows)
        check(model.get_parameter(key).mT, expected, key)


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_a_step_of_gate_and_up_of_experts(class_name: str) -> None:
    """Mixtral's are one above the other; GPT-OSS stores them in x out, each in every second."""
    model = build(class_name).double().eval()
    gradients, before = step(model, None)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {frozenset(range(48)), frozenset(range(48, 96))}
    if class_name == "GptOssForCausalLM":
        parts = {frozenset(range(0, 96, 2)), frozenset(range(1, 96, 2))}
    for each in zip(before[key], gradients[key], model.get_parameter(key), strict=True):
        w, g, moved = (x.mT for x in each) if class_name == "GptOssForCausalLM" else each
        check(moved, by_hand(w, g, parts), key)


def test_gate_and_up_of_gpt_oss() -> None:
    """What its gate function makes of gate alone does not depend on the rows of up."""
    model: Any = build("GptOssForCausalLM").double().eval()
    experts = model.model.layers[0].mlp.experts
    fused = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    fused.data[:, 1::2] = experts.limit + 1.0  # where up is clamped, nothing depends on it
    experts._apply_gate(fused).sum().backward()
    assert fused.grad is not None
    used = fused.grad.abs().amax(0).nonzero().flatten().tolist()
    specs = {s.name: s for s in classify(model)}
    gate = specs["model.layers.0.mlp.experts.gate_up_proj"].matrices[0]
    assert gate.columns is not None
    ((first, count),) = gate.columns.runs
    assert used == [first + gate.columns.step * k for k in range(count)]


def test_a_step_of_dbrx_experts() -> None:
    """Three experts of 48 rows: w1 and v1 multiply transposed, w2 as it is stored."""
    model = build("DbrxForCausalLM").double().eval()
    gradients, before = step(model, None)
    prefix = "transformer.blocks.0.ffn.experts.mlp."
    for leaf in ("w1", "v1", "w2"):
        key = prefix + leaf
        for k in range(3):
            rows = slice(48 * k, 48 * k + 48)
            parts = [x[rows] for x in (before[key], gradients[key], model.get_parameter(key))]
            w, g, moved = [x.mT if leaf == "w2" else x for x in parts]
            check(moved, by_hand(w, g, {frozenset(range(len(w)))}), key)


def test_models_are_known() -> None:
    assert {class_name for class_name, _ in MODELS.values()} <= CONFIGS.keys()
