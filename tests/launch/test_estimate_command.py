"""`spectral-dist estimate`, and what docs/estimate.md shows of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import spectral_dist
from spectral_dist.launch.cli import app
from spectral_dist.launch.estimates import option_of

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs/models"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["estimate", *words], env={"COLUMNS": "80"})


def as_json(model: str, *words: str) -> dict[str, dict[str, float]]:
    result = run("--model", str(MODELS / f"{model}.json"), "--json", *words)
    assert result.exit_code == 0, result.output
    numbers: dict[str, dict[str, float]] = json.loads(result.stdout)["per_rank"]
    return numbers


def test_the_page_shows_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/estimate.md").read_text(encoding="utf-8")
    command, shown = (
        match.strip()
        for match in re.search(r"```bash\n(.*?)```\n\n```text\n(.*?)```", page, re.S).groups()  # type: ignore[union-attr]
    )
    printed = run(*shlex.split(command)[2:]).stdout
    assert "\n".join(line.rstrip() for line in printed.strip().splitlines()) == shown


def test_moved_bytes_of_fsdp_follow_the_formula_of_the_docs() -> None:
    """2 w N / P numbers on the mean, of 2 bytes each (docs/cost.md)."""
    ranks = 64
    numbers = as_json("llama_8b", "--engine", "fsdp", "--dp", str(ranks))
    matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    by_formula = 2 * 2 * (ranks - 1) / ranks * matrices / ranks
    assert abs(numbers["moved"]["mean"] / by_formula - 1) < 1e-6


def test_options_of_the_optimizer_of_groups_and_of_poet() -> None:
    tiny = ("tiny", "--engine", "zero2", "--nodes", "2", "--gpus-per-node", "2")
    plain, per_head = (as_json(*tiny, *more) for more in ((), ("--option", "heads=auto")))
    assert per_head["polar_calls"]["mean"] > plain["polar_calls"]["mean"]
    sumo = as_json(*tiny, "--optimizer", "sumo", "--option", "rank=4")
    assert sumo["optimizer_state"]["mean"] < plain["optimizer_state"]["mean"]
    poet = as_json(*tiny, "--optimizer", "poet", "--option", "block=16")
    assert poet["gradients"]["mean"] < plain["gradients"]["mean"]
    assert option_of("betas=[0.9, 0.95]") == ("betas", [0.9, 0.95])
    assert option_of("strategy=gram") == ("strategy", "gram")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--engine", "zero5", "--dp", "2"), "did you mean 'zero0'"),
        (("--engine", "fsdp"), "dp is needed"),
        (("--engine", "fsdp", "--dp", "2", "--option", "momentum"), "as momentum=0.9"),
        (("--engine", "fsdp", "--dp", "2", "--optimizer", "adam"), "unknown optimizer"),
        (("--engine", "megatron", "--dp", "2", "--ep", "3"), "no multiple of ep"),
    ],
)
def test_errors_say_what_to_write(words: tuple[str, ...], text: str) -> None:
    result = run("--model", str(MODELS / "tiny.json"), *words)
    assert result.exit_code == 2
    assert text.split("'")[0] in result.stderr


def test_tensor_parallelism_follows_the_models_plan() -> None:
    whole, cut = (
        as_json("llama_8b", "--engine", "fsdp", "--dp", "8", "--tp", tp) for tp in ("1", "8")
    )
    momentum = 4 * 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    saved = whole["optimizer_state"]["max"] - cut["optimizer_state"]["max"]
    assert saved == momentum // 8 - momentum // 64
    result = run("--model", str(MODELS / "deepseek_v3.json"), "--engine", "fsdp", "--dp", "8",
                 "--tp", "8")  # fmt: skip
    assert "only colwise and rowwise are estimated" in " ".join(result.stderr.split())


def test_megatrons_flags() -> None:
    one = ("llama_8b", "--engine", "megatron", "--dp", "4", "--tp", "2", "--pp", "4")
    plain, cut = (as_json(*one, *more) for more in ((), ("--distributed-optimizer",)))
    assert plain["polar_calls"]["mean"] == cut["polar_calls"]["mean"] == 32 * 7 / 32
    # of 4 data-parallel ranks each has a quarter of what AdamW keeps, and momentum at the owner
    assert cut["optimizer_state"]["mean"] < plain["optimizer_state"]["mean"]
    assert 0 <= 4 * cut["master_weights"]["mean"] - plain["master_weights"]["mean"] < 4
    buckets = as_json(*one, "--distributed-optimizer", "--ddp-bucket-size", "40000000")
    assert buckets["moved"]["max"] > cut["moved"]["max"]


def test_a_cold_estimate_takes_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoConfig

    path = MODELS / "tiny.json"
    config = AutoConfig.for_model(**json.loads(path.read_text()))
    printed = []
    for given in (path, config, config.to_dict()):
        spectral_dist.estimate_zero3_model_states_mem_needs_all_cold(given, 8)
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert "1 node, 8 GPUs per node" in printed[0]
