#!/usr/bin/env bash
# Trains a small Llama on botocore's documentation, on 2 ranks with ZeRO-2: first with SpectralMuon,
# then with AdamW on the same data and schedule. Prints both results side by side.
# `quickstart.sh polargrad`, or any other optimizer's name, takes that one in place of Muon.
# It installs what it needs into .venv, the text among it. Five to seven minutes on 2 cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

chosen=${1:-muon}

check() { # the name: an error says which there are
  "$PYTHON" - "$chosen" <<'END'
import sys
from spectral_dist.launch import shipped
try:
    shipped.config_of("deepspeed", sys.argv[1])
except ValueError as error:
    sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
END
}

if [ -x "$PYTHON" ]; then check; fi # before anything is installed, if that can be
install deepspeed,train
check
fit 2
runs=$ROOT/runs
ours=$runs/quickstart-$chosen
adamw=$runs/quickstart-adamw

train() { # OPTIMIZER OUT
  rm -rf "$2"
  "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 "$ROOT/launch/pretrain.py" \
    --model "$ROOT/configs/models/quickstart.json" --optimizer "$1" --eval-every 40 --out "$2"
}

echo "1/2: $chosen"
train "$chosen" "$ours"
echo "2/2: adamw"
train adamw "$adamw"
"$PYTHON" -m spectral_dist.launch.report compare "$ours" "$adamw" --plot "$runs/quickstart.png"
