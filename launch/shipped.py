"""Choose an engine's configuration file when only an optimizer's name was given."""

from __future__ import annotations

import atexit
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from spectral_dist._errors import suggest
from spectral_dist.launch.yaml_config import Loader
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import ROUTING

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ADAMW = "adamw"
_FILE_NAMES = {
    "deepspeed": ("deepspeed/zero2.json", "deepspeed/zero2_{}.json"),
    "megatron": ("megatron/tiny_muon.yaml", "megatron/tiny_{}.yaml"),
}
"""By engine: the file of Muon's configuration, and the pattern for other optimizers' files."""


def config_of(engine: str, name: str) -> Path:
    """Return the configuration file of an optimizer.

    It is the file that is shipped for it. For a rule without one, it is Muon's with the rule in its
    place: those of Muon's options that the rule has, and the rule's defaults.

    Args:
        engine: deepspeed, ddp, fsdp or megatron.
        name: of the registry, or "adamw".

    Raises:
        ValueError: an unknown name, or no configuration for this engine.
    """
    muon_file, file_pattern = _FILE_NAMES.get(engine, ("torch/muon.yaml", "torch/{}.yaml"))
    path = CONFIGS / (muon_file if name == "muon" else file_pattern.format(name))
    if path.is_file():
        return path
    known = {entry.name: entry for entry in registry.entries()}
    if name not in (*known, ADAMW):
        raise ValueError(f"unknown optimizer {name!r}{suggest(name, [*known, ADAMW])}")
    entry = known.get(name)
    if entry is None or entry.rule is None:
        prefix = Path(file_pattern).stem.removesuffix("{}")
        shipped_files = CONFIGS.glob(file_pattern.format("*"))
        shipped_names = sorted(path.stem.removeprefix(prefix) for path in shipped_files)
        raise ValueError(
            f"no configuration of {name} is shipped for --engine {engine}; there are"
            f" {', '.join(shipped_names)}: or write one, and give it as --config"
        )
    return _write_derived(CONFIGS / muon_file, engine, entry, path.name)


def _write_derived(muon_config: Path, engine: str, entry: registry.Entry, name: str) -> Path:
    """Write Muon's configuration with another rule in its place, to a temporary file."""
    known = {*specs_of(entry.options), *ROUTING}
    text = muon_config.read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text) if engine == "deepspeed" else yaml.load(text, Loader)
    optimizer = content["optimizer"]
    if engine == "deepspeed":
        params = {key: value for key, value in optimizer["params"].items() if key in known}
        content["optimizer"] = {"type": entry.deepspeed_type, "params": params}
    else:
        kind = entry.megatron_name if engine == "megatron" else entry.title
        params = {key: value for key, value in optimizer.items() if key in known}
        content["optimizer"] = {"type": kind, **params}
    folder = tempfile.TemporaryDirectory(prefix="spectral_dist-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, name)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
    return path
