#!/usr/bin/env bash
# Trains a small Llama on the Python source found here, on 2 ranks with ZeRO-2: first with
# SpectralMuon, then with AdamW on the same data and schedule. Prints both results side by side.
# `quickstart.sh polargrad`, `root`, `sumo` or `poet` takes that one in place of Muon.
# It installs what it needs into .venv and downloads no data. About 5 minutes on 2 cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

chosen=${1:-muon}
case $chosen in
  muon) config=zero2 title=SpectralMuon ;;
  polargrad) config=zero2_polargrad title=SpectralPolarGrad ;;
  root) config=zero2_root title=SpectralROOT ;;
  sumo) config=zero2_sumo title=SpectralSUMO ;;
  poet) config=zero2_poet title=SpectralPOET ;;
  *)
    echo "error: unknown optimizer $chosen; known: muon, polargrad, root, sumo, poet" >&2
    exit 2
    ;;
esac

install deepspeed,train
fit 2
runs=$ROOT/runs
ours=$runs/quickstart-$chosen
adamw=$runs/quickstart-adamw

train() { # CONFIG OUT
  rm -rf "$2"
  "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 "$ROOT/launch/pretrain.py" \
    --model "$ROOT/configs/models/quickstart.json" --config "$ROOT/configs/deepspeed/$1.json" \
    --eval-every 40 --out "$2"
}

echo "1/2: $title"
train "$config" "$ours"
echo "2/2: AdamW"
train zero2_adamw "$adamw"
"$PYTHON" -m spectral_dist.launch.report compare "$ours" "$adamw" --plot "$runs/quickstart.png"
