#!/usr/bin/env bash
# On a machine with a GPU: builds, tests and measures within 8 minutes, without a network; gpu_check.py says more.
#
#   scripts/gpu_check.sh OUTDIR     by the `python` on PATH, or the one that PYTHON names
set -euo pipefail
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname "$0")/gpu_check.py" "$@"
