#!/usr/bin/env bash
# One audit on several nodes of a SLURM cluster, one process per node (all its GPUs).
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config configs/cifar10.py --workdir RUNS/cifar10
#
# The workdir must be on a file system that all nodes see. Set the environment up once beforehand, on
# a node with a GPU: bash launch/run lint. Submit the same line again after a time limit or a failure:
# the audit goes on where it was.
#SBATCH --job-name=ptq_jax
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the project root}"
exec srun bash launch/run audit --distributed "$@"
