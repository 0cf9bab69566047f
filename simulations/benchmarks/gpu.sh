#!/bin/sh
# Measure w1 to w5 of fedlearn on a GPU, in less than eight minutes: at most 45 s for each workload and framework.
#
#   simulations/benchmarks/gpu.sh [DEVICE [SETTING=VALUE ...]]
#   simulations/benchmarks/gpu.sh cuda:0
#   simulations/benchmarks/gpu.sh cpu clients=6 cohort=3 examples=40 rounds=2     a short test without a GPU
#
# The tables are in outputs/gpu. A device that is absent is an error of each run, and the exit code is 3.
set -u
cd "$(dirname "$0")/../.." || exit 2
device=${1:-cuda:0}
[ "$#" -gt 0 ] && shift
export NVIDIA_TF32_OVERRIDE=0 JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false
code=0
for workload in w1 w2 w3 w4 w5; do
    python -m simulations.benchmarks.speed "workload=$workload" "device=$device" systems=ours repeats=1 limit=45 \
        "out=outputs/gpu/$workload" "$@" || code=3
done
exit "$code"
