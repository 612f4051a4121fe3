"""spectral_dist.POET against the reference: steps, merges, checkpoints, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import poet
from spectral_dist.poet.optimizer import clip_ramp_factor
from tests.reference import poet as reference
from tests.support.weights import same, values

BLOCKS = {"0": (4, 3), "2": (6, 5)}


def net(dtype=torch.float64, seed=0):
    """8 -> 12 -> 10, with a norm between, which is a scalar as the biases are."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10)).to(dtype)


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return (torch.tanh(self.model(x)) - y).square().mean()


def batch(step, dtype=torch.float64, rows=16, wide=(8, 10)):
    g = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype) for d in wide)
    return x, torch.tanh(y)


def made(dtype=torch.float64, settings=None, **options):
    chosen = {"blocks": {"^0$": (4, 3), "^2$": (6, 5)}, **(settings or {})}
    model = poet.convert(net(dtype), **chosen)
    optimizer = spectral_dist.POET(
        spectral_dist.param_groups(model), **{**reference.OPTIONS, **options}
    )
    return model, optimizer


def train(model, optimizer, steps, start=0, schedule=lambda step: 1.0, dtype=torch.float64):
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(start, start + steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(step)
        optimizer.zero_grad()
        Loss(model)(*batch(step, dtype)).backward()
        optimizer.step()


def index_of(model):
    """The permutations, as data."""
    layers = {key: model.get_submodule(key) for key in BLOCKS}
    sides = {(k, r.key.rpartition("/")[2]): r for k, m in layers.items() for r in m.rotations}
    return lambda key, side, merges: sides[key, side].index(merges)


def reference_run(model, order=4, blocks=BLOCKS, **options):
    """Of the reference on the model before it was converted."""
    index = index_of(model)
    find = lambda key, side, merges: index(key.removeprefix("model."), side, merges)  # noqa: E731
    named = {f"model.{key}": pair for key, pair in blocks.items()}
    return reference.Run(Loss(net()), named, find, order, **options)


def agrees(model, run, tolerance=1e-11):
    for (key, side), skew in run.skews.items():
        mine = getattr(model.get_submodule(key.removeprefix("model.")), f"skew_{side}")
        torch.testing.assert_close(mine.detach().view_as(skew), skew, rtol=0, atol=tolerance)
    for key, w in run.frozen.items():
        layer = model.get_submodule(key.removeprefix("model."))
        torch.testing.assert_close(layer.weight.detach(), w, rtol=0, atol=tolerance)
        assert layer.merges == run.merges
    for key, p in run.scalars.items():
        mine = model.get_parameter(key.removeprefix("model."))
        torch.testing.assert_close(mine.detach(), p, rtol=0, atol=tolerance)


# -- steps and merges


CASES = [
    ({}, {}),
    ({"order": 3, "segments": 2, "blocks": {"^0$": (4, 3), "^2$": (6, 5)}}, {}),
    ({"order": "exact", "variant": "memory"}, {"scalar_lr": 0.003, "weight_decay": 0.5}),
    ({"form": "fully_stochastic", "seed": 3}, {"betas": (0.5, 0.7), "eps": 1e-3}),
]


@pytest.mark.parametrize(("settings", "options"), CASES)
def test_steps_and_three_merges(settings, options):
    """By a learning rate that changes, to see that a schedule on the groups works."""

    def schedule(step):
        return 1.0 if step < 3 else 0.5 + 0.1 * step

    model, optimizer = made(settings=settings, **options)
    run = reference_run(model, settings.get("order", 4), **options)
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(14):
        optimizer.zero_grad()
        loss = Loss(model)(*batch(step))
        loss.backward()
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(step)
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(
            run.step(*batch(step), factor=schedule(step)), abs=1e-12
        )
        agrees(model, run)
        assert optimizer.steps_since_merge() == run.since == (step + 1) % 4
        assert optimizer.steps_taken() == step + 1
    assert run.merges == 3
    moved = (w - net().get_submodule(k[6:]).weight for k, w in run.frozen.items())
    assert all(change.norm() > 0.1 for change in moved)


def skew_states(optimizer):
    for group in optimizer.param_groups:
        if group["kind"] == "skew":
            for p in group["params"]:
                yield p, optimizer.state[p]


def test_a_merge_starts_the_skews_again_and_leaves_the_rest():
    model, optimizer = made()
    _, other = both = made(merge_every=400)
    train(model, optimizer, 4)
    train(*both, 4)
    for p, state in skew_states(optimizer):
        assert not p.any()
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        assert float(state["step"]) == 0
    mine, theirs = (
        [o.state[p] for g in o.param_groups if g["kind"] == "scalar" for p in g["params"]]
        for o in (optimizer, other)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert float(a["step"]) == 4
        assert all(torch.equal(a[name], b[name]) for name in a)
    train(model, optimizer, 1, 4)
    for p, state in skew_states(optimizer):
        assert float(state["step"]) == 1
        assert float(p.detach().abs().max()) == pytest.approx(
            0.02, rel=1e-2
        )  # Adam's first step is lr


def test_nothing_moves_without_a_learning_rate_after_a_merge():
    model, optimizer = made()
    train(model, optimizer, 4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 3, 4)
    assert not any(p.any() for p, _ in skew_states(optimizer))


def test_no_decay_of_skews_and_decay_of_the_rest():
    model, optimizer = made(weight_decay=0.9, lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    kinds = {id(p): g["kind"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        decayed = kinds.get(id(p)) == "scalar"
        expected = 0.01 * (1 - 0.02 * 0.9) if decayed else 0.01
        assert torch.equal(p, torch.full_like(p, expected)), name
    assert [g["weight_decay"] for g in optimizer.param_groups if g["kind"] == "skew"] == [0.0]


def test_rotations_have_no_decay_whoever_asks():
    model, optimizer = made()
    groups = spectral_dist.param_groups(model)
    for group in groups:
        group["weight_decay"] = 0.5
    with pytest.raises(ValueError, match="weight_decay is set for rotations"):
        spectral_dist.POET(groups)
    run = reference_run(model)
    for step in range(3):
        for group in optimizer.param_groups:  # as Megatron's scheduler does
            group["weight_decay"] = 0.1
        train(model, optimizer, 1, step)
        run.step(*batch(step))
    agrees(model, run)


def test_groups_may_have_options_of_their_own():
    model = poet.convert(net(), blocks={"^0$": (4, 3), "^2$": (6, 5)})
    groups = spectral_dist.param_groups(model)
    for group in groups:
        group["lr"] = {"skew": 0.01, "scalar": 0.002}[group["kind"]]
    optimizer = spectral_dist.POET(groups, lr=0.05, merge_every=4)
    run = reference_run(model, lr=0.01, scalar_lr=0.002, weight_decay=0.1)
    for step in range(6):
        optimizer.zero_grad()
        Loss(model)(*batch(step)).backward()
        optimizer.step()
        run.step(*batch(step))
    agrees(model, run)


def test_a_framework_with_masters_merges_when_it_says_so():
    model, optimizer = made()
    run = reference_run(model)
    optimizer.placement.has_master_weights = True
    for step in range(9):
        optimizer.zero_grad()
        Loss(model)(*batch(step)).backward()
        optimizer.step()
        run.step(*batch(step))
        assert optimizer.merge_if_due() == (run.since == 0)
        agrees(model, run)


def test_skipped_gradients_and_closures():
    model, optimizer = made()
    run = reference_run(model)

    def closure():
        optimizer.zero_grad()
        loss = Loss(model)(*batch(0))
        loss.backward()
        return loss

    found = optimizer.step(closure)
    assert float(found.detach()) == pytest.approx(run.step(*batch(0)), abs=1e-12)
    agrees(model, run)


def test_micro_batches_between_steps_are_those_of_one_large_batch():
    """Three micro-batches a step, against the reference on all their rows: two merges."""
    model, optimizer = made()
    run = reference_run(model)
    for step in range(9):
        optimizer.zero_grad()
        micro_batches = [batch(10 * step + k) for k in range(3)]
        for x, y in micro_batches:
            (Loss(model)(x, y) / 3).backward()
        optimizer.step()
        run.step(*(torch.cat(rows) for rows in zip(*micro_batches, strict=True)))
        agrees(model, run)


def test_an_edit_through_data_between_two_micro_batches_is_seen():
    """It counts no version and moves nothing; the second gradient is at the edited skews."""
    model, optimizer = made()
    run = reference_run(model)
    train(model, optimizer, 2)
    for step in range(2):
        run.step(*batch(step))
    optimizer.zero_grad()
    Loss(model)(*batch(2)).backward()
    _, first = run.gradients(*batch(2))
    for p, _ in skew_states(optimizer):
        p.data.mul_(-0.5)
    run.skews = {key: -0.5 * skew for key, skew in run.skews.items()}
    loss = Loss(model)(*batch(3))
    loss.backward()
    expected_loss, second = run.gradients(*batch(3))
    assert float(loss.detach()) == pytest.approx(expected_loss, abs=1e-12)
    for key, side in run.skews:
        skew = getattr(model.get_submodule(key.removeprefix("model.")), f"skew_{side}")
        expected = (first[key, side] + second[key, side]).view_as(skew)
        torch.testing.assert_close(skew.grad, expected, rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*has no gradient")
def test_skews_written_by_a_framework_after_the_step_are_seen():
    """Through ``data``, which counts no version, while a master was stepped on."""
    model, optimizer = made()
    x, _ = batch(0)
    Loss(model)(*batch(0)).backward()
    for p, _ in skew_states(optimizer):
        p.grad = None
    optimizer.step()
    for p, _ in skew_states(optimizer):
        p.data.fill_(0.1)
    found = model(x)
    assert torch.equal(found, model.eval()(x))


# -- checkpoints


@pytest.mark.parametrize("at", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("form", ["block_stochastic", "fully_stochastic"])
def test_resumed_bitwise(at, form, tmp_path):
    """In mid-cycle, just before a merge, just after it."""
    settings = {"form": form}
    model, optimizer = made(torch.float32, settings)
    train(model, optimizer, at, dtype=torch.float32)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x")
    train(model, optimizer, 11 - at, at, dtype=torch.float32)
    saved = torch.load(tmp_path / "x", weights_only=True)
    again, resumed = made(torch.float32, settings)
    train(again, resumed, 2, 50, dtype=torch.float32)  # what it was does not matter
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps_taken() == at
    train(again, resumed, 11 - at, at, dtype=torch.float32)
    assert same(values(model), values(again))
    for (_, a), (_, b) in zip(skew_states(optimizer), skew_states(resumed), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# -- clipping


def test_clip_factor_ramps_up_after_each_merge_but_the_start():
    model, optimizer = made(clip_ramp=3)
    found = []
    for step in range(9):
        found.append(optimizer.clip_factor())
        train(model, optimizer, 1, step)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.4, 0.7, 1, 0.1])
    model, optimizer = made()
    train(model, optimizer, 5)
    assert optimizer.clip_factor() == 1.0


@pytest.mark.parametrize(
    ("since", "ramp", "merged", "expected"),
    [(0, 4, True, 0.1), (1, 4, True, 0.325), (3, 4, True, 0.775), (4, 4, True, 1), (9, 4, True, 1),
     (0, 4, False, 1), (3, 4, False, 1), (0, 0, True, 1)],
)  # fmt: skip
def test_clip_ramp_factor(since, ramp, merged, expected):
    assert clip_ramp_factor(since, ramp, merged) == pytest.approx(expected)


def factors(model, optimizer, steps, start=0):
    """Of each step, asked for before it."""
    asked = []
    for step in range(start, start + steps):
        asked.append(optimizer.clip_factor())
        train(model, optimizer, 1, step)
    return asked


def test_no_ramp_in_the_first_cycle_of_a_new_optimizer_of_a_merged_model():
    """As at the start of any run; its own merges have one, in a resumed run as well."""
    model, optimizer = made(clip_ramp=3)
    factors(model, optimizer, 6)
    again, fresh = made(clip_ramp=3)
    again.load_state_dict(model.state_dict())
    assert fresh.layers[0].merges == 1
    assert factors(again, fresh, 1, 6) == [1]
    saved, resumed = made(clip_ramp=3)
    saved.load_state_dict(again.state_dict())
    resumed.load_state_dict(fresh.state_dict())
    expected = [1, 1, 1, 0.1, 0.4, 0.7, 1, 0.1]
    assert factors(again, fresh, 8, 7) == pytest.approx(expected)
    assert factors(saved, resumed, 8, 7) == pytest.approx(expected)


def test_a_run_resumed_after_a_merge_ramps_as_if_never_stopped():
    model, optimizer = made(clip_ramp=3)
    factors(model, optimizer, 5)
    again, resumed = made(clip_ramp=3)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert factors(again, resumed, 4, 5) == pytest.approx([0.4, 0.7, 1, 0.1])


def test_the_ramp_of_a_model_of_which_only_rotations_train():
    """Nothing counts all steps; the model's merges do."""
    torch.manual_seed(0)
    model = poet.convert(
        nn.Sequential(nn.Linear(8, 10, bias=False)).double(), block=2, matrices=["0"]
    )
    optimizer = spectral_dist.POET(
        spectral_dist.param_groups(model), **{**reference.OPTIONS, "clip_ramp": 3}
    )
    assert factors(model, optimizer, 6) == pytest.approx([1, 1, 1, 1, 0.1, 0.4])


def test_a_ramp_that_nobody_asks_for_warns_once():
    model, optimizer = made(clip_ramp=3)
    train(model, optimizer, 4)
    with pytest.warns(UserWarning, match="clip_factor"):
        train(model, optimizer, 1, 4)
    train(model, optimizer, 6, 5)


# -- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"merge_every": 0}, "merge_every is 0; it must be a whole number of steps, at least 1"),
        ({"merge_every": 2.5}, "merge_every is 2.5"),
        ({"merge_every": True}, "merge_every is True"),
        ({"clip_ramp": -1}, "clip_ramp is -1"),
        ({"clip_ramp": 5}, "at most merge_every, 4"),
        ({"scalar_weight_decay": 0.1}, "write weight_decay"),
        ({"merge_evry": 5}, "did you mean 'merge_every'"),
        ({"momentum": 0.9}, "unknown option 'momentum'"),
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        made(**options)


def test_each_optimizer_has_its_kind_of_model():
    plain = net()
    with pytest.raises(ValueError, match=r"spectral_dist\.poet\.convert"):
        spectral_dist.POET(spectral_dist.param_groups(plain))
    bare = nn.Sequential(nn.Embedding(3, 3))
    bare[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="no parameter is a matrix"):
        spectral_dist.POET(spectral_dist.param_groups(bare))
    model, _ = made()
    for cls in (spectral_dist.Muon, spectral_dist.SUMO, spectral_dist.PolarGrad):
        with pytest.raises(ValueError, match=r"only spectral_dist\.POET"):
            cls(spectral_dist.param_groups(model))
    with pytest.raises(ValueError, match=r"matrices: 'skew_in' matches 0\.skew_in, which is 1-D"):
        spectral_dist.param_groups(model, matrices=["skew_in"])


def test_a_bad_gradient_is_not_applied():
    model, optimizer = made()
    train(model, optimizer, 3)
    before = values(model)
    Loss(model)(*batch(3)).backward()
    model[0].skew_in.grad[0] = math.nan
    with pytest.raises(ValueError, match=r"0\.skew_in is NaN"):
        optimizer.step()
    assert same(before, values(model))
