#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; arguments go to pytest. With
# --torch VERSION or --deepspeed VERSION before them, another release is installed beside .venv, and
# the tests that rest on it are run with it: TORCH_TESTS or DEEPSPEED_TESTS of common.sh, unless
# the arguments name others. With --faults, all of tests/faults, fast and slow; with --faults --soak,
# of those 200 random kills, 20 signals and 20 restarts, over all engines: an hour.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

which=${1:-} version=${2:-} tests=""
case $which in
  --torch | --deepspeed)
    if [ -z "$version" ]; then
      echo "usage: $0 [--torch VERSION | --deepspeed VERSION] [ARGUMENT OF PYTEST...]" >&2
      exit 2
    fi
    shift 2
    ;;
esac
case $which in
  --torch)
    other_torch "$version"
    tests=$TORCH_TESTS
    ;;
  --deepspeed)
    install deepspeed,train,mpi,test
    other_deepspeed "$version"
    tests=$DEEPSPEED_TESTS
    ;;
  --faults)
    shift
    install deepspeed,train,mpi,test
    megatron
    tests=tests/faults
    set -- -m "slow or not slow" "$@"
    ;;
  *)
    install deepspeed,train,mpi,test
    megatron
    ;;
esac
cd "$ROOT"
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then
    tests=""
  fi
done
# shellcheck disable=SC2086  # a list of files
[ -z "$tests" ] || set -- $tests "$@"
exec "$PYTHON" -m pytest "$@"
