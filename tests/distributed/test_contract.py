"""What every registered rule keeps under every framework, and every placement says of parameters.

Of rules there is no list here: whatever is registered is run, by its name.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectral_dist.launch import megatron_config, shipped, torch_config
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING
from spectral_dist.rules.registry import Entry
from spectral_dist.testing import check_rule
from tests.distributed import contract_runs
from tests.distributed.contract_runs import MEGATRON, distance
from tests.support import harness

ENTRIES = [entry for entry in registry.entries() if entry.rule is not None]
BOUND = 1e-5


def cases(*first: int) -> pytest.MarkDecorator:
    """Every rule with every one of some numbers; all but one rule with the first one are slow."""
    chosen = [
        pytest.param(
            entry, number, id=f"{entry.name}-{number}",
            marks=[] if entry is ENTRIES[0] and number == first[0] else pytest.mark.slow,
        )
        for entry in ENTRIES
        for number in first
    ]  # fmt: skip
    return pytest.mark.parametrize(("entry", "number"), chosen)


@cases(2)
def test_check_rule(entry: Entry, number: int) -> None:
    assert entry.rule is not None
    check_rule(entry.rule, ranks=number)


@cases(1, 3)
def test_deepspeed(entry: Entry, number: int, tmp_path: Path) -> None:
    """ZeRO 1 and 3: one process's weights, and those of a run that never stopped."""
    args = (entry.title, {"lr": 0.02}, number, str(tmp_path))
    for result in harness.run(2, contract_runs.deepspeed, *args):
        assert result["alone"] < BOUND
        assert result["resumed"] < BOUND
        assert result["moved"] > 100 * BOUND


@cases(2)
@pytest.mark.slow
def test_megatron(entry: Entry, number: int, tmp_path: Path) -> None:
    """TP 2: the same, and restored in one process."""
    args = (entry.megatron_name, {}, {"tp": number}, {}, str(tmp_path))
    cut = harness.run(number, contract_runs.megatron, *args, pool=MEGATRON)
    args = (entry.megatron_name, {}, {}, {}, str(tmp_path), "", False)
    (alone,) = harness.run(1, contract_runs.megatron, *args, pool=MEGATRON)
    assert distance(alone["initial"], alone["weights"]) > 100 * BOUND
    for result in cut:
        assert distance(result["weights"], alone["weights"]) < BOUND
        assert distance(result["resumed"], result["weights"]) < BOUND
    assert distance(alone["resumed"], alone["weights"]) < BOUND


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_configuration_for_launch(entry: Entry) -> None:
    """Shipped, or made of Muon's: it is read, and names the rule."""
    for engine, read in (("ddp", torch_config.read), ("megatron", megatron_config.read)):
        config = read(shipped.config_of(engine, entry.name))
        assert type(config.options) is entry.options
    params = json.loads(shipped.config_of("deepspeed", entry.name).read_text())["optimizer"]
    assert params["type"] == entry.deepspeed_type
    entry.options.from_user({k: v for k, v in params["params"].items() if k not in ROUTING})


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ("fsdp", 2), ("tp", 2), ("hsdp", 4),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("fsdp", 3), ("tp_fsdp", 4), ("ddp", 2))),
    ],
)  # fmt: skip
def test_placements_of_plain_torch(layout: str, world: int) -> None:
    assert all(harness.run(world, contract_runs.torch_placement, layout))


@pytest.mark.parametrize(
    ("stage", "world"),
    [
        (1, 2), (3, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 2), (1, 3), (3, 3))),
    ],
)  # fmt: skip
def test_placements_of_deepspeed(stage: int, world: int) -> None:
    assert all(harness.run(world, contract_runs.deepspeed_placement, stage))


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_placements_of_megatron(distributed: bool) -> None:
    """TP 2 x DP 2."""
    wrapping = {"use_distributed_optimizer": distributed}
    args = ({"tp": 2}, wrapping)
    assert all(harness.run(4, contract_runs.megatron_placement, *args, pool=MEGATRON))
