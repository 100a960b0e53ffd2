"""Confidence intervals for attack metrics: over examples, over targets, over both.

An attack's number varies because other examples could have been drawn and because another target
could have been trained. `resample` draws the first kind for all targets and all metrics in one
pass; `over_examples`, `over_targets` and `over_both` turn the draws into named intervals.
"""

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


OVER_BOTH = "bootstrap over examples and models"


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

  The rates at a false-positive rate are exactly those of the weighted examples, with a threshold of
  their own in each resample. AUC is taken to first order in the weights (as DeLong's variance
  is; the rest is of order 1 / E), and balanced accuracy at the best threshold of the sample: both
  are then one matrix product for all targets and resamples. Resamples are split so that their
  weights take 32 MiB at a time.

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
    Eckles 2012, arXiv:1106.2125, for weights shared between targets; DeLong et al. 1988.
  """
  if num_resamples < 1:
    raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1.")
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  values = measure(scores, members, levels=levels, audited=audited)
  groups = members & audited, ~members & audited
  terms = np.stack([_terms(*row) for row in zip(scores, *groups, strict=True)], axis=1)
  tops = _tops(_ranked(scores, *groups), levels)
  num_targets, num_examples = scores.shape
  block = int(np.clip(BLOCK_ELEMENTS // num_examples, 1, num_resamples))
  draws = []
  for i in range(math.ceil(num_resamples / block)):
    weights = _poisson_counts(jax.random.fold_in(key, i), (num_examples, block))
    sums = _sums(weights, terms)
    rates = np.zeros((block, num_targets, len(levels)))
    for top, chosen in tops:
      limits, strict = zip(*(levels[c] for c in chosen), strict=True)
      strict = np.array([rule == "below" for rule in strict])
      rates[:, :, chosen] = _rates(
        weights, top, sums[..., :2], np.array(limits, np.float32), strict
      )
    draws.append((*_areas(np.asarray(sums, np.float64), values), rates))
  merged = [np.concatenate(parts)[:num_resamples] for parts in zip(*draws, strict=True)]
  # A resample without any member, or without any other, has no metrics: only tiny groups meet it.
  return Metrics(*(np.where(np.isfinite(d), d, v) for d, v in zip(merged, values, strict=True)))


class _Ranking(NamedTuple):
  """The examples of each target from high score to low, [E, T]."""

  order: ArrayLike  # int32, which example
  is_member: ArrayLike  # bool, counts as member
  is_other: ArrayLike  # bool, counts as non-member
  is_vertex: ArrayLike  # bool, the last of equal scores


def _ranked(scores, is_member, is_other):
  order = np.argsort(-scores, axis=1, kind="stable")
  ordered = np.take_along_axis(scores, order, axis=1)
  is_vertex = np.append(ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), bool), axis=1)
  counted = [np.take_along_axis(chosen, order, axis=1) for chosen in (is_member, is_other)]
  return _Ranking(*(row.T for row in (order.astype(np.int32), *counted, is_vertex)))


def _tops(ranking, levels):
  """The first of the ranked examples that can matter to some levels, and which levels these are.

  Enough non-members for ten deviations of their weight past the limit, rounded up to a power of
  two: few lengths are compiled, and low rates do not wait for high ones.
  """
  num_examples = len(ranking.order)
  others = ranking.is_other.cumsum(axis=0)
  chosen = {}
  for i, level in enumerate(levels):
    allowed = level.fpr * others[-1]
    enough = (others <= (allowed + 10 * np.sqrt(allowed) + 25)[None]).sum(axis=0).max() + 1
    chosen.setdefault(min(num_examples, 1 << int(enough).bit_length()), []).append(i)
  return [(_Ranking(*(row[:length] for row in ranking)), some) for length, some in chosen.items()]


def _terms(scores, is_member, is_other):
  """float32[E, 6], whose weighted sums give the areas: see `_areas`."""
  inside, outside = np.sort(scores[is_member]), np.sort(scores[is_other])
  share_below = _share_below(outside, scores)
  share_above = 1 - _share_below(inside, scores)
  cut = _best_threshold(scores[is_member | is_other], is_member[is_member | is_other])
  accepted = scores >= cut
  columns = [is_member, is_other, is_member * share_below, is_other * share_above]
  return np.stack([*columns, is_member & accepted, is_other & accepted], axis=-1, dtype=np.float32)


def _share_below(ordered, scores):
  """The share of `ordered` below each score, equals counting half."""
  sides = [np.searchsorted(ordered, scores, side=side) for side in ("left", "right")]
  return (sides[0] + sides[1]) / (2 * len(ordered))


def _best_threshold(scores, members):
  curve = roc.curve(scores, members)
  return curve.thresholds[np.argmax(curve.tpr - curve.fpr)]


def _areas(sums, values):
  """[R, T, 6] -> AUC and balanced accuracy [R, T]."""
  with np.errstate(invalid="ignore", divide="ignore"):
    below, above = sums[..., 2] / sums[..., 0], sums[..., 3] / sums[..., 1]
    tpr, fpr = sums[..., 4] / sums[..., 0], sums[..., 5] / sums[..., 1]
  return below + above - values.auc, (1 + tpr - fpr) / 2


def _poisson_counts(key, shape):
  """uint8 draws of Poisson(1), from 16 random bits each: its distribution exact to 2**-17.

  The bits come from NumPy, seeded by the key: on CPU fifteen times faster than `jax.random.bits`.
  """
  generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  return _counts_of_bits(generator.integers(0, 2**16, size=shape, dtype=np.uint16))


@jax.jit
def _counts_of_bits(bits):
  """Inverts the distribution: how many of its first steps lie at or below the bits."""
  cumulative = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(8)])
  edges = np.round(cumulative * 2**16).astype(np.uint16)
  return sum((bits >= edge).astype(jnp.uint16) for edge in edges).astype(jnp.uint8)


@jax.jit
def _sums(weights, terms):
  """[E, R] and [E, T, 6] -> [R, T, 6]."""
  return jnp.einsum("er,etk->rtk", weights.astype(jnp.float32), terms, precision="highest")


class _Accepted(NamedTuple):
  """What one pass from high scores to low carries, in units of weight."""

  members: Array  # float32[T, R], so far
  others: Array  # float32[T, R], so far
  found: Array  # float32[T, L, R], members at the last vertex within each limit


@jax.jit
def _rates(weights, top, totals, limits, strict):
  """[E, R] weights, the top of the ranking, [R, T, 2] total weights -> TPR [R, T, L]."""
  totals = totals.transpose(2, 1, 0)  # members and others, [T, R]
  allowed = limits[None, :, None] * totals[1][:, None]

  def step(carry, row):
    weight = weights[row.order].astype(jnp.float32)
    members = carry.members + weight * row.is_member[:, None]
    others = carry.others + weight * row.is_other[:, None]
    within = jnp.where(strict[None, :, None], others[:, None] < allowed, others[:, None] <= allowed)
    found = jnp.where(row.is_vertex[:, None, None] & within, members[:, None], carry.found)
    return _Accepted(members, others, found), None

  none = jnp.zeros_like(totals[0])
  last = jax.lax.scan(step, _Accepted(none, none, jnp.zeros_like(allowed)), top)[0]
  return (last.found / totals[0][:, None]).transpose(2, 0, 1)


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
  if np.shape(resamples)[1] == 1:
    return over_examples(values, resamples, confidence=confidence, trials=trials)
  means = _means_of_drawn_targets(key, resamples)
  return _percentiles(np.mean(values), means, confidence, trials, OVER_BOTH)


def of_difference(
  key: Key,
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  reference: Float[ArrayLike, "T"],
  reference_resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
) -> Interval:
  """A metric of one attack minus that of another on the same targets and examples, in [-1, 1].

  Paired: each resample draws the same examples and targets for both, so what makes an example or a
  target easy for either attack cancels. Both `resample` calls must have had the same key.
  """
  change = np.asarray(resamples) - np.asarray(reference_resamples)
  value = np.mean(values) - np.mean(reference)
  if change.shape[1] == 1:
    means, name = change[:, 0], "paired bootstrap over examples"
  else:
    means, name = _means_of_drawn_targets(key, change), f"paired {OVER_BOTH}"
  return _percentiles(value, means, confidence, None, name, lowest=-1.0)


def _means_of_drawn_targets(key, resamples):
  """[R, T] -> [R]: the mean over T targets drawn with replacement, others in each resample."""
  num_targets = np.shape(resamples)[1]
  drawn = np.asarray(jax.random.randint(key, np.shape(resamples), 0, num_targets))
  return np.take_along_axis(np.asarray(resamples), drawn, axis=1).mean(axis=1)


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


def _percentiles(value, draws, confidence, trials, name, lowest=0.0):
  value = float(value)
  if trials is not None and np.ptp(draws) == 0:
    return binomial(round(value * trials), trials, confidence=confidence)._replace(value=value)
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws, [tail, 1 - tail]) + value - np.mean(draws)
  return Interval(value, max(float(low), lowest), min(float(high), 1.0), _named(name, confidence))


def _named(name, confidence):
  return f"{name}, {100 * confidence:g} %"
