#!/usr/bin/env bash
# See on a machine with NVIDIA GPUs that everything works there, in about ten minutes; please send what it prints.
#
#   scripts/check_gpu.sh                 makes .venv-gpu, with JAX for CUDA 12
#   PLATFORM=cpu scripts/check_gpu.sh    the same checks on a CPU, in .venv
#
# It checks the fast programs against their plain twins, plays the demo on the GPU and on the CPU, and measures the
# stages of a 1.5B model with random weights.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 JAX_PLATFORMS="${PLATFORM:-cuda,cpu}"
if [ "$JAX_PLATFORMS" = cpu ]; then
  bin=.venv/bin
else
  bin=.venv-gpu/bin
  "$(scripts/find_python.sh)" -m venv .venv-gpu
  $bin/pip install --quiet --editable '.[cuda,tensorboard]'
fi
runs=$(mktemp -d)

echo "== programs against their plain twins"
$bin/python scripts/check_device.py

echo "== the demo here, and on the CPU: the tables should agree to three digits or so"
$bin/tpaw demo --directory "$runs/here" | tail -30
JAX_PLATFORMS=cpu $bin/tpaw demo --directory "$runs/cpu" | tail -30

echo "== stages of a run"
$bin/tpaw bench --config "${CONFIG:-configs/qwen25_1b5_ultrachat.yaml}" \
  --architecture "${ARCHITECTURE:-configs/models/qwen2.5-1.5b}" --packing.row_length "${ROW_LENGTH:-4096}" \
  --sampling.slots "${SLOTS:-64}" --calls 5
