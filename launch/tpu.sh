#!/usr/bin/env bash
# One audit on all hosts of a TPU pod slice.
#
#   bash launch/tpu.sh NAME ZONE --config configs/cifar10.py --workdir /mnt/shared/runs/cifar10
#
# The project must lie in ~/ptq_jax on every host, and the workdir on a file system that all of them
# mount (Filestore, or a bucket through gcsfuse). Run it again after a pre-emption: it goes on.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name=$1 zone=$2
shift 2
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd ptq_jax && PTQ_JAX_EXTRA=tpu bash launch/run audit --distributed $(printf '%q ' "$@")"
