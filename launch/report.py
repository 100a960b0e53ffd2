"""Writes the tables, figures and page of an audit, and prints the result table.

    bash launch/run report --config configs/digits.py --workdir runs/digits

Reads WORKDIR/results.jsonl; writes results.csv, results.md, figures/ and index.html beside it. Of
the config only its section `report` counts: --config.report.show_images=True also shows the most
exposed training images, --config.report.figures=False draws nothing.
"""

from launch import flags, progress
from ptq_jax.audit import reporting


def run(config, workdir, *, shard, models=None) -> None:
  """The stage alone."""
  del shard, models
  found = reporting.report(workdir, options=config.report, listener=progress.Lines())
  print(reporting.summary(found, workdir), flush=True)


def main() -> None:
  flags.launch(run, config="configs/digits.py", workdir="runs/digits", description=__doc__)


if __name__ == "__main__":
  main()
