"""Which parameters are matrices, and what the user is told."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist.params.classify import classify
from tests.unit.params.small_models import ModelOf, V, blocks, linear


def kinds(model, **options):
    return {route.name: route.kind for route in classify(model, **options)}


def matrices(model, **options):
    return {route.name for route in classify(model, **options) if route.kind == "matrix"}


def reasons(model, **options):
    return {route.name: route.reason for route in classify(model, **options)}


def test_by_type():
    model = ModelOf(
        embed=nn.Embedding(V, 8),
        bag=nn.EmbeddingBag(10, 8),
        layers=blocks(16, 12),
        norm=nn.LayerNorm(8),
        rms=nn.RMSNorm(8),
        batch=nn.BatchNorm1d(8),
        head=nn.Linear(8, V),
    )
    assert kinds(model) == {
        "embed.weight": "scalar",
        "bag.weight": "scalar",
        "layers.0.up.weight": "matrix",
        "layers.0.up.bias": "scalar",
        "layers.0.down.weight": "matrix",
        "layers.0.down.bias": "scalar",
        "layers.1.up.weight": "matrix",
        "layers.1.up.bias": "scalar",
        "layers.1.down.weight": "matrix",
        "layers.1.down.bias": "scalar",
        "norm.weight": "scalar",
        "norm.bias": "scalar",
        "rms.weight": "scalar",
        "batch.weight": "scalar",
        "batch.bias": "scalar",
        "head.weight": "scalar",
        "head.bias": "scalar",
    }
    why = reasons(model)
    assert why["embed.weight"] == "embedding"
    assert "output head" in why["head.weight"]
    assert why["norm.weight"] == "1-D"


@pytest.mark.parametrize("shape", [(8,), (4, 8), (3, 4, 8)])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_are_no_matrices_whatever_their_shape(norm, shape):
    assert matrices(ModelOf(norm=norm(shape), linear=linear(3))) == {"linear.weight"}


def test_tied_head_is_the_embedding_and_counts_once():
    model = ModelOf(embed=nn.Embedding(V, 8), layers=blocks(16), head=nn.Linear(8, V, bias=False))
    model.head.weight = model.embed.weight
    assert kinds(model)["embed.weight"] == "scalar"
    assert "head.weight" not in kinds(model)
    assert "tied" in reasons(model)["embed.weight"]
    # registered before the embedding, the tied weight bears the head's name
    model = ModelOf(head=nn.Linear(8, V, bias=False), embed=nn.Embedding(V, 8), layers=blocks(16))
    model.head.weight = model.embed.weight
    assert kinds(model)["head.weight"] == "scalar"
    assert "embed.weight" not in kinds(model)


def test_an_inner_linear_of_the_vocabularys_size_is_no_head():
    model = ModelOf(embed=nn.Embedding(V, 8), layers=blocks(V, V), head=nn.Linear(8, V, bias=False))
    inner = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}
    assert matrices(model) == inner
    # tied heads are found by tying, never by size
    model.head.weight = model.embed.weight
    assert matrices(model) == inner


def test_width_equal_to_the_vocabulary():
    layers = nn.ModuleList(ModelOf(up=linear(24, 16), down=linear(16, 24)) for _ in range(2))
    model = ModelOf(embed=nn.Embedding(16, 16), layers=layers, head=linear(16, 16))
    inner = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}
    assert matrices(model) == inner


def test_a_backbone_without_head_whose_width_is_the_vocabulary():
    layers = nn.ModuleList(ModelOf(up=linear(24, 16), down=linear(16, 24)) for _ in range(2))
    model = ModelOf(embed=nn.Embedding(16, 16), layers=layers, norm=nn.LayerNorm(16))
    inner = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}
    assert matrices(model) == inner


def test_the_last_linear_of_a_sequential_is_its_head():
    model = nn.Sequential(
        nn.Embedding(V, 8), linear(12, 8), linear(V, 12), linear(8, V), linear(V, 8)
    )
    assert matrices(model) == {"1.weight", "2.weight", "3.weight"}


def test_a_head_inside_a_numbered_part():
    """Backbone and head as two parts of a Sequential, as pipelines have them."""
    backbone = ModelOf(embed=nn.Embedding(V, 8), layers=blocks(16, 12))
    model = nn.Sequential(backbone, ModelOf(norm=nn.LayerNorm(8), proj=nn.Linear(8, V)))
    inner = {f"0.layers.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}
    assert matrices(model) == inner


def test_a_model_without_embedding_has_no_head():
    model = nn.Sequential(linear(8), linear(10, 8))
    assert matrices(model) == {"0.weight", "1.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    leaves = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    assert matrices(model) == {f"model.layers.{i}.{x}.weight" for i in (0, 1) for x in leaves}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert "output head" in reasons(model)[head]
    assert ("lm_head.weight" in kinds(model)) is not tied


def test_convolutions_are_out_by_the_rest():
    model = ModelOf(
        one=nn.Conv1d(3, 4, 5),
        two=nn.Conv2d(3, 4, (5, 2)),
        three=nn.Conv3d(3, 4, 2),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
        transposed=nn.ConvTranspose2d(3, 4, 2),
    )
    shapes = {r.name: [m.shape for m in r.matrices] for r in classify(model) if r.matrices}
    assert shapes == {"one.weight": [(4, 15)], "two.weight": [(4, 30)], "three.weight": [(4, 24)]}


def test_stacks_of_experts():
    model = ModelOf(linear=linear(3))
    model.experts = nn.Parameter(torch.randn(3, 4, 6))
    model.position = nn.Parameter(torch.randn(1, 9, 6))
    model.table = nn.Parameter(torch.randn(5, 6))
    by_name = {r.name: r for r in classify(model)}
    assert by_name["experts"].kind == "matrix"
    assert [m.shape for m in by_name["experts"].matrices] == [(4, 6)] * 3
    assert len({m.name for m in by_name["experts"].matrices}) == 3
    assert by_name["position"].kind == "scalar"
    assert by_name["table"].kind == "scalar"


def test_overrides():
    model = ModelOf(
        embed=nn.Embedding(V, 8), layers=blocks(16, 12), head=nn.Linear(8, V, bias=False)
    )
    assert matrices(model, matrices=[r"^head\.", "embed"], scalars=[r"layers\.1\..*weight"]) == {
        "embed.weight",
        "head.weight",
        "layers.0.up.weight",
        "layers.0.down.weight",
    }
    assert reasons(model, scalars=[r"0\.up\.weight"])["layers.0.up.weight"] == (
        "scalars: '0\\\\.up\\\\.weight'"
    )


def test_override_of_a_table():
    model = ModelOf(linear=linear(3))
    model.table = nn.Parameter(torch.randn(5, 6))
    assert matrices(model, matrices=["table"]) == {"table", "linear.weight"}


def test_override_of_a_grouped_convolution():
    model = ModelOf(conv=nn.Conv1d(4, 4, 3, groups=2))
    (route, _) = classify(model, matrices=[r"conv\.weight"])
    assert [m.shape for m in route.matrices] == [(4, 6)]


@pytest.mark.parametrize("option", ["matrices", "scalars", "split"])
def test_a_pattern_that_matches_nothing(option):
    given = {"nowhere": 2} if option == "split" else ["nowhere"]
    with pytest.raises(ValueError, match=rf"{option}: 'nowhere' matches no .*up\.weight"):
        classify(ModelOf(up=linear(8)), **{option: given})


@pytest.mark.parametrize("option", ["matrices", "scalars", "split"])
def test_a_pattern_that_is_no_regular_expression(option):
    given = {"(": 2} if option == "split" else ["("]
    with pytest.raises(ValueError, match=rf"{option}: '\(' is no regular expression"):
        classify(ModelOf(up=linear(8)), **{option: given})


@pytest.mark.parametrize("option", ["matrices", "scalars"])
def test_a_lone_string_is_not_taken_letter_by_letter(option):
    """u and p would match other names."""
    model = ModelOf(up=linear(8), plus=linear(8), layer=linear(8), pool=nn.Embedding(3, 4))
    pattern = "up"
    try:
        found = kinds(model, **{option: pattern})
    except ValueError as error:
        assert option in str(error)  # noqa: PT017
    else:
        assert found == kinds(model, **{option: [pattern]})


def test_contradicting_patterns():
    with pytest.raises(
        ValueError, match=r"up\.weight matches both matrices: 'up' and scalars: 'w'"
    ):
        classify(ModelOf(up=linear(8), down=linear(8)), matrices=["up"], scalars=["w"])


def test_a_bias_cannot_be_a_matrix():
    with pytest.raises(ValueError, match=r"matches linear\.bias, which is 1-D"):
        classify(ModelOf(linear=nn.Linear(4, 4)), matrices=["bias"])


def test_frozen_parameters_are_shown_and_left_out(caplog):
    model = ModelOf(first=linear(8), second=linear(8), third=nn.Linear(4, 4))
    model.second.weight.requires_grad_(False)
    assert kinds(model)["second.weight"] == "frozen"
    found = spectral_dist.param_groups(model)
    assert [id(p) for g in found for p in g["params"]] == [
        id(model.first.weight),
        id(model.third.weight),
        id(model.third.bias),
    ]
    assert "not trained" in caplog.text
    assert "second.weight" in caplog.text


def test_all_frozen():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        classify(ModelOf(up=linear(8)).requires_grad_(False))


def test_no_matrix_at_all_is_an_error_with_the_table():
    model = ModelOf(embed=nn.Embedding(V, 8), norm=nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r'(?s)matrices=\["pattern"\].*AdamW +1 .*embed\.weight'):
        spectral_dist.param_groups(model)
    with pytest.raises(ValueError, match="no parameter is a matrix"):
        spectral_dist.tag(model)


def test_the_table(caplog, capsys):
    model = ModelOf(
        embed=nn.Embedding(V, 8),
        layers=blocks(16, 12),
        qkv=linear(24, 8),
        norm=nn.LayerNorm(8),
        frozen=linear(5),
        head=nn.Linear(8, V, bias=False),
    )
    model.frozen.weight.requires_grad_(False)
    spectral_dist.param_groups(model, split={"qkv": 3})
    assert capsys.readouterr().out == ""
    (message,) = caplog.messages
    assert message.startswith("which parameters are matrices")
    row = r"(orthogonalized|AdamW|not trained) +(\d+) +(\d+) +([\d,]+)  "
    rows = [re.match(row, line).groups() for line in message.splitlines()[2:]]
    found = sorted((kind, *(int(n.replace(",", "")) for n in counts)) for kind, *counts in rows)
    assert found == [  # parameters, matrices, numbers
        ("AdamW", 1, 0, V * 8),
        ("AdamW", 1, 0, V * 8),
        ("AdamW", 6, 0, 16 + 12 + 8 + 8 + 8 + 8),
        ("not trained", 1, 0, 20),
        ("orthogonalized", 5, 7, 2 * 8 * 16 + 2 * 8 * 12 + 24 * 8),
    ]


@pytest.mark.parametrize("embedding", [False, True])
def test_lazy_parameters(embedding):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ModelOf(embed=nn.Embedding(V, 8) if embedding else None, lazy=nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"lazy\.weight has no shape yet"):
        classify(model)


def test_integers_cannot_be_trained():
    model = ModelOf(linear=linear(4))
    model.codes = nn.Parameter(torch.zeros(3, 3, dtype=torch.int64), requires_grad=False)
    assert kinds(model)["codes"] == "frozen"
    model.waves = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"waves is torch\.complex64"):
        classify(model)


def test_zero_stage_3_hides_the_shape():
    """DeepSpeed empties parameters and keeps their shape in ds_shape."""
    model = ModelOf(
        embed=nn.Embedding(V, 8), up=linear(12, 8), down=linear(8, 12), head=linear(V, 8)
    )
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    assert matrices(model) == {"up.weight", "down.weight"}
    assert {r.name: r.shape for r in classify(model)}["up.weight"] == (12, 8)


def test_compiled_names():
    model = ModelOf(layers=blocks(16), head=linear(3, 8))
    before = kinds(model)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert kinds(model) == before
    assert kinds(torch.compile(model, backend="eager")) == before
