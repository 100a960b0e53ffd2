"""Which examples a model exposes: the attack's evidence per pool example, over many targets.

Works on any attack's scores; with LiRA online a value is a mean log-likelihood ratio, natural-log
units. HIGHER MEANS MORE EXPOSED.
"""

from typing import NamedTuple

import jax
import numpy as np

from ptq_jax.base import ArrayLike, Bool, Float, Int, Key


class Exposure(NamedTuple):
  """Mean attack score of each pool example over targets; NaN where there is nothing to average."""

  when_member: Float[np.ndarray, "E"]  # over the targets that trained on it
  when_non_member: Float[np.ndarray, "E"]  # over the others: what innocence looks like
  times_member: Int[np.ndarray, "E"]  # how many targets trained on it


def per_example(scores: Float[ArrayLike, "T E"], members: Bool[ArrayLike, "T E"]) -> Exposure:
  """Averages an attack's scores over targets, apart for those that trained on the example.

  Args:
    scores: float[T, E], finite.
    members: bool[T, E].
  Raises:
    ValueError: if the shapes differ or a score is NaN or infinite.
  """
  scores, members = np.asarray(scores, np.float64), np.asarray(members).astype(bool)
  if scores.shape != members.shape or scores.ndim != 2:
    raise ValueError(f"scores {scores.shape} and members {members.shape} must both be [T, E].")
  if not np.isfinite(scores).all():
    raise ValueError("scores are NaN or infinite; exposure averages need finite scores.")
  means = []
  for chosen in (members, ~members):
    count = chosen.sum(axis=0)
    mean = np.where(chosen, scores, 0).sum(axis=0) / np.maximum(count, 1)
    means.append(np.where(count > 0, mean, np.nan))
  return Exposure(*means, times_member=members.sum(axis=0))


def ranking(exposure: Exposure) -> Int[np.ndarray, "E"]:
  """Example numbers from most to least exposed when a member; never-members come last."""
  return np.argsort(-exposure.when_member, kind="stable")  # NaN sorts last


def jaccard(exposure: Exposure, other: Exposure, *, top: int) -> float:
  """Overlap of the `top` most exposed examples of two: size of the common set over the union's.

  Two random sets of this size overlap by about top / (2 E - top).

  Raises:
    ValueError: if `top` is not in [1, E].
  """
  num_examples = len(exposure.when_member)
  if not 1 <= top <= num_examples:
    raise ValueError(f"top is {top}; it must lie in [1, {num_examples}], the number of examples.")
  common = len(np.intersect1d(ranking(exposure)[:top], ranking(other)[:top]))
  return common / (2 * top - common)


def compare(
  key: Key,
  scores: Float[ArrayLike, "T E"],
  reference: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  top: int,
  num_resamples: int = 200,
  confidence: float = 0.95,
) -> dict:
  """How the set of most exposed examples differs from a reference's, say full precision's.

  Args:
    scores, reference: float[T, E], one attack on two versions of the same targets.
    members: bool[T, E].
    top: size of the sets.
    num_resamples: targets are drawn with replacement this often for the intervals.
  Returns:
    {"top", "num_examples", "jaccard": N, "noise_ceiling": N}, where N is {"value", "low", "high",
    "interval"}. The ceiling is how far the sets agree that two random halves of the reference's
    targets name (None with one target): a `jaccard` below it is an effect beyond noise.
  Raises:
    ValueError: as `per_example` and `jaccard`.
  """
  scores, reference = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
  members = np.asarray(members).astype(bool)
  exposures = [per_example(rows, members) for rows in (scores, reference)]
  value = jaccard(*exposures, top=top)
  num_targets, num_examples = members.shape
  draw_key, split_key = jax.random.split(key)
  drawn = jax.random.randint(draw_key, (num_resamples, num_targets), 0, num_targets)
  times = np.stack([np.bincount(row, minlength=num_targets) for row in np.asarray(drawn)])
  draws = _overlaps(*(_top_sets(times, rows, members, top) for rows in (scores, reference)))
  ceiling = None
  if num_targets > 1:
    order = np.argsort(jax.random.uniform(split_key, (num_resamples, num_targets)), axis=1)
    halves = (order < num_targets // 2, order >= num_targets // 2)
    overlaps = _overlaps(*(_top_sets(half, reference, members, top) for half in halves))
    name = "random halves of the targets"
    ceiling = _interval(np.mean(overlaps), overlaps, confidence, name)
  return {
    "top": top,
    "num_examples": num_examples,
    "jaccard": _interval(value, draws, confidence, "bootstrap over targets"),
    "noise_ceiling": ceiling,
  }


def _top_sets(times, scores, members, top):
  """bool[R, E], the most exposed examples when target t counts times[r, t] times."""
  times = np.asarray(times, np.float64)
  count = times @ members
  with np.errstate(invalid="ignore"):
    mean = (times @ np.where(members, scores, 0.0)) / count
  chosen = np.argpartition(-mean, top - 1, axis=1)[:, :top]  # NaN, never a member, goes last
  sets = np.zeros(mean.shape, bool)
  np.put_along_axis(sets, chosen, True, axis=1)
  return sets


def _overlaps(sets, others):
  return (sets & others).sum(axis=1) / (sets | others).sum(axis=1)


def _interval(value, draws, confidence, name):
  """Percentiles of the draws, moved so that their mean is the value, within [0, 1]."""
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws, [tail, 1 - tail]) + value - np.mean(draws)
  return {
    "value": float(value),
    "low": max(float(low), 0.0),
    "high": min(float(high), 1.0),
    "interval": f"{name}, {100 * confidence:g} %",
  }
