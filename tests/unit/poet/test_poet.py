"""spectral_dist.POET against the reference: steps, merges, checkpoints, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import poet
from tests.support.weights import same, values
from tests.unit.poet.small_runs import (
    Loss,
    agrees,
    batch,
    made,
    net,
    reference_run,
    skew_states,
    train,
)

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
