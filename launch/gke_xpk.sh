#!/usr/bin/env bash
# NAME=medrlvr CLUSTER=tpus ZONE=us-west4-a TPU=v5litepod-16 IMAGE=…/medrlvr:1 bash launch/gke_xpk.sh [--dry-run] CONFIG.yaml [a.b=value …]
# Trains on TPU slices on Google Kubernetes Engine through XPK, one process per VM. XPK submits a JobSet like launch/gke_jobset.yaml.
# Needs: `pip install xpk`; gcloud and kubectl, logged in; a cluster made by `xpk cluster create`; IMAGE, which all nodes can pull
#   (docker build -f launch/Dockerfile -t IMAGE . && docker push IMAGE); and a file system that all VMs share, mounted at RUNS:
#   `xpk storage attach … --type=gcpfilestore --mount-point=/runs --readonly=false --auto-mount=true`. gs:// addresses do not work.
# Variables: NAME, CLUSTER, ZONE, TPU (the type of one slice), IMAGE; SLICES (1); PROJECT (default: that of gcloud); SPOT=1 for
#   preemptible VMs; RUNS, the folder of all runs (/runs).
# Again: the same command deletes the workload of that name, which saves and stops, and resumes from the newest checkpoint. After a
#   failure or preemption the workload restarts and resumes automatically, up to 100 times. Unusable settings (status 2) end it at once.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/run.sh
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=${1:?usage: NAME=… CLUSTER=… ZONE=… TPU=… IMAGE=… bash launch/gke_xpk.sh [--dry-run] CONFIG.yaml [a.b=value …]}
slices=${SLICES:-1}
settings=("runs=${RUNS:-/runs}" "mesh.slices=$slices" "${@:2}")  # the network between slices is slow
name=${NAME:?names the workload} tpu=${TPU:?the type of one slice, such as v5litepod-16} image=${IMAGE:?the image made by launch/Dockerfile}
cluster=(--cluster="${CLUSTER:?the cluster that xpk made}" --zone="${ZONE:?such as us-west4-a}" ${PROJECT:+--project="$PROJECT"})

run xpk workload delete --workload="$name" "${cluster[@]}" || echo "no workload $name to remove"
train=$(printf ' %q' exec medrlvr train --distributed "$config" "${settings[@]}")  # exec: SIGTERM reaches medrlvr itself
run xpk workload create --workload="$name" "${cluster[@]}" --tpu-type="$tpu" --num-slices="$slices" --docker-image="$image" \
  --command="${train# }" --max-restarts=100 --restart-on-exit-codes=1 --termination-grace-period-seconds=300 ${SPOT:+--spot}
