"""Only what is known to be matrices is one, and what is stored in x out is read out x in."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

import spectral_dist
from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients
from spectral_dist.params.classify import classify
from spectral_dist.params.table import table
from spectral_dist.rules import registry
from tests.support import harness
from tests.support.weights import give_gradients

RULES = [entry.title for entry in registry.entries() if entry.rule is not None]
LINEAR = nn.Linear(3, 3, bias=False)


def found(*layers: nn.Module, **options: Any) -> dict[str, tuple[str, str, list[Any]]]:
    """Of every parameter of two dimensions or more: kind, reason, and its matrices as read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        routes = classify(nn.Sequential(*layers, LINEAR), **options)
    return {
        r.name: (r.kind, r.reason, [m.read_shape for m in r.matrices])
        for r in routes
        if len(r.shape) > 1 and max(r.shape) > 1 and r.parameter is not LINEAR.weight
    }


def old(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return old_weight_norm(layer)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose1d(16, 8, 4), "weight of ConvTranspose1d is no known stack of matrices"),
        (nn.ConvTranspose2d(16, 8, 4), "weight of ConvTranspose2d is no known matrix"),
        (nn.ConvTranspose3d(16, 8, 4), "weight of ConvTranspose3d is no known matrix"),
        (nn.Conv1d(16, 16, 4, groups=2), "Conv1d with groups"),
        (nn.Bilinear(5, 5, 4), "weight of Bilinear is no known stack of matrices"),
        (nn.LSTM(4, 3), "weight_ih_l0 of LSTM is no known matrix"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_matrix(layer: nn.Module, reason: str) -> None:
    kinds = found(layer)
    assert {kind for kind, _, _ in kinds.values()} == {"scalar"}
    assert reason in {why for _, why, _ in kinds.values()}


LAYERS = {
    "linear": lambda: nn.Linear(16, 16), "conv1d": lambda: nn.Conv1d(16, 16, 4),
    "grouped": lambda: nn.Conv1d(16, 16, 4, groups=2), "conv2d": lambda: nn.Conv2d(16, 16, 3),
    "transposed": lambda: nn.ConvTranspose1d(16, 8, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_parametrized_weights_are_none(name: str) -> None:
    """Their directions are no update of the weight that multiplies: all as the grouped ones."""
    layer = parametrizations.weight_norm(LAYERS[name]())
    kind, reason, _ = found(layer)["0.parametrizations.weight.original1"]
    assert (kind, reason) == ("scalar", f"parametrized weight of {type(LAYERS[name]()).__name__}")
    kind, reason, _ = found(old(LAYERS[name]()))["0.weight_v"]
    assert kind == "scalar"
    assert reason.startswith("weight_v of ")
    with_norm = parametrizations.spectral_norm(LAYERS[name]())
    kind, reason, _ = found(with_norm)["0.parametrizations.weight.original"]
    assert (kind, reason.split()[0]) == ("scalar", "parametrized")


def test_named_by_hand_they_are_out_by_the_rest() -> None:
    """And not a stack of as many matrices as there are channels."""
    layers = [
        parametrizations.weight_norm(nn.Conv1d(6, 4, 3)), old(nn.Conv1d(6, 4, 3)),
        nn.ConvTranspose1d(6, 4, 3), parametrizations.weight_norm(nn.Conv2d(6, 4, 3)),
    ]  # fmt: skip
    routing = ["original1", "weight_v", r"^2\.weight"]
    shapes = [m for _, _, m in found(*layers, matrices=routing).values() if m]
    assert shapes == [[(4, 18)], [(4, 18)], [(6, 12)], [(4, 54)]]


class StackedWeight(nn.Module):
    """One parameter of three dimensions."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        setattr(self, name, nn.Parameter(0.3 * torch.randn(*shape)))


def of_class(name: str, module: str = __name__) -> type[StackedWeight]:
    return type(name, (StackedWeight,), {"__module__": module})


@pytest.mark.parametrize(
    "block",
    [
        of_class("MixtralExperts")("gate_up_proj", 3, 8, 6),
        of_class("JetMoeParallelExperts")("weight", 3, 8, 6),
        of_class("DeepseekV3NaiveMoe")("gate_up_proj", 3, 8, 6),
        of_class("GroupedExperts")("w1", 3, 8, 6),
        of_class("FSDPGroupedExperts")("w1", 3, 8, 6),
        StackedWeight("experts", 3, 8, 6),
        nn.ModuleDict({"experts": StackedWeight("w1", 3, 8, 6)}),
        nn.ModuleDict({"shared_experts": StackedWeight("w1", 3, 8, 6)}),
    ],
)
def test_stacks_of_experts(block: nn.Module) -> None:
    ((kind, reason, shapes),) = found(block).values()
    assert (kind, shapes) == ("matrix", [(8, 6)] * 3)
    assert reason.startswith("stack of 3 in ")


@pytest.mark.parametrize(
    "block",
    [
        StackedWeight("r_kernel", 3, 8, 6),
        StackedWeight("position_embeddings", 3, 8, 6),
        of_class("Qwen3MoeVisionEmbedding")("table", 3, 8, 6),
        of_class("MoeModel")("queries", 3, 8, 6),
        nn.ParameterList([nn.Parameter(torch.randn(3, 8, 6))]),
    ],
)
def test_others_are_none_unless_they_are_named(block: nn.Module) -> None:
    ((name, (kind, reason, _)),) = found(block).items()
    assert kind == "scalar"
    assert reason.endswith("is no known stack of matrices")
    assert [m for _, _, m in found(block, matrices=[name]).values()] == [[(8, 6)] * 3]


# -- transformers' own models


def routes_of(model: nn.Module) -> dict[str, Any]:
    return {route.name: route for route in classify(model)}


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=16, n_inner=32
    )
    model = transformers.GPT2LMHeadModel(config)
    routes = routes_of(model)
    shapes = {r.name.split("h.0.")[-1]: [m.read_shape for m in r.matrices] for r in routes.values()
              if r.matrices}  # fmt: skip
    assert shapes == {
        "attn.c_attn.weight": [(8, 8)] * 3, "attn.c_proj.weight": [(8, 8)],
        "mlp.c_fc.weight": [(32, 8)], "mlp.c_proj.weight": [(8, 32)],
    }  # fmt: skip
    assert "Conv1D, read out x in, q, k and v each (GPT2Attention)" in table(list(routes.values()))
    routes = {r.name: r for r in classify(model, split={r"c_attn\.weight": [8, 16]})}
    shapes = [m.read_shape for m in routes["transformer.h.0.attn.c_attn.weight"].matrices]
    assert shapes == [(8, 8), (16, 8)]
    with pytest.raises(ValueError, match="24 rows cannot be cut into 5 equal parts"):
        classify(model, split={r"c_attn\.weight": 5})


def experts(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
              "num_local_experts": 3, "num_experts_per_tok": 1}  # fmt: skip
    if name == "GptOss":
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**common))
    if name == "Mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**common))
    config = transformers.Llama4TextConfig(
        **common, interleave_moe_layer_step=1, intermediate_size_mlp=6, pad_token_id=0
    )
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize("name", ["GptOss", "Llama4", "Mixtral"])
def test_experts_of_transformers(name: str) -> None:
    """Gate and up, (6, 8), and down, (8, 6), are out x in, whatever they are stored as."""
    routes = routes_of(experts(name))
    for leaf, shapes in (("gate_up_proj", [(6, 8)] * 6), ("down_proj", [(8, 6)] * 3)):
        (stack,) = (r for r in routes.values() if r.name.endswith(f"experts.{leaf}"))
        assert [m.read_shape for m in stack.matrices] == shapes
        assert stack.matrices[0].transposed == (name != "Mixtral")
        assert stack.reason.startswith("stack of 3 in ")


def test_audio() -> None:
    """Their convolutions are transposed, grouped behind parametrizations, or weight-normed."""
    transformers = pytest.importorskip("transformers")
    voice = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
        )
    )  # fmt: skip
    routes = routes_of(voice)
    assert routes["upsampler.0.weight"].kind == "scalar"
    assert all(len(r.matrices) < 2 for r in routes.values())
    assert any(r.kind == "matrix" for r in routes.values())
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=8,
    )  # fmt: skip
    routes = routes_of(transformers.Wav2Vec2Model(config))
    grouped = [r for name, r in routes.items() if "pos_conv" in name and len(r.shape) == 3]
    assert grouped
    assert {r.kind for r in grouped} == {"scalar"}


# -- stored in x out


CONV1D = of_class("Conv1D", "transformers.pytorch_utils")
STACK = of_class("GptOssExperts", "transformers.models.gpt_oss.modeling_gpt_oss")
SHAPES = [(6, 10), (10, 6), (8, 8)]


class Plain(nn.Module):
    """The same numbers, out x in, under the same names."""

    def __init__(self, stored: nn.Module) -> None:
        super().__init__()
        for name, block in stored.named_children():
            ((leaf, p),) = block.named_parameters()
            layer = nn.Linear(1, 1, bias=False) if p.ndim == 2 else of_class("Experts")(leaf, 1)
            setattr(layer, leaf, nn.Parameter(p.detach().mT.contiguous()))
            setattr(self, name, layer)


def stored() -> nn.Module:
    blocks = {f"one{i}": CONV1D("weight", *shape) for i, shape in enumerate(SHAPES)}
    blocks |= {f"two{i}": STACK("down_proj", 3, *shape) for i, shape in enumerate(SHAPES)}
    model = nn.ModuleDict(blocks)
    for block in model.values():
        block.__class__.forward = lambda self: next(self.parameters()).square().sum()
    return model


SPLIT = {"(one|two)0": [4, 6], "(one|two)1": [1, 1], "(one|two)2": [1, 2, 1]}
"""Two runs of columns, every second column, every fourth and pairs."""


def optimizer_of(model: nn.Module, title: str, split: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = spectral_dist.param_groups(model, split=split)
        return getattr(spectral_dist, title)(groups, lr=0.02, **options)


def turned(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().mT for name, p in model.named_parameters()}


def train(model: nn.Module, optimizer: Any, first: int, last: int, transposed: bool) -> None:
    """On the same gradients, as they are stored."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(70 + step)
        for p in model.parameters():
            shape = p.shape if transposed else p.mT.shape
            g = torch.randn(shape, generator=generator)
            g = g if transposed else g.mT.contiguous()
            if isinstance(p, DTensor):
                g = torch.distributed.tensor.distribute_tensor(g, p.device_mesh, p.placements)
            p.grad = g
        optimizer.step()


def of_title(title: str) -> dict[str, Any]:
    return {"SUMO": {"rank": 2, "period": 3, "perp_scale": 0.5}}.get(title, {})


@pytest.mark.parametrize("split", [None, SPLIT], ids=["whole", "columns"])
@pytest.mark.parametrize("title", RULES)
@pytest.mark.fast_cases("Muon-whole", "SUMO-columns", "ROOT-whole")
def test_a_rule_reads_them_out_by_in(title: str, split: Any, tmp_path: Path) -> None:
    """The numbers of an nn.Linear, bit by bit; its state and options are those of out x in."""
    for scale in ("original", "spectral") if title not in ("PolarGrad",) else ("",):
        options = {**of_title(title), **({"scale": scale} if scale else {})}
        model = stored()
        plain = Plain(model)
        optimizer, other = (optimizer_of(m, title, split, **options) for m in (model, plain))
        train(model, optimizer, 0, 3, True)
        folder = tmp_path / scale
        spectral_dist.checkpoint.save(folder, model, optimizer)
        model = stored()
        optimizer = optimizer_of(model, title, split, **options)
        spectral_dist.checkpoint.load(folder, model, optimizer)
        train(model, optimizer, 3, 5, True)
        train(plain, other, 0, 5, False)
        for name, p in turned(model).items():
            torch.testing.assert_close(p, plain.get_parameter(name), rtol=0, atol=0)
        mine, theirs = optimizer.matrix_state(), other.matrix_state()
        assert {m: {k: v.shape for k, v in kept.items()} for m, kept in mine.items()} == {
            m: {k: v.shape for k, v in kept.items()} for m, kept in theirs.items()
        }


def test_the_step_has_the_norm_of_its_scale() -> None:
    """GPT-2's c_fc, 8 in and 32 out: sqrt(32 / 8) times the polar factor."""
    for scale in ("original", "spectral"):
        model = nn.ModuleDict({"c_fc": CONV1D("weight", 8, 32)})
        optimizer = optimizer_of(model, "Muon", scale=scale, weight_decay=0.0, polar="svd")
        before = model["c_fc"].weight.detach().clone()
        give_gradients(model, 0)
        optimizer.step()
        change = before - model["c_fc"].weight.detach()
        norm = torch.linalg.matrix_norm(change / 0.02, ord=2)
        assert float(norm) == pytest.approx(2.0, rel=1e-3)


def sharded(title: str, split: Any, strategy: str) -> dict[str, Tensor]:
    model = stored()
    for block in model.values():
        fully_shard(block)
    optimizer = optimizer_of(model, title, split, strategy=strategy, **of_title(title))
    train(model, optimizer, 0, 5, True)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("title", "strategy"),
    [*((title, "owner") for title in RULES), *((t, "gram") for t in ("Muon", "NorMuon", "SUMO"))],
)
@pytest.mark.parametrize("split", [None, SPLIT], ids=["whole", "columns"])
def test_on_two_ranks(title: str, strategy: str, split: Any) -> None:
    model = stored()
    train(model, optimizer_of(model, title, split, **of_title(title)), 0, 5, True)
    for ours in harness.run(2, sharded, title, split, strategy):
        for name, p in model.named_parameters():
            torch.testing.assert_close(ours[name], p.detach(), rtol=0, atol=2e-6)


def replicated(title: str, folder: str) -> dict[str, Tensor]:
    """Train as replicas, of which owners store momentum; save, load into other objects, go on."""
    options = {"process_group": torch.distributed.group.WORLD, **of_title(title)}
    model = stored()
    optimizer = optimizer_of(model, title, SPLIT, **options)
    train(model, optimizer, 0, 2, True)
    spectral_dist.checkpoint.save(folder, model, optimizer)
    optimizer.consolidate_state_dict()
    whole = optimizer.state_dict()
    model = stored()
    optimizer = optimizer_of(model, title, SPLIT, **options)
    spectral_dist.checkpoint.load(folder, model, optimizer)
    train(model, optimizer, 2, 3, True)
    weights = [p.detach().clone() for p in model.parameters()]
    other = optimizer_of(model, title, SPLIT, **options)
    spectral_dist.checkpoint.load(folder, model, optimizer)
    other.load_state_dict(whole)
    train(model, other, 2, 3, True)
    for p, wanted in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=0)
    train(model, other, 3, 5, True)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("title", ["Muon", "SUMO"])
def test_columns_of_replicas(title: str, tmp_path: Path) -> None:
    model = stored()
    train(model, optimizer_of(model, title, SPLIT, **of_title(title)), 0, 5, True)
    for ours in harness.run(2, replicated, title, str(tmp_path)):
        for name, p in model.named_parameters():
            torch.testing.assert_close(ours[name], p.detach(), rtol=0, atol=2e-6)


def projected() -> str:
    model = nn.parallel.DistributedDataParallel(stored())
    optimizer = optimizer_of(model, "SUMO", rank=2, perp_scale=0)
    with pytest.raises(ValueError, match="stored in x out") as raised:
        project_gradients(model, optimizer)
    return str(raised.value)


def test_projected_gradients_are_refused() -> None:
    assert len(harness.run(2, projected)) == 2
