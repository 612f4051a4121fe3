#!/usr/bin/env bash
# Template: pretraining with the deepspeed launcher. As it stands it runs 2 ranks on this host.
# On several hosts (passwordless ssh, the same paths): HOSTFILE=hosts launch/deepspeed.sh, with
# lines such as "node0 slots=8".
# Arguments go to launch/pretrain.py (--help lists them), e.g. --out runs/a --save-every 500.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RANKS_PER_NODE=${RANKS_PER_NODE:-2} # one per GPU; too few GPUs: on the CPU
HOSTFILE=${HOSTFILE:-}              # empty: this host
MASTER_PORT=${MASTER_PORT:-29500}
MODEL=${MODEL:-$ROOT/configs/models/quickstart.json}
CONFIG=${CONFIG:-$ROOT/configs/deepspeed/zero2.json}

fit "$RANKS_PER_NODE"
export PATH="$(dirname "$PYTHON"):$PATH" # the launcher starts `python` and `deepspeed` by name
exec deepspeed --num_accelerators "$RANKS_PER_NODE" --master_port "$MASTER_PORT" \
  ${HOSTFILE:+--hostfile "$HOSTFILE"} --no_local_rank \
  "$ROOT/launch/pretrain.py" --model "$MODEL" --config "$CONFIG" "$@"
