"""Every ZeRO stage and setting gives the numbers of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.engine import errors
from tests.reference import training
from tests.support import harness, models

STEPS = 10
WORLDS = (2, 3, 4)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulation": ...},
    "clipping": {"gradient_clipping": 0.3},
    "round_robin_gradients": {"zero": {"round_robin_gradients": True}},
    "overlap_comm": {"zero": {"overlap_comm": True}},
    "no reduce_scatter": {"zero": {"reduce_scatter": False}},
    "no contiguous_gradients": {"zero": {"contiguous_gradients": False}},
    "small buckets": {"zero": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}},
    "parameter_alignment": {"zero": {"parameter_alignment": True}},
    "sub-groups": {"zero": {"sub_group_size": 3000}},
    "offload": {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}},
    "small bucket_mb": {"options": {"bucket_mb": 0.004}},
    "zero.Init": {"zero_init": True},
    "client optimizer": {"client": True},
    "client optimizer, offload": {
        "client": True, "zero_force_ds_cpu_optimizer": False,
        "zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    },
    "tied head": {"tied": True},
    "everything": {
        "accumulation": ..., "gradient_clipping": 0.3, "client": True,
        "zero": {"round_robin_gradients": True, "overlap_comm": True, "sub_group_size": 3000},
    },
}  # fmt: skip
ACCUMULATION = {2: 3, 3: 2, 4: 3}  # micro-batches a rank, of 12 sequences in all
# stages at which a setting means something
ONLY = {
    "zero.Init": {3},
    "sub-groups": {3},
    "parameter_alignment": {1, 2},
    "offload": {1, 2, 3},
    "client optimizer, offload": {1, 2, 3},
}
STAGES = {setting: sorted(ONLY.get(setting, range(4))) for setting in SETTINGS}


def cases() -> list[Any]:
    """(world, stage, setting): each pair of the last two; of some all three worlds.

    Fast are "everything" at each stage, and each other setting at one stage.
    """
    chosen = []
    for number, (setting, stages) in enumerate(STAGES.items()):
        every = setting in ("plain", "everything") or len(stages) < len(WORLDS)
        for stage in stages:
            usual = WORLDS[(number + stage) % len(WORLDS)]
            turn = setting == "everything" or stage == stages[number % len(stages)]
            for world in WORLDS if every else [usual]:
                marks = [] if turn and world == usual else [pytest.mark.slow]
                chosen.append(pytest.param(world, stage, setting, marks=marks))
    return sorted(chosen, key=lambda case: case.values)


def matrices(model: models.Tiny) -> int:
    """Matrices that train: 8 in the layers, 3 experts, the unused one."""
    return 8 + 3 + 1


@pytest.fixture(scope="module")
def reference() -> Any:
    """Parameters of the one-process reference by (clip, tied), computed once each."""
    known: dict[tuple[float, bool], dict[str, torch.Tensor]] = {}

    def get(clip: float, tied: bool) -> dict[str, torch.Tensor]:
        if (clip, tied) not in known:
            known[clip, tied] = training.train(engine.OPTIONS, STEPS, clip, tied=tied)
        return known[clip, tied]

    return get


@pytest.mark.parametrize(("world", "stage", "setting"), cases())
def test_sharded_equals_one_process(world: int, stage: int, setting: str, reference: Any) -> None:
    if setting == "parameter_alignment":
        config = engine.quietly("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
        if setting not in config.model_fields:
            pytest.skip("DeepSpeed has it from 0.19.7 on; those before refuse it")
    changes = copy.deepcopy(SETTINGS[setting])
    if "accumulation" in changes:
        changes["accumulation"] = ACCUMULATION[world]
    keywords = {k: changes.pop(k) for k in ("zero_init", "client", "tied") if k in changes}
    wanted = reference(changes.get("gradient_clipping", 0.0), keywords.get("tied", False))
    ranks = harness.run(world, engine.train, engine.config(stage, world, **changes), **keywords)
    for result in ranks:
        matrix, rest = errors(result["parameters"], wanted)
        assert matrix < 1e-6
        assert rest < 1e-5
    assert sum(result["polar_calls"] for result in ranks) == STEPS * matrices(models.build())
    assert [n for n, kind in ranks[0]["kinds"].items() if kind == "matrix"] == [
        n for n in ranks[0]["kinds"] if training.is_matrix(n)
    ]


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, fp32 accumulation": {
        "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
    },
    "bf16 polar and wire": {"options": {"polar_dtype": "bfloat16"}},
    "bf16 wire": {"options": {"wire_dtype": "bfloat16"}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 1024}},
}  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.fast_cases("bf16")
def test_bitwise_with_equal_gradients(precision: str) -> None:
    """The owner strategy moves numbers and changes none: any layout has one rank's bits."""
    wanted = None
    for world in (1, 2, 4):  # sums of 2 and 4 equal gradients, divided again, are exact
        for stage in (0, 1, 2, 3):
            if stage == 0 and precision == "bf16, fp32 accumulation":
                continue  # DeepSpeed refuses the combination
            changes = copy.deepcopy(PRECISIONS[precision])
            configuration = engine.config(stage, world, **changes)
            configuration.update(train_batch_size=12 * world, train_micro_batch_size_per_gpu=12)
            ranks = harness.run(
                world, engine.train, configuration, count=3, same=True, given_gradients=True
            )
            for result in ranks:
                assert set(result["kinds"].values()) == {"matrix", "scalar"}
                wanted = wanted or result["parameters"]
                for name, value in wanted.items():
                    assert torch.equal(result["parameters"][name], value), (world, stage, name)


def test_wrappers_are_the_ones_meant() -> None:
    """bf16 at stage 1 has two wrappers with layouts of their own; both must have been tested."""
    found = []
    for precision in ("bf16", "bf16, fp32 accumulation"):
        configuration = engine.config(1, 2, **copy.deepcopy(PRECISIONS[precision]))
        found.append(harness.run(2, engine.train, configuration, count=1)[0]["wrapper"])
    assert found == ["DeepSpeedZeroOptimizer", "BF16_Optimizer"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_its_float32_run(stage: int) -> None:
    """bfloat16 rounds weights to 2^-8 of their size, and the run must not drift further off."""
    wanted = training.train(engine.OPTIONS, STEPS)
    start = dict(models.build().named_parameters())
    configuration = engine.config(stage, 2, bf16={"enabled": True})
    found = harness.run(2, engine.train, configuration)[0]["parameters"]
    for name in wanted:
        if not training.is_matrix(name) or name == "unused.weight":
            continue
        moved = (wanted[name] - start[name]).norm()
        assert (found[name] - wanted[name]).norm() < 0.15 * moved, name
