#!/usr/bin/env bash
# Template: pretraining with mpirun (Open MPI, MPICH, Intel MPI). MPI only starts the ranks and
# tells them about each other (integrations/torch/mpi.py, mpi4py); NCCL or gloo moves the data.
# As it stands it runs 2 ranks on this host. On several: RANKS=16 HOSTFILE=hosts launch/mpirun.sh
# Needs: pip install 'spectral-dist[deepspeed,train,mpi]' and an MPI, the cluster's own or
# `pip install mpich` (one MPI per environment; mpi4py has to load the one that mpirun belongs to).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RANKS=${RANKS:-2}                             # in all
RANKS_PER_NODE=${RANKS_PER_NODE:-$RANKS}      # on this host; too few GPUs: on the CPU
HOSTFILE=${HOSTFILE:-}                        # hosts, in your MPI's format; empty: this host
MPI_ARGS=${MPI_ARGS:-}                        # e.g. "-x NCCL_DEBUG" (Open MPI) to hand a variable on
MODEL=${MODEL:-$ROOT/configs/models/quickstart.json}
ENGINE=${ENGINE:-deepspeed}         # or ddp, fsdp, megatron
CONFIG=${CONFIG:-$(shipped_config "$ENGINE")}

MPIRUN=${MPIRUN:-$(dirname "$PYTHON")/mpiexec} # of the environment; else the one on PATH
[ -x "$MPIRUN" ] || MPIRUN=mpirun
if [ "$(id -u)" = 0 ]; then # in a container; Open MPI refuses root otherwise
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

fit "$RANKS_PER_NODE"
# shellcheck disable=SC2086  # MPI_ARGS is a list of words
exec "$MPIRUN" -n "$RANKS" ${HOSTFILE:+-hostfile "$HOSTFILE"} $MPI_ARGS \
  "$PYTHON" "$ROOT/launch/pretrain.py" --engine "$ENGINE" --model "$MODEL" --config "$CONFIG" "$@"
