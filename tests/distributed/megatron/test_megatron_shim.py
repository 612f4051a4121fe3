"""The tools of the Megatron tests: its own Adam trains one model alike however the model is cut.

Adam divides by the root of a mean square, which blows the rounding of tiny gradients up to whole
learning rates (parameters differ by 3e-4 with adam_eps 1e-8); with 1e-4 it keeps them small.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import harness, megatron_cpu
from tests.support import megatron_model as models

BOUND = 2e-6
DISTRIBUTED = {"use_distributed_optimizer": True}
EXPERTS = {"moe_experts": 4}

Layout = tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]
"""ranks; options of parallel, of wrap, and of gpt that change nothing in one process"""
LAYOUTS: dict[str, Layout] = {
    "TP 2 x DP 2, distributed optimizer": (4, {"tp": 2}, DISTRIBUTED, {}),
    "TP 4, fewer query groups": (4, {"tp": 4}, {}, {}),
    "TP 2 x PP 2": (4, {"tp": 2, "pp": 2}, {}, {}),
}
SPARSE: Layout = (2, {"ep": 2}, {}, {})

Run = tuple[list[float], list[float], dict[str, Tensor]]


def train(
    version: str, groups: dict[str, Any], wrapping: dict[str, Any], model: dict[str, Any]
) -> Run:
    """Losses and gradient norms of three steps, and the parameters after them."""
    megatron_cpu.install(version)
    from megatron.core.optimizer import get_megatron_optimizer

    data = models.parallel(**groups)
    ddp = models.wrap(models.gpt(**model), **wrapping)
    optimizer = get_megatron_optimizer(models.optimizer_config(ddp, adam_eps=1e-4), [ddp])
    steps = [models.train_step(ddp, optimizer, models.batch(step, *data)) for step in range(3)]
    return [loss for loss, _ in steps], [norm for _, norm in steps], models.full_parameters(ddp)


@functools.cache
def alone(version: str, model: tuple[tuple[str, Any], ...]) -> Run:
    return harness.run(1, train, version, {}, {}, dict(model), pool=version)[0]


def agree(version: str, layout: Layout, model: dict[str, Any], bound: float = BOUND) -> None:
    ranks, groups, wrapping, more = layout
    losses, norms, wanted = alone(version, tuple(model.items()))
    for found in harness.run(ranks, train, version, groups, wrapping, model | more, pool=version):
        assert found[0] == pytest.approx(losses, rel=0, abs=bound)
        assert found[1] == pytest.approx(norms, rel=bound)
        assert found[2].keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[2][name], value, rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", megatron_cpu.VERSIONS)
@pytest.mark.fast_cases(*(f"0.19.2-{layout}" for layout in LAYOUTS))
def test_a_cut_model_trains_like_a_whole_one(version, layout):
    agree(version, LAYOUTS[layout], {})


@pytest.mark.parametrize("version", megatron_cpu.VERSIONS)
@pytest.mark.fast_cases("0.19.2")
def test_a_cut_mixture_of_experts_trains_like_a_whole_one(version):
    agree(version, SPARSE, EXPERTS)


def layout_of_qkv(version: str) -> tuple[list[int], bool]:
    megatron_cpu.install(version)
    models.parallel(tp=4)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    parameter = dict(models.named_parameters(models.gpt()))[name]
    full = models.weight(name, [128, 64])  # 2 groups of [2 heads of q, k, v], 16 rows a head
    rank = torch.distributed.get_rank()
    return list(parameter.shape), torch.equal(parameter, full[32 * rank : 32 * (rank + 1)])


@pytest.mark.parametrize("version", megatron_cpu.VERSIONS)
@pytest.mark.fast_cases("0.19.2")
def test_fewer_query_groups_than_ranks_cut_a_group(version):
    """Rank 0 has a group's q, rank 1 its k and v: rows as they come, at no boundary of a group."""
    assert harness.run(4, layout_of_qkv, version, pool=version) == [([32, 64], True)] * 4


def test_launch_fetches_these_versions():
    script = (megatron_cpu.FOLDERS.parent / "launch" / "common.sh").read_text()
    assert re.findall(r"^MEGATRON=\"(.*)\"", script, re.M) == [" ".join(megatron_cpu.VERSIONS)]
