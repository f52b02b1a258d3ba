#!/usr/bin/env bash
# On a machine with a GPU and dove_fast installed: every kernel's correctness first, then the benchmarks.
#
#   scripts/gpu_check.sh [DIRECTORY]     where the figures go, by default benchmarks/results
set -euo pipefail
cd "$(dirname "$0")/.."

results=${1:-benchmarks/results}
device=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
python -c 'import dove_fast; info = dove_fast.build_info(); print(info); assert info["cuda"], info["cuda_reason"]'

pytest -m gpu
mkdir -p "$results"
pytest benchmarks --benchmark-only --device cuda --benchmark-json "$results/$device-$(date +%F).json"
