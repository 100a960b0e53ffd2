"""Confidence intervals for attack metrics: over examples, over targets, over both.

An attack's number varies because other examples could have been drawn and because another target
could have been trained. `resample` draws the first kind for all targets and all metrics in one
pass; `over_examples`, `over_targets` and `over_both` turn the draws into named intervals.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ptq_jax.base import Array, ArrayLike, Bool, Float, Key
from ptq_jax.metrics import roc

BLOCK_ELEMENTS = 2**25
"""Examples x resamples drawn at once, one byte each."""


class Interval(NamedTuple):
  """A number and where it may lie."""

  value: float
  low: float
  high: float
  interval: str  # which variation it covers, and the confidence


class Metrics(NamedTuple):
  """Attack metrics of T targets, once or for each of R resamples."""

  auc: Float[np.ndarray, "*R T"]
  balanced_accuracy: Float[np.ndarray, "*R T"]
  tpr: Float[np.ndarray, "*R T L"]  # one per operating level


class Level(NamedTuple):
  """An operating point: a false-positive rate and which vertices count there."""

  fpr: float
  rule: roc.Rule = "at_most"


def measure(
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  levels: Sequence[Level],
  audited: Bool[ArrayLike, "T E"] | None = None,
) -> Metrics:
  """AUC, balanced accuracy and TPR of each target, from exact ROC vertices.

  Args:
    scores: float[T, E], attack statistic; higher means member.
    members: bool[T, E], true membership.
    levels: L operating points.
    audited: bool[T, E], the examples that count; None means all.
  Raises:
    ValueError: as `roc.curve`, for any target.
  """
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  rows = zip(scores, members, audited, strict=True)
  curves = [roc.curve(row[keep], member[keep]) for row, member, keep in rows]
  points = [[roc.point_at_fpr(c, fpr=fpr, rule=rule).tpr for fpr, rule in levels] for c in curves]
  return Metrics(
    auc=np.array([roc.area(c) for c in curves]),
    balanced_accuracy=np.array([roc.best_balanced_accuracy(c) for c in curves]),
    tpr=np.array(points).reshape(len(curves), len(levels)),
  )


def resample(
  key: Key,
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  levels: Sequence[Level],
  num_resamples: int = 1000,
  audited: Bool[ArrayLike, "T E"] | None = None,
) -> Metrics:
  """The metrics of `measure` under resampled examples, stratified by membership.

  Each resample weighs every example by an independent Poisson(1) count and divides by the total
  weight of members, and of non-members, apart: the bootstrap with the size of both groups fixed, in
  a form that streams. An example has the same weight for all targets, for they are audited on
  the same pool: what makes an example easy to expose is not independent between targets.

  The examples are passed once, from high score to low, with the counts of all resamples side by
  side; resamples are split so that their weights take 32 MiB at a time.

  Args:
    key: the same key gives the same weights, so that two attacks can be compared resample by
      resample.
    scores, members, levels, audited: as `measure`.
    num_resamples: R.
  Returns:
    `Metrics` with leading axis R.
  Raises:
    ValueError: as `roc.curve`, for any target, or `num_resamples` below 1.
  Reference: Chamandy et al. 2012, "Estimating uncertainty for massive data streams"; Owen and
    Eckles 2012, arXiv:1106.2125, for weights shared between targets.
  """
  if num_resamples < 1:
    raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1.")
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  measure(scores, members, levels=levels, audited=audited)  # refuses what has no metrics
  rows = _ranked(scores, members & audited, ~members & audited)
  limits = np.array([fpr for fpr, _ in levels], np.float64)
  strict = np.array([rule == "below" for _, rule in levels], bool)
  top = _Ranking(*(row[: _top_length(rows.is_other, limits)] for row in rows))
  num_examples = scores.shape[1]
  block = int(np.clip(BLOCK_ELEMENTS // num_examples, 1, num_resamples))
  draws = []
  with jax.enable_x64(True):
    for i in range(math.ceil(num_resamples / block)):
      weights = _poisson_counts(jax.random.fold_in(key, i), (num_examples, block))
      totals, *areas = _resampled_areas(weights, rows)
      draws.append((*areas, _resampled_rates(weights, top, totals, limits, strict)))
  merged = [
    np.concatenate(parts, axis=-1)[..., :num_resamples] for parts in zip(*draws, strict=True)
  ]
  return Metrics(*(np.moveaxis(part, -1, 0) for part in merged))


class _Ranking(NamedTuple):
  """The examples of each target from high score to low, [E, T]."""

  order: ArrayLike  # int32, which example
  is_member: ArrayLike  # bool, counts as member
  is_other: ArrayLike  # bool, counts as non-member
  is_vertex: ArrayLike  # bool, the last of equal scores


class _Accepted(NamedTuple):
  """Weight accepted so far, of each target and resample: float32[T, R], exact up to 2**24."""

  members: Array
  others: Array

  def add(self, weights, row):
    weight = weights[row.order].astype(jnp.float32)
    return _Accepted(
      self.members + weight * row.is_member[:, None], self.others + weight * row.is_other[:, None]
    )


def _ranked(scores, is_member, is_other):
  order = np.argsort(-scores, axis=1, kind="stable")
  ordered = np.take_along_axis(scores, order, axis=1)
  is_vertex = np.append(ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), bool), axis=1)
  counted = [np.take_along_axis(chosen, order, axis=1) for chosen in (is_member, is_other)]
  return _Ranking(*(row.T for row in (order.astype(np.int32), *counted, is_vertex)))


def _top_length(is_other, limits):
  """How many of the ranked examples can matter to the rates: ten deviations past the limit.

  Rounded up to a power of two, so that few lengths are compiled.
  """
  num_examples = len(is_other)
  if not len(limits):
    return 0
  allowed = limits.max() * is_other.sum(axis=0)
  enough = allowed + 10 * np.sqrt(allowed) + 50
  length = int((is_other.cumsum(axis=0) <= enough[None]).sum(axis=0).max()) + 1
  return min(num_examples, 1 << length.bit_length())


@functools.partial(jax.jit, static_argnames=("shape",))
def _poisson_counts(key, shape):
  """uint8 draws of Poisson(1), from 16 random bits each: its distribution exact to 2**-17."""
  cumulative = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(8)])
  bits = jax.random.bits(key, shape, jnp.uint16)
  counts = jnp.zeros(shape, jnp.uint8)
  for edge in np.round(cumulative * 2**16).astype(np.uint16):
    counts += (bits >= edge).astype(jnp.uint8)
  return counts


@jax.jit
def _resampled_areas(weights, rows):
  """[E, R] weights -> total weights, AUC [T, R], balanced accuracy [T, R]."""
  empty = jnp.zeros((rows.order.shape[1], weights.shape[1]), jnp.float32)
  start = _Accepted(empty, empty)
  totals = jax.lax.scan(lambda sums, row: (sums.add(weights, row), None), start, rows)[0]

  def step(carry, row):
    accepted, vertex, area, advantage = carry
    accepted = accepted.add(weights, row)
    width = (accepted.others - vertex.others).astype(jnp.float64)
    wider = area + width * (accepted.members + vertex.members)
    ahead = accepted.members / totals.members - accepted.others / totals.others
    at_vertex = row.is_vertex[:, None]
    vertex = _Accepted(
      *(jnp.where(at_vertex, *pair) for pair in zip(accepted, vertex, strict=True))
    )
    area = jnp.where(at_vertex, wider, area)
    return (
      accepted,
      vertex,
      area,
      jnp.where(at_vertex, jnp.maximum(advantage, ahead), advantage),
    ), None

  carry = (start, start, empty.astype(jnp.float64), empty)
  _, _, area, advantage = jax.lax.scan(step, carry, rows)[0]
  auc = area / (2 * totals.members.astype(jnp.float64) * totals.others)
  return totals, auc, (1 + advantage) / 2


@jax.jit
def _resampled_rates(weights, top, totals, limits, strict):
  """[E, R] weights and the first of the ranked examples -> TPR [T, L, R]."""
  allowed = limits[None, :, None] * totals.others.astype(jnp.float64)[:, None]
  strict = strict[None, :, None]

  def step(carry, row):
    accepted, rates = carry
    accepted = accepted.add(weights, row)
    others, members = accepted.others[:, None], accepted.members[:, None]
    within = jnp.where(strict, others < allowed, others <= allowed)
    return (accepted, jnp.where(row.is_vertex[:, None, None] & within, members, rates)), None

  empty = jnp.zeros_like(totals.members)
  carry = (_Accepted(empty, empty), jnp.zeros(allowed.shape, jnp.float32))
  _, rates = jax.lax.scan(step, carry, top)[0]
  return rates / totals.members[:, None]


def over_examples(
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
  trials: int | None = None,
) -> Interval:
  """The mean over these very targets; what varies is which examples were drawn.

  The percentiles of the resampled means, moved so that their average is the value: a maximum over
  thresholds is larger in every resample than in the sample, and plain percentiles would then
  lie above the value.

  Args:
    values: float[T], the metric of each target, in [0, 1].
    resamples: float[R, T], as `resample` gives them.
    confidence: in (0, 1).
    trials: number of members; when no resample differs (no true positive at all, say) the
      bootstrap is blind and the exact binomial interval of `trials` takes its place.
  """
  means = np.mean(resamples, axis=1)
  return _percentiles(np.mean(values), means, confidence, trials, "bootstrap over examples")


def over_targets(values: Float[ArrayLike, "T"], *, confidence: float = 0.95) -> Interval:
  """Student's t for the mean of a rate over targets; with one target the interval is [0, 1].

  Targets that audit each other share shadows and examples, so they are not independent and this
  interval is then somewhat too narrow.
  """
  values = np.asarray(values, np.float64)
  mean, name = float(values.mean()), _named("t-interval over targets", confidence)
  if len(values) < 2:
    return Interval(mean, 0.0, 1.0, name)
  quantile = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)
  half = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
  return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0), name)


def over_both(
  key: Key,
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
  trials: int | None = None,
) -> Interval:
  """Targets are drawn with replacement, then examples: the variation of a repeated study.

  With one target there is nothing to draw, and the interval is that over examples, named so.

  Args:
    values, resamples, confidence, trials: as `over_examples`.
  """
  num_resamples, num_targets = np.shape(resamples)
  if num_targets == 1:
    return over_examples(values, resamples, confidence=confidence, trials=trials)
  drawn = np.asarray(jax.random.randint(key, (num_resamples, num_targets), 0, num_targets))
  means = np.take_along_axis(np.asarray(resamples), drawn, axis=1).mean(axis=1)
  name = "bootstrap over examples and models"
  return _percentiles(np.mean(values), means, confidence, trials, name)


def binomial(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
  """Exact interval for a rate of independent trials.

  >>> interval = binomial(0, 100)
  >>> interval.low, round(interval.high, 4)
  (0.0, 0.0362)

  Reference: Clopper and Pearson 1934.
  """
  test = scipy.stats.binomtest(successes, trials).proportion_ci(confidence)
  name = _named("exact binomial", confidence)
  return Interval(successes / trials, float(test.low), float(test.high), name)


def _percentiles(value, draws, confidence, trials, name):
  value = float(value)
  if trials is not None and np.ptp(draws) == 0:
    return binomial(round(value * trials), trials, confidence=confidence)._replace(value=value)
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws, [tail, 1 - tail]) + value - np.mean(draws)
  return Interval(value, max(float(low), 0.0), min(float(high), 1.0), _named(name, confidence))


def _named(name, confidence):
  return f"{name}, {100 * confidence:g} %"
