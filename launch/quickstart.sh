#!/usr/bin/env bash
# bash launch/quickstart.sh [a.b=value …]
# Trains the embedded model by PPO on a laptop and evaluates it before and after. Makes .venv if it is missing and installs into it.
# Needs: Python 3.11 or newer, 2 CPU cores, 4 GB of memory; the network only for pip. Time: at most 10 minutes.
# Leaves: runs/quickstart/ (`runs=` and `name=` change it) with summary.json, metrics.jsonl, samples.jsonl, checkpoints and report.html,
#   the page of the run.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv .
medrlvr train configs/quickstart.yaml "$@"
