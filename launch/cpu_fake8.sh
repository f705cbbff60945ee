#!/usr/bin/env bash
# bash launch/cpu_fake8.sh [--dry-run] CONFIG.yaml [a.b=value …]
# Eight fake CPU devices in one process, to try a mesh before paying for one: makes .venv if there is none, installs, trains.
# Needs: Python 3.11 or newer, the memory for one copy of everything; the network for pip, and for the hub where the config names it.
# Variables: RUNS, the folder of all runs (runs).
# Again: the same command goes on from the newest checkpoint. SIGTERM and Ctrl-C save and stop; a second one stops at once.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/run.sh
source launch/venv.sh
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=${1:?usage: bash launch/cpu_fake8.sh [--dry-run] CONFIG.yaml [a.b=value …]}
settings=("runs=${RUNS:-runs}" "${@:2}")

run ensure_venv .
# Threads for every collective that a device may wait in at once: with XLA's default, one a device, a busy machine can get stuck.
run env JAX_PLATFORMS=cpu PJRT_NPROC=32 XLA_FLAGS="--xla_force_host_platform_device_count=8" medrlvr train "$config" "${settings[@]}"
