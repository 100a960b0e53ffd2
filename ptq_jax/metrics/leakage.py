"""One attack's leakage as a record: metrics over targets with intervals and counts, JSON-ready.

N stands for {"value", "low", "high", "interval"}: a number, where it may lie, and what was varied.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from ptq_jax.base import ArrayLike, Bool, Float, Key
from ptq_jax.metrics import intervals, roc

FPRS = (0.01, 0.001, 0.0001, 0.00001)
PRIORS = (0.01, 0.1, 0.5)
FEW_FALSE_POSITIVES = 10
"""A rate that rests on fewer false positives than this is marked."""

CURVE_FPRS = np.append(0.0, np.logspace(-5, 0, 121))
"""Where the mean ROC is read: evenly in log FPR, and at zero."""


class Audit(NamedTuple):
  """Whom an attack is asked about."""

  members: Bool[np.ndarray, "T E"]  # who counts as member
  audited: Bool[np.ndarray, "T E"]  # who counts at all


class Pool(NamedTuple):
  """Attack scores of models that are not targets, to set thresholds on."""

  scores: Float[ArrayLike, "S E"]
  members: Bool[ArrayLike, "S E"]


class Sample(NamedTuple):
  """The metrics of an attack at its operating points, and their resamples."""

  levels: list[intervals.Level]
  values: intervals.Metrics
  draws: intervals.Metrics


def sample(
  key: Key,
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  fprs: Sequence[float] = FPRS,
  rules: Sequence[roc.Rule] = ("at_most", "below"),
  audited: Bool[ArrayLike, "T E"] | None = None,
  num_resamples: int = 1000,
) -> Sample:
  """What `summarise` and `compare` rest on; arguments and errors as `summarise`."""
  levels = [intervals.Level(fpr, rule) for rule in rules for fpr in fprs]
  values = intervals.measure(scores, members, levels=levels, audited=audited)
  draws = intervals.resample(
    jax.random.split(key)[0],
    scores,
    members,
    levels=levels,
    audited=audited,
    num_resamples=num_resamples,
  )
  return Sample(levels, values, draws)


def compare(key: Key, one: Sample, reference: Sample, *, confidence: float = 0.95) -> dict:
  """One attack minus another on the same targets and examples, with paired intervals.

  Args:
    key: that of both samples.
    one, reference: of the same operating points.
    confidence: of the intervals.
  Returns:
    {"auc": N, "tpr": [{"fpr", "rule", **N}]}, see the module's text.
  """
  target_key = jax.random.split(key)[1]

  def number(value, draws, other, other_draws):
    return intervals.of_difference(
      target_key, value, draws, other, other_draws, confidence=confidence
    )._asdict()

  return {
    "auc": number(one.values.auc, one.draws.auc, reference.values.auc, reference.draws.auc),
    "tpr": [
      level._asdict()
      | number(
        one.values.tpr[:, i],
        one.draws.tpr[..., i],
        reference.values.tpr[:, i],
        reference.draws.tpr[..., i],
      )
      for i, level in enumerate(one.levels)
    ],
  }


def summarise(
  key: Key,
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  fprs: Sequence[float] = FPRS,
  rules: Sequence[roc.Rule] = ("at_most", "below"),
  priors: Sequence[float] = PRIORS,
  audited: Bool[ArrayLike, "T E"] | None = None,
  shadows: Pool | None = None,
  num_resamples: int = 1000,
  confidence: float = 0.95,
  sampled: Sample | None = None,
) -> dict:
  """Everything that tables and figures need about one attack.

  Numbers are means over the T targets. Intervals are bootstraps over examples and models (over
  examples with one target) unless said otherwise.

  Args:
    key: the same key for all methods and levels makes their intervals comparable.
    scores: float[T, E], an attack's scores, as `attack.protocol` gives them.
    members: bool[T, E], true membership of the targets.
    fprs, rules: operating points, every rate with every rule.
    priors: shares of members among the candidates, for the precision (first rule).
    audited: bool[T, E], the examples that count; None means all. See `calibration_audits`.
    shadows: the same attack on models that are not targets (the shadows of dedicated targets,
      attacked leave-one-out); thresholds are set on these. None: the threshold for a target is set
      on the other targets, which takes two.
    num_resamples: bootstrap resamples.
    confidence: of the intervals.
    sampled: `sample` of the same arguments, if it is at hand; `fprs`, `rules` and `num_resamples`
      are then those it was made with.
  Returns:
    {"num_targets", "num_members", "num_non_members" (per target, the fewest of all targets),
     "auc": N, "balanced_accuracy": N,
     "tpr": [{"fpr", "rule", **N, "over_examples": N, "over_targets": N (t-interval),
       "false_positives" (at the vertex used; the fewest of all targets),
       "total_false_positives" (of all targets), "few_false_positives" (fewer than 10),
       "transferred": None or {"tpr": N, "fpr": N} (t-intervals), the rates that a threshold set
       on shadows alone realises on the targets}],
     "precision": [{"prior", "fpr", **N}],
     "curve": {"fpr": [...], "tpr": [...]}, mean over targets of the largest TPR at each FPR}.
  Raises:
    ValueError: as `roc.curve`, for any target.
  """
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  if sampled is None:
    sampled = sample(
      key, scores, members, fprs=fprs, rules=rules, audited=audited, num_resamples=num_resamples
    )
  levels, values, draws = sampled
  target_key = jax.random.split(key)[1]
  curves = [
    roc.curve(row[keep], m[keep]) for row, m, keep in zip(scores, members, audited, strict=True)
  ]
  transfers = transferred(scores, members, levels=levels, audited=audited, shadows=shadows)
  num_members = int((members & audited).sum(axis=1).min())

  def number(value, draw, trials=None):
    both = intervals.over_both(target_key, value, draw, confidence=confidence, trials=trials)
    return both._asdict()

  def over_targets(value):
    return intervals.over_targets(np.asarray(value), confidence=confidence)._asdict()

  def rate(i, level):
    value, draw = values.tpr[:, i], draws.tpr[..., i]
    examples = intervals.over_examples(value, draw, confidence=confidence, trials=num_members)
    points = transfers and transfers[i]
    return (
      {**level._asdict(), **number(value, draw, num_members)}
      | {"over_examples": examples._asdict(), "over_targets": over_targets(value)}
      | _false_positives(curves, level)
      | {
        "transferred": points
        and {
          "tpr": over_targets([point.tpr for point in points]),
          "fpr": over_targets([point.fpr for point in points]),
        }
      }
    )

  def precision(prior, i):
    both = [roc.precision(tpr[..., i], fprs[i], prior=prior) for tpr in (values.tpr, draws.tpr)]
    return {"prior": prior, "fpr": fprs[i], **number(*both)}

  return {
    "num_targets": len(scores),
    "num_members": num_members,
    "num_non_members": int((~members & audited).sum(axis=1).min()),
    "auc": number(values.auc, draws.auc),
    "balanced_accuracy": number(values.balanced_accuracy, draws.balanced_accuracy),
    "tpr": [rate(i, level) for i, level in enumerate(levels)],
    "precision": [precision(prior, i) for prior in priors for i in range(len(fprs))],
    "curve": mean_curve(curves),
  }


def mean_curve(curves: Sequence[roc.Curve]) -> dict[str, list[float]]:
  """Mean over curves of the largest TPR at each of `CURVE_FPRS`."""
  tpr = np.mean([roc.tpr_on_grid(curve, CURVE_FPRS) for curve in curves], axis=0)
  return {"fpr": CURVE_FPRS.tolist(), "tpr": tpr.tolist()}


def transferred(
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  levels: Sequence[intervals.Level],
  audited: Bool[ArrayLike, "T E"] | None = None,
  shadows: Pool | None = None,
) -> list[list[roc.Point]] | None:
  """The rates on each target of a threshold that was set without looking at its membership.

  The threshold is the lowest that keeps the pooled non-members of other models at the level. When
  those are the other targets of a leave-one-out audit, their attack scores rest a little on this
  target's scores too, as one shadow among many.

  Args:
    scores, members, audited, shadows: as `summarise`.
    levels: the rates that the attacker aims at.
  Returns:
    For each level one point per target, whose `fpr` is the realised rate; None for one target
    without shadows.
  """
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  if shadows is None and len(scores) == 1:
    return None
  if shadows is None:
    others = ~members & audited
    pool, owner = scores[others], np.nonzero(others)[0]
  else:
    pool = np.asarray(shadows.scores)[~np.asarray(shadows.members).astype(bool)]
    owner = np.full(pool.shape, -1)
  order = np.argsort(-pool)
  pool, owner = pool[order], owner[order]
  points = [[] for _ in levels]
  for t, keep in enumerate(audited):
    others = pool[owner != t]
    for row, level in zip(points, levels, strict=True):
      threshold = _lowest_threshold(others, level)
      row.append(roc.point_at_threshold(scores[t, keep], members[t, keep], threshold=threshold))
  return points


def calibration_audits(
  members: Bool[ArrayLike, "T E"], calibrated: Bool[ArrayLike, "T E"]
) -> dict[str, Audit]:
  """Does a quantizer leak the examples it was calibrated on?

  Args:
    members: bool[T, E], who trained the targets.
    calibrated: bool[T, E], who calibrated their quantization, members or not.
  Returns:
    Those of these audits that have somebody on each side for every target:
      "calibration members": members that calibrated, against non-members that did not.
      "other members": the other members, against the same non-members.
      "calibration among members": within the members, calibrated or not.
      "calibration among non-members": within the non-members, calibrated or not (a calibration set
        disjoint from the training set).
  """
  members, calibrated = (np.asarray(a).astype(bool) for a in (members, calibrated))
  untouched = ~members & ~calibrated
  audits = {
    "calibration members": Audit(members, untouched | (members & calibrated)),
    "other members": Audit(members, untouched | (members & ~calibrated)),
    "calibration among members": Audit(calibrated, members),
    "calibration among non-members": Audit(calibrated, ~members),
  }
  return {
    name: audit
    for name, audit in audits.items()
    if all((side & audit.audited).any(axis=1).all() for side in (audit.members, ~audit.members))
  }


def _false_positives(curves, level):
  points = [roc.point_at_fpr(curve, fpr=level.fpr, rule=level.rule) for curve in curves]
  counts = [point.false_positives for point in points]
  return {
    "false_positives": min(counts),
    "total_false_positives": sum(counts),
    "few_false_positives": min(counts) < FEW_FALSE_POSITIVES,
  }


def _lowest_threshold(descending, level):
  """Just above the first non-member score that must not be accepted any more."""
  allowed = np.arange(len(descending) + 1) / len(descending)
  side = "right" if level.rule == "at_most" else "left"
  count = int(np.searchsorted(allowed, level.fpr, side=side)) - 1
  return np.nextafter(descending[count], np.inf) if count < len(descending) else -np.inf
