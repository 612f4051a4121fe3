#!/usr/bin/env bash
# Runs the tests of one trainer, fast and slow, with the releases that docs/trainers.md speaks of:
#   bash launch/trainers.sh NAME
# NAME: huggingface, lightning, llama_factory, ms_swift, axolotl, torchtitan, automodel, verl, megatron_bridge.
# Further arguments go to pytest. Each trainer has an environment of its own, .venv-trainer-NAME, which is
# made once: 1 to 5 GB, and minutes. Where a host needs an index of its own for torch, UV_FIND_LINKS and
# UV_INDEX say so to uv, which installs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# need PACKAGE...: install them into the trainer's environment.
need() {
  "$PYTHON" -m uv pip install --quiet --python "$PYTHON" "torch==$TORCH" "$@"
}

# bare PACKAGE...: install them without what they ask for, be it other packages or another Python.
bare() {
  "$PYTHON" -m pip install --quiet --no-deps --ignore-requires-python "$@"
}

# packages NAME: install the trainer.
packages() {
  case $1 in
    huggingface)
      need transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 trl==1.16.0 datasets deepspeed==0.19.8
      ;;
    lightning)
      need lightning==2.6.6 transformers==5.24.0 deepspeed==0.19.8
      ;;
    llama_factory)
      # it asks for torchaudio and torchvision, of which it imports the first by name only
      need transformers==5.6.0 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 datasets==4.0.0 \
        deepspeed==0.19.8 av==16.0.0 einops fastapi fire gradio==5.50.0 hf-transfer matplotlib modelscope \
        omegaconf pandas protobuf sentencepiece scipy sse-starlette tiktoken torchdata==0.11.0 'tyro<0.9' uvicorn
      bare llamafactory==0.9.5
      mkdir -p "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio"
      touch "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio/__init__.py"
      ;;
    ms_swift)
      need ms-swift==4.6.0 transformers==5.19.0 deepspeed==0.19.8
      ;;
    torchtitan)
      need torchtitan==0.3.0 triton
      ;;
    automodel)
      need nemo-automodel==0.7.0 triton==3.6.0
      ;;
    verl)
      need verl==0.9.1 transformers==5.10.0
      ;;
    megatron_bridge)
      # it asks for Python 3.12 and for kernels of GPUs, whose names the tests stand in for
      need transformers==5.12.1 accelerate diffusers einops omegaconf hydra-core datasets peft \
        tensorboard wandb==0.29.0 regex pyyaml tqdm mistral-common
      bare megatron-bridge==0.6.2 megatron-core==0.19.2
      ;;
    axolotl)
      # it asks for Python 3.12 and for kernels of GPUs; what trains is plain Python
      need transformers==5.20.1 accelerate==1.15.0 peft==0.21.2 trl==1.14.1 datasets==5.0.1 deepspeed==0.19.8 \
        bitsandbytes==0.50.2 colorama addict fire wandb einops evaluate art python-dotenv fastcore posthog \
        mistral-common kernels schedulefree sentencepiece hf_transfer nvidia-ml-py tensorboard optimum numba
      bare axolotl==0.21.0 axolotl-contribs-lgpl axolotl-contribs-mit
      ;;
  esac
}

name=${1:-}
if [ -z "$name" ] || [ ! -d "$ROOT/tests/distributed/$name" ] || ! declare -f packages | grep -q " $name)"; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
shift
environment "$ROOT/.venv-trainer-$name"
stamp=$ROOT/.venv-trainer-$name/.spectral-dist
wanted="torch==$TORCH $(cksum <"$ROOT/setup.cfg") $(declare -f packages | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing $name into $ROOT/.venv-trainer-$name (once) ..."
  "$PYTHON" -m pip install --quiet uv setuptools wheel ninja
  packages "$name"
  need --editable "$ROOT[test]" setuptools
  "$PYTHON" -m compileall -q "$ROOT/.venv-trainer-$name/lib" >/dev/null 2>&1 || true
  echo "$wanted" >"$stamp"
fi
cd "$ROOT"
exec "$PYTHON" -m pytest "tests/distributed/$name" -m "slow or not slow" "$@"
