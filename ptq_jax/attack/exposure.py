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


def split_half_jaccard(
  key: Key,
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  top: int,
  num_splits: int = 20,
) -> float:
  """Overlap of the most exposed sets that two random halves of the targets name, on average.

  How much of a change of the exposed set is noise: compare `jaccard` between two bit widths with
  this before calling it an effect of bits.

  Raises:
    ValueError: with fewer than two targets, or as `jaccard`.
  """
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  num_targets = len(scores)
  if num_targets < 2:
    raise ValueError(f"there are {num_targets} targets; two halves need at least 2.")
  overlaps = []
  for split_key in jax.random.split(key, num_splits):
    order = np.asarray(jax.random.permutation(split_key, num_targets))
    halves = order[: num_targets // 2], order[num_targets // 2 :]
    overlaps.append(
      jaccard(*(per_example(scores[half], members[half]) for half in halves), top=top)
    )
  return float(np.mean(overlaps))
