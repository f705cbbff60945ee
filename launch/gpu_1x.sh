#!/usr/bin/env bash
# bash launch/gpu_1x.sh [--dry-run] CONFIG.yaml [a.b=value …]
# Trains on one machine with NVIDIA GPUs, in one process on all of them. Makes .venv if it is missing and installs the extra `cuda`.
# Needs: Python 3.11 or newer, an NVIDIA driver for CUDA 12; the network for pip, and for the hub if the config names a hub model.
# Variables: RUNS, the folder of all runs (runs).
# Again: the same command resumes from the newest checkpoint. SIGTERM and Ctrl-C save and stop; a second one stops at once.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/run.sh
source launch/venv.sh
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=${1:?usage: bash launch/gpu_1x.sh [--dry-run] CONFIG.yaml [a.b=value …]}
settings=("runs=${RUNS:-runs}" "${@:2}")

run ensure_venv ".[cuda]"
# By default JAX takes 75 % of a GPU's memory, and XLA copies the q, k and v matrices for each sampled token in order to merge them.
run env XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 XLA_FLAGS="--xla_gpu_dot_merger_threshold_mb=0${XLA_FLAGS:+ $XLA_FLAGS}" \
  medrlvr train "$config" "${settings[@]}"
