#!/usr/bin/env bash
# bash launch/pretrain_embedded.sh OUT_DIR
# Makes the embedded base model anew, as it is in medrlvr_jax/world/embedded: first lists, then the whole text of the embedded world.
# Needs: Python 3.11 or newer, 2 CPU cores, 4 GB of memory; the network only for pip. Time: about 20 minutes. OUT_DIR must not be there yet.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash launch/pretrain_embedded.sh OUT_DIR}
source launch/venv.sh
ensure_venv .
medrlvr sft configs/pretrain_lists.yaml
[[ -d runs/pretrain_lists/hf ]] || medrlvr export runs/pretrain_lists runs/pretrain_lists/hf
medrlvr sft configs/pretrain_embedded.yaml
medrlvr export runs/pretrain_embedded "$out"
