#!/usr/bin/env bash
# The first minute on a card: build, GPU tests, parity, sanitizer, timings, profile, in under 10
# minutes. Needs Python >= 3.10 with torch and Triton; torchdiffeq and pytest for what they are for.
# Nothing is downloaded.
#
#   bash benchmarks/gpu_session.sh [OUT [STEP...]]      OUT: default $OUT, or results/gpu
#
# Exit status: 0, 1 if a step failed, 2 if there is no CUDA device.
# ANODE_FAST_GPU_DRY_RUN=1: every step's code at tiny sizes without a card; nothing is measured.
# PYTHON: the interpreter. What the steps are: benchmarks/gpu/session.py.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-${OUT:-$root/results/gpu}}
[[ $out == /* ]] || out=$PWD/$out
[[ $# -gt 0 ]] && shift
python=${PYTHON:-$(command -v python || command -v python3)}
cd "$root" && exec "$python" -m benchmarks.gpu.session "$out" "$@"
