#!/usr/bin/env bash
# NAME=pod ZONE=us-west4-a TPU=v5litepod-16 NFS=10.0.0.2:/runs bash launch/tpu_pod.sh [--dry-run] CONFIG.yaml [a.b=value …]
# Trains on a Cloud TPU pod slice: requests it as a queued resource, waits, copies HEAD to all workers, and starts one process on each.
# Needs: gcloud, logged in, with a project that has the TPU API and quota; `ssh-add ~/.ssh/google_compute_engine`; CONFIG committed.
#   All workers write checkpoints into RUNS, so they must share it: NFS=SERVER:/EXPORT (for example Filestore) is mounted there on each
#   worker. Without NFS, RUNS must be a shared folder already, or there must be only one worker. gs:// addresses do not work.
# Variables: NAME, ZONE, TPU (the accelerator type); RUNTIME, the VM's image (v2-alpha-tpuv5-lite, for v5litepod);
#   SPOT=1 for preemptible VMs; NFS; RUNS, the folder of all runs (/mnt/runs). Several slices: launch/gke_xpk.sh.
# Again: the training does not end with the connection. The same command shows its log if it is running; else it resumes from the newest
#   checkpoint, on a new slice if the old one was preempted. Preemption sends SIGTERM, often too late to save: set checkpoint.every to
#   the number of steps that you can afford to lose.
# Save and stop: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='kill -- -$(cat medrlvr.pid)'
# Delete it:     gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/run.sh
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=${1:?usage: NAME=… ZONE=… TPU=… bash launch/tpu_pod.sh [--dry-run] CONFIG.yaml [a.b=value …]}
runs=${RUNS:-/mnt/runs}
for setting in "${@:2}"; do if [[ $setting == runs=* ]]; then runs=${setting#runs=}; fi; done  # NFS is mounted at the folder of the runs
settings=("runs=$runs" "${@:2}")
name=${NAME:?names the slice} zone=${ZONE:?such as us-west4-a} tpu=${TPU:?the accelerator type, such as v5litepod-16}
git cat-file -e "HEAD:$config"  # the workers get the committed files

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format="value(state.state)" 2>/dev/null || echo ABSENT
}

wait_until_active() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "$(date +%T) $name: $now"
    if [[ $now == FAILED || $now == SUSPENDED || $now == ABSENT ]]; then exit 1; fi  # the same command makes a new request
    sleep 30
  done
}

found=ABSENT
if [[ -z ${dry_run:-} ]]; then found=$(state); fi
if [[ $found == FAILED || $found == SUSPENDED ]]; then  # the slice was preempted: its VMs are gone
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
