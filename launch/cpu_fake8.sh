#!/usr/bin/env bash
# bash launch/cpu_fake8.sh [--dry-run] CONFIG.yaml [a.b=value …]
# Trains on eight fake CPU devices in one process, to test a mesh without accelerators. Makes .venv if it is missing and installs.
# Needs: Python 3.11 or newer; memory for one copy of all states; the network for pip, and for the hub if the config names a hub model.
# Variables: RUNS, the folder of all runs (runs).
# Again: the same command resumes from the newest checkpoint. SIGTERM and Ctrl-C save and stop; a second one stops at once.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/run.sh
source launch/venv.sh
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=${1:?usage: bash launch/cpu_fake8.sh [--dry-run] CONFIG.yaml [a.b=value …]}
settings=("runs=${RUNS:-runs}" "${@:2}")

run ensure_venv .
# A device can wait in several collectives at once, each in a thread. With XLA's default of one thread per device it can deadlock.
run env JAX_PLATFORMS=cpu PJRT_NPROC=32 XLA_FLAGS="--xla_force_host_platform_device_count=8" medrlvr train "$config" "${settings[@]}"
