"""Trains the shadows, and the dedicated targets if there are any, chunk by chunk.

    bash launch/run train_shadows --config configs/digits.py --workdir runs/digits

Writes WORKDIR/models/CHUNK (checkpoints, and loss and accuracy by epoch in metrics.jsonl) and
WORKDIR/scores/full_precision/CHUNK.npz. A run that was killed goes on from its last checkpoint, to
the same result.
"""

from launch import flags, progress
from ptq_jax.audit import preflight, training, work


def run(config, workdir, *, shard, models=None, tensorboard=False) -> None:
  """The stage alone."""
  listener = progress.listener(workdir, tensorboard)
  options = {"trained": models, "shard": shard, "listener": listener}
  audit = preflight.open_audit(config, workdir, **options)
  with work.pinned_randomness():
    for owner in training.train(audit):
      print(f"left to others: {owner}", flush=True)


def main() -> None:
  flags.launch(run, description=__doc__, switches={"tensorboard": progress.TENSORBOARD})


if __name__ == "__main__":
  main()
