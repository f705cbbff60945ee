#!/usr/bin/env bash
# bash launch/pretrain_vision.sh OUT_DIR
# Trains the vision-language model in medrlvr_jax/world/vision from scratch: first on captions of films, then on questions.
# Needs: Python 3.11 or newer, 2 CPU cores, 4 GB of memory; the network only for pip. Time: about 15 minutes. OUT_DIR must not exist.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash launch/pretrain_vision.sh OUT_DIR}
source launch/venv.sh
ensure_venv .
medrlvr sft configs/pretrain_films.yaml
[[ -d runs/pretrain_films/hf ]] || medrlvr export runs/pretrain_films runs/pretrain_films/hf --dtype float32
medrlvr sft configs/pretrain_radiograph.yaml
medrlvr export runs/pretrain_radiograph "$out" --dtype bfloat16
