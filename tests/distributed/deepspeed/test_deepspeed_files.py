"""What an engine's checkpoints say of themselves: which is complete, and whose they are."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spectral_dist.rules import registry
from tests.distributed.deepspeed import engine
from tests.distributed.deepspeed.universal import to_universal
from tests.support import harness, together

TITLES = [entry.title for entry in registry.builtin_entries()]
WRONG_LATEST = ["", "\n", "nowhere", "../outside", "/etc", ".", "..", "a/../../outside"]
SUMO = {"rank": 3, "period": 4}
POET = {"block": 2}


def build(rule: str, stage: int = 1, **changes: Any) -> Any:
    config = engine.config(stage, 2, **changes)
    params = {"lr": 0.02, **(SUMO if rule == "SUMO" else {}), **(POET if rule == "POET" else {})}
    config["optimizer"] = {"type": f"Spectral{rule}", "params": params}
    return engine.engine_for(config)


def everything(running: Any) -> dict[str, torch.Tensor]:
    base = running.basic_optimizer
    state = {f"{i} {k}": v for i, s in enumerate(base.state.values()) for k, v in s.items()}
    parts = base.matrix_parts() if hasattr(base, "matrix_parts") else ()
    state |= {f"{part.matrix} {part.name}": part.values for part in parts}
    return {k: v.detach().clone() for k, v in {**engine.full_parameters(running), **state}.items()}


# -- `latest`


def late(folder: str, stage: int) -> list[str]:
    """Rank 1 writes its files last, and looks at what is named by then."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    latest = Path(folder, "latest")
    running = build("Muon", stage)
    engine.steps(running, 0, 1)
    assert running.save_checkpoint(folder, tag="first") is True
    seen: list[str] = []

    def look() -> None:
        seen.append(latest.read_text())
        dist.barrier()  # before another save takes it away

    look()
    save = TorchCheckpointEngine.save

    def late_save(self: Any, state_dict: Any, path: str) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.3)
            seen.append(latest.read_text() if latest.exists() else "none")
        return save(self, state_dict, path)

    TorchCheckpointEngine.save = late_save
    try:
        running.save_checkpoint(folder, "second")
        look()
        running.save_checkpoint(folder, "second")  # over the one that is named
        look()
        running.save_checkpoint(folder, "third", None, False)  # save_latest
        running.save_checkpoint(folder, tag="fourth", save_latest=False)
        look()
        running.save_checkpoint(folder)
        look()
    finally:
        TorchCheckpointEngine.save = save
        running.destroy()
    return seen


@pytest.mark.parametrize(
    "stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))]
)
def test_latest_names_a_complete_checkpoint(stage: int, tmp_path: Path) -> None:
    quick, slow = harness.run(2, late, str(tmp_path), stage)
    assert quick == ["first", "second", "second", "second", "global_step1"]
    files_of_rank = 1 if stage < 3 else 2  # at stage 3 the model's as well
    expected = ["first"]
    # there is none only while the one that is named is overwritten
    for during, after in (
        ("first", "second"), ("none", "second"), ("second", None), ("second", "second"),
        ("second", "global_step1"),
    ):  # fmt: skip
        expected += [during] * files_of_rank + ([after] if after else [])
    assert slow == expected
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def wrong_latest(folder: str, text: str | None) -> str:
    running = build("Muon")
    before = everything(running)
    if text is not None and dist.get_rank() == 0:
        Path(folder, "latest").write_text(text)
    dist.barrier()
    try:
        path, _ = running.load_checkpoint(folder)
        said = f"returned {path}"
    except ValueError as error:
        said = str(error)
    assert together.same(everything(running), before)
    running.destroy()
    return said


@pytest.mark.parametrize("text", WRONG_LATEST)
def test_a_latest_that_names_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "run"
    (folder / "a").mkdir(parents=True)
    for said in harness.run(2, wrong_latest, str(folder), text):
        assert f"{folder / 'latest'} names {text.strip()!r}, which is no checkpoint" in said


def test_no_latest_is_nothing_to_load(tmp_path: Path) -> None:
    """As DeepSpeed has it."""
    assert harness.run(2, wrong_latest, str(tmp_path), None) == ["returned None"] * 2


# -- another rule's


def saved(folder: str, stage: int, rules: list[str]) -> None:
    for rule in rules:
        running = build(rule, stage)
        engine.steps(running, 0, 2)
        running.save_checkpoint(folder, tag=rule, client_state={"mine": 3})
        running.destroy()


def crossed(folder: str, stage: int, ours: str, suffix: str = "") -> dict[str, str]:
    """What is said of every rule's checkpoint; what is refused must have changed nothing."""
    changes: dict[str, Any] = {"checkpoint": {"load_universal": True}} if suffix else {}
    running = build(ours, stage, **changes)
    engine.steps(running, 0, 1)
    said = {}
    before = everything(running)
    for theirs in [*(title for title in TITLES if title != ours), ours]:
        try:
            _, client_state = running.load_checkpoint(folder, tag=theirs + suffix)
            assert {"spectral_dist", "spectral_rule"}.isdisjoint(client_state)
            said[theirs] = f"loaded {client_state['mine']}"
        except ValueError as error:
            said[theirs] = str(error)
            assert together.same(everything(running), before)
    running.destroy()
    return said


@pytest.mark.parametrize(("stage", "ours"), [
    (1, "Muon"), (3, "SUMO"),
    *(pytest.param(s, r, marks=pytest.mark.slow) for s in (0, 1, 2, 3) for r in TITLES
      if (s, r) not in ((1, "Muon"), (3, "SUMO"))),
])  # fmt: skip
def test_another_rules_checkpoint(stage: int, ours: str, tmp_path: Path) -> None:
    harness.run(2, saved, str(tmp_path), stage, TITLES)
    for said in harness.run(2, crossed, str(tmp_path), stage, ours):
        assert said.pop(ours) == "loaded 3"
        for theirs, message in said.items():
            wanted = f"saved with another optimizer: {theirs}, and this one is {ours}"
            assert wanted in message
            assert str(tmp_path / theirs) in message


def objects(folder: str, ours: str) -> str:
    """A client_state that only pickle reads: what is said of it after DeepSpeed's load."""
    running = build("NorMuon")
    engine.steps(running, 0, 1)
    running.save_checkpoint(folder, tag="a", client_state={"mine": Path(folder)})
    running.destroy()
    running = build(ours)
    said = ""
    try:
        _, client_state = running.load_checkpoint(folder, tag="a")
        assert client_state["mine"] == Path(folder)
    except ValueError as error:
        said = str(error)
    running.destroy()
    return said


def test_with_objects_in_client_state(tmp_path: Path) -> None:
    assert harness.run(2, objects, str(tmp_path), "NorMuon") == ["", ""]
    for said in harness.run(2, objects, str(tmp_path), "Muon"):
        assert "this state was saved by NorMuon" in said


def without_states(folder: str) -> None:
    running = build("Muon", 1)
    running.load_checkpoint(folder, tag="ROOT", load_optimizer_states=False)
    running.load_checkpoint(folder, tag="SUMO", load_module_only=True)
    running.destroy()


def test_weights_alone_may_be_another_rules(tmp_path: Path) -> None:
    harness.run(2, saved, str(tmp_path), 1, ["ROOT", "SUMO"])
    harness.run(2, without_states, str(tmp_path))


@pytest.mark.slow
def test_a_universal_checkpoint_of_another_rule(tmp_path: Path) -> None:
    harness.run(2, saved, str(tmp_path), 2, TITLES)
    for title in TITLES:
        to_universal(tmp_path, title)
    for ours in ("Muon", "SUMO"):
        for said in harness.run(2, crossed, str(tmp_path), 2, ours, "_universal"):
            assert said.pop(ours) == "loaded 3"
            for theirs, message in said.items():
                assert f"another optimizer: {theirs}, and this one is {ours}" in message


# -- matrix state beside the checkpoint it belongs to


def sumo(folder: str, tag: str, universal: bool = False) -> Any:
    changes: dict[str, Any] = {"checkpoint": {"load_universal": True}} if universal else {}
    running = build("SUMO", 1, **changes)
    try:
        running.load_checkpoint(folder, tag=tag)
        parts = running.basic_optimizer.matrix_parts()
        return {f"{part.matrix} {part.name}": part.values.clone() for part in parts}
    except ValueError as error:
        return str(error)
    finally:
        running.destroy()


def sumo_run(folder: str, first: int) -> Any:
    """Save two steps from batch ``first`` on; the state."""
    running = build("SUMO", 1)
    engine.steps(running, first, first + 2)
    running.save_checkpoint(folder, tag="a")
    parts = running.basic_optimizer.matrix_parts()
    state = {f"{part.matrix} {part.name}": part.values.clone() for part in parts}
    running.destroy()
    return state


def test_a_moved_checkpoint_takes_no_other_runs_state(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    states = harness.run(2, sumo_run, str(here), 0)
    shutil.copytree(here, there)
    for found, wanted in zip(harness.run(2, sumo, str(there), "a"), states, strict=True):
        assert together.same(found, wanted)
    shutil.rmtree(here)
    others = harness.run(2, sumo_run, str(here), 5)  # in the place that the copy came from
    assert not together.same(others[0], states[0])
    beside = there / "a" / "spectral_dist"
    (beside / ".metadata").rename(there / "metadata")
    for said in harness.run(2, sumo, str(there), "a"):
        assert f"{there / 'a'} has no matrix state: there is no {beside}" in said
        assert str(here) not in said
    shutil.rmtree(beside)
    for said in harness.run(2, sumo, str(there), "a"):
        assert "has no matrix state" in said
    shutil.copytree(here / "a" / "spectral_dist", beside)
    for said in harness.run(2, sumo, str(there), "a"):
        assert f"{beside} is of another save" in said


def test_a_universal_checkpoint_finds_its_own_state(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    states = harness.run(2, sumo_run, str(folder), 0)
    tag = to_universal(folder, "a")
    for found, wanted in zip(harness.run(2, sumo, str(folder), tag, True), states, strict=True):
        assert together.same(found, wanted)
    shutil.rmtree(folder / "a")
    harness.run(2, sumo_run, str(folder), 5)  # the same tag, saved again
    for said in harness.run(2, sumo, str(folder), tag, True):
        assert f"{folder / 'a' / 'spectral_dist'} is of another save" in said


# -- damaged files


@pytest.mark.parametrize("how", ["empty", "cut", "gone", "junk"])
def test_a_damaged_file_of_the_model_is_named(how: str, tmp_path: Path) -> None:
    harness.run(2, saved, str(tmp_path), 1, ["Muon"])
    path = tmp_path / "Muon" / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    path.unlink()
    content = {"empty": b"", "cut": whole[:-500], "junk": b"junk" * 99}
    if how != "gone":
        path.write_bytes(content[how])
    for said in harness.run(2, crossed, str(tmp_path), 1, "Muon"):
        assert ("holds no checkpoint of DeepSpeed" if how == "gone" else str(path)) in said["Muon"]
