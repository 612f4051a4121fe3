"""Print the option reference of docs/options.md: what each optimizer's dataclass says of itself.

    .venv/bin/python docs/options.py

writes that part of the page anew; a test compares them.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import spectral_dist
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of

PAGE = Path(__file__).with_name("options.md")
MARK = "<!-- What follows is printed by docs/options.py. -->\n"
KINDS = {
    "matrix": "groups of matrices",
    "scalar": "groups on AdamW",
    "skew": "groups of rotations",
}


def reference() -> str:
    """Return the reference as Markdown: a section for each optimizer of this package."""
    package = f"{spectral_dist.__name__}."
    own = [e for e in registry.entries() if e.options.__module__.startswith(package)]
    own.sort(key=lambda entry: (entry.rule is None, entry.name != "muon", entry.name))
    return "\n".join(section(entry) for entry in own)


def section(entry: registry.Entry) -> str:
    """Return one optimizer's names, and a table of its options."""
    lines = [
        f"## {entry.title}",
        "",
        f"`spectral_dist.{entry.title}`; `{entry.deepspeed_type}` in DeepSpeed's JSON;"
        f" `--optimizer {entry.megatron_name}` in Megatron's flags; `--optimizer {entry.name}` of"
        " `launch/pretrain.py`.",
        "",
        "| option | default | set for | |",
        "|---|---|---|---|",
    ]
    defaults = {each.name: each.default for each in fields(entry.options)}
    for name, spec in specs_of(entry.options).items():
        doc = spec.doc.replace("|", "\\|")
        lines.append(f"| `{name}` | `{defaults[name]!r}` | {scope(entry, name)} | {doc} |")
    return "\n".join(lines) + "\n"


def scope(entry: registry.Entry, name: str) -> str:
    """Return the groups of parameters that an option may be set for."""
    kinds = entry.options.kinds()
    carrying = [KINDS[kind] for kind in kinds if name in entry.options.names(kind)]
    if len(carrying) == len(kinds):
        return "every group"
    return ", ".join(carrying) or "the optimizer"


if __name__ == "__main__":
    written, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{written}{MARK}\n{reference()}")
