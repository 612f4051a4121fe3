#!/usr/bin/env bash
# Predicted and measured steps on two hosts of one rank each, which launch/hosts.sh makes (as root), over rates
# of the link between them: bash benchmarks/link_rates.sh [RATE...]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HOSTS_PREFIX=sdrate
[ $# -gt 0 ] || set -- 100mbit 300mbit 1gbit 10gbit
trap 'bash launch/hosts.sh down' EXIT
bash launch/hosts.sh up 2 "$1"
for rate in "$@"; do
  bash launch/hosts.sh rate "$rate"
  echo "link of $rate"
  # shellcheck disable=SC2016  # for the shell on each host
  bash launch/hosts.sh each bash -c '"$0" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 \
    --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:29400" -m benchmarks.plan_step' "$PYTHON" 2>&1 |
    grep -E "predicted|between hosts|Error"
done
