"""Which examples a model exposes: the attack's evidence per pool example, over many targets.

Works on any attack's scores; with LiRA online a value is a mean log-likelihood ratio, natural-log
units. An example is exposed when its scores differ between targets that trained on it and those
that did not: a high score in both is an easy example, not an exposed one.
"""

from typing import NamedTuple

import jax
import numpy as np

from ptq_jax.base import ArrayLike, Bool, Float, Int, Key, as_members


class Exposure(NamedTuple):
  """Mean attack score of each pool example over targets; NaN where there is nothing to average."""

  when_member: Float[np.ndarray, "E"]  # over the targets that trained on it
  when_non_member: Float[np.ndarray, "E"]  # over the others: what innocence looks like
  times_member: Int[np.ndarray, "E"]  # how many targets trained on it

  @property
  def gap(self) -> Float[np.ndarray, "E"]:
    """How far membership shows; NaN where one of the two was never seen. Higher is more exposed."""
    return self.when_member - self.when_non_member


def per_example(scores: Float[ArrayLike, "T E"], members: Bool[ArrayLike, "T E"]) -> Exposure:
  """Averages an attack's scores over targets, apart for those that trained on the example.

  Args:
    scores: float[T, E], finite.
    members: bool[T, E].
  Raises:
    ValueError: if the shapes differ or a score is NaN or infinite.
  """
  scores, members = np.asarray(scores, np.float64), np.asarray(as_members(members))
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
  """Example numbers from most to least exposed by `gap`; those without one come last."""
  return np.argsort(-exposure.gap, kind="stable")  # NaN sorts last


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
    {"top", "num_examples", "jaccard": {"value", "low", "high", "interval"}}. Draws of targets that
    leave too few examples with a gap are not used; with one target there is no overlap to tell, and
    the numbers are None.
  Raises:
    ValueError: as `per_example` and `jaccard`.
  """
  scores, reference = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
  members = np.asarray(as_members(members))
  exposures = [per_example(rows, members) for rows in (scores, reference)]
  num_targets, num_examples = members.shape
  nothing = {"value": None, "low": None, "high": None, "interval": None}
  found = {"top": top, "num_examples": num_examples, "jaccard": nothing}
  if np.isfinite(exposures[0].gap).sum() < top:
    return found
  value = jaccard(*exposures, top=top)
  drawn = jax.random.randint(key, (num_resamples, num_targets), 0, num_targets)
  times = np.stack([np.bincount(row, minlength=num_targets) for row in np.asarray(drawn)])
  draws = _overlaps(*(_top_sets(times, rows, members, top) for rows in (scores, reference)))
  draws = draws[np.isfinite(draws)]
  if len(draws) > 1:
    found["jaccard"] = _interval(value, draws, confidence, "bootstrap over targets")
  return found


def _top_sets(times, scores, members, top):
  """int[R, top], the most exposed when target t counts times[r, t] times; -1 if too few."""
  times = np.asarray(times, np.float32)
  means = []
  for chosen in (members, ~members):
    count = times @ chosen.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
      means.append((times @ np.where(chosen, scores, 0.0).astype(np.float32)) / count)
  gap = means[0] - means[1]
  sets = np.argpartition(-gap, top - 1, axis=1)[:, :top]  # NaN goes last
  sets[np.isfinite(gap).sum(axis=1) < top] = -1
  return sets


def _overlaps(sets, others):
  """Jaccard overlaps of two rows of sets [R, top], NaN where one is not known."""
  pairs = zip(sets, others, strict=True)
  common = np.array([len(np.intersect1d(*pair)) for pair in pairs], float)
  common[(sets[:, 0] < 0) | (others[:, 0] < 0)] = np.nan
  return common / (2 * sets.shape[1] - common)


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
