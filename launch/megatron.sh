#!/usr/bin/env bash
# Template: pretraining with Megatron-LM's own pretrain_gpt.py, with --optimizer spectral_muon.
# That file, of core_v0.16.1 to core_v0.19, needs one line of yours, anywhere among its imports:
#   import spectral_dist.integrations.megatron
# Under Slurm: sbatch launch/megatron.sh. Without it, on every node:
#   NODES=2 MASTER_ADDR=node0 RANKS_PER_NODE=8 launch/megatron.sh
# Arguments go to the script that runs, after the flags below, so they win: --lr 1e-4, say.
# ENGINE=megatron runs launch/pretrain.py with a configs/megatron/*.yaml in its place.
#SBATCH --job-name=spectral-megatron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1    # one torchrun per node; it starts the ranks
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue              # goes on from the last checkpoint, see OUT
set -euo pipefail
# Slurm runs a copy of this file, so the repository is where sbatch was called.
source "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}/launch/common.sh"

ENGINE=${ENGINE:-megatron-lm}       # or megatron
SIZE=${SIZE:-8b}                    # or 70b
MEGATRON_LM=${MEGATRON_LM:-$HOME/Megatron-LM} # a checkout of it
DATA=${DATA:-}                      # prefix of its preprocessed data; empty: random tokens
TOKENIZER=${TOKENIZER:-}            # of that data: a folder or a name of Hugging Face's
NODES=${NODES:-${SLURM_NNODES:-1}}
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}} # one per GPU
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} # node 0, as the others see it
MASTER_PORT=${MASTER_PORT:-29500}   # free there, and open to the others
OUT=${OUT:-$ROOT/runs/megatron-$SIZE} # on a file system that all nodes see

case $SIZE in
  8b)
    shape=(--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32)
    cut=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1)
    pace=(--global-batch-size 512 --lr 3e-4 --min-lr 3e-5)
    ;;
  70b) # 32 GPUs hold one copy of the model
    shape=(--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64)
    cut=(--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4)
    pace=(--global-batch-size 1024 --lr 1.5e-4 --min-lr 1.5e-5)
    ;;
  *)
    echo "error: unknown SIZE $SIZE; known: 8b, 70b" >&2
    exit 2
    ;;
esac

case $ENGINE in
  megatron-lm)
    export PYTHONPATH=$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}
    script=("$MEGATRON_LM/pretrain_gpt.py")
    script+=("${shape[@]}" --group-query-attention --num-query-groups 8 --swiglu)
    script+=(--normalization RMSNorm --norm-epsilon 1e-5 --disable-bias-linear)
    script+=(--position-embedding-type rope --rotary-base 500000 --init-method-std 0.02)
    script+=(--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0)
    script+=(--seq-length 8192 --max-position-embeddings 8192 --bf16)
    script+=("${cut[@]}" --sequence-parallel --use-distributed-optimizer)
    script+=(--overlap-grad-reduce --overlap-param-gather)
    # Ours is Adam to Megatron: betas and eps are of what is no matrix, the rest of all. Lists are
    # JSON: --spectral-scalars '["router"]'. --help has the other --spectral- flags.
    script+=(--optimizer spectral_muon --spectral-momentum 0.95 --spectral-scale match_rms_adamw)
    script+=("${pace[@]}" --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8)
    script+=(--clip-grad 1.0 --micro-batch-size 1 --train-iters 240000)
    script+=(--lr-decay-style cosine --lr-warmup-iters 2000)
    # Fully reshardable: any other tensor and data parallelism can load it.
    script+=(--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable)
    script+=(--save "$OUT" --load "$OUT" --save-interval 1000)
    script+=(--log-interval 10 --eval-interval 1000 --eval-iters 10)
    if [ -n "$DATA" ]; then
      script+=(--data-path "$DATA" --split 99,1,0)
      script+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
    else
      script+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 128256)
    fi
    ;;
  *)
    MODEL=${MODEL:-$ROOT/configs/models/llama_$SIZE.json}
    CONFIG=${CONFIG:-$ROOT/configs/megatron/llama_$SIZE.yaml}
    script=("$ROOT/launch/pretrain.py" --engine "$ENGINE" --model "$MODEL" --config "$CONFIG")
    script+=(--seq-len "${SEQ_LEN:-8192}" --out "$OUT" --resume auto)
    ;;
esac

start=()
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  start=(srun --kill-on-bad-exit=1)
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # what Megatron wants for overlap

fit "$RANKS_PER_NODE"
# c10d numbers the nodes itself: every node runs the same line.
"${start[@]}" "$PYTHON" -m torch.distributed.run \
  --nnodes "$NODES" --nproc_per_node "$RANKS_PER_NODE" \
  --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv_id "${SLURM_JOB_ID:-here}" \
  "${script[@]}" "$@"
