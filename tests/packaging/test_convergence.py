"""benchmarks.convergence at tiny sizes: every optimizer trains, and a second call runs nothing."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from benchmarks import convergence
from spectral_dist.launch import ranks


@pytest.mark.slow  # 15 s
def test_runs_are_done_once_and_a_table_and_a_picture_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        words = " ".join(f"word{(i * 7 + k * k) % 97}" for k in range(4000))
        (text / f"{i}.txt").write_text(words)
    settings = convergence.ConvergenceSettings(
        "quickstart", 2, tmp_path / "runs", tiny=True, data=(str(text),)
    )
    chosen = [c for c in convergence.CONTENDERS if c.kind in ("AdamW", "POET")]
    here = ranks.start()
    try:
        bench = convergence.ConvergenceRuns(settings, here)
        first = [bench.run(c, seed) for c in chosen for seed in (0, 1)]
        late = convergence.ConvergenceRuns(settings, here, deadline=time.monotonic())
        again = [late.run(c, seed) for c in chosen for seed in (0, 1)]
        with pytest.raises(TimeoutError, match="goes on with the next run"):
            late.run(chosen[0], 2)
        other = convergence.ConvergenceSettings(
            "quickstart", 3, tmp_path / "runs", tiny=True, data=(str(text),)
        )
        with pytest.raises(ValueError, match="steps is 2, and 3 is asked for"):
            convergence.ConvergenceRuns(other, here).run(chosen[0])
    finally:
        ranks.stop()
    assert again == first
    assert all(math.isfinite(r["bits_per_byte"]) and len(r["train"]) == 2 for r in first)
    assert first[0]["bits_per_byte"] != first[1]["bits_per_byte"]
    rows = convergence.table(convergence.read(settings.results)).splitlines()
    assert len(rows) == 4
    assert all("| 2 |" in row for row in rows[2:])
    convergence.plot(convergence.read(settings.results), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
