"""The command `spectral-dist`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Spectral optimizers' tools.")


@app.callback()
def main() -> None:
    """Spectral optimizers' tools."""


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="Your DeepSpeed JSON.")],
    model: Annotated[Path, typer.Option(help="A LlamaConfig JSON, as in configs/models.")],
    full: Annotated[bool, typer.Option("--full", help="Do not shrink the model.")] = False,
) -> None:
    """Take a few steps on your own config, on 2 ranks here, and check each silent failure."""
    from spectral_dist import doctor as checks
    from spectral_dist.launch import engines, llama

    console = Console()
    try:
        fields = engines.read_deepspeed_config(config)
        small, note = checks.shrink(llama.load_config(model), full)
        rows = checks.examine(fields, small)
    except ValueError as error:
        Console(stderr=True).print(f"spectral-dist doctor: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    table = Table("check", "", "seen", title=f"{config}: {note}")
    for row in rows:
        table.add_row(row.check, "[green]ok[/]" if row.passed else "[red]FAILED[/]", row.seen)
    console.print(table)
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    app()
