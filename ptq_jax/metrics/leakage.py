"""One attack's leakage as a record: metrics over targets, with intervals and counts, JSON-ready."""

from collections.abc import Sequence

import jax
import numpy as np

from ptq_jax.base import ArrayLike, Bool, Float, Key
from ptq_jax.metrics import intervals, roc

FPRS = (0.01, 0.001, 0.0001, 0.00001)
PRIORS = (0.01, 0.1, 0.5)
FEW_FALSE_POSITIVES = 10
"""A rate that rests on fewer false positives than this is marked."""

CURVE_POINTS = 121
"""Points of the mean ROC, evenly spaced in log FPR from 1e-5 to 1, and the one at zero."""


def summarise(
  key: Key,
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  fprs: Sequence[float] = FPRS,
  rules: Sequence[roc.Rule] = ("at_most", "below"),
  priors: Sequence[float] = PRIORS,
  audited: Bool[ArrayLike, "T E"] | None = None,
  shadow_attack_scores: Float[ArrayLike, "S E"] | None = None,
  shadow_members: Bool[ArrayLike, "S E"] | None = None,
  num_resamples: int = 1000,
  confidence: float = 0.95,
) -> dict:
  """Everything that the tables and figures need about one attack.

  Numbers are means over the T targets. A number with an interval is {"value", "low", "high",
  "interval"}: bootstrap over examples and models, or over examples with one target.

  Args:
    scores: float[T, E], an attack's scores, as `attack.protocol` gives them.
    members: bool[T, E], true membership of the targets.
    fprs, rules: operating points, every rate with every rule.
    priors: shares of members for the precision (rule "at_most").
    audited: bool[T, E], the examples that count; None means all. See `calibration_masks`.
    shadow_attack_scores, shadow_members: float[S, E], bool[S, E], the same attack on shadows that
      are not targets (shadows of dedicated targets attacked leave-one-out). Thresholds are set on
      these. None: the threshold for each target is set on the other targets, which needs two.
    num_resamples: bootstrap resamples.
    confidence: of the intervals.
  Returns:
    {"num_targets", "num_members", "num_non_members" (per target, the fewest over targets),
     "auc": N, "balanced_accuracy": N,
     "tpr": [{"fpr", "rule", "false_positives" (at the vertex used, the fewest of all targets),
       "total_false_positives" (over targets), "few_false_positives": bool, **N,
       "over_targets": N (t-interval), "over_examples": N,
       "transferred": {"tpr": N, "fpr": N} or None: the rates that thresholds from shadows reach}],
     "precision": [{"prior", "fpr", **N}],
     "curve": {"fpr": [...], "tpr": [...]}: mean over targets of the largest TPR at each FPR}.
  Raises:
    ValueError: as `roc.curve`, for any target.
  """
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  levels = [intervals.Level(fpr, rule) for fpr in fprs for rule in rules]
  values = intervals.measure(scores, members, levels=levels, audited=audited)
  resample_key, target_key = jax.random.split(key)
  draws = intervals.resample(
    resample_key, scores, members, levels=levels, num_resamples=num_resamples, audited=audited
  )

  def number(value, draw):
    return intervals.over_both(target_key, value, draw, confidence=confidence)._asdict()

  def transfer(fpr, rule):
    points = transferred(
      scores,
      members,
      fpr=fpr,
      rule=rule,
      audited=audited,
      shadow_attack_scores=shadow_attack_scores,
      shadow_members=shadow_members,
    )
    rates = {name: [getattr(point, name) for point in points] for name in ("tpr", "fpr")}
    return {
      name: intervals.over_targets(rate, confidence=confidence)._asdict()
      for name, rate in rates.items()
    }

  curves = [
    roc.curve(row[keep], member[keep])
    for row, member, keep in zip(scores, members, audited, strict=True)
  ]
  can_transfer = len(scores) > 1 or shadow_attack_scores is not None
  rates = []
  for i, (fpr, rule) in enumerate(levels):
    points = [roc.point_at_fpr(curve, fpr=fpr, rule=rule) for curve in curves]
    false_positives = [point.false_positives for point in points]
    value, draw = values.tpr[:, i], draws.tpr[:, :, i]
    over_examples = intervals.over_examples(value, draw, confidence=confidence)
    rates.append(
      {"fpr": fpr, "rule": rule}
      | {"false_positives": min(false_positives), "total_false_positives": sum(false_positives)}
      | {"few_false_positives": min(false_positives) < FEW_FALSE_POSITIVES}
      | number(value, draw)
      | {"over_examples": over_examples._asdict()}
      | {"over_targets": intervals.over_targets(value, confidence=confidence)._asdict()}
      | {"transferred": transfer(fpr, rule) if can_transfer else None}
    )
  precision = []
  for prior in priors:
    for i, (fpr, rule) in enumerate(levels):
      if rule == rules[0]:
        arrays = [roc.precision(tpr[..., i], fpr, prior=prior) for tpr in (values.tpr, draws.tpr)]
        precision.append({"prior": prior, "fpr": fpr} | number(*arrays))
  grid = np.append(0.0, np.logspace(-5, 0, CURVE_POINTS))
  mean_curve = np.mean([roc.tpr_on_grid(curve, grid) for curve in curves], axis=0)
  return {
    "num_targets": len(scores),
    "num_members": int((members & audited).sum(axis=1).min()),
    "num_non_members": int((~members & audited).sum(axis=1).min()),
    "auc": number(values.auc, draws.auc),
    "balanced_accuracy": number(values.balanced_accuracy, draws.balanced_accuracy),
    "tpr": rates,
    "precision": precision,
    "curve": {"fpr": grid.tolist(), "tpr": mean_curve.tolist()},
  }


def transferred(
  scores: Float[ArrayLike, "T E"],
  members: Bool[ArrayLike, "T E"],
  *,
  fpr: float,
  rule: roc.Rule = "at_most",
  audited: Bool[ArrayLike, "T E"] | None = None,
  shadow_attack_scores: Float[ArrayLike, "S E"] | None = None,
  shadow_members: Bool[ArrayLike, "S E"] | None = None,
) -> list[roc.Point]:
  """The rates on each target of a threshold that was set without looking at its membership.

  The threshold is the lowest that keeps the pooled non-members of the shadows at `fpr`.

  Args:
    scores, members, audited, shadow_attack_scores, shadow_members: as `summarise`. When the other
      targets set the threshold (leave-one-out), their attack scores rest a little on this
      target's scores, as one shadow among many.
    fpr, rule: the rate that the attacker aims at.
  Returns:
    T points; `fpr` of a point is the realised rate.
  """
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  if shadow_attack_scores is None:
    pool, owner = scores[~members & audited], np.nonzero(~members & audited)[0]
  else:
    pool = np.asarray(shadow_attack_scores)[~np.asarray(shadow_members).astype(bool)]
    owner = np.full(pool.shape, -1)
  order = np.argsort(-pool)
  pool, owner = pool[order], owner[order]
  points = []
  for t, (row, member, keep) in enumerate(zip(scores, members, audited, strict=True)):
    threshold = _lowest_threshold(pool[owner != t], fpr, rule)
    points.append(roc.point_at_threshold(row[keep], member[keep], threshold=threshold))
  return points


def _lowest_threshold(descending, fpr, rule):
  """Just above the first non-member score that must not be accepted."""
  allowed = np.arange(len(descending) + 1) / len(descending)
  side = "right" if rule == "at_most" else "left"
  count = int(np.searchsorted(allowed, fpr, side=side)) - 1
  return np.nextafter(descending[count], np.inf) if count < len(descending) else -np.inf
