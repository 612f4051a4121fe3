"""What spectral_dist.SUMO keeps and how much of it, its options, and how it is resumed."""

from __future__ import annotations

import copy
import gc
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist.params.classify import classify
from tests.reference.sumo import galore_numbers, number, sumo_numbers
from tests.support import models
from tests.support.weights import Weights, give_gradients, mixed_model, same, values
from tests.unit.rules.sumo_steps import equal, state_of, sumo

CONFIGS = Path(spectral_dist.__file__).parent / "configs" / "models"


def numbers(state):
    return sum(value.numel() for value in state.values())


# -- how much is kept


@pytest.mark.parametrize("rank", [1, 2, 0.25, 0.5])
def test_numbers_kept_of_each_matrix(rank):
    """Of a split weight and of stacked ones too: r (m + n), the norm and the steps."""
    model = models.build()
    optimizer = sumo(model, split={"qkv": 3}, rank=rank, period=2)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
        shapes = {f"layers.{i}.qkv.weight/{j}": (24, 24) for i in (0, 1) for j in (0, 1, 2)}
        shapes |= {f"layers.{i}.out.weight": (24, 24) for i in (0, 1)}
        shapes |= {"layers.0.up.weight": (56, 24), "layers.1.up.weight": (61, 24)}
        shapes |= {"layers.0.down.weight": (24, 56), "layers.1.down.weight": (24, 61)}
        shapes |= {f"experts[{k}]": (24, 7) for k in range(3)} | {"unused.weight": (3, 24)}
        states = state_of(optimizer)
        assert states.keys() == shapes.keys()
        for name, (m, n) in shapes.items():
            r, state = number(rank, m, n), states[name]
            assert state.keys() == {"basis", "moment", "norm", "step"}
            assert state["basis"].shape == (max(m, n), r)
            assert state["moment"].shape == (r, min(m, n))
            assert numbers(state) == sumo_numbers(m, n, r)
            assert state["basis"].dtype == torch.float32


def storages():
    """id -> elements of all storages of floating-point tensors that are alive."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, nn.Parameter) and x.is_floating_point() and x.numel():
            size = x.untyped_storage().nbytes() // x.element_size()
            found[x.untyped_storage().data_ptr()] = size
    return found


def reachable(x, seen=None):
    """All tensors that an object leads to."""
    seen = set() if seen is None else seen
    if id(x) in seen or isinstance(x, type | str | bytes | int | float | type(gc)):
        return
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        yield x
        return
    inside = []
    if isinstance(x, dict):
        inside = [*x.keys(), *x.values()]
    elif isinstance(x, list | tuple | set | frozenset):
        inside = list(x)
    else:
        inside = [vars(x)] if hasattr(x, "__dict__") else []
        slots = itertools.chain(*(getattr(c, "__slots__", ()) for c in type(x).__mro__))
        inside += [getattr(x, name) for name in slots if hasattr(x, name)]
    for part in inside:
        yield from reachable(part, seen)


def test_no_buffer_of_a_matrixs_size_outlives_a_step():
    """Nothing but the states and the weights, wherever an optimizer could hide it."""
    shapes = {"tall": (97, 61), "wide": (59, 101), "square": (83, 83)}
    model = Weights(**shapes)
    before = storages()
    optimizer = sumo(model, rank=7, period=2)
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    optimizer.zero_grad()
    wanted = sum(sumo_numbers(m, n, 7) for m, n in shapes.values())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for found in (storages(), {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4
                               for x in reachable(optimizer)}):  # fmt: skip
        new = {k: size for k, size in found.items() if k not in before and k not in weights}
        assert sum(new.values()) < wanted + 100
        assert max(new.values()) <= 7 * (101 + 59)
    kept = sum(numbers(state) for state in optimizer.matrix_state().values())
    assert kept == wanted
    for p in model.parameters():
        assert sum(x.numel() for x in optimizer.state.get(p, {}).values()) <= 1
        assert "exp_avg" not in optimizer.state.get(p, {})


def bytes_kept(shapes, r):
    """In float32, of matrices alone: embeddings, head and norms are AdamW's beside each of them."""
    return {
        "SUMO": 4 * sum(sumo_numbers(m, n, r) for m, n in shapes),
        "GaLore": 4 * sum(galore_numbers(m, n, r) for m, n in shapes),
        "Muon": 4 * sum(m * n for m, n in shapes),
        "AdamW": 4 * sum(2 * m * n for m, n in shapes),
    }


def llama(**smaller):
    """configs/models/llama_1b.json without its values, or smaller with values; its matrices."""
    build = pytest.importorskip("spectral_dist.launch.llama")
    config = build.load_config(CONFIGS / "llama_1b.json")
    for name, value in smaller.items():
        setattr(config, name, value)
    with torch.device("cpu" if smaller else "meta"):
        model = build.LlamaForCausalLM(config)
    routes = classify(model)
    return model, [matrix.shape for route in routes for matrix in route.matrices]


def test_bytes_of_a_language_model_of_one_billion():
    """At r = 512, as in the paper, SUMO < GaLore < Muon < AdamW."""
    model, shapes = llama()
    assert Counter(shapes) == {(2048, 2048): 96, (5461, 2048): 48, (2048, 5461): 24}
    found = bytes_kept(shapes, 512)
    assert found == {
        "SUMO": 1_912_553_472 + 168 * 8,
        "GaLore": 3_120_463_872,
        "Muon": 4_831_641_600,
        "AdamW": 9_663_283_200,
    }
    assert list(found.values()) == sorted(found.values())
    optimizer = sumo(model, rank=512)
    optimizer.initialize_state()  # meta device: also a float64 norm and an int64 count each
    kept = [x for state in optimizer.matrix_state().values() for x in state.values()]
    assert sum(x.nbytes for x in kept) == found["SUMO"] + 168 * 8
    others = sum(p.numel() for p in model.parameters()) - found["Muon"] // 4
    assert others == 131_172_352  # beside which there are 8 bytes each of AdamW's


def test_bytes_are_what_the_formulas_say():
    """Of that model at a 32nd of its width."""
    model, shapes = llama(hidden_size=64, intermediate_size=171, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=2, vocab_size=11)  # fmt: skip
    wanted = bytes_kept(shapes, 16)
    optimizers = (sumo(model, rank=16), spectral_dist.Muon(spectral_dist.param_groups(model)))
    give_gradients(model, 0)
    for optimizer in optimizers:
        optimizer.step()
    kept = [x for state in optimizers[0].matrix_state().values() for x in state.values()]
    assert sum(torch.as_tensor(x).numel() * 4 for x in kept) == wanted["SUMO"]
    matrices = [g for g in optimizers[1].param_groups if g["kind"] == "matrix"]
    momenta = [optimizers[1].state[p]["exp_avg"] for g in matrices for p in g["params"]]
    assert sum(x.nbytes for x in momenta) == wanted["Muon"]


# -- options


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("rank", -1), ("rank", True), ("rank", 1.5), ("rank", 0.0), ("rank", "a"),
     ("rank", -0.5), ("rank", float("nan")), ("rank", None), ("period", 0), ("period", 2.5),
     ("period", True), ("limiter", 0.5), ("limiter", -1.0), ("limiter", float("nan")),
     ("perp_scale", -0.1), ("perp_scale", "all"), ("refresh_below", -1.0), ("seed", 0.5),
     ("momentum", 1.0), ("strategy", "block"), ("scale", "foo"), ("basis", "foo"),
     ("replicate_momentum", True)],
)  # fmt: skip
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"SUMO: {option} is "):
        sumo(Weights(a=(3, 4)), **{option: value})


@pytest.mark.parametrize("option", ["nesterov", "polar", "polar_dtype", "polar_steps",
                                    "polar_first", "quantile"])  # fmt: skip
def test_options_of_others_are_unknown(option):
    with pytest.raises(ValueError, match=f"SUMO: unknown option '{option}'"):
        sumo(Weights(a=(3, 4)), **{option: 1})


def test_the_nearest_basis_is_suggested():
    with pytest.raises(ValueError, match=r"basis is 'randomised'.*did you mean 'randomized'"):
        sumo(Weights(a=(3, 4)), basis="randomised")


def test_a_group_has_a_rank_of_its_own():
    model = Weights(a=(9, 6))
    groups = spectral_dist.param_groups(model)
    groups[0]["rank"] = 3
    optimizer = spectral_dist.SUMO(groups, rank=2)
    give_gradients(model, 0)
    optimizer.step()
    assert state_of(optimizer)["a.weight"]["basis"].shape == (9, 3)
    groups[0]["rank"] = 1.5
    with pytest.raises(ValueError, match=r"rank is 1\.5"):
        spectral_dist.SUMO(groups, rank=2)


def test_one_sided_matrices_are_refused():
    """They ask for an exact polar factor of the whole matrix."""
    groups = spectral_dist.param_groups(Weights(a=(9, 6), b=(9, 6)), one_sided=["b"])
    with pytest.raises(ValueError, match="one_sided is for optimizers that have it"):
        spectral_dist.SUMO(groups)


# -- one process, saved and loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_state_dict_resumes_bitwise(dtype):
    one = mixed_model(dtype)
    optimizer = sumo(one, rank=2, period=3)
    for step in range(4):
        give_gradients(one, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(one)
    loaded = sumo(other, rank=2, period=3)
    loaded.load_state_dict(saved)
    assert equal(state_of(loaded), state_of(optimizer))
    for step in range(4, 9):
        for model, each in ((one, optimizer), (other, loaded)):
            give_gradients(model, step)
            each.step()
        assert same(values(one), values(other))
    assert equal(state_of(loaded), state_of(optimizer))


@pytest.mark.parametrize("stepped", [False, True])
def test_states_of_another_rank_are_refused(stepped):
    model = Weights(a=(9, 6))
    one, other = (sumo(model, rank=rank) for rank in (2, 3))
    give_gradients(model, 0)
    for optimizer in (one, other)[: 1 + stepped]:
        optimizer.step()
    with pytest.raises(ValueError, match="rank is 3 here, but 2 in the checkpoint"):
        other.load_state_dict(one.state_dict())
