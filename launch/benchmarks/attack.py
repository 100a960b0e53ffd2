"""Five LiRA variants with ROC and TPR, against the plain loop over examples.

    bash launch/run bench attack [--examples N] [--plain_examples N] [--stream]

The plain loop takes each example's "in" and "out" scores, their median and standard deviation, and
SciPy's log density, one example after the other, then scikit-learn's ROC. It scales linearly;
--plain_examples times a part of it and says so. A second plain version only gathers in a loop, as
the public LiRA script does. Ratios are of wall time, and of processor time in brackets.

--stream instead runs 256 shadows x 100 000 examples x 18 views from a file on disk and reports the
peak of memory.
"""

import argparse
import json
import os
import pathlib
import resource
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats
from sklearn import metrics

from ptq_jax.attack import lira, threshold
from ptq_jax.metrics import roc

VARIANTS = {
  "online": lira.Variant("online"),
  "online, fixed variance": lira.Variant("online", "reference"),
  "offline": lira.Variant("offline", tail="density"),
  "offline, fixed variance": lira.Variant("offline", "reference", tail="density"),
}
FPRS = (0.01, 0.001)


class Times(NamedTuple):
  """What one call took, in seconds."""

  wall: float
  processor: float  # summed over cores: hardly moved by what else the machine does

  def __str__(self):
    return f"{self.wall:.3f} s ({self.processor:.3f} s of processor)"


def main(argv: list[str]) -> None:
  """Prints the times and their ratios; stops if the results differ."""
  flags = _parser().parse_args(argv)
  if flags.stream:
    stream(flags.folder)
    return
  data = draw(flags.models, flags.examples, flags.views)
  print(f"{flags.models} shadows x {flags.examples} examples x {flags.views} views, on ", end="")
  print(f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
  first, _ = timed(lambda: ours(*data))
  fastest, (scores, rates) = _fastest(lambda: ours(*data), flags.repeats)
  print(f"ours: {fastest}, {first.wall - fastest.wall:.1f} s more the first time, to compile")
  timed(lambda: leave_one_out(data[0][:, :2000], data[1][:, :2000]))
  print(f"ours, every model as target: {_fastest(lambda: leave_one_out(*data[:2]), 2)[0]}")
  part = min(flags.plain_examples or flags.examples, flags.examples)
  some = (data[0][:, :part].astype(np.float64), data[1][:, :part])
  some += (data[2][:part].astype(np.float64), data[3][:part])
  for name, function in PLAIN.items():
    times, (plain_scores, plain_rates) = timed(lambda f=function: f(*some))
    scaled = Times(*(value * flags.examples / part for value in times))
    note = "" if part == flags.examples else f", scaled from {part} examples"
    wall, processor = (theirs / mine for theirs, mine in zip(scaled, fastest, strict=True))
    print(f"{name}: {scaled}{note}; ratio {wall:.0f} ({processor:.0f})")
    if part == flags.examples:
      for variant, row in plain_scores.items():
        np.testing.assert_allclose(scores[variant], row, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(rates[variant], plain_rates[variant], atol=1e-12)
      print("  same scores, AUC and TPR")


def stream(folder: str | None, *, models=256, examples=100_000, views=18, targets=10) -> None:
  """The largest case, from a memory-mapped file."""
  with tempfile.TemporaryDirectory(dir=folder) as directory:
    path = pathlib.Path(directory) / "scores.npy"
    shape = (models + targets, examples, views)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    rng = np.random.default_rng(0)
    members = rng.random(shape[:2]) < 0.5
    for start in range(0, examples, 2000):
      index = slice(start, start + 2000)
      center = 2 * rng.standard_normal((1, members[:, index].shape[1], 1), np.float32)
      noise = rng.standard_normal((shape[0], center.shape[1], views), np.float32)
      file[:, index] = center + noise + members[:, index, None]
    file.flush()
    del file, noise
    before = peak_gigabytes()
    scores = np.load(path, mmap_mode="r")
    times, rows = timed(
      lambda: lira.attack(
        scores[:models], members[:models], scores[models:], variants=tuple(VARIANTS.values())
      )
    )
    area = np.mean([roc.auc(*pair) for pair in zip(rows[0], members[models:], strict=True)])
  report = {
    "models": models,
    "examples": examples,
    "views": views,
    "targets": targets,
    "seconds": round(times.wall, 1),
    "online_auc": round(float(area), 4),
    "peak_gigabytes_before": round(before, 2),
    "peak_gigabytes": round(peak_gigabytes(), 2),
  }
  print(json.dumps(report))


def ours(shadows, members, target, inside):
  """Scores of the five attacks, and (AUC, TPR at each FPR) of each."""
  rows = lira.attack(shadows, members, target[None], variants=tuple(VARIANTS.values()))[:, 0]
  scores = dict(zip(VARIANTS, rows, strict=True)) | {"global": threshold.loss_threshold(target)}
  return scores, {name: _rates(roc.curve(row, inside)) for name, row in scores.items()}


def _rates(curve):
  points = [roc.point_at_fpr(curve, fpr=fpr, rule="below").tpr for fpr in FPRS]
  return [roc.area(curve), *points]


def leave_one_out(shadows, members):
  """The four attacks that need shadows, on every model, by the others."""
  left_out = np.arange(len(shadows))[:, None]
  variants = tuple(VARIANTS.values())
  return lira.attack(shadows, members, shadows, variants=variants, left_out=left_out)


def plain_loop(shadows, members, target, inside):
  """Everything per example, with SciPy's log density."""
  fixed = np.std(shadows[members]), np.std(shadows[~members])
  scores = {name: np.zeros(len(target)) for name in [*VARIANTS, "global"]}
  for e in range(len(target)):
    within, without = shadows[members[:, e], e], shadows[~members[:, e], e]
    centers = np.median(within, axis=0), np.median(without, axis=0)
    own = np.std(within, axis=0), np.std(without, axis=0)
    for name, value in _plain_scores(target[e], centers, own, fixed).items():
      scores[name][e] = value.mean()
  return scores, _plain_rates(scores, inside)


def plain_gathering(shadows, members, target, inside):
  """A loop gathers and cuts to equal counts, as the public LiRA script does; the rest is arrays."""
  within = [shadows[members[:, e], e] for e in range(len(target))]
  without = [shadows[~members[:, e], e] for e in range(len(target))]
  within, without = _cut(within), _cut(without)
  centers = np.median(within, axis=1), np.median(without, axis=1)
  own = np.std(within, axis=1), np.std(without, axis=1)
  fixed = np.std(within), np.std(without)
  scores = {k: v.mean(axis=1) for k, v in _plain_scores(target, centers, own, fixed).items()}
  return scores, _plain_rates(scores, inside)


def _cut(groups):
  shortest = min(map(len, groups))
  return np.array([group[:shortest] for group in groups])


def _plain_scores(target, centers, own, fixed):
  def log_density(side, deviations):
    return stats.norm.logpdf(target, centers[side], deviations[side] + 1e-30)

  both = (fixed[0], fixed[0])
  return {
    "online": log_density(0, own) - log_density(1, own),
    "online, fixed variance": log_density(0, both) - log_density(1, both),
    "offline": -log_density(1, own),
    "offline, fixed variance": -log_density(1, fixed),
    "global": target,
  }


def _plain_rates(scores, inside):
  rates = {}
  for name, row in scores.items():
    fpr, tpr, _ = metrics.roc_curve(inside, row)
    points = [tpr[np.flatnonzero(fpr < limit)[-1]] for limit in FPRS]
    rates[name] = [metrics.auc(fpr, tpr), *points]
  return rates


def draw(models, examples, views):
  """Scores as trained classifiers give them: examples differ, members are more confident.

  Every example is a member of exactly half of the shadows, so the gathering version loses none.
  """
  rng = np.random.default_rng(0)
  members = rng.permuted(np.tile(np.arange(models)[:, None] % 2 == 0, (1, examples)), axis=0)
  inside = rng.random(examples) < 0.5
  center, gap = 3 * rng.standard_normal((examples, 1)), rng.exponential(size=(examples, 1))

  def scores(members):
    noise = rng.standard_normal((*members.shape, 1)) + 0.3 * rng.standard_normal(
      (*members.shape, views)
    )
    return (center + gap * members[..., None] + noise).astype(np.float32)

  return scores(members), members, scores(inside), inside


PLAIN = {"plain loop over examples": plain_loop, "loop that gathers, then arrays": plain_gathering}


def timed(function) -> tuple[Times, Any]:
  """What a call took, and its result."""
  wall, processor = time.perf_counter(), time.process_time()
  result = function()
  return Times(time.perf_counter() - wall, time.process_time() - processor), result


def _fastest(function, repeats):
  return min((timed(function) for _ in range(repeats)), key=lambda pair: pair[0].wall)


def peak_gigabytes() -> float:
  """Largest memory of this process so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _parser():
  parser = argparse.ArgumentParser(
    prog="bench attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", type=int, default=64, help="shadows")
  parser.add_argument("--examples", type=int, default=50_000)
  parser.add_argument("--views", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5, help="runs of ours; the fastest counts")
  parser.add_argument("--plain_examples", type=int, help="time the plain loop on this many only")
  parser.add_argument("--stream", action="store_true", help="256 x 100 000 x 18 from a file")
  parser.add_argument("--folder", help="where --stream writes its 2 GB file")
  return parser
