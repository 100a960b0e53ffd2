"""One attack's leakage as a record: metrics over targets with intervals and counts, JSON-ready.

N stands for {"value", "low", "high", "interval"}: a number, where it may lie, and what was varied.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from ptq_jax.base import ArrayLike, Bool, Float, Key, Shaped, as_members
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
  curves: list[roc.Curve]  # of the targets

  def of_targets(self, kept: Bool[np.ndarray, "T"]) -> "Sample":
    """The same for some of the targets, in order."""
    if kept.all():
      return self
    parts = [
      intervals.Metrics(
        part.auc[..., kept], part.balanced_accuracy[..., kept], part.tpr[..., kept, :]
      )
      for part in (self.values, self.draws)
    ]
    curves = [curve for curve, chosen in zip(self.curves, kept, strict=True) if chosen]
    return Sample(self.levels, *parts, curves)


def sample(
  key: Key,
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
  *,
  fprs: Sequence[float] = FPRS,
  rules: Sequence[roc.Rule] = ("at_most", "below"),
  audited: Bool[ArrayLike, "T E"] | None = None,
  num_resamples: int = 1000,
) -> Sample:
  """What `summarise` and `compare` rest on; arguments and errors as `summarise`."""
  levels = [intervals.Level(fpr, rule) for rule in rules for fpr in fprs]
  ranked = intervals.rank(scores, members, audited=audited)
  draws = intervals.resample(
    key, scores, members, levels=levels, ranked=ranked, num_resamples=num_resamples
  )
  values = intervals.measure(scores, members, levels=levels, ranked=ranked)
  return Sample(levels, values, draws, ranked.curves)


def compare(one: Sample, reference: Sample, *, confidence: float = 0.95) -> dict:
  """One attack minus another on the same targets and examples, with paired intervals.

  Args:
    one, reference: of the same operating points, drawn with the same key.
    confidence: of the intervals.
  Returns:
    {"auc": D, "balanced_accuracy": D, "tpr": [{"fpr", "rule", **D}], "tpr_ratio": [{"fpr", "rule",
    **N}]}, where D is {"value", "low", "high", "interval", "p"}, p the two-sided p-value of no
    difference; the ratio, one divided by the reference, is left out where the reference found
    nothing.
  """

  def number(name, i=..., of=intervals.of_difference):
    parts = [getattr(x, name) for sample in (one, reference) for x in (sample.values, sample.draws)]
    parts = [part[..., i] if name == "tpr" else part for part in parts]
    found = of(*parts, confidence=confidence)
    return found and found._asdict()

  ratios = [number("tpr", i, intervals.of_ratio) for i in range(len(one.levels))]
  return {
    "auc": number("auc"),
    "balanced_accuracy": number("balanced_accuracy"),
    "tpr": [level._asdict() | number("tpr", i) for i, level in enumerate(one.levels)],
    "tpr_ratio": [
      level._asdict() | ratio for level, ratio in zip(one.levels, ratios, strict=True) if ratio
    ],
  }


def member_accuracy(
  correct: Bool[ArrayLike, "M E V"], members: Shaped[ArrayLike, "M E"]
) -> Float[np.ndarray, "M"]:
  """How well each model fits those it trained on: the share of their queries that it gets right.

  Args:
    correct: bool[M, E, V], whether the class that a model names for a query is the example's. A
      score above 0 says that the class has more than half of the probability, which is less often.
    members: bool[M, E], who trained on what.
  Returns:
    float64[M] in [0, 1]; NaN for a model without members.
  """
  inside = np.asarray(as_members(members))
  hits = (np.asarray(correct).mean(axis=2) * inside).sum(axis=1)
  with np.errstate(invalid="ignore"):
    return hits / inside.sum(axis=1)


def score_moments(
  scores: Float[ArrayLike, "N E V"], members: Shaped[ArrayLike, "N E"]
) -> dict[str, dict[str, float]]:
  """Where scores lie and how far they spread, for members and for non-members of N models.

  Quantizing shifts and narrows the scores of a target; beside those of the shadows it shows how far
  an attacker is off who takes them as they are.

  Args:
    scores: float[N, E, V], as the attacks read them.
    members: bool[N, E].
  Returns:
    {"members": {"mean", "sd"}, "non_members": {"mean", "sd"}} over models, examples and views.
  """
  scores, inside = np.asarray(scores, np.float64), np.asarray(as_members(members))
  return {
    name: {"mean": float(scores[side].mean()), "sd": float(scores[side].std())}
    for name, side in (("members", inside), ("non_members", ~inside))
  }


def summarise(
  key: Key,
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
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

  Numbers are means over the T targets. Intervals are over examples and models (over examples with
  one target) unless said otherwise.

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
     "tpr": [{"fpr", "rule", **N, "chance" (what a guesser reaches there, `roc.chance`),
       "over_examples": N, "over_targets": N (t-interval),
       "realised_fpr": N (of the very non-members the threshold was set on; exact binomial interval
         of one target's), "promised_fpr": N (that of new non-members: chance, and where it lies,
         by the order statistic that the threshold is),
       "false_positives" (at the vertex used; the fewest of all targets),
       "total_false_positives" (of all targets), "few_false_positives" (fewer than 10),
       "transferred": None or {"tpr": N, "fpr": N}, the rates that a threshold set on shadows alone
       realises on the targets (t-intervals; of one target exact binomials)}],
     "precision": [{"prior", "fpr", **N}], from the TPR and the promised rate of accusing
       non-members, the interval from the cautious end of both to the other,
     "curve": {"fpr": [...], "tpr": [...], "low": [...], "high": [...]}, mean over targets of the
       largest TPR at each FPR, and the least and most exposed targets there}.
  Raises:
    ValueError: as `roc.curve`, for any target.
  """
  scores, members = np.asarray(scores), np.asarray(as_members(members))
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  if sampled is None:
    sampled = sample(
      key, scores, members, fprs=fprs, rules=rules, audited=audited, num_resamples=num_resamples
    )
  levels, values, draws, curves = sampled
  transfers = transferred(scores, members, levels=levels, audited=audited, shadows=shadows)
  num_members = int((members & audited).sum(axis=1).min())
  num_others = int((~members & audited).sum(axis=1).min())

  def number(value, draw, trials=None):
    return intervals.over_both(value, draw, confidence=confidence, trials=trials)._asdict()

  def share(counts, trials):
    """A realised rate: over targets, or exact for one."""
    if len(counts) > 1:
      rates = np.asarray(counts) / np.asarray(trials)
      return intervals.over_targets(rates, confidence=confidence)._asdict()
    return intervals.binomial(int(counts[0]), int(trials[0]), confidence=confidence)._asdict()

  def of_transfer(points):
    groups = [((members if inside else ~members) & audited).sum(axis=1) for inside in (True, False)]
    return {
      "tpr": share([point.true_positives for point in points], groups[0]),
      "fpr": share([point.false_positives for point in points], groups[1]),
    }

  def rate(i, level):
    value, draw = values.tpr[:, i], draws.tpr[..., i]
    examples = intervals.over_examples(value, draw, confidence=confidence, trials=num_members)
    points = transfers and transfers[i]
    return (
      {**level._asdict(), **number(value, draw, num_members)}
      | {"chance": float(roc.chance(num_others, fpr=level.fpr, rule=level.rule))}
      | {"over_examples": examples._asdict()}
      | {"over_targets": intervals.over_targets(value, confidence=confidence)._asdict()}
      | _false_positives(curves, level, num_others, confidence)
      | {"transferred": points and of_transfer(points)}
    )

  def precision(prior, entry):
    ends = {"value": ("value", "value"), "low": ("low", "high"), "high": ("high", "low")}
    parts = {
      name: float(roc.precision(entry[own], entry["promised_fpr"][other], prior=prior))
      for name, (own, other) in ends.items()
    }
    return {"prior": prior, "fpr": entry["fpr"], **parts, "interval": entry["interval"]}

  rates = [rate(i, level) for i, level in enumerate(levels)]
  return {
    "num_targets": len(scores),
    "num_members": num_members,
    "num_non_members": num_others,
    "auc": number(values.auc, draws.auc),
    "balanced_accuracy": number(values.balanced_accuracy, draws.balanced_accuracy),
    "tpr": rates,
    "precision": [precision(prior, rates[i]) for prior in priors for i in range(len(fprs))],
    "curve": mean_curve(curves),
  }


def mean_curve(curves: Sequence[roc.Curve]) -> dict[str, list[float]]:
  """Mean, lowest and highest over curves of the largest TPR at each of `CURVE_FPRS`."""
  rows = np.stack([roc.tpr_on_grid(curve, CURVE_FPRS) for curve in curves])
  parts = {"fpr": CURVE_FPRS, "tpr": rows.mean(axis=0), "low": rows.min(0), "high": rows.max(0)}
  return {name: part.tolist() for name, part in parts.items()}


def transferred(
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
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
  scores, members = np.asarray(scores), np.asarray(as_members(members))
  audited = np.ones_like(members) if audited is None else np.asarray(audited)
  if shadows is None and len(scores) == 1:
    return None
  if shadows is None:
    others = ~members & audited
    pool, owner = scores[others], np.nonzero(others)[0]
  else:
    pool = np.asarray(shadows.scores)[~np.asarray(as_members(shadows.members))]
    owner = np.full(pool.shape, -1)
  order = np.argsort(pool)[::-1]
  pool, owner = pool[order], owner[order]
  points = [[] for _ in levels]
  for t, keep in enumerate(audited):
    others = pool[owner != t]
    for row, level in zip(points, levels, strict=True):
      threshold = _lowest_threshold(others, level)
      row.append(roc.point_at_threshold(scores[t, keep], members[t, keep], threshold=threshold))
  return points


def calibration_audits(
  members: Shaped[ArrayLike, "T E"], calibrated: Bool[ArrayLike, "T E"]
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
  members, calibrated = (np.asarray(as_members(a)) for a in (members, calibrated))
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


def _false_positives(curves, level, num_others, confidence):
  points = [roc.point_at_fpr(curve, fpr=level.fpr, rule=level.rule) for curve in curves]
  counts = [point.false_positives for point in points]
  realised = intervals.binomial(round(np.mean(counts)), num_others, confidence=confidence)
  chance = float(roc.chance(num_others, fpr=level.fpr, rule=level.rule))
  allowed = round(chance * (num_others + 1)) - 1
  tails = [(1 - confidence) / 2, (1 + confidence) / 2]
  low, high = scipy.special.betaincinv(allowed + 1, max(num_others - allowed, 1e-9), tails)
  promised = intervals.Interval(
    chance, float(low), float(high), f"order statistic, {100 * confidence:g} %"
  )
  return {
    "realised_fpr": realised._replace(
      value=float(np.mean([point.fpr for point in points]))
    )._asdict(),
    "promised_fpr": promised._asdict(),
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
