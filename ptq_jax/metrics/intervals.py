"""Confidence intervals for attack metrics: over examples, over targets, over both.

An attack's number varies because other examples could have been drawn and because another target
could have been trained. `resample` draws the first kind for all targets and all metrics in one
pass; `over_examples`, `over_targets` and `over_both` turn the draws into named intervals, and
`of_difference` does so for one attack less another on the same targets and examples. How often
they hold the truth is measured by `launch/benchmarks/coverage.py`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from ptq_jax.base import Array, ArrayLike, Bool, Float, Key, Shaped, as_members
from ptq_jax.metrics import roc

BLOCK_ELEMENTS = 2**25
"""Examples x resamples drawn at once, one byte each."""


OVER_BOTH = "over examples and models"


class Interval(NamedTuple):
  """A number and where it may lie."""

  value: float
  low: float
  high: float
  interval: str  # which variation it covers, and the confidence


class Difference(NamedTuple):
  """A difference, where it may lie, and how surprising it were if there was none."""

  value: float
  low: float
  high: float
  interval: str
  p: float  # two-sided, of the same distribution as the interval


class Metrics(NamedTuple):
  """Attack metrics of T targets, once or for each of R resamples."""

  auc: Float[np.ndarray, "*R T"]
  balanced_accuracy: Float[np.ndarray, "*R T"]
  tpr: Float[np.ndarray, "*R T L"]  # one per operating level


class Level(NamedTuple):
  """An operating point: a false-positive rate and which vertices count there."""

  fpr: float
  rule: roc.Rule = "at_most"


class Ranked(NamedTuple):
  """The examples of each target from high score to low: the one sort that all metrics share."""

  order: ArrayLike  # int32[T, E], which example
  is_member: ArrayLike  # bool[T, E], counts as member
  is_other: ArrayLike  # bool[T, E], counts as non-member
  is_vertex: ArrayLike  # bool[T, E], the last of equal scores
  curves: list[roc.Curve]  # of the examples that count


def rank(
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
  *,
  audited: Bool[ArrayLike, "T E"] | None = None,
) -> Ranked:
  """Sorts once per target.

  Raises:
    ValueError: as `roc.curve`, for any target.
  """
  scores, members = np.asarray(scores), np.asarray(as_members(members))
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  for row, inside, keep in zip(scores, members, audited, strict=True):
    roc.checked(row[keep], inside[keep])
  order = np.argsort(scores, axis=1, kind="stable")[:, ::-1]
  ordered, inside, keep = [np.take_along_axis(a, order, 1) for a in (scores, members, audited)]
  is_vertex = np.append(ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), bool), axis=1)
  rows = zip(ordered, inside, keep, strict=True)
  curves = [roc.from_ranked(row[chosen], member[chosen]) for row, member, chosen in rows]
  return Ranked(order.astype(np.int32), inside & keep, ~inside & keep, is_vertex, curves)


def measure(
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
  *,
  levels: Sequence[Level],
  audited: Bool[ArrayLike, "T E"] | None = None,
  ranked: Ranked | None = None,
) -> Metrics:
  """AUC, balanced accuracy and TPR of each target, from exact ROC vertices.

  Args:
    scores: float[T, E], attack statistic; higher means member.
    members: bool[T, E], true membership.
    levels: L operating points.
    audited: bool[T, E], the examples that count; None means all.
    ranked: `rank` of these, if it is at hand.
  Raises:
    ValueError: as `roc.curve`, for any target.
  """
  curves = (ranked or rank(scores, members, audited=audited)).curves
  points = [[roc.point_at_fpr(c, fpr=fpr, rule=rule).tpr for fpr, rule in levels] for c in curves]
  return Metrics(
    auc=np.array([roc.area(c) for c in curves]),
    balanced_accuracy=np.array([roc.best_balanced_accuracy(c) for c in curves]),
    tpr=np.array(points).reshape(len(curves), len(levels)),
  )


def resample(
  key: Key,
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
  *,
  levels: Sequence[Level],
  num_resamples: int = 1000,
  audited: Bool[ArrayLike, "T E"] | None = None,
  ranked: Ranked | None = None,
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
    scores, members, levels, audited, ranked: as `measure`.
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
  ranked = ranked or rank(scores, members, audited=audited)
  values = measure(scores, members, levels=levels, ranked=ranked)
  terms = np.stack([_terms(*row, curve) for *row, curve in zip(*ranked, strict=True)], axis=1)
  tops = _tops(_Ranking(*(part.T for part in ranked[:4])), levels)
  num_targets, num_examples = ranked.order.shape
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
  """The first arrays of `Ranked` with targets last, [E, T]."""

  order: ArrayLike
  is_member: ArrayLike
  is_other: ArrayLike
  is_vertex: ArrayLike


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


def _terms(order, is_member, is_other, is_vertex, curve):
  """float32[E, 6], whose weighted sums give the areas: see `_areas`."""
  best = int(np.argmax(curve.tpr - curve.fpr))
  sizes = curve.true_positives[best], curve.false_positives[best]
  accepted = [
    np.cumsum(side) <= size for side, size in zip((is_member, is_other), sizes, strict=True)
  ]
  above_member, above_other = [_share_above(side, is_vertex) for side in (is_member, is_other)]
  columns = [is_member, is_other, is_member * (1 - above_other), is_other * above_member]
  columns += [is_member & accepted[0], is_other & accepted[1]]
  terms = np.empty((len(order), 6), np.float32)
  terms[order] = np.stack(columns, axis=-1)
  return terms


def _share_above(side, is_vertex):
  """The share of a side above each ranked score, equals counting half."""
  count = np.cumsum(side)
  through = np.where(is_vertex, count, 0)
  before = np.append(0, np.maximum.accumulate(through)[:-1])
  through = np.minimum.accumulate(np.where(is_vertex, count, count[-1])[::-1])[::-1]
  return (before + through) / (2 * count[-1])


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

  Normal with the variance of the resampled means, on the scale of the log-odds, so that it stays
  within [0, 1]. The resamples serve for their spread alone: a maximum over thresholds is larger in
  every resample than in the sample.

  Args:
    values: float[T], the metric of each target, in [0, 1].
    resamples: float[R, T], as `resample` gives them.
    confidence: in (0, 1).
    trials: number of members; when nobody or everybody is found, or no resample differs, the
      exact binomial interval of `trials` takes its place.
  """
  variance = np.var(np.mean(resamples, axis=1), ddof=1)
  name = "bootstrap over examples"
  return _within_unit(np.mean(values), variance, np.inf, confidence, trials, name)


def over_targets(values: Float[ArrayLike, "T"], *, confidence: float = 0.95) -> Interval:
  """Student's t for the mean of a rate over targets; with one target the interval is [0, 1].

  Targets that audit each other share shadows and examples, so they are not independent and this
  interval is then somewhat too narrow.
  """
  values = np.asarray(values, np.float64)
  mean, name = float(values.mean()), _named("t-interval over targets", confidence)
  if len(values) < 2:
    return Interval(mean, 0.0, 1.0, name)
  half = _half(values.var(ddof=1) / len(values), len(values) - 1, confidence)
  return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0), name)


def two_way(
  values: Float[ArrayLike, "T"], resamples: Float[ArrayLike, "R T"]
) -> tuple[float, float]:
  """Variance of the mean over targets when both examples and targets are drawn anew.

  examples + targets - interaction: the resampled means vary by the examples and by 1 / T of the
  interaction; values vary between targets by the targets and by all of the interaction, which is
  what the resamples of single targets vary more than their mean does, and must not count again.

  Returns:
    The variance, and its degrees of freedom by Satterthwaite: between T targets there are T - 1,
    the more so the more of the variance is theirs. Infinite with one target, where only the
    examples vary.
  Reference: Owen 2007, "The pigeonhole bootstrap", arXiv:0712.1111; Cameron, Gelbach and Miller
    2011, "Robust inference with multiway clustering"; Satterthwaite 1946.
  """
  values, resamples = np.asarray(values, np.float64), np.asarray(resamples, np.float64)
  num_targets = len(values)
  examples = float(np.var(resamples.mean(axis=1), ddof=1))
  if num_targets == 1:
    return examples, math.inf
  single = float(np.var(resamples, axis=0, ddof=1).mean())
  interaction = max(single - examples, 0.0) * num_targets / (num_targets - 1)
  between = float(np.var(values, ddof=1))
  variance = examples + max(between - interaction, 0.0) / num_targets
  if between == 0:
    return variance, math.inf
  return variance, (num_targets - 1) * (variance * num_targets / between) ** 2


def over_both(
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
  trials: int | None = None,
) -> Interval:
  """The mean over targets when both examples and targets are drawn anew: a repeated study.

  Student's t with the variance and degrees of freedom of `two_way`, on the scale of the log-odds.
  One target cannot tell how targets vary: the interval is that over examples, named so.

  Args:
    values, resamples, confidence, trials: as `over_examples`.
  """
  if np.shape(resamples)[1] == 1:
    return over_examples(values, resamples, confidence=confidence, trials=trials)
  variance, freedom = two_way(values, resamples)
  return _within_unit(np.mean(values), variance, freedom, confidence, trials, OVER_BOTH)


def of_difference(
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  reference: Float[ArrayLike, "T"],
  reference_resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
) -> Difference:
  """A metric of one attack minus that of another on the same targets and examples, in [-1, 1].

  Paired: each resample draws the same examples for both, and targets are compared with themselves,
  so what makes an example or a target easy for either attack cancels. Both `resample` calls must
  have had the same key. With one target only the examples vary.
  """
  change = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
  draws = np.asarray(resamples, np.float64) - np.asarray(reference_resamples, np.float64)
  name = "paired, over examples" if len(change) == 1 else f"paired, {OVER_BOTH}"
  return _difference(change.mean(), *two_way(change, draws), confidence, name)


def of_ratio(
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  reference: Float[ArrayLike, "T"],
  reference_resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
) -> Interval | None:
  """The mean of a metric divided by that of another attack on the same targets and examples.

  Paired as `of_difference`. To first order the logarithm of the ratio varies as the mean over
  targets of value / mean - reference / its mean does, whose variance `two_way` gives; the interval
  is symmetric in the logarithm. A ratio of 0 has no upper bound (NaN).

  Args:
    values, resamples, reference, reference_resamples, confidence: as `of_difference`.
  Returns:
    None if the reference found nothing.
  """
  means = [float(np.mean(part)) for part in (values, reference)]
  if means[1] == 0:
    return None
  name = "paired, over examples" if len(values) == 1 else f"paired, {OVER_BOTH}"
  if means[0] == 0:
    return Interval(0.0, 0.0, math.nan, _named(name, confidence))
  shares, draws = (
    np.asarray(one, np.float64) / means[0] - np.asarray(other, np.float64) / means[1]
    for one, other in ((values, reference), (resamples, reference_resamples))
  )
  factor = math.exp(min(_half(*two_way(shares, draws), confidence), 700.0))
  ratio = means[0] / means[1]
  return Interval(ratio, ratio / factor, ratio * factor, _named(name, confidence))


def of_accuracy(
  values: Float[ArrayLike, "T"], *, num_examples: int | None, confidence: float = 0.95
) -> Interval:
  """Mean accuracy of targets: Student's t over them; of one, the binomial of its examples.

  So, too, where all targets have the same, such as 1 on their members: that leaves room for less.

  Args:
    values: float[T], in [0, 1].
    num_examples: that one target classifies, the same for all; None if unknown.
  """
  values = np.asarray(values, np.float64)
  if not num_examples or np.ptp(values) > 0:
    return over_targets(values, confidence=confidence)
  found = binomial(round(float(values[0]) * num_examples), num_examples, confidence=confidence)
  return found._replace(value=float(values[0]))


def of_accuracy_difference(
  values: Float[ArrayLike, "T"],
  reference: Float[ArrayLike, "T"],
  *,
  num_examples: int | None,
  confidence: float = 0.95,
) -> Difference | None:
  """Mean accuracy of targets less that of the same targets before, on one test set.

  Student's t over the paired targets. Of one target the binomial variances of both are added, as if
  their test sets were two: with one, errors in common make the difference surer than that. None if
  neither is known.
  """
  change = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
  if len(change) > 1:
    variance, name = change.var(ddof=1) / len(change), "paired, over targets"
    return _difference(change.mean(), variance, len(change) - 1, confidence, name)
  if not num_examples:
    return None
  # Two pseudo-observations each (Agresti and Caffo 2000), so that 0 and 1 have a variance, too.
  rates = [(float(v[0]) * num_examples + 1) / (num_examples + 2) for v in (values, reference)]
  variance = sum(rate * (1 - rate) for rate in rates) / (num_examples + 2)
  return _difference(change.mean(), variance, math.inf, confidence, "binomial of two test sets")


def holm(p_values: Sequence[float], *, level: float = 0.05) -> list[bool]:
  """Which of many differences to call different, so that the chance of any false one is `level`.

  The smallest p must be at most level / m, the next level / (m - 1), ... up to the first that
  fails.

  >>> holm([0.02, 0.001, 0.04], level=0.05)
  [True, True, True]
  >>> holm([0.03, 0.001, 0.04], level=0.05)
  [False, True, False]

  Reference: Holm 1979.
  """
  found, order = [False] * len(p_values), np.argsort(p_values, kind="stable")
  for done, i in enumerate(order):
    if not p_values[i] <= level / (len(p_values) - done):
      break
    found[i] = True
  return found


def _difference(value, variance, freedom, confidence, name):
  value, half = float(value), _half(variance, freedom, confidence)
  low, high = max(value - half, -1.0), min(value + half, 1.0)
  if variance == 0:
    p = float(value == 0)
  else:
    p = float(2 * scipy.special.stdtr(freedom, -abs(value) / math.sqrt(variance)))
  return Difference(value, low, high, _named(name, confidence), p)


def _half(variance, freedom, confidence):
  return float(scipy.special.stdtrit(freedom, (1 + confidence) / 2) * math.sqrt(variance))


def _within_unit(value, variance, freedom, confidence, trials, name):
  """Interval of a rate, symmetric in log-odds."""
  value = float(value)
  inside = 0 < value < 1
  if trials is not None and (not inside or variance == 0):
    return binomial(round(value * trials), trials, confidence=confidence)._replace(value=value)
  half = _half(variance, freedom, confidence)
  if not inside:
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), _named(name, confidence))
  center, half = scipy.special.logit(value), half / (value * (1 - value))
  low, high = scipy.special.expit([center - half, center + half])
  return Interval(value, float(low), float(high), _named(name, confidence))


def binomial(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
  """Exact interval for a rate of independent trials.

  >>> interval = binomial(0, 100)
  >>> interval.low, round(interval.high, 4)
  (0.0, 0.0362)

  Reference: Clopper and Pearson 1934.
  """
  tail, failures = (1 - confidence) / 2, trials - successes
  low, high = 0.0, 1.0
  if successes:
    low = float(scipy.special.betaincinv(successes, failures + 1, tail))
  if failures:
    high = float(scipy.special.betaincinv(successes + 1, failures, 1 - tail))
  return Interval(successes / trials, low, high, _named("exact binomial", confidence))


def _named(name, confidence):
  return f"{name}, {100 * confidence:g} %"
