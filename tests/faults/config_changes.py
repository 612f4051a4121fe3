"""Mistakes in the files that launch/pretrain.py is given: one at a time, drawn by chance.

Each change tells in words what it did, and the case which names an error about it may say.
"""

from __future__ import annotations

import copy
import json
import math
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from spectral_dist.launch import megatron_config, torch_config
from spectral_dist.launch.yaml_config import Loader
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import ROUTING

BEYOND = "@1e400@"
"""Written as 1e400, which is a number of JSON and of YAML that no float can hold."""
TWICE = "@twice"
"""After a key that is written without it: there it is twice."""
VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "ü✓", "0.5", "1e-3", "auto", [], [1], [0.9, 0.95], ["x"], {},
    {"a": 1}, math.nan, math.inf, -math.inf, BEYOND, -1, 0, 1, 2, 3, 0.5, -0.5, 1.0, 1e30, 10**30,
)  # fmt: skip
MAY_BE_NULL = ("scalar_lr", "scalar_weight_decay", "bos_token_id", "eos_token_id", "pad_token_id")
TOO_LONG = ("hidden_size",)
"""Left out of a model it is thousands, which no test has the time for."""
EXTRA: dict[str, tuple[tuple[str, ...], ...]] = {
    "deepspeed": (
        *(("bf16", "enabled"), ("fp16", "enabled"), ("train_micro_batch_size_per_gpu",)),
        *(("zero_optimization", "overlap_comm"), ("zero_optimization", "reduce_bucket_size")),
        *(("zero_optimization", "offload_optimizer"), ("zero_optimization", "sub_group_size")),
        *(
            ("scheduler", "params", "warmup_min_lr"),
            ("scheduler", "params", "last_batch_iteration"),
        ),
        *(("prescale_gradients",), ("wall_clock_breakdown",), ("dump_state",), ("checkpoint",)),
        *(("gradient_predivide_factor",), ("communication_data_type",), ("seq_parallel",)),
    ),
    "torch": tuple((f.name,) for f in fields(torch_config.TorchConfig)),
    "megatron": tuple((f.name,) for f in fields(megatron_config.MegatronConfig)),
}
"""Keys that the shipped files leave out."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "type": (
        *("AdamW", "Adam", "Muon", "muon", "SpectralMuon", "spectral_muon", "adam", "SGD", "Lion"),
        *("SpectralROOT", "PolarGrad", "POET", "OneBitAdam", "Adagrad", "WarmupLR", "OneCycle"),
        *("WarmupDecayLR", "LRRangeTest", "WarmupCosineLR", "Nothing", "optimizer", " AdamW"),
    ),
    "stage": (4, -1, "2", 1.0, 2.5, 10**30, True),
    "dtype": ("float16", "bfloat16", "fp32", "float64", "torch.float32"),
    "param_dtype": ("float16", "bfloat16", "float32", "fp8"),
    "train_batch_size": (3, 5, 7, 1),
    "batch": (3, 5, 7, 1),
    "micro_batch": (3, 8, 1),
    "tensor_parallel": (3, 4, 7),
    "mesh": ({"replicate": 3}, {"shard": 5}, {"replicate": -1, "shard": -1}, {"replicate": 0}),
    "warmup_type": ("cosine", "log", "Linear"),
    "hidden_act": ("gelu", "swish", "nothing"),
    "model_type": ("gpt2", "Llama", "mistral"),
    "init": ("orthogonal", "nothing", "normalized"),
}
"""Values of their kind, many of them wrong."""


@dataclass
class ChangedRun:
    """Files and options of a run, and the changes that were made in them."""

    number: int
    engine: str  # as --engine takes it
    base: str
    ranks: int
    config: Any
    model: Any
    options: list[str]
    changes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # an error has to say one of them
    must_fail: bool = False  # it is nothing that can be meant
    damage: Callable[[str], str] | None = None  # of the configuration's text

    @property
    def room(self) -> str:
        """The folder of configs that its configuration is from."""
        return "torch" if self.engine in ("ddp", "fsdp") else self.engine

    def __str__(self) -> str:
        return (
            f"case {self.number}: --engine {self.engine}, {self.base}, {self.ranks} rank(s):"
            f" {'; '.join(self.changes) or 'no change'}"
        )

    def write(self, folder: Path, data: Path) -> list[str]:
        """Write the files; what pretrain is given."""
        config, model = folder / self.base, folder / "fuzzed_model.json"
        text = _text(self.config, config.suffix == ".yaml")
        config.write_text(self.damage(text) if self.damage else text, encoding="utf-8")
        model.write_text(_text(self.model, False), encoding="utf-8")
        places = {"CONFIG": config, "MODEL": model, "DATA": data, "OUT": folder / "out"}
        return [str(places.get(option, option)) for option in self.options]


class Dumper(yaml.SafeDumper):
    """Quotes what Loader would read as a number."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def _text(content: Any, is_yaml: bool) -> str:
    if is_yaml:
        text = yaml.dump(content, Dumper=Dumper, allow_unicode=True, sort_keys=False)
    else:
        text = json.dumps(content, ensure_ascii=False)
    for quote in "'\"":
        text = text.replace(f"{quote}{BEYOND}{quote}", "1e400")
    return text.replace(TWICE, "")


Place = tuple[dict[str, Any], str, str]
"""The object that a key is in, the key, and its path in words."""


def _places(content: Any, path: str = "") -> Iterator[Place]:
    if isinstance(content, dict):
        for key, inner in content.items():
            yield content, key, f"{path}{key}"
            yield from _places(inner, f"{path}{key}.")


def _keys(content: Any) -> list[str]:
    return [key for _, key, _ in _places(content)]


def misspelt(chance: random.Random, word: str) -> str:
    """A word as somebody in a hurry writes it."""
    place = chance.randrange(len(word))
    letter = chance.choice(string.ascii_lowercase)
    choices = {
        word[:place] + word[place + 1 :],
        word[:place] + letter + word[place:],
        word[:place] + word[place : place + 2][::-1] + word[place + 2 :],
        word.upper(),
        word.replace("_", "-", 1),
    } - {word, ""}
    return chance.choice(sorted(choices))


def kind(value: Any) -> str:
    """Numbers pass for each other: an lr may be 1. Numbers that are none are of no kind."""
    if value == BEYOND or (isinstance(value, float) and not math.isfinite(value)):
        return "no number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__
    return "number"


def change_file(chance: random.Random, case: ChangedRun, which: str, content: Any) -> None:
    """Make a change in the configuration or the model."""
    inside, key, path = chance.choice(list(_places(content)))
    old = inside[key]
    names = [key, *_keys(old)]
    name = chance.choices(list(CHANGES), [weight for weight, _ in CHANGES.values()])[0]
    change = CHANGES[name][1]
    told = change(chance, case, which, (inside, key, path))
    if told is None:
        return
    if key == "type" and inside.get("type") != old:  # and so what options there are
        names += ["optimizer", "scheduler", *_keys(case.config.get("optimizer"))]
    case.names += names
    case.changes.append(f"{which}: {told}")


def _value(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    old = inside[key]
    value = copy.deepcopy(chance.choice(VALUES))
    if kind(value) == kind(old) and value == old:
        return None
    inside[key] = value
    null = value is None and key in MAY_BE_NULL
    several = key == "eos_token_id" and value == [1]
    if old is None or null or several or (isinstance(old, dict) and value == {}):
        return f"{path} = {value!r}"
    if kind(value) != kind(old):
        case.must_fail = True
    return f"{path} = {value!r}"


def _choice(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    known = [
        p for p in _places(case.config if which == "config" else case.model) if p[1] in CHOICES
    ]
    inside, key, path = chance.choice(known or [place])
    value = chance.choice(CHOICES.get(key, VALUES))
    if value == inside[key]:
        return None
    inside[key] = copy.deepcopy(value)
    case.names += [key, *_keys(value)]
    if key == "type":
        case.names += [str(value), "optimizer", "scheduler", *_keys(case.config)]
    return f"{path} = {value!r}"


def _delete(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    if key in TOO_LONG:
        return None
    del inside[key]
    return f"no {path}"


def _rename(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    wrong = misspelt(chance, key)
    inside[wrong] = inside[key]
    if chance.random() < 0.5:
        del inside[key]
    case.names.append(wrong)
    case.must_fail = True
    return f"{path} is written {wrong}" + " as well" * (key in inside)


def _unknown(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, _, path = place
    inside["frobnicate"] = copy.deepcopy(chance.choice(VALUES))
    case.names.append("frobnicate")
    if which == "config" and (case.room != "deepspeed" or inside is not case.config):
        case.must_fail = True  # the rest is DeepSpeed's, or transformers': they take anything
    return f"frobnicate beside {path}"


def _extra(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    if which == "model":
        names = ("head_dim", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias")
        path: tuple[str, ...] = (chance.choice((*names, "attention_dropout", "bos_token_id")),)
        content = case.model
    else:
        content = case.config
        path = chance.choice((*EXTRA[case.room], *_optimizer_options(case)))
    for name in path[:-1]:
        content = content.get(name) if isinstance(content, dict) else None
        content = {} if content is None else content
    if not isinstance(content, dict):
        return None
    value = copy.deepcopy(chance.choice(CHOICES.get(path[-1], VALUES)))
    content[path[-1]] = value
    if len(path) == 2 and path[0] not in case.config:
        case.config[path[0]] = content
    case.names += [*path, *_keys(value)]
    default = _defaults(case).get(path[-1]) if which == "config" else None
    other = isinstance(default, bool | int | float | str) and kind(value) != kind(default)
    if kind(value) == "no number" or other:
        case.must_fail = True
    return f"{'.'.join(path)} = {value!r} is added"


def _defaults(case: ChangedRun) -> dict[str, Any]:
    """What settings are that the file leaves out, by name; of those whose default says a kind."""
    declared = [torch_config.TorchConfig, megatron_config.MegatronConfig]
    classes: list[Any] = [] if case.room == "deepspeed" else declared
    options = {name: entry.options for name, entry in _entries().items()}
    optimizer = case.config.get("optimizer")
    chosen = options.get(str(optimizer.get("type"))) if isinstance(optimizer, dict) else None
    classes += [chosen] if chosen else []
    return {each.name: each.default for cls in classes for each in fields(cls)}


def _entries() -> dict[str, Any]:
    """Our rules by every name that a type can have."""
    return {
        name: entry
        for entry in registry.entries()
        for name in (entry.title, entry.deepspeed_type, entry.megatron_name)
    }


def _optimizer_options(case: ChangedRun) -> list[tuple[str, ...]]:
    optimizer = case.config.get("optimizer") if isinstance(case.config, dict) else None
    if not isinstance(optimizer, dict):
        return []
    entry = _entries().get(str(optimizer.get("type")))
    if entry is None:
        return []
    where = ("optimizer", "params") if case.room == "deepspeed" else ("optimizer",)
    return [(*where, name) for name in (*specs_of(entry.options), *ROUTING)]


def _nest(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    if isinstance(inside[key], dict) and inside[key] and chance.random() < 0.7:
        inner = chance.choice(sorted(map(str, inside[key])))
        case.names += _keys(inside[key])
        if chance.random() < 0.5:
            inside[key] = inside[key].get(inner)
            return f"{path} is what {path}.{inner} was"
        inside |= inside.pop(key)
        case.must_fail = case.must_fail or which == "config"
        return f"what is in {path} stands in its place"
    inside[key] = {chance.choice((key, "value")): inside[key]}
    case.names.append("value")
    case.must_fail = case.must_fail or kind(inside[key]) != "dict"
    return f"{path} is nested: {inside[key]!r}"


def _swap(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    other = chance.choice(sorted(map(str, inside)))
    if other == key or other not in inside:
        return None
    inside[key], inside[other] = inside[other], inside[key]
    case.names += [other, *_keys(inside[key])]
    return f"{path} and {other} are swapped"


def _twice(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    inside, key, path = place
    inside[f"{key}{TWICE}"] = inside[key]
    case.must_fail = True
    return f"{path} is there twice"


def _damaged(chance: random.Random, case: ChangedRun, which: str, place: Place) -> str | None:
    if which == "model":
        return _value(chance, case, which, place)
    name, damage = chance.choice(DAMAGES)
    case.damage = damage
    case.names += [case.base, "optimizer"]
    case.must_fail = True
    return f"the file is {name}"


DAMAGES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("empty", lambda text: ""),
    ("a list", lambda text: "[1, 2]"),
    ("null", lambda text: "null"),
    ("cut off", lambda text: text[: len(text) // 3].rstrip(" :,")),
    ("a text", lambda text: '"x"'),
    ("two files", lambda text: f"{text}\n---\n{text}"),
    ("indented by tabs", lambda text: text.replace(" ", "\t") + "\t{"),
    ("with a zero in it", lambda text: text.replace(":", ":\x00", 1)),
)
CHANGES: dict[str, tuple[int, Callable[[random.Random, ChangedRun, str, Place], str | None]]] = {
    "value": (8, _value),
    "choice": (4, _choice),
    "delete": (3, _delete),
    "rename": (3, _rename),
    "unknown": (2, _unknown),
    "extra": (6, _extra),
    "nest": (2, _nest),
    "swap": (2, _swap),
    "twice": (1, _twice),
    "damaged": (1, _damaged),
}
