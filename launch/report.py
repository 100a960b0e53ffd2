"""Writes the tables, figures and page of an audit, and prints the result table.

    bash launch/run report --config configs/digits.py --workdir runs/digits

Reads WORKDIR/results.jsonl; writes results.csv, results.md, results.tex (the result table, for
booktabs), figures/ and index.html beside it. Of the config only its section `report` counts:
--config.report.show_images=True also shows the most exposed training images,
--config.report.figures=False draws nothing.

    bash launch/run report --compare runs/a runs/b --out runs/comparison

puts studies side by side: a table, leakage against lost member fit, and where they differ. Of each
folder only results.jsonl is read; a study is called like its folder.
"""

from launch import flags, progress
from ptq_jax import audit
from ptq_jax.audit import reporting


def run(config, workdir, *, shard, models=None, compare=None, out=None) -> None:
  """The stage alone, or studies side by side."""
  del shard, models
  listener = progress.Lines()
  if compare:
    print(audit.compare(compare, out=out or "runs/comparison", progress=listener), flush=True)
    return
  if out:
    raise ValueError("--out needs --compare, the folders of the studies.")
  found = reporting.report(workdir, options=config.report, listener=listener)
  print(reporting.summary(found, workdir), flush=True)


def main() -> None:
  flags.launch(
    run,
    description=__doc__,
    options={"out": "With --compare: where it is written, runs/comparison if not given."},
    several={"compare": "Folders of the studies to put side by side."},
  )


if __name__ == "__main__":
  main()
