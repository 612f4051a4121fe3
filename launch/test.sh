#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install deepspeed,train,mpi,test
megatron
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
