"""spectral_dist.NorMuon against specs/normuon.md, and what it obeys; whole and in tiles."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import spectral_dist
from spectral_dist.polar import METHODS
from tests.reference import polar as formulas
from tests.reference import rules, training
from tests.reference.normuon import NorMuonMatrix
from tests.support import harness, models, sharded_model
from tests.support.weights import FACTORS, SHAPES, Weights, give_gradients, same, values
from tests.unit.sharding.slab_cuts import cuts

sides = st.integers(1, 9)
seeds = st.integers(0, 10_000)
methods = st.sampled_from(["jordan", "polar_express", "svd", "qdwh", "gram_jordan"])


def normuon(model, lr=0.02, split=None, **options):
    return spectral_dist.NorMuon(spectral_dist.param_groups(model, split=split), lr=lr, **options)


def muon(model, **options):
    options = {k: v for k, v in options.items() if k not in ("beta2", "row_eps")}
    return spectral_dist.Muon(spectral_dist.param_groups(model), **options)


def directions(gradients, optimizer=normuon, **options):
    """D of each step on one matrix."""
    model = nn.Sequential(nn.Linear(*gradients[0].shape[::-1], bias=False))
    model[0].weight = nn.Parameter(torch.zeros_like(gradients[0]))
    chosen = optimizer(model, **{"lr": 1.0, "weight_decay": 0.0, "scale": "none", **options})
    found = []
    for g in gradients:
        model[0].weight.data.zero_()
        model[0].weight.grad = g.clone()
        chosen.step()
        found.append(-model[0].weight.detach().clone())
    return found


def gaussians(m, n, seed, count=3):
    return [formulas.gaussian(m, n, seed=seed + 20_000 * k) for k in range(count)]


def row_norms(d):
    return d.norm(dim=1)


def near(a, b, bound=1e-9):
    return bool((a - b).norm() <= bound * (1 + b.norm()))


# -- against the reference


def check(model, count=5, bound=1e-9, split=None, polar=None, **options):
    """Weights and v of both after every step; ``split``: name -> equal blocks of rows."""
    o = {"lr": 0.02, "weight_decay": 0.1, **options}
    splits = {name: 1 for name, p in model.named_parameters() if p.ndim > 1} | (split or {})
    splits = {n: k for n, k in splits.items() if training.is_matrix(n) or "embed" not in n}
    wanted = {n: p.detach().clone() for n, p in model.named_parameters() if n in splits}
    theirs = {
        training.part_name(n, i, w, splits[n]): NorMuonMatrix(
            o, rules.oracle(polar) if polar else None
        )
        for n, w in wanted.items()
        for i in range(len(training.parts(w, splits[n])))
    }
    given = {**o, "polar": polar} if polar else o
    optimizer = normuon(model, split=split, **given)
    for step in range(count):
        give_gradients(model, step)
        optimizer.step()
        state = optimizer.matrix_state()
        assert state.keys() == theirs.keys()
        for name, p in model.named_parameters():
            if name not in wanted:
                continue
            both = (training.parts(x, splits[name]) for x in (wanted[name], p.grad))
            for i, (w, g) in enumerate(zip(*both, strict=True)):
                part = training.part_name(name, i, p, splits[name])
                theirs[part].step(w, g.to(torch.promote_types(p.dtype, torch.float32)))
                v = state[part]["row_squares"]
                assert v.shape == (len(w), 1)
                assert v.dtype == torch.promote_types(p.dtype, torch.float32)
                squares = torch.tensor(theirs[part].squares, dtype=torch.float64)
                torch.testing.assert_close(v[:, 0].double(), squares, rtol=1e3 * bound, atol=bound)
            if p.dtype == torch.bfloat16:  # computed as for float32, and rounded once
                half_an_ulp = torch.exp2(torch.floor(torch.log2(p.detach().float().abs())) - 7)
                assert ((p - wanted[name]).float().abs() <= half_an_ulp).all()
                wanted[name].copy_(p.detach())
            else:
                torch.testing.assert_close(p.detach(), wanted[name], rtol=0, atol=bound, msg=part)
    return optimizer


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", FACTORS)
def test_scales_and_nesterov(scale, nesterov):
    check(Weights(dtype=torch.float64, **SHAPES), scale=scale, nesterov=nesterov)


def test_defaults_are_the_papers():
    """.95, .95 and 1e-8, on Muon's defaults."""
    model = Weights(dtype=torch.float64, **SHAPES)
    optimizer = check(model, 6)
    [group] = [g for g in optimizer.param_groups if g["kind"] == "matrix"]
    wanted = {"momentum": 0.95, "beta2": 0.95, "row_eps": 1e-8, "nesterov": True,
              "polar": "jordan", "scale": "match_rms_adamw", "weight_decay": 0.1}  # fmt: skip
    assert {name: group[name] for name in wanted} == wanted
    assert optimizer.polar_calls == 6 * len(SHAPES)


@pytest.mark.parametrize(
    "options",
    [{"beta2": 0.5, "momentum": 0.8, "row_eps": 1e-3}, {"beta2": 0.0, "weight_decay": 0.0},
     {"polar": "polar_express"}, {"polar": "svd", "beta2": 0.999, "scale": "original"}],
)  # fmt: skip
def test_options_and_oracles(options):
    check(Weights(dtype=torch.float64, **SHAPES), 4, **options)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-3)])
def test_float32_and_bfloat16_weights(dtype, bound):
    """Momentum and v are float32 beside both."""
    optimizer = check(Weights(dtype=dtype, **SHAPES), bound=bound)
    momenta = [state["exp_avg"] for state in optimizer.state.values()]
    assert {m.dtype for m in momenta} == {torch.float32}


@pytest.mark.slow
def test_fused_weights_and_stacks_of_experts():
    """Each part and each expert is a matrix, with |O|_F of its own."""
    model = models.build().double()
    model.frozen = model.embed = model.head = None
    check(model, 4, split={f"layers.{i}.qkv.weight": 3 for i in (0, 1)})


# -- properties


@given(sides, sides, seeds, methods)
@example(9, 4, 0, "jordan")
def test_rows_have_equal_norms_after_the_first_step(m, n, seed, method):
    """And D is then the polar factor with rows normalised, times a constant."""
    g = gaussians(m, n, seed, 1)
    [d], [o] = directions(g, polar=method, row_eps=1e-14), directions(g, muon, polar=method)
    norms = row_norms(d)
    torch.testing.assert_close(norms, norms.mean().expand(m), rtol=1e-8, atol=0)
    wanted = o / row_norms(o)[:, None] * (o.norm() / m**0.5)
    assert near(d, wanted, 1e-8)


@given(sides, sides, seeds, methods, st.booleans())
def test_beta2_of_zero_normalises_rows_in_every_step(m, n, seed, method, nesterov):
    g = gaussians(m, n, seed)
    o = {"polar": method, "nesterov": nesterov}
    for d, u in zip(directions(g, beta2=0.0, row_eps=1e-14, **o), directions(g, muon, **o),
                    strict=True):  # fmt: skip
        assert near(d, u / row_norms(u)[:, None] * (u.norm() / m**0.5), 1e-8)


@given(sides, sides, seeds, methods, st.floats(0, 0.999), st.booleans())
def test_the_norm_is_that_of_muons_direction(m, n, seed, method, beta2, nesterov):
    g, o = gaussians(m, n, seed), {"polar": method, "nesterov": nesterov}
    for d, u in zip(directions(g, beta2=beta2, **o), directions(g, muon, **o), strict=True):
        assert d.norm().item() == pytest.approx(u.norm().item(), rel=1e-9)


@given(sides, sides, seeds, methods, st.integers(-60, 60))
def test_the_scale_of_the_gradient_does_not_matter_bitwise_by_powers_of_two(
    m, n, seed, method, exponent
):
    g = gaussians(m, n, seed)
    scaled = directions([2.0**exponent * x for x in g], polar=method)
    assert all(map(torch.equal, scaled, directions(g, polar=method)))


@given(sides, sides, seeds, methods, st.floats(-6, 6))
def test_the_scale_of_the_gradient_does_not_matter(m, n, seed, method, exponent):
    g = gaussians(m, n, seed)
    scaled = directions([10.0**exponent * x for x in g], polar=method)
    assert all(map(near, scaled, directions(g, polar=method)))


@given(sides, sides, seeds, methods)
def test_permuting_rows_permutes_rows(m, n, seed, method):
    g = gaussians(m, n, seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    found = directions([x[order] for x in g], polar=method)
    assert all(near(a, b[order]) for a, b in zip(found, directions(g, polar=method), strict=True))


@given(sides, sides, seeds, st.sampled_from(["svd", "qdwh"]))
def test_of_no_more_rows_than_columns_it_is_muon_with_an_exact_factor(m, n, seed, method):
    """Its rows have one norm already. Of a tall matrix they have not: a neuron is a row."""
    short, long = sorted((m, n + 1))
    g = gaussians(short, long, seed)
    for d, u in zip(directions(g, polar=method), directions(g, muon, polar=method), strict=True):
        assert near(d, u, 1e-6)
    if 1 < short < long:
        tall = [x.mT.contiguous() for x in g]
        pair = directions(tall, polar=method)[0], directions(tall, muon, polar=method)[0]
        assert not near(*pair, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_a_row_of_zeros_stays_zero(shape, dtype):
    """Whatever the method: of rounding errors, sqrt(v) would make a direction of full size."""
    for method in METHODS:
        g = [x.to(dtype) for x in gaussians(*shape, 5, 4)]
        for x in g:
            x[2] = 0
        for beta2 in (0.0, 0.95):
            for d in directions(g, polar=method, beta2=beta2):
                assert d.isfinite().all(), method
                assert torch.equal(d[2], torch.zeros_like(d[2])), method
                assert d.norm() > 1, method


@pytest.mark.parametrize("method", METHODS)
def test_zero_gives_zero(method):
    """At first, and after steps in which v became something; then the row moves as others do."""
    zero, (g,) = torch.zeros(6, 4), [x.float() for x in gaussians(6, 4, 1, 1)]
    for beta2 in (0.0, 0.95):
        found = directions([zero, zero, g], polar=method, beta2=beta2, momentum=0.0)
        assert torch.equal(found[0], zero)
        assert torch.equal(found[1], zero)
        assert found[2].isfinite().all()
        later = directions([g, zero, g], polar=method, beta2=beta2, momentum=0.0)
        assert torch.equal(later[1], zero)
        assert near(later[2].norm(), found[2].norm(), 1e-4)


def test_a_row_that_has_moved_once_does_not_move_for_ever():
    """O * O fades twice as fast as v."""
    g = [x.float() for x in gaussians(8, 3, 1, 60)]
    for x in g[1:]:
        x[2] = 0
    found = directions(g)
    assert found[-1][2].norm() < 0.3 * found[0][2].norm()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_tiny_and_huge_gradients_in_float32(scale):
    g = [x.float() for x in gaussians(9, 4, 2)]
    pairs = zip(directions([x * scale for x in g]), directions(g), strict=True)
    assert all(near(a, b, 1e-4) for a, b in pairs)


def test_a_parameter_without_gradient_keeps_weight_momentum_and_v():
    model = Weights(a=(7, 4), b=(7, 4))
    optimizer = normuon(model)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    before = copy.deepcopy((values(model), optimizer.matrix_state(), optimizer.state))
    give_gradients(model, 2, skip=("b.weight",))
    with pytest.warns(UserWarning, match=r"b\.weight has no gradient"):
        optimizer.step()
    weights, state, _ = before
    assert torch.equal(model.b.weight, weights["b.weight"])
    assert same(optimizer.matrix_state()["b.weight"], state["b.weight"])
    assert not same(optimizer.matrix_state()["a.weight"], state["a.weight"])


def test_torchs_state_dict_resumes_bitwise():
    one = Weights(**SHAPES)
    optimizer = normuon(one)
    for step in range(3):
        give_gradients(one, step)
        optimizer.step()
    other = copy.deepcopy(one)
    loaded = normuon(other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for model, each in ((one, optimizer), (other, loaded)):
            give_gradients(model, step)
            each.step()
        assert same(values(one), values(other))


# -- options


@pytest.mark.parametrize(
    ("option", "value"),
    [("beta2", 1.0), ("beta2", -0.1), ("beta2", "0.9"), ("beta2", None), ("row_eps", 0.0),
     ("row_eps", -1e-8), ("row_eps", True), ("strategy", "block")],
)  # fmt: skip
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"NorMuon: {option} is "):
        normuon(Weights(a=(3, 4)), **{option: value})
    groups = spectral_dist.param_groups(Weights(a=(3, 4)))
    groups[0][option] = value
    told = "has no option 'strategy'" if option == "strategy" else f": {option} is "
    with pytest.raises(ValueError, match=f"a parameter group.*{told}"):
        spectral_dist.NorMuon(groups)


def test_a_group_has_a_beta2_of_its_own():
    model = Weights(a=(9, 4))
    groups = spectral_dist.param_groups(model)
    groups[0] |= {"beta2": 0.5, "row_eps": 1e-3}
    wanted, reference = (
        values(model)["a.weight"].double(),
        NorMuonMatrix({"lr": 0.02, "weight_decay": 0.1, "beta2": 0.5, "row_eps": 1e-3}),
    )
    optimizer = spectral_dist.NorMuon(groups, lr=0.02, beta2=0.9)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
        reference.step(wanted, model.a.weight.grad.double())
    torch.testing.assert_close(model.a.weight.detach().double(), wanted, rtol=0, atol=2e-5)


# -- in tiles of any kind, of whole weights with equal gradients


TILES = {"tall": (12, 5), "wide": (5, 12), "square": (8, 8), "other": (12, 5), "row": (1, 6)}


def tiled(kind, ranks, replicas, options, strategy):
    """(largest difference from one process, elements of v that this rank is to save)."""
    here = sharded_model.ShardedModel(
        cuts(kind, ranks, TILES), "NorMuon", ranks, replicas, strategy=strategy, **options
    )
    alone = sharded_model.ShardedModel(sharded_model.whole(TILES), "NorMuon", **options)
    for step in range(4):
        for each in (here, alone):
            each.step(step, dead_row)
    parts = [p for p in here.optimizer.matrix_parts() if p.is_primary]
    gram = here.unit.plan.strategies.count("gram")
    return here.difference(alone), sum(p.values.numel() for p in parts), gram


def dead_row(shape, step, name, dtype):
    """Random, but for a row."""
    g = sharded_model.gradient(shape, step, name, dtype)
    if shape[0] > 1:
        g[1] = 0
    return g


@pytest.mark.parametrize(
    ("kind", "ranks", "replicas", "options"),
    [("rows", 2, 1, {}), ("columns", 2, 1, {}), ("rows", 3, 1, {"polar": "eigh"}),
     ("columns", 3, 1, {"beta2": 0.5, "nesterov": False}), ("flat", 3, 1, {}),
     ("uneven", 3, 1, {"bucket_mb": 1e-4}), ("columns", 2, 2, {}), ("rows", 2, 2, {})],
)  # fmt: skip
def test_tiles_equal_one_process(kind, ranks, replicas, options):
    for strategy in ("owner", "gram"):
        results = harness.run(ranks * replicas, tiled, kind, ranks, replicas, options, strategy)
        differences, kept, grams = zip(*results, strict=True)
        assert max(differences) < 2e-6
        assert sum(kept) == sum(m for m, _ in TILES.values())
        assert all(count == 0 if strategy == "owner" else count >= 4 for count in grams)
