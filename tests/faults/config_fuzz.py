"""Configurations with a mistake or two in them, and what a run of one has to end with.

From the shipped files, made tiny: a seeded change in the configuration, the model or the command
line. ``case_of(number)`` is always the same; ``verdict`` says what is wrong with how it ended.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from spectral_dist.launch.yaml_config import Loader
from tests.faults.config_changes import ChangedRun, change_file, misspelt
from tests.faults.forked_ranks import HUNG, Ending
from tests.launch.jobs import MODEL, ROOT

STEPS, STOP = 6, 2
TEXTS = (
    *("", "0", "-1", "1", "3", "x", "1.5", "nan", "inf", "-inf", "1e400", "1" + "0" * 30, "٣"),
    *("true", "None", " 2", "é", "0x10", "1_0", "--keep", "4294967296"),
)
OPTIONS = (
    *("--steps", "--seq-len", "--seed", "--eval-every", "--eval-batches", "--save-every"),
    *("--save-minutes", "--keep", "--grace", "--stop-at", "--prompt", "--resume", "--engine"),
    *("--optimizer", "--data", "--model", "--config", "--out"),
)


@functools.cache
def bases() -> tuple[tuple[str, str, str], ...]:
    """Engine, file and text of each shipped configuration, by engine."""
    found = []
    for room, engines in {"deepspeed": ("deepspeed",), "torch": ("ddp", "fsdp")}.items():
        for path in sorted((ROOT / "configs" / room).glob("[!_]*")):
            only = ("fsdp",) if path.stem in ("hsdp", "tp_fsdp") else engines
            found += [(engine, path.name, path.read_text()) for engine in only]
    megatron = sorted((ROOT / "configs/megatron").glob("*.yaml"))
    return (*found, *(("megatron", path.name, path.read_text()) for path in megatron))


def base_of(engine: str, name: str, text: str) -> ChangedRun:
    """A shipped configuration, made tiny."""
    if engine == "deepspeed":
        config = json.loads(text)
        config |= {"train_batch_size": 4, "steps_per_print": 100}
        config["scheduler"]["params"] |= {"total_num_steps": STEPS, "warmup_num_steps": 2}
        own = config["optimizer"]["params"]
    else:
        config = yaml.load(text, Loader)
        config |= {"batch": 4, "steps": STEPS, "warmup": 2}
        own = config["optimizer"]
        if config.get("tensor_parallel", 1) > 2:
            config["tensor_parallel"] = 2
        config.pop("micro_batch", None)
    own |= {key: 8 for key in ("block",) if key in own}
    own |= {key: 2 for key in ("period", "merge_every", "segments") if key in own}
    model = {**MODEL, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    model |= {"hidden_act": "silu", "initializer_range": 0.05, "pad_token_id": None}
    model |= {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    options = ["--engine", engine, "--model", "MODEL", "--config", "CONFIG", "--data", "DATA"]
    options += ["--out", "OUT", "--seq-len", "16", "--stop-at", str(STOP)]
    options += ["--eval-every", "0", "--eval-batches", "1"]
    return ChangedRun(-1, engine, name, 2, config, model, options)


def case_of(number: int, megatron: bool = True, ranks: int = 0) -> ChangedRun:
    """The case of a number; without megatron-core, or on as many ranks, another one."""
    chance = random.Random(f"configuration {number}")
    pool = [base for base in bases() if megatron or base[0] != "megatron"]
    case = base_of(*chance.choice(pool))
    case.number = number
    alone = chance.random() < 0.1 and not {"tensor_parallel", "mesh"} & set(case.config)
    case.ranks = ranks or (1 if alone else 2)
    for _ in range(chance.choice((1, 1, 1, 2))):
        if case.damage is not None or "--stop-at" in case.names:
            break
        where = chance.random()
        if where < 0.6:
            change_file(chance, case, "config", case.config)
        elif where < 0.78:
            change_file(chance, case, "model", case.model)
        else:
            _change_options(chance, case)
    return case


def _change_options(chance: random.Random, case: ChangedRun) -> None:
    option = chance.choice(OPTIONS)
    options = case.options
    case.names.append(option)
    what = chance.random()
    if option == "--steps" and case.engine != "deepspeed":
        case.must_fail = True
    if what < 0.08:
        wrong = "--" + misspelt(chance, option[2:]).lower().replace("_", "-")
        if wrong in OPTIONS:
            return
        options += [wrong, "3"]
        case.names.append(wrong)
        case.must_fail = True
        case.changes.append(f"{wrong} 3 is added")
        return
    if what < 0.16:
        if option in options:
            place = options.index(option)
            del options[place : place + 2]
            case.names.append("--data")
            case.changes.append(f"no {option}")
            case.must_fail = option == "--model"
        else:
            options.append(option)
            case.changes.append(f"{option} without a value")
            case.must_fail = option != "--resume"
        return
    value = chance.choice(TEXTS)
    words = {
        "--resume": ("auto", "must", "never", "maybe"),
        "--engine": ("ddp", "fsdp", "deepspeed", "megatron", "jax"),
        "--optimizer": ("muon", "adamw", "nothing", "poet"),
        "--out": ("CONFIG", "out/../out2", "é"),
    }
    if option in words and chance.random() < 0.8:
        value = chance.choice(words[option])
    case.names += [value, *(("CONFIG", case.base, "--config") if option == "--engine" else ())]
    if option in options:
        options[options.index(option) + 1] = value
    else:
        options += [option, value]
    if value in ("x", "nan", "inf", "-inf", "1e400", "é", "None") and option in NUMERIC:
        case.must_fail = True
    case.changes.append(f"{option} {value!r}")


NUMERIC = OPTIONS[: OPTIONS.index("--prompt")]


@dataclass(frozen=True)
class Verdict:
    """What a case came to: "ran", or "refused by" whom; and what is wrong with that."""

    what: str
    problem: str = ""
    line: str = ""  # of the error


def verdict(case: ChangedRun, endings: Sequence[Ending], out: Path) -> Verdict:
    """Judge how the ranks of a case have ended."""
    printed = endings[0].printed
    statuses = [ending.status for ending in endings]
    if HUNG in statuses:
        return Verdict("hung", f"ranks ended so: {statuses}")
    for ending in endings:
        if "Traceback (most recent call last)" in ending.printed:
            return Verdict("traceback", "a traceback")
    errors = [_errors(ending.printed) for ending in endings]
    if len({str(each) for each in (*statuses,)}) > 1 or any(e != errors[0] for e in errors):
        return Verdict("differ", f"ranks differ: {statuses}, {errors}")
    if statuses[0] == 0:
        wrong = _wrong_run(case, out)
        if case.must_fail and not wrong:
            told = [line for line in printed.splitlines() if line.startswith("pretrain: ")]
            if not any(_says(line, case.names) for line in told):
                wrong = "it was taken without a word"
        return Verdict("ran", wrong)
    if len(errors[0]) != 1:
        return Verdict("failed", f"exit status {statuses[0]}, {len(errors[0])} lines of error")
    (line,) = errors[0]
    layer = _layer(statuses[0], line)
    if statuses[0] not in (1, 2) or (statuses[0] == 1) != (layer == "training"):
        return Verdict(layer, f"exit status {statuses[0]}", line)
    causes = ["lr"] if layer == "training" else []  # of what has diverged nobody can know it
    if not _says(line, [*case.names, *causes]):
        return Verdict(layer, f"the error names none of {case.names}", line)
    return Verdict(layer, "", line)


def _errors(printed: str) -> list[str]:
    """The lines of error: of pretrain, or in Typer's box."""
    lines = printed.splitlines()
    found = [line for line in lines if line.startswith("pretrain: error: ")]
    for place, line in enumerate(lines):
        if line.startswith("╭─ Error"):
            found.append(" ".join(each.strip("│ ") for each in lines[place + 1 :] if "│" in each))
    return found


def _layer(status: int | str, line: str) -> str:
    if not line.startswith("pretrain: error: "):
        return "the command line"
    if status == 1:
        return "training"
    if ": DeepSpeed: " in line:
        return "DeepSpeed"
    return "transformers" if "no Llama can be built from it" in line else "pretrain"


def _says(line: str, names: Sequence[str]) -> bool:
    """Whether a line says a name, be it "hidden size" for hidden_size."""
    words = [re.escape(name).replace("_", "[_ ]") for name in names if name]
    return any(re.search(rf"(?<!\w){word}(?!\w)", line) for word in words)


def _wrong_run(case: ChangedRun, out: Path) -> str:
    """What is wrong with the metrics of a run that ended well."""
    options = dict(zip(case.options[::2], case.options[1::2], strict=False))
    if {"--out", "--stop-at", "--steps"} & set(case.names):
        return ""  # the run is elsewhere, or of another length
    path = out / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    train = [record for record in records if record["part"] == "train"]
    config = case.config
    total = (
        config["scheduler"]["params"]["total_num_steps"]
        if case.room == "deepspeed"
        else config["steps"]
    )
    asked = min(int(options["--stop-at"]), total)
    if [record["step"] for record in train] != list(range(1, asked + 1)):
        return f"{len(train)} steps of {asked}"
    if not all(math.isfinite(record["loss"]) for record in records if "loss" in record):
        return "a loss is not finite"
    return ""
