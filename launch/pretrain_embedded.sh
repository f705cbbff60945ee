#!/usr/bin/env bash
# bash launch/pretrain_embedded.sh OUT_DIR
# Trains the base model in medrlvr_jax/world/embedded from scratch: first on lists, then on all texts of the embedded world.
# Needs: Python 3.11 or newer, 2 CPU cores, 4 GB of memory; the network only for pip. Time: about 20 minutes. OUT_DIR must not exist.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash launch/pretrain_embedded.sh OUT_DIR}
source launch/venv.sh
ensure_venv .
medrlvr sft configs/pretrain_lists.yaml
[[ -d runs/pretrain_lists/hf ]] || medrlvr export runs/pretrain_lists runs/pretrain_lists/hf
medrlvr sft configs/pretrain_embedded.yaml
medrlvr export runs/pretrain_embedded "$out"
