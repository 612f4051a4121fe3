"""What mkdocs does to the pages, so that they read well on GitHub and on the site."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PICTURES = ("benchmarks/memory.png", "benchmarks/loss.png", "benchmarks/sent.png")
"""Files away from docs/ that pages show."""
FENCE = re.compile(r"^```(\w+) ([\w.]+)$", re.MULTILINE)
"""A block of code with a label: a file's name, or what its test calls it."""

EXAMPLE = re.compile(r"^( *)\[(examples/[\w.]+)\]\(\.\./\2\)$", re.MULTILINE)
"""A line that is a link to an example, and nothing else: the site has the whole file there."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures."""
    root = Path(config.config_file_path).parent
    for path in PICTURES:
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Return a page with its examples, its labels as titles, and its pictures where they are."""
    root = Path(config.config_file_path).parent

    def whole(link: re.Match[str]) -> str:
        indent, path = link.groups()
        code = (root / path).read_text().rstrip("\n")
        block = f'```python title="{path}"\n{code}\n```'
        return textwrap.indent(block, indent)

    markdown = EXAMPLE.sub(whole, markdown)
    for path in PICTURES:
        markdown = markdown.replace(f"](../{path})", f"]({path})")
    return FENCE.sub(r'```\1 title="\2"', markdown)
