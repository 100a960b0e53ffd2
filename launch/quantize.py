"""Quantizes all models of an audit with every method at every precision.

    bash launch/run quantize --config configs/digits.py --workdir runs/digits

Each model is calibrated on its own members. Writes WORKDIR/scores/VARIANT/CHUNK.npz (scores,
accuracy, what happened to each unit) and WORKDIR/quantized/VARIANT/CHUNK.npz (integer codes). A run
that was killed goes on with the first method of the first chunk that is not complete.
"""

from launch import flags, progress
from ptq_jax.audit import preflight, quantizing, work


def run(config, workdir, *, shard, models=None) -> None:
  """The stage alone."""
  options = {"trained": models, "shard": shard, "listener": progress.Lines()}
  audit = preflight.open_audit(config, workdir, **options)
  with work.pinned_randomness():
    for owner in quantizing.quantize(audit):
      print(f"left to others: {owner}", flush=True)


def main() -> None:
  flags.launch(run, description=__doc__)


if __name__ == "__main__":
  main()
