#!/usr/bin/env bash
# One audit on several single-host TPU VMs, or on all hosts of a pod slice.
#
#   bash launch/tpu.sh NAME ZONE --config configs/cifar10.py --workdir /mnt/shared/runs/cifar10
#
# NAME may be several VMs with commas between them. Every host does its shard of the models on its
# own chips, and the last one attacks and reports; run it again after a pre-emption, and it goes on.
# In a slice, TPU_PROCESS_BOUNDS and TPU_CHIPS_PER_PROCESS_BOUNDS keep a host to its own chips: set
# the second to what a host has (2,2,1: four chips; 2,4,1: eight). Not tried on a TPU yet.
#
# The project must lie in ~/ptq_jax on every host, and the workdir on a file system that all of them
# mount and that has locks (Filestore).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
IFS=, read -ra names <<<"$1"
zone=$2
shift 2
flags=$(printf '%q ' "$@")
alone="TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=${TPU_CHIPS_PER_PROCESS_BOUNDS:-2,2,1}"

start() { # NAME SHARD
  gcloud compute tpus tpu-vm ssh "$1" --zone "$zone" --worker=all --command \
    "cd ptq_jax && $alone PTQ_JAX_EXTRA=tpu bash launch/run audit --shard=$2 $flags"
}

if [ ${#names[@]} -eq 1 ]; then
  start "${names[0]}" auto
  exit
fi
pids=()
for i in "${!names[@]}"; do
  start "${names[i]}" "$i/${#names[@]}" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
