"""The benchmarks' problems are what they say, and so are their counts; all at tiny sizes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import (
    ddp_step,
    dispatched_traffic,
    fsdp_step,
    megatron_step,
    poet_counts,
    poet_drift,
    poet_numbers,
    poet_quickstart,
    split_step,
    sumo_quickstart,
)
from benchmarks import polargrad_problems as problems
from benchmarks.poet_layer import rotated
from spectral_dist.launch import llama
from tests.support import harness, megatron_cpu, models

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "quadratic": lambda: problems.Quadratic(20, 8, 4, 12),
    "logistic": lambda: problems.Logistic(30, 6, 4, 5, batch=10),
    "completion": lambda: problems.Completion(12, 10, 2, seen=0.8),
}


def test_the_quadratic_is_f_less_its_minimum_with_the_gradient_of_f():
    model = TINY["quadratic"]()
    a, b, c = model.data
    x = model.x.detach().clone().requires_grad_()
    f = (a @ x @ b - c).square().sum() / 2
    least = (a @ model.solution @ b - c).square().sum() / 2
    f.backward()
    gap = model()
    gap.backward()
    torch.testing.assert_close(gap, f - least)
    torch.testing.assert_close(model.x.grad, x.grad)
    hessian = torch.kron(a.mT @ a, b @ b.mT)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    largest, kappa = model.curvature()
    assert largest == pytest.approx(eigenvalues[-1].item())
    assert kappa == pytest.approx((eigenvalues[-1] / eigenvalues[0]).item())


def test_polargrad_contracts_the_quadratic_as_the_theorem_says():
    model = TINY["quadratic"]()
    _, factor = model.theory()
    contender = problems.polar_grad("", None)
    values = list(problems.run(model, contender, 200, 1).values.values())
    assert all(after <= factor * before for before, after in itertools.pairwise(values))


@pytest.mark.slow
def test_polargrad_converges_linearly_and_muon_levels_off_with_its_lr():
    model = TINY["quadratic"]()
    curve = problems.run(model, problems.polar_grad("", None), 4000, 10)
    assert curve.relative(4000) < problems.TARGET
    plateaus = []
    for lr in (0.02, 0.01):
        curve = problems.run(TINY["quadratic"](), problems.muon(lr, "qdwh"), 1000, 1)
        tail = [value for step, value in curve.values.items() if step > 500]
        plateaus.append(sum(tail) / len(tail))
    # f is quadratic, so half the step leaves a quarter
    assert plateaus[0] / plateaus[1] == pytest.approx(4, rel=0.3)
    assert plateaus[1] > 1e-7 * curve.values[0]


def test_the_logistic_loss_and_its_batches():
    model = TINY["logistic"]()
    logits = model.a @ model.x @ model.b
    labels = (model.c + 1) / 2
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    torch.testing.assert_close(model.whole(), entropy)
    assert set(model.c.flatten().tolist()) == {-1.0, 1.0}
    again = TINY["logistic"]()
    first = [model().item(), model().item()]
    assert first == [again().item(), again().item()]
    assert first[0] != first[1]


def test_the_completion_sees_only_what_is_seen():
    model = TINY["completion"]()
    u, s, vh = torch.linalg.svd(model.target)
    assert s[2] < 1e-12 * s[0]
    model.x.data, model.y.data = u[:, :2] * s[:2], vh[:2].mT.contiguous()
    assert model().item() < 1e-25
    hidden = (model.mask == 0).nonzero()[0]
    model.target[tuple(hidden)] += 1.0
    assert model().item() < 1e-25


def test_every_contender_runs_and_is_stopped_if_it_diverges():
    for name, problem in problems.PROBLEMS.items():
        for contender in problem.contenders:
            if contender.lr is None and name != "quadratic":
                continue
            curve = problems.run(TINY[name](), contender, 2, 1)
            assert curve.diverged is not None or list(curve.values) == [0, 1, 2], contender
    curve = problems.run(TINY["quadratic"](), problems.polar_grad("", 1.0), 100, 1)
    assert curve.diverged is not None
    assert curve.diverged < 100


def collectives() -> dict[str, int]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.zeros(12)
    with dispatched_traffic.DispatchedTraffic() as traffic:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(torch.zeros(12 * ranks), x)
        dist.reduce_scatter_tensor(torch.zeros(12 // ranks), x)
        sizes = [[2, 10], [3, 9]]
        got = torch.zeros(sizes[0][rank] + sizes[1][rank])
        dist.all_to_all_single(got, x, [sizes[0][rank], sizes[1][rank]], sizes[rank])
        dist.gather(x, [torch.zeros(12) for _ in range(ranks)] if rank == 0 else None)
        dist.scatter(torch.zeros(6), list(x.chunk(2)) if rank == 0 else None)
        dist.broadcast(x, 0)
        dist.reduce(torch.zeros(6), 0)
    return dict(traffic.bytes)


def test_bytes_are_counted_at_the_dispatcher():
    first, second = harness.run(2, collectives)
    common = {"allreduce_": 48, "_allgather_base_": 48, "_reduce_scatter_base_": 24}
    # 48 and 24 bytes once over the link of two ranks: of each rank half, as of a chain of ranks
    common |= {"broadcast_": 24, "reduce_": 12}
    assert first == {**common, "alltoall_base_": 40, "gather_": 0, "scatter_": 24}
    assert second == {**common, "alltoall_base_": 12, "gather_": 48, "scatter_": 0}


def balance(name: str) -> list[float]:
    contender = fsdp_step.CONTENDERS[fsdp_step.OURS]
    return fsdp_step.loads(contender.build(fsdp_step.sharded(name)))


def test_newton_schulz_is_balanced_over_ranks():
    for name, number, shapes in (("plain", 16, 4), ("gqa", 28, 7)):
        matrices = fsdp_step.matrices_and_rest(fsdp_step.LanguageModel(fsdp_step.MODELS[name]))[0]
        assert (len(matrices), len({m.shape for m in matrices})) == (number, shapes)
        loads = harness.run(4, balance, name)
        assert all(other == loads[0] for other in loads)
        assert len(loads[0]) == 4
        assert fsdp_step.imbalance(loads[0]) <= 1.15


def ddp_traffic(owners: bool) -> tuple[float, float]:
    runner = ddp_step.DDPRunner("plain", "float32", owners)
    runner.iterate()
    return runner.sent(), runner.all_reduced()


def shared_step() -> tuple[float, float]:
    """The largest load over the mean of a step of one matrix, at its owner and split."""
    steppers = [split_step.Stepper(1, 16, strategy) for strategy in split_step.STRATEGIES]
    for stepper in steppers:
        stepper.step()
    return steppers[0].imbalance, steppers[1].imbalance


def test_a_matrix_is_shared() -> None:
    assert harness.run(2, shared_step) == [(2.0, 1.0)] * 2


@pytest.mark.slow
def test_ddp_sends_what_it_sends_for_adamw():
    """With reduce_to_owners; without it half as much more for the matrices."""
    (plain, whole), _ = harness.run(2, ddp_traffic, False)
    small = sum(sent for sent, _ in harness.run(2, ddp_traffic, True)) / 2
    matrices = 4 * 4 * 512 * 512 * (3 + 1 + 4 + 4)
    assert plain - whole == pytest.approx(matrices / 2, abs=100)
    assert small == pytest.approx(whole, abs=1000)  # and the norms


def test_multiply_adds_are_counted_at_the_dispatcher():
    a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.ones(2, 5)
    with megatron_step.Observer() as observer:
        a @ b
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        torch.bmm(a.expand(7, 2, 3), b.expand(7, 3, 5))
        torch.baddbmm(c.expand(7, 2, 5), a.expand(7, 2, 3), b.expand(7, 3, 5))
    assert observer.macs == (3 + 2 * 7) * 30


def megatron_owners(names: list[str], settings: megatron_step.MegatronSettings) -> dict[str, dict]:
    megatron_cpu.install(megatron_step.VERSION)
    return megatron_step.measure(names, settings)


@pytest.mark.slow
def test_megatron_steps_are_what_the_formula_and_the_reference_say():
    names = ["ours owner", "ours owner, gate|up"]
    settings = megatron_step.MegatronSettings(2, 1, 256, 384, "float32", 0)
    ranks = harness.run(2, megatron_owners, names, settings, pool=megatron_step.VERSION)
    for name in names:
        contender = megatron_step.CONTENDERS[name]
        sent = sum(found[name]["sent"] for found in ranks) / 2
        flag = 12  # what ranks agree on before a step
        assert sent == contender.formula(settings) + flag
        macs = sum(found[name]["macs"] for found in ranks)
        sizes = [sorted((m, n)) for m, n, _ in settings.matrices(contender.split)]
        assert macs == 5 * sum(s * s * (2 * long + s) for s, long in sizes)
        assert max(found[name]["error"] for found in ranks) < 1e-5


ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GALORE = """
from torch.optim import AdamW as Plain
class AdamW(Plain):
    def __init__(self, groups, no_deprecation_warning, **adam):
        super().__init__(groups, **adam)
"""


@pytest.fixture
def galore(tmp_path, monkeypatch):
    """A folder where galore_torch's AdamW is torch's, and the package's __init__ fails."""
    for name in ("galore_torch", "galore_torch.adamw"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "galore_torch").mkdir()
    (tmp_path / "galore_torch/__init__.py").write_text("import bitsandbytes_that_is_not_there")
    (tmp_path / "galore_torch/adamw.py").write_text(GALORE)
    yield str(tmp_path)
    for name in ("galore_torch", "galore_torch.adamw"):
        sys.modules.pop(name, None)


def test_every_contender_of_the_quickstart_takes_a_step(galore):
    for contender in sumo_quickstart.CONTENDERS:
        model = models.build(odd=False)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = sumo_quickstart.build(
            contender.kind, model, contender.lr, ADAM, contender.options, galore
        )
        model(models.tokens(0)).backward()
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            assert new.isfinite().all(), contender
            assert not torch.equal(old, new), contender
        keeps_what_it_says(contender, model, sumo_quickstart.state_bytes(optimizer, model))


def keeps_what_it_says(
    contender: sumo_quickstart.QuickstartContender, model: torch.nn.Module, state: dict[str, int]
) -> None:
    matrices, rest = fsdp_step.matrices_and_rest(model)
    moments = sum(2 * p.nbytes for p in rest)
    steps = 16 * (len(matrices) + len(rest))  # 0-d tensors
    assert moments <= state["all"] - state["matrices"] <= moments + steps, contender
    least = None
    if contender.kind == "Muon":
        least = sum(p.nbytes for p in matrices)
    if contender.kind == "SUMO":
        rank = contender.options["rank"] * 24
        least = sum(4 * rank * sum(p.shape) for p in matrices)
    if least is not None:
        assert least <= state["numbers"] <= state["matrices"] <= least + steps, contender


def test_galore_has_a_part_of_the_short_side_and_the_rest_in_a_plain_group(galore, tmp_path):
    options = {"rank": 0.25, "scale": 0.25}
    model = models.build(odd=False)
    optimizer = sumo_quickstart.build("GaLore", model, 0.01, ADAM, options, galore)
    plain, low = optimizer.param_groups
    assert "rank" not in plain
    assert (low["rank"], low["scale"], low["betas"]) == (6, 0.25, (0.9, 0.95))
    matrices, rest = fsdp_step.matrices_and_rest(model)
    assert list(map(id, low["params"])) == list(map(id, matrices))
    assert list(map(id, plain["params"])) == list(map(id, rest))
    for name in ("galore_torch", "galore_torch.adamw"):
        sys.modules.pop(name, None)
    absent = tmp_path / "empty"
    absent.mkdir()
    with pytest.raises(ImportError, match=r"pip install --no-deps --target .* galore-torch"):
        sumo_quickstart.galore(str(absent))


def test_state_is_counted_by_storages_each_once():
    class Projector:
        view = None

    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters())
    projector = Projector()
    projector.view = torch.zeros(10, 10)[:, :3]
    state = {"projector": projector, "again": projector.view, "step": 3}
    optimizer.state = {model.weight: state, model.bias: {"exp_avg": torch.zeros(4)}}
    found = sumo_quickstart.state_bytes(optimizer, model)
    assert found == {"all": 416, "matrices": 400, "numbers": 120}


class FormulaRuns(sumo_quickstart.QuickstartRuns):
    """Bits per byte by a formula, without a run: least at lr 0.04, period 20, perp_scale 0."""

    def __init__(self) -> None:
        pass

    def run(self, contender: sumo_quickstart.QuickstartContender, seed: int = 0) -> dict[str, Any]:
        bits = (torch.tensor(contender.lr / 0.04).log2() ** 2).item() + 1
        period = contender.options.get("period", 0)
        bits -= 0.1 * (period == 20) + 0.01 * (contender.options.get("perp_scale") == 0)
        return {
            "name": contender.name, "kind": contender.kind, "lr": contender.lr, "seed": seed,
            "options": contender.options, "bits_per_byte": bits,
            "state": dict.fromkeys(("all", "matrices", "numbers"), 1.5e6),
        }  # fmt: skip


def test_the_best_lr_is_no_last_one_and_the_table_says_what_was_changed():
    bench = FormulaRuns()
    contender = next(c for c in sumo_quickstart.CONTENDERS if c.kind == "SUMO")
    assert bench.best_lr(contender).lr == pytest.approx(0.048)
    finals = bench.finals(contender)
    assert [r["options"]["period"] for r in finals] == [250, 50, 20, 20]
    assert [r["options"]["perp_scale"] for r in finals] == [1, 1, 1, 0]
    last = sumo_quickstart.table(finals).splitlines()[-1]
    assert last.startswith(f"| {contender.name}, perp_scale 0.0 | 0.048 | 20 |")


def test_poet_numbers_are_those_of_its_paper():
    """And AdamW's and Muon's those of the model: 2764.47M numbers, 2600.47M of them in matrices."""
    found = poet_numbers.rows(ROOT / "configs/models/llama_3b.json", [256, 512])
    assert found == [
        ("AdamW", 2_764_474_880, 2 * 2_764_474_880),
        ("Muon", 2_764_474_880, 2_764_474_880 + 32_000 * 2560 * 2 + 65 * 2560),
        ("POET, b 256", 366_635_520, 2 * 366_635_520),
        ("POET, b 512", 570_059_264, 2 * 570_059_264),
    ]


def test_poets_contenders_train_and_keep_what_adam_would():
    config = llama.load_config(ROOT / "configs/models/quickstart.json")
    config.num_hidden_layers = 1
    tokens = torch.arange(32).view(2, 16)
    for contender in poet_quickstart.CONTENDERS:
        model, optimizer = poet_quickstart.build(
            llama.build(config, 0), contender, ADAM, lambda model: model
        )
        losses = []
        for _ in range(2):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] < losses[0], contender
        trained = [p for p in model.parameters() if p.requires_grad]
        if contender.kind != "Muon":
            kept = sumo_quickstart.state_bytes(optimizer, model)["all"]
            assert kept == sum(2 * p.nbytes + 4 for p in trained), contender
        frozen = any(not p.requires_grad for p in model.parameters())
        assert frozen == (contender.kind == "POET"), contender


def test_merges_of_order_3_drift_and_of_order_4_do_not():
    (three, norm), (four, _) = (poet_drift.drift(o, torch.float32, merges=40) for o in (3, 4))
    assert 0.07 < norm < 0.09
    assert three > 1e-4 > 1e-6 > four


@pytest.mark.parametrize("variant", poet_counts.VARIANTS)
def test_what_a_rotated_layer_asks_a_gpu_for(variant):
    """Products and saved bytes by formula; W R_i x and the map once more if they are not saved."""
    tokens, n, m, b = 96, 32, 48, 8
    given = {"dtype": torch.bfloat16, "device": "meta"}
    x, gradient = torch.empty(tokens, n, **given), torch.empty(tokens, m, **given)
    x.requires_grad_()
    plain = poet_counts.count(torch.nn.Linear(n, m, bias=False, **given), x, gradient)
    assert (plain.kernels, plain.saved) == (3, 2 * tokens * n)
    assert plain.products == {torch.bfloat16: 3 * tokens * n * m}
    layer = rotated(n, m, torch.bfloat16, block=b, variant=variant).to("meta")
    counts = poet_counts.count(layer, x, gradient)
    again = variant == "memory"
    one_product, rotated_rows = tokens * n * m, tokens * b * (n + m)
    assert counts.products == {
        torch.bfloat16: (2 + again) * one_product + 3 * rotated_rows + again * tokens * n * b,
        torch.float32: (8 + 3 * again) * (n + m) * b**2,
    }
    assert counts.saved == 2 * tokens * n + (not again) * 2 * (tokens * m + (n + m) * b)
    assert counts.peak > counts.saved - 2 * tokens * n
    assert counts.moved > plain.moved
    assert counts.seconds >= (1 - 1e-12) * counts.moved / poet_counts.BYTES_PER_SECOND
