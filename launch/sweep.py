"""A grid of audits over keys of the config, and one table of them all.

    bash launch/run sweep --config configs/digits.py --workdir runs/sweep \\
      --sweep seed=0,1,2 --sweep quantize.levels=3,4,16 --dry_run

--sweep KEY=VALUE,VALUE (once per key) names a key as --config.KEY does, and its values in the same
spelling; a value with commas goes in brackets: "quantize.levels=(3,4),(16,)". --dry_run prints the
points and what they cost, and stops.

Every combination is an audit in WORKDIR/points/POINT, a command of its own that is printed and run;
a scheduler may run them instead. Points whose seed, data, model and training are the same share
their models in WORKDIR/trained, so each of these is trained once. The results of all points stand
in WORKDIR/sweep.csv, sweep.jsonl and sweep.md. Run it again, and it goes on where it was.
"""

import copy
import csv
import dataclasses
import io
import itertools
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import config_flags

from launch import flags as launching
from ptq_jax import settings, storage
from ptq_jax.audit import preflight, work
from ptq_jax.audit.layout import Audit
from ptq_jax.models import flops
from ptq_jax.report import records, tables

GROWING = ("train.models", "train.targets")
"""Keys by which an audit may grow."""

OPENING, CLOSING, QUOTES = "([{", ")]}", "'\""


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a point has to compute if nothing is there yet."""

  models: int  # shadows and targets
  examples: int  # that all of them train on, repetitions counted
  training_flops: int
  quantized: int  # models times variants
  scored: int  # examples that all models, in full precision and in each variant, look at
  scoring_flops: int


@dataclasses.dataclass(frozen=True)
class Point:
  """One combination of values."""

  values: Mapping[str, str]  # by key, as they were written
  config: settings.Config
  root: pathlib.Path  # its workdir
  trained: pathlib.Path  # its models, shared with the points that train the same
  cost: Cost

  @property
  def name(self) -> str:
    return self.root.name

  @property
  def typed_values(self) -> dict:
    """The values by key, as the config has them."""
    return {key: settings.plain(settings.get(self.config, key)) for key in self.values}

  def command(self, base: Sequence[str]) -> list[str]:
    """The audit of this point, given the flags that all points share."""
    own = {"name": self.config.name, **self.values}
    kept = [flag for flag in base if not flag.startswith(tuple(f"--config.{key}=" for key in own))]
    values = [f"--config.{key}={value}" for key, value in own.items()]
    where = [f"--workdir={self.root}", f"--models={self.trained}"]
    return [sys.executable, "-m", "launch.audit", *kept, *values, *where]


def run(
  config, workdir, *, base: Sequence[str], sweep: Sequence[str], dry_run: bool = False
) -> None:
  """All points of the grid, one after another.

  Args:
    config: with which `base` starts an audit.
    base: flags of every point.
    sweep: texts KEY=VALUE,VALUE.
    dry_run: only print the plan.
  Raises:
    ValueError: for a text of another form, or a point that makes no sense; nothing is computed.
    RuntimeError: if a point fails.
  """
  points = make_points(config, workdir, parse_axes(sweep))
  print(describe(points), flush=True)
  for point in points:
    print(shlex.join(["python", *point.command(base)[1:]]), flush=True)
  if dry_run:
    return
  storage.require_writable(workdir)
  finished: list[tuple[Point, list[dict]]] = []
  try:
    for number, point in enumerate(points, start=1):
      print(f"\nPoint {number} of {len(points)}: {point.name}", flush=True)
      run_point(point, base)
      finished.append((point, results_of(point)))
  finally:
    if finished:
      write_tables(finished, workdir)
      print(tables.to_text(joined_table(finished)))
      print(f"{workdir / 'sweep.csv'} has every number.", flush=True)


def run_point(point: Point, base: Sequence[str]) -> None:
  """Runs the audit of a point; a stop is passed on to it, and waited for."""
  process = subprocess.Popen(point.command(base))
  try:
    process.wait()
  except KeyboardInterrupt:
    process.terminate()
    process.wait()
    raise
  if process.returncode:
    raise RuntimeError(
      f"point {point.name} ended with code {process.returncode}; its own message says why."
    )


# ---- the grid ----


def parse_axes(texts: Sequence[str]) -> dict[str, list[str]]:
  """Values by key from texts KEY=VALUE,VALUE, both as they are written.

  >>> parse_axes(["seed=0,1", "quantize.levels=3,(4,16)"])
  {'seed': ['0', '1'], 'quantize.levels': ['3', '(4,16)']}

  Raises:
    ValueError: for no text at all, a text of another form, or a key given twice.
  """
  axes: dict[str, list[str]] = {}
  for text in texts:
    key, _, values = text.partition("=")
    axis = split(values)
    if not key or not all(axis):
      raise ValueError(f"--sweep has {text!r}; write KEY=VALUE,VALUE.")
    if key in axes:
      raise ValueError(f"--sweep names {key} twice; give all its values at once.")
    axes[key] = axis
  if not axes:
    raise ValueError("nothing to sweep; give --sweep KEY=VALUE,VALUE, such as --sweep seed=0,1,2.")
  return axes


def split(text: str) -> list[str]:
  """Parts between commas that stand in no brackets and no quotes, without blanks around them."""
  parts, depth, quote = [""], 0, ""
  for letter in text:
    if quote:
      quote = "" if letter == quote else quote
    elif letter in QUOTES:
      quote = letter
    else:
      depth += (letter in OPENING) - (letter in CLOSING)
    if letter == "," and not depth and not quote:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def make_points(
  config: settings.Config, workdir: pathlib.Path, axes: Mapping[str, Sequence[str]]
) -> list[Point]:
  """Every combination of the values as an audit that passed its checks, the last key fastest."""
  points: list[Point] = []
  datasets = {}  # the one in use: a set may be large, and to read it takes time
  for combination in itertools.product(*axes.values()):
    values = dict(zip(axes, combination, strict=True))
    own = with_values(config, values)
    for point in points:
      if settings.plain(point.config) | {"name": own.name} == settings.plain(own):
        raise ValueError(f"--sweep gives the same point twice: {point.name}.")
    own.name = f"{config.name}, {point_name(values)}"
    root = workdir / "points" / point_name(values)
    opened = Audit(own, root, root / "models")
    source = settings.fingerprint(own.data)
    if source not in datasets:
      datasets = {source: opened.dataset}
    vars(opened)["dataset"] = datasets[source]
    try:
      preflight.check(opened)
    except ValueError as error:
      raise ValueError(f"at {opened.root.name}: {error}") from error
    trained = workdir / "trained" / training_fingerprint(opened, swept=axes)
    points.append(Point(values, own, opened.root, trained, cost_of(opened)))
  return points


def with_values(config: settings.Config, values: Mapping[str, str]) -> settings.Config:
  """A copy of the config with values read as `--config.KEY=VALUE` reads them.

  Raises:
    ValueError: for a key that the config does not have, or a value of another type.
  """
  known = settings.dotted(settings.plain(config))
  arguments = ["sweep"]
  for key, value in values.items():
    if key not in known:
      raise ValueError(f"--sweep names {key}, but the config has no such key; --help lists all.")
    arguments.append(f"--config.{key}={value}")
  parsed = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      "config", copy.deepcopy(config), flag_values=parsed, sys_argv=arguments
    )
    parsed(arguments)
  except (flags.Error, ValueError, TypeError) as error:
    raise ValueError(f"--sweep has a value that cannot be read: {error}") from error
  return parsed.config


def point_name(values: Mapping[str, str]) -> str:
  """The values as the name of a folder."""
  name = ",".join(f"{key}={value}" for key, value in values.items())
  safe = re.sub(r"[^\w=.,()+-]", "_", name)[:100]
  return safe if safe == name else f"{safe}-{settings.fingerprint(values)[:6]}"


def training_fingerprint(opened: Audit, *, swept: Mapping[str, Sequence[str]]) -> str:
  """Changes with everything that the trained models depend on.

  How many models there are counts only where the sweep varies it: a finished sweep can be given
  more models, as an audit can.
  """
  counts = [settings.get(opened.config, key) for key in GROWING if key in swept]
  return settings.fingerprint([opened.training_settings, opened.dataset.fingerprint, counts])


# ---- what it costs ----


def cost_of(opened: Audit) -> Cost:
  """What a point computes from scratch."""
  config, data = opened.config, opened.dataset
  train, pool = config.train, len(data.train_labels)
  models, variants = train.models + train.targets, len(opened.variants())
  scored = models * (1 + variants) * (opened.num_views * pool + len(data.test_labels))
  forward = flops.forward(opened.model, image_shape=data.image_shape, dtype=data.fed(1).dtype)
  return Cost(
    models=models,
    examples=opened.training_images,
    training_flops=opened.training_flop,
    quantized=models * variants,
    scored=scored,
    scoring_flops=scored * forward,
  )


def describe(points: Sequence[Point]) -> str:
  """The plan in words: every point, and the cost of all of them."""
  distinct = {point.trained: point for point in points}
  trainings = {path: number for number, path in enumerate(distinct, start=1)}
  lines = [f"Sweep of {len(points)} points:"]
  for point in points:
    state = " (finished)" if results_of(point) else ""
    lines.append(f"  {point.name}: models of training {trainings[point.trained]}{state}")
  models = sum(point.cost.models for point in distinct.values())
  there = sum(map(trained_models, distinct))
  examples = sum(point.cost.examples for point in distinct.values())
  training = sum(point.cost.training_flops for point in distinct.values())
  quantized, scored, scoring = (
    sum(getattr(point.cost, field) for point in points)
    for field in ("quantized", "scored", "scoring_flops")
  )
  lines += [
    f"Trainings: {len(distinct)}, together {models} models ({there} trained already), "
    f"{examples:,} examples, {short(training)}FLOP.",
    f"Quantized models: {quantized:,}.",
    f"Scoring: {scored:,} examples, {short(scoring)}FLOP.",
  ]
  return "\n".join(lines)


def trained_models(trained: pathlib.Path) -> int:
  """How many models have finished their training in a shared folder."""
  found = work.read(trained)
  chunks = found.chunks if found else ()
  return sum(
    len(chunk) for chunk in chunks if any((trained / chunk.name / "trained").glob("*.json"))
  )


def short(number: float) -> str:
  """Three digits and the prefix of the unit that follows.

  >>> short(12), short(4_000_000), short(1.33e16)
  ('12 ', '4 M', '13.3 P')
  """
  for prefix in ("", "k", "M", "G", "T", "P"):
    if number < 999.5:
      return f"{number:.3g} {prefix}"
    number /= 1000
  return f"{number:.3g} E"


# ---- what comes out ----


def results_of(point: Point) -> list[dict]:
  """The records of a point's audit; none unless it has been finished with this config."""
  path = point.root / "results.jsonl"
  found = storage.read_records(path) if path.exists() else []
  runs, own = records.select(found, "run"), settings.of_results(point.config)
  return found if runs and settings.of_results(runs[0]["config"]) == own else []


def write_tables(finished: Sequence[tuple[Point, list[dict]]], workdir: pathlib.Path) -> None:
  """The results of points, each with its records, as records, as numbers and as a table."""
  leakage = [
    {**record, "point": point.name, "values": point.typed_values}
    for point, found in finished
    for record in records.select(found, "leakage")
  ]
  storage.write_records(workdir / "sweep.jsonl", leakage)
  storage.write_text(workdir / "sweep.csv", joined_csv(finished))
  storage.write_text(workdir / "sweep.md", tables.to_markdown(joined_table(finished)))


def joined_csv(finished: Sequence[tuple[Point, list[dict]]]) -> str:
  """Every number of every point, the swept values first."""
  rows = [
    {**point.values, **row}
    for point, found in finished
    for row in csv.DictReader(io.StringIO(tables.to_csv(found)))
  ]
  out = io.StringIO()
  names = list(dict.fromkeys(name for row in rows for name in row))
  writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def joined_table(finished: Sequence[tuple[Point, list[dict]]]) -> tables.Table:
  """The result tables of all points below each other, the swept values first."""
  columns, rows, notes = [], [], []
  for point, found in finished:
    table = tables.results(found)
    keys = [tables.Column(key.replace(".", ".\n"), words=True) for key in point.values]
    values = [tables.Cell(value) for value in point.values.values()]
    columns = [*keys, *table.columns]
    rows += [[*values, *row] for row in table.rows]
    notes += table.notes
  return tables.Table("Sweep", columns, rows, list(dict.fromkeys(notes)))


def main() -> None:
  sweep = flags.DEFINE_multi_string("sweep", [], "KEY=VALUE,VALUE; once per key.")
  dry_run = flags.DEFINE_bool("dry_run", False, "Print the plan and its cost, and stop.")
  own = ("--sweep", "--dry_run", "--nodry_run", "--workdir")
  base = [
    a for before, a in itertools.pairwise(sys.argv) if not a.startswith(own) and before not in own
  ]
  launching.launch(
    lambda config, workdir, **_: run(
      config, workdir, base=base, sweep=sweep.value, dry_run=dry_run.value
    ),
    workdir="runs/sweep",
    description=__doc__,
  )


if __name__ == "__main__":
  main()
