#!/usr/bin/env bash
# Tests and measures on one GPU, in about eight minutes: tests/gpu, then benchmarks.gpu.
# `gpu.sh FOLDER [ARGUMENT OF benchmarks.gpu...]` writes tests.log, gpu.log, gpu.json, gpu.png and
# corpus.log into the folder. It installs and downloads nothing: PYTHON has torch and pytest, and
# for the training botocore 1.43.11 or, in SPECTRAL_DIST_CACHE, the tokens of the default corpus. It
# fails if a test did or nothing was measured; what fails in a part of the benchmark is in its table.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

out=${1:?usage: gpu.sh FOLDER [ARGUMENT OF benchmarks.gpu...]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd) tests=0 measured=0
cd "$ROOT"
export PYTHONUNBUFFERED=1
# what the benchmark trains on last, made by the CPU in the meantime
"$PYTHON" -c 'from spectral_dist.launch import corpus; corpus.prepare([], 32000)' \
  >"$out/corpus.log" 2>&1 &
timeout --signal INT --kill-after 10 "${SECONDS_OF_TESTS:-170}" "$PYTHON" -m pytest tests/gpu \
  --confcutdir tests/gpu -p no:cacheprovider -rfExX --durations 10 --tb short 2>&1 |
  tee "$out/tests.log" || tests=$?
"$PYTHON" -m benchmarks.gpu --json "$out/gpu.json" --png "$out/gpu.png" "$@" 2>&1 |
  tee "$out/gpu.log" || measured=$?
wait || true
exit $((tests ? tests : measured))
