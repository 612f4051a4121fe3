"""Markdown tables of the rows that ``python -m benchmarks.peers`` measures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.peers.contenders import OURS

Row = dict[str, Any]
OF_RANKS = ("sent", "polar", "state", "peak", "peak step", "macs")
"""What a row has of each rank."""
EXACT = 0.25
"""The largest difference of an update, in its RMS, that rounding to bfloat16 makes."""


def ratio(row: Row, base: Row, which: int) -> float:
    """Return the median of the ratios of two rows' times in the same turn."""
    pairs = zip(row["times"], base["times"], strict=True)
    return statistics.median(a[which] / b[which] for a, b in pairs)


def exact(row: Row) -> str:
    """Return whether the update is that of one process, and how far it is from it."""
    if row["error"] is None:
        return ""
    return f"{'yes' if row['error'] < EXACT else '**no**'}, {row['error']:.1g}"


def grouped(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by some of their values."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def over_adamw(row: Row, rows: Sequence[Row], key: str = "mean sent") -> float:
    """Return what a row's ranks send more than AdamW's of the same case, the mean of ranks."""
    return row[key] - next((r[key] for r in rows if r["name"] == "AdamW"), 0)


def whole_table(rows: Sequence[Row]) -> str:
    """Return the table of one case: everything that is counted, and times if there are any."""
    timed = any(row.get("times") for row in rows)
    titles = ["", "MB over AdamW", "calls", "matrices, busiest rank", "all ranks", "state MB",
              "peak MB", "as one process"]  # fmt: skip
    titles += ["iteration ms", "of ours", "step ms", "of ours"] * timed
    ours = next((r for r in rows if r["name"] == OURS and not r["failed"]), None)
    lines = []
    for row in rows:
        if row["failed"]:
            lines.append([row["name"], row["failed"].replace("|", "/")[:120]])
            lines[-1] += [""] * (len(titles) - 2)
            continue
        peak = "peak" if row["layout"].startswith("zero") else "peak step"
        cells = [row["name"], f"{over_adamw(row, rows) / 1e6:.3f}"]
        cells.append(f"{over_adamw(row, rows, 'calls'):g}")
        cells += [str(f(row["polar"])) if "polar" in row else "" for f in (max, sum)]
        cells += [f"{max(row[key]) / 1e6:.2f}" if key in row else "" for key in ("state", peak)]
        cells.append(exact(row))
        for which in (0, 1) if row.get("times") else ():
            cells.append(f"{1e3 * statistics.median(t[which] for t in row['times']):.0f}")
            cells.append(f"{ratio(row, ours, which):.2f}" if ours else "")
        lines.append(cells)
    return table(titles, lines)


def bytes_table(rows: Sequence[Row]) -> str:
    """Return the bytes over AdamW's of one layout and model, over numbers of ranks."""
    by_ranks = grouped(rows, ["ranks"])
    counts = sorted(ranks for (ranks,) in by_ranks if ranks > 1)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [name]
        for ranks in counts:
            own = next(r for r in by_ranks[ranks,] if r["name"] == name)
            failed = own["failed"]
            cells.append("" if failed else f"{over_adamw(own, by_ranks[ranks,]) / 1e6:.3f}")
        lines.append(cells)
    return table(["MB over AdamW", *(f"{ranks} ranks" for ranks in counts)], lines)


def losses(rows: Iterable[Row]) -> list[str]:
    """Return where an exact peer sends fewer bytes than the best of ours, or is faster."""
    found = []
    for key, case in grouped(rows, ["link", "layout", "model", "scale", "ranks"]).items():
        here = [row for row in case if not row["failed"]]
        mine = [row for row in here if row["name"].startswith(OURS)]
        if not mine or key[-1] == 1:
            continue
        least = min(mine, key=lambda row: row["mean sent"])
        for row in here:
            if row in mine or row["name"] == "AdamW" or (row["error"] or 0) >= EXACT:
                continue
            where = " ".join(map(str, key))
            if row["mean sent"] <= least["mean sent"]:
                found.append(f"{where}: {row['name']} sends {row['mean sent']:,.0f} B, "
                             f"{least['name']} {least['mean sent']:,.0f} B")  # fmt: skip
            base = next((r for r in mine if r["name"] == OURS), None)
            if row.get("times") and base and (share := ratio(row, base, 0)) < 1:
                found.append(f"{where}: an iteration of {row['name']} takes {share:.2f} of ours")
    return found


def document(rows: Sequence[Row]) -> str:
    """Return all tables, as docs/performance.md takes them, and where ours loses."""
    parts = []
    for (link, layout, model, ranks), case in grouped(
        [r for r in rows if r["scale"] == 1 and r["ranks"] > 1],
        ["link", "layout", "model", "ranks"],
    ).items():
        parts.append(f"#### {layout}, {model}, {ranks} ranks, {link}\n\n{whole_table(case)}")
    one_host = [row for row in rows if row["link"] == "one host"]
    for growth, chosen in (
        ("strong", [r for r in one_host if r["scale"] == 1]),
        ("weak", [r for r in one_host if r["scale"] == r["ranks"]]),
    ):
        for (layout, model), case in grouped(chosen, ["layout", "model"]).items():
            if any(row["ranks"] > 2 for row in case):
                parts.append(f"#### {layout}, {model}, {growth} scaling\n\n{bytes_table(case)}")
    lost = losses(rows) or ["no exact peer sends as little or is faster"]
    return "\n".join(parts) + "\n" + "\n".join(f"- {line}" for line in lost) + "\n"
