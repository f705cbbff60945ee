#!/usr/bin/env bash
# bash launch/quickstart.sh [a.b=value …]
# The embedded world end to end on a laptop: makes .venv if there is none, installs, trains by PPO, evaluates before and after.
# Needs: Python 3.11 or newer, 2 CPU cores, 4 GB of memory; the network only for pip. Time: at most 10 minutes.
# Leaves: runs/quickstart/, or what runs= and name= make of it, with summary.json, metrics.jsonl, samples.jsonl, checkpoints, and report.html: the page of the run.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
ensure_venv .
medrlvr train configs/quickstart.yaml "$@"
