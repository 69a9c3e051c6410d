#!/usr/bin/env bash
# The kernels on a GPU, in one call of under 8 minutes: their tests, those that need the card among them; every op at
# real shapes against the eager idiom; what was predicted; autoencoders at every layer of a full-size action expert.
# Writes one file, anew after each op: what stops a run later leaves what was measured. After 6 minutes no shape is
# begun, and the file names those left out.
#
#   PYTHON=python3 benchmarks/gpu_suite.sh [RESULTS.json]
set -euo pipefail
cd "$(dirname "$0")/.."
exec timeout 480 "${PYTHON:-python}" benchmarks/bench_ops.py --device cuda --within 360 \
  --report "${1:-benchmarks/results/bench_ops_cuda.json}"
