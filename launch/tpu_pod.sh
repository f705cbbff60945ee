#!/usr/bin/env bash
# NAME=pod ZONE=us-west4-a TPU=v5litepod-16 NFS=10.0.0.2:/runs bash launch/tpu_pod.sh [--dry-run] CONFIG.yaml [a.b=value …]
# A Cloud TPU pod slice: asks for it as a queued resource, waits, copies HEAD to all its workers, trains with one process on each.
# Needs: gcloud, logged in, with a project that has the TPU API and quota; `ssh-add ~/.ssh/google_compute_engine`; CONFIG committed.
#   A folder that all workers share, since all write checkpoints: NFS=SERVER:/EXPORT (Filestore, say) is mounted at RUNS on each worker;
#   without NFS, RUNS must be such a folder already, or there must be one worker. gs:// addresses are not understood.
# Variables: NAME, ZONE, TPU (the accelerator type); RUNTIME, the VM's image (v2-alpha-tpuv5-lite, which goes with v5litepod);
#   SPOT=1 for preemptible VMs; NFS; RUNS, the folder of all runs (/mnt/runs). Several slices: launch/gke_xpk.sh.
# Again: the same command follows the training if it is alive, for it outlives the connection; else it goes on from the newest checkpoint,
#   on a new slice if the old one was preempted. Preemption sends SIGTERM, often too late to save: set checkpoint.every to what may be lost.
# Save and stop: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='kill -- -$(cat medrlvr.pid)'
# Give it back:  gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/run.sh
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=${1:?usage: NAME=… ZONE=… TPU=… bash launch/tpu_pod.sh [--dry-run] CONFIG.yaml [a.b=value …]}
runs=${RUNS:-/mnt/runs}
for setting in "${@:2}"; do if [[ $setting == runs=* ]]; then runs=${setting#runs=}; fi; done  # NFS is mounted where the runs go
settings=("runs=$runs" "${@:2}")
name=${NAME:?names the slice} zone=${ZONE:?such as us-west4-a} tpu=${TPU:?the accelerator type, such as v5litepod-16}
git cat-file -e "HEAD:$config"  # the workers get what is committed

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format="value(state.state)" 2>/dev/null || echo ABSENT
}

wait_until_active() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "$(date +%T) $name: $now"
    if [[ $now == FAILED || $now == SUSPENDED || $now == ABSENT ]]; then exit 1; fi  # the same command asks anew
    sleep 30
  done
}

found=ABSENT
if [[ -z ${dry_run:-} ]]; then found=$(state); fi
if [[ $found == FAILED || $found == SUSPENDED ]]; then  # after preemption: its VMs are gone
  run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
  found=ABSENT
fi
if [[ $found == ABSENT ]]; then
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$tpu" \
    --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
fi
run wait_until_active
run mkdir -p .cache
run git archive --format=tar.gz --prefix=medrlvr_jax/ --output=.cache/medrlvr_jax.tar.gz HEAD
run gcloud compute tpus tpu-vm scp .cache/medrlvr_jax.tar.gz "$name:" --zone="$zone" --worker=all
train=$(printf ' %q' "$runs" "${NFS:-}" train --distributed "$config" "${settings[@]}")
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="bash <(tar xzOf medrlvr_jax.tar.gz medrlvr_jax/launch/tpu_worker.sh)$train"
