#!/usr/bin/env bash
# The kernels on a GPU, in one call of under 8 minutes: their tests, those that need the card among them; every op at
# real shapes against the eager idiom; what was predicted. Writes one file.
#
#   PYTHON=python3 benchmarks/gpu_suite.sh [RESULTS.json]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmarks/bench_ops.py --device cuda --report "${1:-benchmarks/results/bench_ops_cuda.json}"
