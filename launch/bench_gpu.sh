#!/usr/bin/env bash
# `medcg bench` of configs/bench_gpu.py on this machine: bash launch/bench_gpu.sh [OUT.json] [flags of medcg_jax.bench]
# Under 10 minutes, no network. Takes `python3` with jax, flax and optax as they are here (PYTHON=... names another).
# LLaVA-1.5-7B with random weights: training, adapters, evaluation, transformers beside them, a trace, and checks.
# It ends with a summary; OUT.json has it too, with versions and date, to be committed (benchmarks/ where none is named).
# The same stages on a CPU: JAX_PLATFORMS=cpu bash launch/bench_gpu.sh OUT.json --model=llava15_tiny --time=9000
set -euo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,6s/^# //p' "$0"; exit 0 ;;
    "" | -*) out="benchmarks/bench_gpu_$(date -u +%Y-%m-%d-%H%M%S).json" ;;
    *) out="$1"; shift; case "$out" in /*) ;; *) out="$PWD/$out" ;; esac ;;
esac
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys, jax, flax, optax; sys.exit(sys.version_info < (3, 11))' 2>/dev/null </dev/null || {
    echo "bench_gpu.sh: $python must be Python 3.11 or later with jax, flax and optax; PYTHON=... names another" >&2
    exit 1
}
exec "$python" -m medcg_jax.bench --json="$out" "$@" </dev/null
