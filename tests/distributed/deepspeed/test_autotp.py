"""Under DeepSpeed's tensor parallelism every ZeRO stage gives the numbers of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_dist
from spectral_dist.params.classify import classify
from tests.distributed.deepspeed import autotp_runs as runs
from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.universal import converter
from tests.support import harness

pytest.importorskip("transformers")
POOL = "autotp"  # DeepSpeed keeps groups and modes of AutoTP for as long as a process lives
STEPS, CLIP, LAYERS = 3, 0.3, 2
MATRICES = {"neox": 6, "phi3": 7}
"""of a layer; else 7: q, k, v, o, gate, up, down"""
PHI3 = {
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row"},
            {
                "patterns": [r".*\.gate_up_proj\.weight$"], "partition_type": "column",
                "shape": [2, -1], "partition_dim": 0,
            },
        ],
    }
}  # fmt: skip
"""The MLP alone: transformers cuts q, k and v apart at rows that AutoTP does not change."""


def optimizer_of(rule: str, **options: Any) -> Any:
    def make(model: nn.Module) -> Any:
        groups = spectral_dist.param_groups(model)
        return getattr(spectral_dist, rule)(groups, **engine.OPTIONS, **options)

    return make


@functools.cache
def alone(name: str, rule: str, steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    return runs.alone(name, optimizer_of(rule), steps, CLIP)


def config(
    stage: int, name: str = "gqa", rule: str = "Muon", tensor: int = 2, **changes: Any
) -> dict[str, Any]:
    section = PHI3 if name == "phi3" else {}
    found = runs.config(
        stage, tensor, 4, gradient_clipping=CLIP, accumulation=2, tensor_parallel=section, **changes
    )
    found["optimizer"]["type"] = f"Spectral{rule}"
    return found


def check(name: str, rule: str, ranks: list[Any]) -> None:
    """Compare matrices to 1e-6, AdamW's parameters, which it divides by small numbers, to 1e-5.

    PolarGrad's polar factor of o_proj's gradient, which is nearly singular, has errors of 1.1e-6
    without tensor parallelism as well.
    """
    _, wanted = alone(name, rule)
    per_layer = MATRICES.get(name, 7)
    assert sum(one["polar_calls"] for one in ranks) == STEPS * LAYERS * per_layer
    for one in ranks:
        assert sum(len(shapes) for _, shapes in one["kinds"].values()) == LAYERS * per_layer
        for key, value in wanted.items():
            bound = 5e-6 if rule == "PolarGrad" else 1e-6
            bound = bound if one["kinds"][key][0] == "matrix" else 1e-5
            found = one["parameters"][key].view_as(value)
            torch.testing.assert_close(found, value, rtol=0, atol=bound, msg=f"{key} of {name}")


RULES = ("Muon", "PolarGrad", "ROOT", "SUMO", "NorMuon")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.fast_cases("Muon-1")
def test_steps_are_those_of_one_process(rule: str, stage: int) -> None:
    """TP 2 x DP 2 with accumulation and clipping; each matrix once in the job."""
    check("gqa", rule, harness.run(4, runs.train, config(stage, rule=rule), "gqa", pool=POOL))


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("name", ["tied", "uneven", "qwen3", "neox", "phi3"])
@pytest.mark.slow
def test_kinds_of_models(name: str, stage: int) -> None:
    """A tied head, three key-value heads on two ranks, head norms, q, k and v in one weight."""
    check(name, "Muon", harness.run(4, runs.train, config(stage, name), name, pool=POOL))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.slow
def test_matrices_in_slabs(stage: int) -> None:
    ranks = harness.run(
        4, runs.train, config(stage, options={"strategy": "gram"}), "gqa", pool=POOL
    )
    check("gqa", "Muon", ranks)
    assert all(one["strategies"] == {"gram"} for one in ranks)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.slow
def test_each_tile_alone(stage: int) -> None:
    """On request; it takes other steps, and as many as there are tiles."""
    options = {"strategy": "block"}
    ranks = harness.run(4, runs.train, config(stage, options=options), "gqa", 3, pool=POOL)
    assert sum(one["polar_calls"] for one in ranks) == 2 * STEPS * LAYERS * 7
    _, wanted = alone("gqa", "Muon")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert (ranks[0]["parameters"][key] - wanted[key]).abs().max() > 1e-3
    for one in ranks:
        assert torch.equal(one["parameters"][key], ranks[0]["parameters"][key])


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.slow
def test_a_client_optimizer_and_tp_model_init(stage: int) -> None:
    found = config(stage)
    del found["optimizer"]
    check("gqa", "Muon", harness.run(4, runs.train_with_client, found, "gqa", pool=POOL))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.slow
def test_matrices_that_are_not_cut(stage: int) -> None:
    """Both tensor-parallel ranks have copies of such weights; one of them orthogonalizes each."""
    found = config(stage)
    specs = [{"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"}]
    up = r".*\.(q|k|v|up|gate)_proj\.weight$"
    specs.append({"patterns": [up], "partition_type": "column"})
    specs[0]["patterns"] = [r".*layers\.0\.(self_attn\.o|mlp\.down)_proj\.weight$"]
    specs[1]["patterns"] = [up.replace(".*", r".*layers\.0\..*", 1)]
    section = {"use_default_specs": False, "layer_specs": specs}
    found["tensor_parallel"]["partition_config"] = section
    check("gqa", "Muon", harness.run(4, runs.train, found, "gqa", pool=POOL))


@pytest.mark.slow
def test_deepspeeds_own_muon_steps_on_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    """Its TP 2 x DP 2 is not its one process; ours is. Figures for docs/deepspeed.md."""
    differences = {}
    for kind in ("Muon", "SpectralMuon"):
        results = []
        for world, tensor in ((1, 1), (4, 2)):
            found = runs.config(1, tensor, world)
            own = {"torch_adam": True} if kind == "Muon" else {}  # no compiling
            params = {"lr": 0.02, "weight_decay": 0.0, **own}
            found["optimizer"] = {"type": kind, "params": params}
            results.append(harness.run(world, runs.trained, found, "gqa", STEPS, pool=POOL)[0])
        start = {n: p.detach() for n, p in runs.build("gqa").named_parameters()}
        one, many = results
        names = [name for name in one if "proj" in name]
        moved = max(float((one[n] - start[n]).norm()) for n in names)
        error = max(float((many[n].view_as(one[n]) - one[n]).norm()) for n in names)
        differences[kind] = error / moved
    with capsys.disabled():
        print(f"\nlargest error of a matrix over the largest way it moved: {differences}")
    assert differences["SpectralMuon"] < 1e-4
    assert differences["Muon"] > 0.01


def to_universal(folder: Path, tag: str) -> str:
    harness.run(
        1, converter, "--inject_missing_state", "--num_extract_workers", "1",
        "--num_merge_workers", "1", "--input_folder", str(folder / tag),
        "--output_folder", str(folder / f"{tag}_universal"), pool=POOL,
    )  # fmt: skip
    return f"{tag}_universal"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("rule", ["Muon", "SUMO"])
@pytest.mark.fast_cases("Muon-0")
def test_saved_and_loaded_with_the_same_ranks(rule: str, stage: int, tmp_path: Path) -> None:
    """Bit by bit, as if it had never stopped."""
    found, folder = config(stage, rule=rule), str(tmp_path)
    whole = harness.run(4, runs.interrupted, found, folder, first=0, last=6, save="end", pool=POOL)
    harness.run(4, runs.interrupted, found, folder, first=0, last=3, save="a", pool=POOL)
    again = harness.run(4, runs.interrupted, found, folder, first=3, last=6, load="a", pool=POOL)
    for never_stopped, resumed in zip(whole, again, strict=True):
        assert resumed["losses"] == never_stopped["losses"][-len(resumed["losses"]) :]
        for key, value in never_stopped["parameters"].items():
            assert torch.equal(resumed["parameters"][key], value), key


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("stage", "rule"), [(1, "Muon"), (2, "SUMO")])
@pytest.mark.slow
def test_universal_checkpoints(stage: int, rule: str, tensor: int, tmp_path: Path) -> None:
    """TP 2 x DP 2 to TP 1 x DP 4, and back to what it was: DeepSpeed's converter knows tiles."""
    folder = str(tmp_path)
    found = config(stage, rule=rule)
    whole = harness.run(4, runs.interrupted, found, folder, first=0, last=6, pool=POOL)
    harness.run(4, runs.interrupted, found, folder, first=0, last=3, save="a", pool=POOL)
    tag = to_universal(tmp_path, "a")
    changes = {"tensor": tensor, "checkpoint": {"load_universal": True}}
    found = config(stage, rule=rule, **changes)
    if tensor == 1:
        found["gradient_accumulation_steps"] = 1
        found["train_micro_batch_size_per_gpu"] = runs.BATCH // 4
    again = harness.run(4, runs.interrupted, found, folder, first=3, last=6, load=tag, pool=POOL)
    assert mean_losses(again, 3) == pytest.approx(mean_losses(whole, 6)[3:], abs=1e-6)
    for key, value in whole[0]["parameters"].items():
        loaded = again[0]["parameters"][key].view_as(value)
        torch.testing.assert_close(loaded, value, rtol=0, atol=1e-5, msg=key)


def mean_losses(ranks: list[Any], steps: int) -> list[float]:
    """The loss of each step over all micro-batches and ranks."""
    losses = torch.tensor([one["losses"] for one in ranks], dtype=torch.float64)
    return losses.view(len(ranks), steps, -1).mean((0, 2)).tolist()


def test_refusals() -> None:
    """Every rank raises; the last model has two key-value heads."""
    poet = config(1, rule="POET")
    poet["optimizer"]["params"] = {"lr": 1e-3}
    harness.run_refused(4, "POET rotates whole weights", runs.train, poet, "gqa", pool=POOL,
                        within=60)  # fmt: skip
    four = config(1, tensor=4)
    four["train_micro_batch_size_per_gpu"] = 4
    harness.run_refused(4, r"at\s+most 2", runs.train, four, "gqa", pool=POOL, within=60)
    hpz = config(3)
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2
    harness.run_refused(4, "together with zero_hpz_partition_size", runs.train, hpz, "gqa",
                        pool=POOL, within=60)  # fmt: skip


class Marked(nn.Module):
    """A Linear whose weight says what AutoTP's layers would."""

    def __init__(self, entry: Any, reason: str = "") -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6, bias=False)
        conversion = {"affine_map": entry, "unsupported_reason": reason}
        self.proj.weight.ds_autotp_universal_checkpoint_meta = {"conversion": conversion}


def entry(*pieces: dict[str, Any]) -> dict[str, Any]:
    ranks: dict[int, Any] = {0: {"pieces": []}, 1: {"pieces": []}}
    for piece in pieces:
        for rank in piece["locations"]:
            ranks[rank]["pieces"].append(piece)
    return {"logical_shape": [6, 4], "ranks": ranks}


def piece(row: int, rows: int, at: int, *ranks: int, **changes: Any) -> dict[str, Any]:
    source, dest = [4 * row, [4, 1]], [4 * at, [4, 1]]
    return {"shape": [rows, 4], "source": source, "dest": dest, "locations": list(ranks)} | changes


def test_pieces_are_read_and_what_cannot_be_read_is_refused() -> None:
    engine.quietly("deepspeed")
    from spectral_dist.integrations.deepspeed.tensor_parallel import pieces_of

    def read(found: Any, reason: str = "") -> Any:
        model = Marked(found, reason)  # holds the parameter
        return pieces_of(classify(model)[0], 2)

    blocks = read(entry(piece(0, 1, 0, 0), piece(1, 3, 0, 1), piece(4, 2, 1, 0)))
    assert [(p.tensor_rank, p.row, p.rows, p.offset) for p in blocks] == [
        (0, 0, 1, 0), (1, 1, 3, 0), (0, 4, 2, 4),
    ]  # fmt: skip
    assert read(entry(piece(0, 6, 0, 0, 1))) is None
    refused: list[tuple[Any, str, str]] = [
        (None, "shared heads", "shared heads"),
        (entry(piece(0, 3, 0, 0), piece(3, 3, 0, 0, 1)), "", "several ranks hold"),
        (entry(piece(0, 3, 0, 0, scale=0.5), piece(3, 3, 0, 1)), "", "or scale"),
        (entry(piece(0, 6, 0, 0, shape=[2, 3, 4])), "", "not cut into rectangles"),
        (entry(piece(0, 3, 0, 0), piece(3, 2, 0, 1)), "", "do not add up"),
        (entry(piece(0, 6, 0, 0)), "", "at most 1"),
    ]
    for found, reason, match in refused:
        with pytest.raises(ValueError, match=match):
            read(found, reason)
