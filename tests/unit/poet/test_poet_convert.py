"""What convert rotates and refuses, how W starts, and export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_dist
from spectral_dist import poet
from spectral_dist.params.classify import classify
from spectral_dist.poet.layer import PoetLinear
from tests.support import models
from tests.unit.poet.rotated_layers import One, rotated, spin, weight_of

FITS = {"block": 8, "blocks": {"unused": (8, 3)}}


def tiny(**settings):
    return poet.convert(models.build(layers=1), **{**FITS, **settings})


def llama(**kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "tie_word_embeddings": False, **kwargs}))


def rotated_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, PoetLinear)}


# -- which layers


def test_every_linear_but_the_head_and_frozen_ones():
    model = tiny()
    assert rotated_names(model) == {
        *(f"layers.0.{leaf}" for leaf in ("qkv", "out", "up", "down")),
        "unused",
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"embed.weight", "head.weight", "experts", "layers.0.out.bias"} < trained
    assert not any(name.endswith("qkv.weight") for name in trained)
    routes = {r.name: (r.kind, r.layer) for r in classify(model)}
    assert routes["layers.0.up.skew_in"] == ("skew", model.layers[0].up)
    assert routes["head.weight"][0] == routes["experts"][0] == "scalar"
    assert routes["layers.0.up.weight"] == ("frozen", None)


def test_patterns_leave_out_and_take_in():
    model = tiny(
        scalars=[r"\.up\.weight"], matrices=["head"], blocks={"unused": (8, 3), "head": (8, 61)}
    )
    names = rotated_names(model)
    assert "head" in names
    assert "layers.0.up" not in names
    assert model.layers[0].up.weight.requires_grad


def test_blocks_of_a_pattern():
    up = tiny(blocks={"unused": [8, 3], r"\.up$": (12, 7), "qkv": 6}).layers[0].up
    assert (up.inner[0].block, up.outer[0].block) == (12, 7)
    assert up.skew_in.shape == (2 * 66,)
    assert up.skew_out.shape == (8 * 21,)


def attention(cls=nn.MultiheadAttention):
    model = nn.Module()
    model.attention, model.up = cls(8, 2), nn.Linear(8, 8)
    return model


def test_a_linear_whose_forward_is_never_called_is_not_rotated():
    assert rotated_names(poet.convert(attention(), block=4)) == {"up"}


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def compiled():
    """What torch.compile gives, without its import of a second."""
    wrapper = nn.Module()
    wrapper._orig_mod = models.build(layers=1)
    return wrapper


REFUSED = [
    (models.build, {"blok": 8}, "unknown setting 'blok'; did you mean 'block'"),
    (models.build, {"block": 1}, "block is 1; write a whole number, at least 2"),
    (models.build, {"block": 0.5}, "block is 0.5"),
    (models.build, {"block": True}, "block is True"),
    (models.build, {"form": "fully_stochastic", "block": 1.5}, "block is 1.5; write a fraction"),
    (models.build, {"blocks": {"up": (2, 3, 4)}}, r"blocks: 'up' is \(2, 3, 4\)"),
    (models.build, {"blocks": 8}, "blocks is 8"),
    (models.build, {"segments": 0}, "segments is 0"),
    (models.build, {"seed": 1.5}, "seed is 1.5"),
    (models.build, {"order": 5}, "order is 5"),
    (models.build, {"order": "exat"}, "did you mean 'exact'"),
    (models.build, {"form": "block_stochastics"}, "did you mean 'block_stochastic'"),
    (models.build, {"variant": "mem"}, "variant is 'mem'"),
    (models.build, {"init": "normal"}, "did you mean 'normalized'"),
    (models.build, {"block": 8}, r"(?s)unused/out: block 8.*3 does"),
    (models.build, {**FITS, "blocks": {"unused": 2, "nothing": 4}}, "unused/out"),
    (models.build, {"block": 8, "blocks": {"unused": (8, 3), "upp": 4, r"1\.": 2}}, "1.up"),
    (lambda: models.build(layers=1), {**FITS, "blocks": {"unused": (8, 3), "upp": 4}},
     "blocks: 'upp' matches no"),
    (lambda: models.build(layers=1), {**FITS, "scalars": ["nothing"]}, "'nothing' matches no"),
    (lambda: models.build(layers=1), {**FITS, "matrices": ["experts"]}, "experts, no nn.Linear"),
    (tied, {"block": 4}, r"0 and 2 have one weight.*scalars=\['0'\]"),
    (tiny, FITS, "converted already"),
    (compiled, FITS, "before it is wrapped"),
    (lambda: nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), {"block": 2}, "no "),
]  # fmt: skip


@pytest.mark.parametrize(("make", "settings", "text"), REFUSED)
def test_what_convert_refuses(make, settings, text):
    model = make()
    kept = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=text):
        poet.convert(model, **settings)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == kept


def test_all_layers_that_do_not_fit_are_named_and_none_is_changed():
    model = models.build()
    with pytest.raises(ValueError, match="does not divide") as error:
        poet.convert(model, block=8, init="normalized")
    for name in ("layers.1.up/out", "layers.1.down/in", "unused/out"):
        assert name in str(error.value)
    assert "layers.0" not in str(error.value)
    assert not rotated_names(model)
    assert torch.equal(model.layers[0].up.weight, models.build().layers[0].up.weight)


def test_layers_that_differ_in_their_number_are_named_together():
    with pytest.raises(ValueError, match=r"layers\.0\.qkv/in and 2 like it: ") as error:
        poet.convert(models.build(layers=3, odd=False), block=7)
    assert "layers.2.qkv" not in str(error.value)
    assert "layers.1.up/out" in str(error.value)  # 61 outputs, where layers.0.up has 56


# -- the W to start from


def test_initial_weights():
    made = {init: tiny(init=init) for init in ("own", "normalized", "uniform_spectrum")}
    for name in rotated_names(made["own"]):
        weight = {init: m.get_submodule(name).weight.detach() for init, m in made.items()}
        assert torch.equal(weight["own"], models.build(layers=1).get_submodule(name).weight)
        norms = torch.linalg.vector_norm(weight["normalized"], dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
        s = torch.linalg.svdvals(weight["uniform_spectrum"])
        torch.testing.assert_close(s, torch.ones_like(s), rtol=0, atol=1e-6)
    square = made["normalized"].layers[0].out.weight
    assert abs(square.mean()) < 0.05  # and not the rows of an identity
    assert square.abs().max() < 0.9


@pytest.mark.parametrize("init", ["normalized", "uniform_spectrum"])
def test_initial_weights_depend_on_the_name_and_seed_alone(init):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = rotated(init=init, dtype=torch.float32).weight
    torch.rand(3)
    assert torch.equal(rotated(init=init, dtype=torch.float32).weight, one)
    assert torch.equal(rotated(init=init, start=4, bias=False).weight.float(), one)
    assert not torch.equal(poet.convert(One(), init=init, block=4, seed=1).up.weight.float(), one)
    model = poet.convert(llama(), block=4, init=init)
    a, b = (layer.self_attn.q_proj.weight for layer in model.model.layers)
    assert not torch.equal(a, b)
    torch.set_rng_state(before)


# -- numbers of parameters


def test_numbers_of_parameters():
    for b_in, b_out in ((5, 3), (10, 12), (2, 2)):
        layer = rotated(blocks={"up": (b_in, b_out)})
        count = sum(p.numel() for p in layer.skews.values())
        assert count == 12 * (b_out - 1) / 2 + 20 * (b_in - 1) / 2
        layer = rotated(blocks={"up": (b_in, b_out)}, form="fully_stochastic")
        count = sum(p.numel() for p in layer.skews.values())
        assert count == (b_out * (b_out - 1) + b_in * (b_in - 1)) / 2
    assert sum(p.numel() for p in rotated(block=4, blocks={}).skews.values()) == 32 * 3 / 2


@pytest.mark.parametrize(("block", "trainable"), [(256, 366_635_520), (512, 570_059_264)])
def test_llama_3b_as_published(block, trainable):
    """arXiv 2603.05500, table of trainable numbers: 366.64M and 570.06M."""
    with torch.device("meta"):
        model = llama(hidden_size=2560, intermediate_size=7168, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)  # fmt: skip
    poet.convert(model, block=block)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert all(p.is_meta for p in model.parameters())


# -- export


@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
def test_an_exported_model_is_a_plain_one_with_the_same_logits(form):
    model = poet.convert(llama(attention_bias=True), block=4, form=form)
    optimizer = spectral_dist.POET(spectral_dist.param_groups(model), lr=0.02, merge_every=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        tokens = torch.randint(31, (4, 9), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert model.model.layers[0].mlp.up_proj.merges == 2
    state = {k: v.clone() for k, v in model.state_dict().items()}
    exported = poet.export(model, optimizer)
    plain = llama(attention_bias=True)
    assert list(exported) == list(plain.state_dict())
    start = plain(tokens).logits
    plain.load_state_dict(exported, strict=True)
    with torch.no_grad():
        logits = model(tokens).logits
        assert (plain(tokens).logits - logits).abs().max() <= 1e-5
        assert (start - logits).abs().max() > 0.1
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    exported["model.norm.weight"].zero_()
    assert model.model.norm.weight.all()


def test_export_keeps_dtypes_and_rounds_once():
    model = One(dtype=torch.float32)
    poet.convert(model, blocks={"up": (5, 3)})
    spin(model)
    model.bfloat16()
    for skew in model.up.skews.values():
        skew.data = skew.data.float()
    found = poet.export(model)["up.weight"]
    assert found.dtype == torch.bfloat16
    expected = weight_of(model.up)
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    exact = (found == expected.bfloat16()).float().mean()
    assert exact > 0.97  # the rest lies on a boundary of rounding
