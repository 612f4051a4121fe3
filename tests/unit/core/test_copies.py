"""A copied or pickled optimizer goes on as the original does, or is refused when it is copied."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import spectral_dist
from spectral_dist.monitor import Monitor
from spectral_dist.rules import registry
from tests.support import harness
from tests.support.weights import same, values
from tests.unit.core.trained import build, train

TITLES = [entry.title for entry in registry.entries()]


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def saved(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("title", TITLES)
def test_goes_on_bit_by_bit(title: str, copied: Callable[[Any], Any]) -> None:
    """Before the first step, in the middle of a cycle, and after the original has gone on."""
    for steps in (0, 4):
        model, optimizer = build(title)
        train(model, optimizer, 0, steps)
        other, second = copied((model, optimizer))
        assert type(second) is type(optimizer)
        before = values(other)
        train(model, optimizer, steps, 9)
        assert same(values(other), before)
        train(other, second, steps, 9)
        assert same(values(other), values(model))
        assert second.steps_taken() == optimizer.steps_taken() == 9
        mine, theirs = (list(o.state.values()) for o in (optimizer, second))
        for a, b in zip(mine, theirs, strict=True):
            assert same(a, b)
        assert not {id(p) for p in second.state} & {id(p) for p in optimizer.state}


def test_a_copy_begins_anew_what_was_added_from_outside() -> None:
    """As torch's copies have no hooks: two runs would write into one file."""
    model, optimizer = build("Muon")
    seen: list[int] = []
    optimizer.monitor = Monitor(every=1, write=[lambda step, report: seen.append(step)])
    optimizer.observers.append(lambda names, matrices: None)
    optimizer.after_load.append(lambda: None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 0, 2)
    schedule.step()
    other, second, copied_schedule = copy.deepcopy((model, optimizer, schedule))
    assert second.monitor is None
    assert second.observers == second.after_load == []
    train(other, second, 2, 3)
    assert seen == [1, 2]
    copied_schedule.step()
    assert [g["lr"] for g in second.param_groups] == pytest.approx([0.005, 0.005])
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.01])
    second.load_state_dict(optimizer.state_dict())
    second.add_param_group({"params": [], "lr": 1.0})


def test_what_an_older_release_has_pickled() -> None:
    old = spectral_dist.Muon.__new__(spectral_dist.Muon)
    with pytest.raises(ValueError, match=r"build it anew and load its state_dict"):
        old.__setstate__({"defaults": {}, "state": {}, "param_groups": []})


def on_ranks() -> list[str]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)))
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for optimizer in (
            spectral_dist.Muon(spectral_dist.param_groups(ddp)),
            spectral_dist.Muon(
                spectral_dist.param_groups(ddp.module), process_group=dist.group.WORLD
            ),
        ):
            for copied in (copy.deepcopy, pickle.dumps):
                for steps in range(2):
                    train(ddp.module, optimizer, 0, steps)
                    with pytest.raises(ValueError, match="cannot be copied") as raised:
                        copied(optimizer)
                    said.append(str(raised.value))
            train(ddp.module, optimizer, 1, 2)
        alone = spectral_dist.Muon(spectral_dist.param_groups(ddp.module))
        train(*copy.deepcopy((ddp.module, alone)), 0, 1)
    spectral_dist.tag(ddp)
    file = io.BytesIO()
    torch.save(dict(ddp.named_parameters()), file)
    torch.save(ddp.module, io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == dict(ddp.named_parameters()).keys()
    return said


def test_with_other_ranks_it_is_refused_when_it_is_copied() -> None:
    for said in harness.run(2, on_ranks):
        assert len(said) == 8
        assert all("spectral_dist.checkpoint.save" in text for text in said)


@pytest.mark.parametrize("title", ["Muon", "POET"])
def test_a_tagged_model_is_copied_and_saved(title: str) -> None:
    model, _ = build(title)
    spectral_dist.tag(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    with pytest.raises(ValueError, match="bare parameters"):
        getattr(spectral_dist, title)([p for p in average.parameters() if p.requires_grad])
    assert same(values(pickled(model)), values(model))
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), values(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(spectral_dist, title)(trained)
    train(model, optimizer, 0, 1)


@pytest.mark.parametrize("title", [title for title in TITLES if title != "POET"])
def test_what_was_replaced_is_not_kept(title: str) -> None:
    """As accelerate does under FSDP2, whose shards take the place of the whole model."""
    model, optimizer = build(title)
    spectral_dist.tag(model)
    old = [weakref.ref(p) for p in model.parameters()]
    with torch.no_grad():
        new = [nn.Parameter(p.clone()) for p in model.parameters()]
    where = {id(p): q for p, q in zip(model.parameters(), new, strict=True)}
    groups = [[where[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for group, replaced in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = replaced
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, where[id(p)])
    del p, replaced
    gc.collect()
    assert [reference() for reference in old] == [None] * len(old)
    train(model, optimizer, 0, 2)
    wanted, other = build(title)
    train(wanted, other, 0, 2)
    assert same(values(model), values(wanted))
