#!/usr/bin/env bash
# Trains a small Llama on the Python source found here, on 2 ranks with ZeRO-2: first with
# SpectralMuon, then with AdamW on the same data and schedule. Prints both results side by side.
# It installs what it needs into .venv and downloads no data. About 5 minutes on 2 cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install deepspeed,train
fit 2
runs=$ROOT/runs
muon=$runs/quickstart-muon
adamw=$runs/quickstart-adamw

train() { # CONFIG OUT
  rm -rf "$2"
  "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 "$ROOT/launch/pretrain.py" \
    --model "$ROOT/configs/models/quickstart.json" --config "$ROOT/configs/deepspeed/$1.json" \
    --eval-every 40 --out "$2"
}

echo "1/2: SpectralMuon"
train zero2 "$muon"
echo "2/2: AdamW"
train zero2_adamw "$adamw"
"$PYTHON" -m spectral_dist.launch.report compare "$muon" "$adamw" --plot "$runs/quickstart.png"
