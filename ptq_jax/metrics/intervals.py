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

  One pass over the examples from high score to low carries the counts of all resamples at once.

  Args:
    key, scores, members, levels, audited: as `measure`.
    num_resamples: R.
  Returns:
    `Metrics` with leading axis R.
  Raises:
    ValueError: as `roc.curve`, for any target.
  Reference: Chamandy et al. 2012, "Estimating uncertainty for massive data streams"; Owen and
    Eckles 2012, arXiv:1106.2125, for weights shared between targets.
  """
  if num_resamples < 1:
    raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1.")
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  measure(scores, members, levels=(), audited=audited)  # refuses what has no ROC curve
  order = np.argsort(-scores, axis=1, kind="stable")
  ordered = np.take_along_axis(scores, order, 1)
  is_vertex = np.append(ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), bool), axis=1)
  is_member = np.take_along_axis(members & audited, order, 1)
  is_other = np.take_along_axis(~members & audited, order, 1)
  limits = np.array([level.fpr for level in levels], np.float64)
  strict = np.array([level.rule == "below" for level in levels], bool)
  block = int(np.clip(BLOCK_ELEMENTS // scores.shape[1], 1, num_resamples))
  results = []
  with jax.enable_x64(True):
    rows = [jnp.asarray(a.T) for a in (order.astype(np.int32), is_member, is_other, is_vertex)]
    for i in range(math.ceil(num_resamples / block)):
      results.append(_resampled(jax.random.fold_in(key, i), *rows, limits, strict, num=block))
  merged = [np.concatenate(parts)[:num_resamples] for parts in zip(*results, strict=True)]
  return Metrics(*merged)


def poisson_counts(key: Key, shape: tuple[int, ...]) -> Array:
  """uint8 draws of Poisson(1), from 16 random bits each: the table is exact to 2**-17."""
  cumulative = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(9)])
  edges = np.round(cumulative * 2**16).astype(np.uint32)
  edges = edges[edges < 2**16].astype(np.uint16)
  bits = jax.random.bits(key, shape, jnp.uint16)
  counts = jnp.zeros(shape, jnp.uint8)
  for edge in edges:
    counts += (bits >= edge).astype(jnp.uint8)
  return counts


class _Pass(NamedTuple):
  """What one pass from high to low scores carries, each [T, R]."""

  accepted_members: Array  # weight so far
  accepted_others: Array
  vertex_members: Array  # the same at the last vertex
  vertex_others: Array
  area: Array  # in units of weight squared
  advantage: Array  # largest TPR - FPR so far
  tpr: Array  # [L, T, R]


@functools.partial(jax.jit, static_argnames=("num",))
def _resampled(key, order, is_member, is_other, is_vertex, limits, strict, *, num):
  """[E, T] sorted rows -> (auc [R, T], balanced accuracy [R, T], tpr [R, T, L])."""
  num_examples, num_targets = order.shape
  weights = poisson_counts(key, (num_examples, num))
  empty = jnp.zeros((num_targets, num), jnp.float32)

  def totals(chosen):
    def add(total, row):
      index, keep = row
      return total + weights[index] * keep[:, None].astype(jnp.float32), None

    return jax.lax.scan(add, empty, (order, chosen))[0]

  members, others = totals(is_member), totals(is_other)
  allowed = limits.astype(jnp.float64)[:, None, None] * others[None]

  def step(carry, row):
    index, member, other, vertex = (part[..., None] for part in row)
    weight = weights[index[:, 0]].astype(jnp.float32)
    accepted_members = carry.accepted_members + weight * member
    accepted_others = carry.accepted_others + weight * other
    width = accepted_others - carry.vertex_others
    height = accepted_members.astype(jnp.float64) + carry.vertex_members
    advantage = accepted_members / members - accepted_others / others
    below, at_most = accepted_others[None] < allowed, accepted_others[None] <= allowed
    within = vertex[None] & jnp.where(strict[:, None, None], below, at_most)
    return _Pass(
      accepted_members,
      accepted_others,
      jnp.where(vertex, accepted_members, carry.vertex_members),
      jnp.where(vertex, accepted_others, carry.vertex_others),
      jnp.where(vertex, carry.area + width * height / 2, carry.area),
      jnp.where(vertex, jnp.maximum(carry.advantage, advantage), carry.advantage),
      jnp.where(within, accepted_members[None], carry.tpr),
    ), None

  start = _Pass(
    empty,
    empty,
    empty,
    empty,
    empty.astype(jnp.float64),
    empty,
    jnp.zeros((len(limits), *empty.shape), jnp.float32),
  )
  last = jax.lax.scan(step, start, (order, is_member, is_other, is_vertex))[0]
  auc = last.area / (members.astype(jnp.float64) * others)
  return auc.T, (1 + last.advantage.T) / 2, (last.tpr / members[None]).transpose(2, 1, 0)


def over_examples(
  values: Float[ArrayLike, "T"], resamples: Float[ArrayLike, "R T"], *, confidence: float = 0.95
) -> Interval:
  """The mean over these very targets; what varies is which examples were drawn."""
  return _percentiles(
    np.mean(values), np.mean(resamples, axis=1), confidence, "bootstrap over examples"
  )


def over_targets(values: Float[ArrayLike, "T"], *, confidence: float = 0.95) -> Interval:
  """Student's t for the mean over targets; with one target the interval is infinite.

  Targets that audit each other share shadows and examples, so they are not independent and this
  interval is then somewhat too narrow.
  """
  values = np.asarray(values, np.float64)
  mean, name = float(values.mean()), _named("t-interval over targets", confidence)
  if len(values) < 2:
    return Interval(mean, -math.inf, math.inf, name)
  quantile = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)
  half = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
  return Interval(mean, mean - half, mean + half, name)


def over_both(
  key: Key,
  values: Float[ArrayLike, "T"],
  resamples: Float[ArrayLike, "R T"],
  *,
  confidence: float = 0.95,
) -> Interval:
  """Targets are drawn with replacement, then examples: the variation of a repeated study.

  With one target there is nothing to draw, and the interval is that over examples, named so.
  """
  num_resamples, num_targets = np.shape(resamples)
  if num_targets == 1:
    return over_examples(values, resamples, confidence=confidence)
  drawn = np.asarray(jax.random.randint(key, (num_resamples, num_targets), 0, num_targets))
  means = np.take_along_axis(np.asarray(resamples), drawn, axis=1).mean(axis=1)
  return _percentiles(np.mean(values), means, confidence, "bootstrap over examples and models")


def _percentiles(value, draws, confidence, name):
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws, [tail, 1 - tail])
  return Interval(float(value), float(low), float(high), _named(name, confidence))


def _named(name, confidence):
  return f"{name}, {100 * confidence:g} %"
