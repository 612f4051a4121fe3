#!/usr/bin/env bash
# Template: pretraining with torchrun. As it stands it runs 2 ranks on this host.
# On several nodes, run the same line on each:
#   NODES=2 MASTER_ADDR=node0 RANKS_PER_NODE=8 launch/torchrun.sh
# Arguments go to launch/pretrain.py (--help lists them), e.g. --out runs/a --save-every 500. With
# MAX_RESTARTS=3 and --resume auto a run whose rank has failed comes back by itself; after the loss of
# another node than node0, as soon as the line is run on one in its place. SIGTERM, SIGINT and SIGUSR1
# to it go to all ranks, which save and end; its own exit status is 1 then.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NODES=${NODES:-1}                   # how many hosts
RANKS_PER_NODE=${RANKS_PER_NODE:-2} # one per GPU; too few GPUs: on the CPU
MAX_RESTARTS=${MAX_RESTARTS:-0}     # of all ranks when one has failed
MASTER_ADDR=${MASTER_ADDR:-}        # of several nodes the first, as the others see it
MASTER_PORT=${MASTER_PORT:-29500}   # of several nodes: free there, and open to the others
RUN_ID=${RUN_ID:-here}              # of several nodes: the same on all, another one for another job
MODEL=${MODEL:-$ROOT/configs/models/quickstart.json}
ENGINE=${ENGINE:-deepspeed}         # or ddp, fsdp, megatron
CONFIG=${CONFIG:-$(shipped_config "$ENGINE")}

if [ "$NODES" = 1 ]; then
  rendezvous=(--standalone) # on any free port
elif [ -z "$MASTER_ADDR" ]; then
  echo "error: NODES is $NODES, and MASTER_ADDR is not set; write MASTER_ADDR=node0, the first node" >&2
  exit 2
else
  # c10d numbers the nodes itself, and lets one take the place of another that was lost
  rendezvous=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "$RUN_ID")
fi

fit "$RANKS_PER_NODE"
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NODES" --nproc_per_node "$RANKS_PER_NODE" \
  --max_restarts "$MAX_RESTARTS" --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "${rendezvous[@]}" \
  "$ROOT/launch/pretrain.py" --engine "$ENGINE" --model "$MODEL" --config "$CONFIG" "$@"
