"""What becomes of singular values over many merges of spectral_dist.POET, and its reports."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist import poet
from spectral_dist._host_copy import HostCopy
from spectral_dist.monitor import Monitor, to_jsonl
from spectral_dist.poet import report
from spectral_dist.poet.report import QUANTITIES, drift
from tests.reference import poet as reference
from tests.unit.poet.small_runs import BLOCKS, Loss, batch, made, skew_states, train

# -- spectra


def well_conditioned(order, init, seed=0):
    """16 -> 16 -> 24 -> 10, float32: square, tall and wide."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)
    )
    return poet.convert(model, block=8, blocks={"^0$": (16, 4)}, order=order, init=init)


def spectra(model):
    layers = (m for m in model if isinstance(m, poet.PoetLinear))
    return [torch.linalg.svdvals(layer.weight.detach().double()) for layer in layers]


def follow(model, lr, cycle, merges):
    """Trains with real gradients; thetas of every merge by layer: [[(in, out)]]."""
    optimizer = spectral_dist.POET(
        spectral_dist.param_groups(model), lr=lr, merge_every=cycle, scalar_lr=1e-3
    )
    optimizer.placement.has_master_weights = (
        True  # it merges when it is told to, so that one can look before
    )
    found, losses = [], []
    for step in range(cycle * merges):
        optimizer.zero_grad()
        loss = Loss(model)(*batch(step % 8, torch.float32, 32, (16, 8)))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        if (step + 1) % cycle == 0:
            found.append([
                [reference.thetas(getattr(layer, r.skew), r.block) for r in layer.rotations]
                for layer in optimizer.layers
            ])  # fmt: skip
        assert optimizer.merge_if_due() == ((step + 1) % cycle == 0)
    assert losses[-1] < 0.8 * losses[0]
    return found


@pytest.mark.parametrize(
    "init", ["normalized", pytest.param("uniform_spectrum", marks=pytest.mark.slow)]
)
def test_order_4_keeps_the_spectrum(init):
    """400 steps and 20 merges."""
    model = well_conditioned(4, init)
    before = spectra(model)
    found = follow(model, 2e-3, 20, 20)
    largest = max(float(t.max()) for merge in found for layer in merge for t in layer)
    assert 0.05 < largest < 0.25  # so that it is no idle case
    for s0, s in zip(before, spectra(model), strict=True):
        assert (s / s0 - 1).abs().max() <= 1e-5


def test_order_3_shrinks_it_as_the_formula_says():
    """det(R_o W R_i) tells all: the product of every 1 - theta^4, for a square W and any blocks."""
    model = well_conditioned(3, "uniform_spectrum")
    found = follow(model, 6e-3, 20, 10)
    for layer, thetas in zip((0, 2, 4), zip(*found, strict=True), strict=True):
        s = torch.linalg.svdvals(model[layer].weight.detach().double())
        assert (s - 1).abs().max() > 1e-3  # so order 3 fails the bound of 1e-5
        smallest = torch.ones(())
        for both in thetas:
            for theta in both:
                smallest = smallest * reference.shrink(theta.max(), 3)
        assert smallest - 1e-5 <= s.min() <= s.max() <= 1 + 1e-5
        if layer == 0:
            shrunk = [torch.log(reference.shrink(t, 3)).sum() for both in thetas for t in both]
            assert float(s.log().sum()) == pytest.approx(float(sum(shrunk)), rel=1e-3)
    assert abs(float(sum(shrunk))) > 0.01


def test_a_single_block_shrinks_every_plane_by_its_own_theta():
    """One merge of one side: the singular values are exactly the factors, in order."""
    for order in (1, 2, 3, 4, "exact"):
        model = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64))
        poet.convert(model, block=8, order=order, init="uniform_spectrum")
        layer = model[0]
        fill(model, {"0": 0.6})
        with torch.no_grad():
            layer.skew_in.zero_()
            layer.weight.copy_(torch.linalg.qr(layer.weight)[0])
        theta = reference.thetas(layer.skew_out, 8)[0].tolist()
        layer.merge(layer.weight, layer.skews)
        factors = sorted((reference.shrink(t, order) for t in theta), reverse=True)
        expected = torch.tensor(factors, dtype=torch.float64)
        found = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# -- reports


def fill(model, sizes):
    """Skews of known ||Q||, by layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, norm in sizes.items():
            for r in model.get_submodule(key).rotations:
                v = torch.randn(r.shape, generator=generator, dtype=torch.float64)
                v *= norm / reference.thetas(v, r.block).max()
                getattr(model.get_submodule(key), r.skew).copy_(v.flatten())


def merge_now(optimizer):
    for _, state in skew_states(optimizer):
        state["step"] = torch.tensor(4.0)
    return optimizer.merge_if_due()


def test_large_rotations_warn_and_name_the_layer():
    model, optimizer = made()
    optimizer.initialize_state()
    fill(model, {"0": 0.3, "2": 0.7})
    with pytest.warns(UserWarning, match=r"\|\|Q\|\| was 0\.(69|70) in 2, above 0\.5 in 1 of 2"):
        assert merge_now(optimizer)
    fill(model, {"0": 0.3, "2": 0.45})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_now(optimizer)


class Copy:
    """An event of a copy that arrives when the test says so."""

    def __init__(self):
        self.is_there, self.waited = False, False

    def query(self):
        return self.is_there

    def synchronize(self):
        self.waited = not self.is_there


def on_a_device(monkeypatch):
    """Copies of the merges' reports, as of a GPU."""
    copies = []

    def copy(numbers):
        made = HostCopy(numbers)
        made._arrived = Copy()
        copies.append(made._arrived)
        return made

    monkeypatch.setattr(report, "HostCopy", copy)
    return copies


def test_the_warning_comes_when_the_numbers_have_arrived(monkeypatch):
    model, optimizer = made()
    copies = on_a_device(monkeypatch)
    optimizer.initialize_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(model, {"0": 0.3, "2": 0.7})
        assert merge_now(optimizer)
        train(model, optimizer, 1)  # not yet there
    copies[0].is_there = True
    with pytest.warns(UserWarning, match=r"merge after step 4 \|\|Q\|\| was 0\.(69|70) in 2"):
        train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)  # once only
        fill(model, {"0": 0.6, "2": 0.2})
        assert merge_now(optimizer)
    assert not any(copy.waited for copy in copies)
    fill(model, {"0": 0.2, "2": 0.2})
    with pytest.warns(UserWarning, match=r"in 0, above 0\.5 in 1 of 2"):
        assert merge_now(optimizer)  # a merge writes what the one before has left
    assert [copy.waited for copy in copies] == [False, True, False]


def test_a_monitor_waits_for_its_numbers(monkeypatch):
    model, optimizer = made()
    copies, seen = on_a_device(monkeypatch), []
    optimizer.monitor = Monitor(1, [lambda step, report: seen.append((step, set(report)))])
    optimizer.initialize_state()
    fill(model, {"0": 0.3, "2": 0.3})
    assert merge_now(optimizer)
    assert seen == [(4, set(QUANTITIES))]
    assert copies[0].waited


@pytest.mark.parametrize("order", [1, 3])
def test_the_monitor_reports_merges(order, tmp_path):
    path = tmp_path / "m.jsonl"
    model, optimizer = made(settings={"order": order})
    seen = []
    optimizer.monitor = Monitor(1, [lambda step, report: seen.append(step), to_jsonl(path)])
    optimizer.initialize_state()
    fill(model, {"0": 0.2, "2": 0.4})
    expected = {name: {} for name in QUANTITIES}
    for key in BLOCKS:
        layer = model.get_submodule(key)
        w = layer.weight.clone()
        blocks = [
            (row, r.block) for r in layer.rotations for row in getattr(layer, r.skew).view(r.shape)
        ]
        gs = [reference.cayley(reference.skew_matrix(v.detach(), b), order) for v, b in blocks]
        errors = [torch.linalg.norm(g @ g.T - torch.eye(len(g))) / len(g) ** 0.5 for g in gs]
        expected["rotation_error"][key] = float(max(errors))
        expected["skew_norm"][key] = {"0": 0.2, "2": 0.4}[key]
        indices = [r.index(0).split(r.block) for r in layer.rotations]
        skews = [getattr(layer, r.skew).detach() for r in layer.rotations]
        after = reference.effective(w, skews, indices, order)
        ratio = torch.linalg.svdvals(after) / torch.linalg.svdvals(w)
        expected["singular_value_drift"][key] = float((ratio - 1).abs().max())
    assert merge_now(optimizer)
    assert seen == [4]
    found = json.loads(path.read_text())
    assert (found.pop("kind"), found.pop("step")) == ("matrices", 4)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        rel = 0.02 if name == "skew_norm" else 1e-5
        assert found[name] == pytest.approx(values, rel=rel)
    assert found["singular_value_drift"]["2"] > 1e-3
    train(model, optimizer, 9, 4)
    assert seen == [4, 8, 12]


def test_drift_leaves_out_what_is_zero():
    """A layer that starts from zero, and one of low rank."""
    assert drift(torch.zeros(4, 5), torch.zeros(4, 5)) == 0
    torch.manual_seed(0)
    w = torch.randn(6, 2) @ torch.randn(2, 5)
    turned = torch.linalg.qr(torch.randn(6, 6))[0] @ w
    assert drift(w, turned) <= 1e-5
    assert float(drift(w, 0.9 * turned)) == pytest.approx(0.1, abs=1e-5)
    assert float(drift(torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 0.0])))) == 1.0
