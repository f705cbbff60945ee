#!/usr/bin/env bash
# bash launch/tpu_worker.sh RUNS NFS MEDRLVR_ARGUMENTS …
# Called by launch/tpu_pod.sh on each worker. Mounts NFS (if not empty) at RUNS, unpacks and installs, and starts `medrlvr …` independently
# of the connection. Then shows its log until it ends, and exits with its status. If medrlvr is running already, only shows its log.
# Needs: a Cloud TPU VM (Ubuntu; sudo without password) and medrlvr_jax.tar.gz in the home folder; the network for apt, uv and pip.
# Leaves in the home folder: medrlvr_jax/ with its .venv, medrlvr.log, medrlvr.pid, medrlvr.status.
set -euo pipefail
cd
runs=$1 nfs=$2

if ! grep -qs medrlvr "/proc/$(cat medrlvr.pid 2>/dev/null)/cmdline"; then
  if [[ -n $nfs ]] && ! mountpoint -q "$runs"; then
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq nfs-common
    sudo mkdir -p "$runs"
    sudo mount -t nfs "$nfs" "$runs"
    [[ -w $runs ]] || sudo chmod a+rwx "$runs"
  fi
  tar xzf medrlvr_jax.tar.gz
  cd medrlvr_jax
  if [[ ! -x .venv/bin/python ]]; then  # the Python of the VM images is 3.10
    [[ -x ~/.local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --quiet --seed --python 3.12 .venv
  fi
  source launch/venv.sh
  ensure_venv ".[tpu]"
  rm -f ~/medrlvr.status
  : >~/medrlvr.log
  # This shell ignores SIGTERM, so that it can write the exit status of a run that saves and stops.
  setsid bash -c 'trap : TERM; medrlvr "$@"; echo $? >~/medrlvr.status' medrlvr "${@:3}" >>~/medrlvr.log 2>&1 </dev/null &
  echo $! >~/medrlvr.pid
fi
tail --pid="$(cat ~/medrlvr.pid)" --lines=+1 --follow ~/medrlvr.log
exit "$(cat ~/medrlvr.status)"
