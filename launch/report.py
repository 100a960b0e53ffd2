"""Writes the tables, figures and page of an audit, and prints the result table.

    bash launch/run report --config configs/digits.py --workdir runs/digits

Reads WORKDIR/results.jsonl; writes results.csv, results.md, figures/ and index.html beside it.
"""

from launch import flags, progress
from ptq_jax.audit import reporting


def run(config, workdir, *, shard, models=None) -> None:
  """The stage alone."""
  del config, shard, models
  found = reporting.report(workdir, listener=progress.Lines())
  print(reporting.summary(found, workdir), flush=True)


def main() -> None:
  flags.launch(run, config="configs/digits.py", workdir="runs/digits", description=__doc__)


if __name__ == "__main__":
  main()
