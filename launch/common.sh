# Sourced by the scripts beside it: where things are, and the environment they run in.
# It sets ROOT (the repository) and PYTHON (of .venv there; set it yourself for another one).

TORCH=2.13.0 # the one place that pins torch
MEGATRON="0.19.2 0.16.1" # what the tests run megatron-core as
TORCH_TESTS="tests/unit/sharding/test_exchange.py tests/unit/sharding/test_exchange_costs.py
  tests/unit/sharding/test_exchange_agreement.py tests/unit/params/test_classify.py
  tests/unit/params/test_splits.py tests/unit/poet/test_poet_layer.py
  tests/unit/polar/test_polar_front_door.py tests/distributed/torch/test_torch_equality.py
  tests/distributed/torch/test_torch_bitwise.py tests/distributed/torch/test_fsdp_placement.py
  tests/distributed/torch/test_placement_refusals.py
  tests/distributed/torch/test_torch_checkpoints.py
  tests/distributed/torch/test_torch_checkpoint_refusals.py
  tests/distributed/torch/test_sumo_ddp.py tests/distributed/torch/test_poet_torch.py"
DEEPSPEED_TESTS="tests/distributed/deepspeed/test_deepspeed_versions.py
  tests/distributed/deepspeed/test_deepspeed_equality.py tests/distributed/deepspeed/test_deepspeed_safety.py
  tests/distributed/deepspeed/test_deepspeed_checkpoints.py tests/distributed/deepspeed/test_sumo_deepspeed.py
  tests/distributed/deepspeed/test_poet_deepspeed.py"

# Else torchrun shares its store with the ranks, and torch 2.13 tells where that is in the first round
# alone: a node that takes the place of a lost one would wait for it until it fails.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PATH # in an empty environment bash has one, but does not hand it on
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}

# environment FOLDER: a virtual environment there, unless there is one; PYTHON is then its own.
environment() {
  local candidate
  PYTHON=$1/bin/python
  if [ ! -x "$PYTHON" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
      if command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        "$candidate" -m venv "$1"
        break
      fi
    done
    if [ ! -x "$PYTHON" ]; then
      echo "error: no Python 3.11 or newer with the venv module on PATH" >&2
      return 1
    fi
  fi
}

# install EXTRAS [REQUIREMENT...]: .venv with torch, this package editable with EXTRAS, and more.
# Done once: what was asked for and setup.cfg are remembered in .venv. VENV names another folder.
install() {
  local extras=$1 venv=${VENV:-$ROOT/.venv}
  shift
  environment "$venv"
  local wanted stamp
  wanted="torch==$TORCH $extras $* $(cksum <"$ROOT/setup.cfg")"
  stamp=$venv/.spectral-dist-$extras
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing torch $TORCH and spectral-dist[$extras] into $venv (once) ..."
    # torch first: deepspeed looks for it while it is being built.
    "$PYTHON" -m pip install --quiet "torch==$TORCH"
    "$PYTHON" -m pip install --quiet "torch==$TORCH" --editable "$ROOT[$extras]" "$@"
    echo "$wanted" >"$stamp"
  fi
}

# megatron: each of the versions above into a folder of its own, .venv/megatron-core-VERSION.
# Done once. 0.19.2 declares Python 3.12, but has a wheel for 3.11; the tests need none of its
# dependencies beyond what is there.
megatron() {
  local version folder
  for version in $MEGATRON; do
    folder=$ROOT/.venv/megatron-core-$version
    if [ ! -d "$folder" ]; then
      echo "fetching megatron-core $version into $folder (once) ..."
      rm -rf "$folder.part"
      "$PYTHON" -m pip install --quiet --no-deps --ignore-requires-python \
        --target "$folder.part" "megatron-core==$version"
      mv "$folder.part" "$folder"
    fi
  done
}

# other_torch VERSION: an environment of its own, .venv-torch-VERSION, with what TORCH_TESTS need.
# Done once. A few GB where torch brings CUDA.
other_torch() {
  TORCH=$1
  VENV=$ROOT/.venv-torch-$1 install test
  is_installed torch "$1"
}

# other_deepspeed VERSION: into .venv-deepspeed-VERSION, which is found before the one of .venv.
# Done once. The integration refuses a release outside of LOWEST and NEWEST in
# integrations/deepspeed/_compat.py: to try another, change them first.
other_deepspeed() {
  local folder=$ROOT/.venv-deepspeed-$1
  if [ ! -d "$folder" ]; then
    echo "fetching deepspeed $1 into $folder (once) ..."
    rm -rf "$folder.part"
    "$PYTHON" -m pip install --quiet --no-deps --target "$folder.part" "deepspeed==$1"
    mv "$folder.part" "$folder"
  fi
  export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
  is_installed deepspeed "$1"
}

# is_installed PACKAGE VERSION: fail unless this is the one that an import would find.
is_installed() {
  local found
  found=$("$PYTHON" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1")
  if [ "${found%%+*}" != "$2" ]; then
    echo "error: $1 $found would be tested in place of $2" >&2
    return 1
  fi
}

# accelerators: how many GPUs this host has.
accelerators() {
  { nvidia-smi -L 2>/dev/null || true; } | wc -l
}

# fit RANKS: run on the CPU when this host has too few GPUs for them.
fit() {
  if [ "$(accelerators)" -lt "$1" ]; then
    export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
}

# shipped_config ENGINE: the configuration that a template runs as it stands.
shipped_config() {
  case $1 in
    deepspeed) echo "$ROOT/configs/deepspeed/zero2.json" ;;
    megatron) echo "$ROOT/configs/megatron/tiny_muon.yaml" ;;
    *) echo "$ROOT/configs/torch/muon.yaml" ;;
  esac
}
