"""Checkpoints that are written while training goes on hold the numbers of the call."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

import spectral_dist
from spectral_dist import checkpoint, poet
from spectral_dist.checkpoint import files as checkpoint_files
from spectral_dist.checkpoint.chunked_tensor import ChunkedTensor
from spectral_dist.rules import registry
from tests.support import harness, together
from tests.support.together import OptimizedModel, quiet
from tests.unit.checkpoint.loading import everything, made, unchanged

TITLES = [*(entry.title for entry in registry.builtin_entries()), "POET"]
OPTIONS: dict[str, dict[str, Any]] = {"SUMO": {"rank": 2}, "POET": {"merge_every": 3}}


def trial(layout: str, kind: str) -> OptimizedModel:
    return OptimizedModel(layout, kind=kind, **OPTIONS.get(kind, {}))


def hold(monkeypatch: Any) -> threading.Event:
    """Have this process write nothing before the event is set."""
    go_on = threading.Event()
    write = checkpoint_files.write_in

    def late(*args: Any) -> str:
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint_files, "write_in", late)
    return go_on


def steps_meanwhile(folder: str, layout: str, kind: str) -> None:
    with quiet(), pytest.MonkeyPatch.context() as patched:
        first = trial(layout, kind)
        for number in range(2):
            first.step(number)
        weights, states = first.weights(), first.states()
        go_on = hold(patched)
        future = checkpoint.async_save(folder, first.model, first.optimizer, steps=2)
        for number in range(2, 5):
            first.step(number)
        assert not future.done()
        assert not Path(folder, "spectral_dist.json").exists()
        go_on.set()
        for number in range(5, 8):  # while the ranks write
            first.step(number)
        assert isinstance(future.result(60), str)
        dist.barrier()
        second = trial(layout, kind)
        assert checkpoint.load(folder, second.model, second.optimizer) == {"steps": 2}
        assert together.same(second.weights(), weights)
        assert together.same(second.states(), states)
        for number in range(2, 8):
            second.step(number)
        assert together.same(second.weights(), first.weights())


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(
            layout, kind, marks=[pytest.mark.slow] * (kind not in ("Muon", "SUMO", "POET"))
        )
        for kind in TITLES
        for layout in ("ddp", "fsdp")
    ],
)
def test_steps_while_it_is_written(layout: str, kind: str, tmp_path: Path) -> None:
    harness.run(2, steps_meanwhile, str(tmp_path), layout, kind)


@pytest.mark.parametrize("kind", ["Muon", "SUMO"])
def test_in_one_process(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made(kind, 3)
    go_on = hold(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = checkpoint.async_save(tmp_path, model, optimizer, step=3)
        model(torch.arange(5)).sum().backward()
        optimizer.step()
        go_on.set()
        future.result(60)
    other = made(kind, seed=1)
    assert checkpoint.load(tmp_path, *other) == {"step": 3}
    unchanged(everything(*made(kind, 3)), *other)


def test_one_after_the_other(tmp_path: Path) -> None:
    model, optimizer = made("Muon", 1)
    futures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(4):
            futures.append(
                checkpoint.async_save(tmp_path / str(number), model, optimizer, n=number)
            )
            assert all(future.done() for future in futures[:-1])
        futures[-1].result(60)
    for number in range(4):
        assert checkpoint.load(tmp_path / str(number), model, optimizer) == {"n": number}


def test_errors_of_writing_are_in_the_future(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, optimizer = made("Muon", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = checkpoint.async_save(tmp_path / "file", model, optimizer)
        with pytest.raises(RuntimeError, match="file was not saved"):
            future.result(60)
        checkpoint.async_save(tmp_path / "good", model, optimizer).result(60)  # goes on
    checkpoint.load(tmp_path / "good", model, optimizer)


# -- torch's own


def by_torch(folder: str, layout: str, kind: str) -> None:
    with quiet():
        first, second = trial(layout, kind), trial(layout, kind)
        for number in range(2):
            first.step(number)
        states = first.states()
        content = {"o": checkpoint.state_dict(first.optimizer)}
        future = dcp_async_save(content, checkpoint_id=folder)
        future.result()
        dist.barrier()
        loaded = {"o": checkpoint.state_dict(second.optimizer, saving=False)}
        dcp_load(loaded, checkpoint_id=folder)
        checkpoint.load_state_dict(second.optimizer, loaded["o"])
        assert together.same(second.states(), states)
        dist.barrier()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["Muon", "SUMO"])
def test_async_save_of_torch(layout: str, kind: str, tmp_path: Path) -> None:
    harness.run(2, by_torch, str(tmp_path), layout, kind)


def copies(folder: str) -> None:
    """What is done to tensors to copy them; nothing else is, in silence."""
    with quiet():
        first = trial("ddp", "Muon")
        first.step(0)
        state = checkpoint.state_dict(first.optimizer)["state"]
        runs = next(s["exp_avg"] for s in state.values() if isinstance(s["exp_avg"], ChunkedTensor))
        for made_so in (
            copy.deepcopy,
            torch.clone,
            lambda t: t.detach(),
            lambda t: t.to("cpu", copy=True),
        ):
            other = made_so(runs)
            assert other.shape == runs.shape
            assert other.parts.keys() == runs.parts.keys()
            assert all(torch.equal(other.parts[at], v) for at, v in runs.parts.items())
        zeros = torch.empty_like(runs)
        for values in zeros.parts.values():
            values.zero_()
        zeros.copy_(runs)
        assert all(torch.equal(zeros.parts[at], v) for at, v in runs.parts.items())
        for wrong in (
            lambda: runs + 1,
            lambda: torch.zeros(runs.shape).copy_(runs),
            lambda: runs.sum(),
            lambda: runs.new_empty(3),
        ):
            with pytest.raises(NotImplementedError, match=r"checkpoint\.async_save"):
                wrong()
        # torch's writers stage in another way, into tensors of their own: refused, not wrong
        with pytest.raises(NotImplementedError, match="without a storage_writer"):
            dcp_async_save({"o": {"state": state}}, storage_writer=FileSystemWriter(folder))


def test_what_is_spread_is_copied_and_no_more(tmp_path: Path) -> None:
    harness.run(2, copies, str(tmp_path))


# -- what is saved can be loaded


class Odd:
    pass


ODD: dict[str, Any] = {
    "a number of numpy": np.float64(0.1),
    "an array": np.zeros(3),
    "a path": Path("/"),
    "an object": Odd(),
    "a set": {"inner": {1: [Odd()]}},
    "a function": print,
    "a class": Odd,
    "a lambda": lambda: None,
}
PLAIN: dict[str, Any] = {
    "numbers": [1, 2.5, True, None, 1j],
    "text": "text",
    "bytes": b"bytes",
    "tensors": {"a": torch.ones(2)},
    "a generator": torch.get_rng_state(),
    "nested": {"a": [{"b": (1, 2)}]},
    "sizes": torch.Size([1, 2]),
    "a dtype": torch.bfloat16,
}


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.async_save])
@pytest.mark.parametrize("name", ODD)
def test_extra_that_could_not_be_loaded(save: Any, name: str, tmp_path: Path) -> None:
    model, optimizer = made("Muon", 1)
    with pytest.raises(ValueError, match=r"schedule\.odd.* is no plain data"):
        save(tmp_path / "a", model, optimizer, fine=1, schedule={"odd": ODD[name], "lr": 0.1})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", PLAIN)
def test_extra_that_can_be_loaded(name: str, tmp_path: Path) -> None:
    model, optimizer = made("Muon", 1)
    checkpoint.save(tmp_path, model, optimizer, value=PLAIN[name])
    value = checkpoint.load(tmp_path, model, optimizer)["value"]
    assert type(value) is type(PLAIN[name])
    assert str(value) == str(PLAIN[name])


def test_the_schedule_of_a_numpy_lr(tmp_path: Path) -> None:
    """Refused when it is saved, or loaded: not the one and not the other."""
    model = nn.Linear(8, 6)
    lr = np.logspace(-3, -2, 3)[1]
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    schedule.step()
    said = ""
    try:
        checkpoint.save(tmp_path, model, optimizer, schedule=schedule.state_dict())
        checkpoint.load(tmp_path, model, optimizer)
    except ValueError as error:
        said = str(error)
    assert not said or "schedule.base_lrs is no plain data" in said


class Kept(nn.Linear):
    kept: Any = None

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_what_a_module_keeps_beside_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(Kept(6, 4))
    optimizer = spectral_dist.Muon(spectral_dist.param_groups(model))
    model[0].kept = {"scale": 2.5, "history": torch.ones(3)}
    checkpoint.save(tmp_path / "a", model, optimizer)
    model[0].kept = {"scale": 0.0, "history": torch.zeros(3)}
    checkpoint.load(tmp_path / "a", model, optimizer)
    assert model[0].kept["scale"] == 2.5
    assert model[0].kept["history"].tolist() == [1, 1, 1]
    model[0].kept = pickle.Pickler
    with pytest.raises(ValueError, match=r"0\._extra_state is no plain data"):
        checkpoint.save(tmp_path / "b", model, optimizer)


def test_poet_alone(tmp_path: Path) -> None:
    """Its layers keep their settings beside their weights."""
    model = poet.convert(nn.Sequential(nn.Linear(8, 4)), block=4)
    optimizer = spectral_dist.POET(spectral_dist.param_groups(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.async_save(tmp_path, model, optimizer).result(60)
    checkpoint.load(tmp_path, model, optimizer)
