#!/usr/bin/env bash
# One audit on a SLURM cluster, from raw data to the page.
#
#   sbatch --array=0-3 --gpus=8 launch/slurm.sh --config configs/cifar10.py --workdir RUNS/cifar10
#   sbatch --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 launch/slurm.sh --config ... --workdir ...
#
# The processes need not know each other: each does its shard of the models on all GPUs that it sees
# (tasks of one node share its GPUs out), and the last one attacks and reports. One that fails, is
# killed or runs out of time is started again by --requeue, or by submitting the same line once more,
# and goes on where it was; the others are not disturbed.
#
# The workdir must be on a file system that all nodes see and that has locks. Set the environment up
# once beforehand, on a node with a GPU: bash launch/run lint.
#SBATCH --job-name=ptq_jax
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the project root}"
exec srun --kill-on-bad-exit=0 bash launch/run audit --shard=auto "$@"
