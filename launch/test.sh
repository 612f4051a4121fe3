#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install deepspeed,train,mpi,test mpich==5.0.2 # an MPI to start ranks with, from PyPI
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
