"""Receiver operating characteristic on exact vertices: AUC, balanced accuracy, rates, precision.

HIGHER SCORE MEANS MEMBER, everywhere. A vertex accepts every example whose score is at least its
threshold, so equal scores are accepted together or not at all. Scores may be infinite (only their
order counts); a NaN is an error. NumPy or JAX in, Python floats or NumPy out.
"""

from typing import Literal, NamedTuple

import numpy as np

from ptq_jax.base import ArrayLike, Bool, Float

Rule = Literal["at_most", "below"]
RULES: tuple[Rule, ...] = ("at_most", "below")
"""Which vertices count at a false-positive rate: "at_most" (<=), or "below" (<, as the paper)."""


class Curve(NamedTuple):
  """Vertices of a ROC curve, from nobody accepted to everybody accepted."""

  fpr: Float[np.ndarray, "K"]  # false positives / non-members, non-decreasing from 0 to 1
  tpr: Float[np.ndarray, "K"]  # true positives / members, non-decreasing from 0 to 1
  thresholds: Float[np.ndarray, "K"]  # accept scores >= threshold; +inf at the first vertex
  false_positives: np.ndarray  # int[K]
  true_positives: np.ndarray  # int[K]


class Point(NamedTuple):
  """What an attacker reaches with one threshold."""

  tpr: float  # true positives / members
  fpr: float  # false positives / non-members, the realised rate
  threshold: float  # accept scores >= threshold
  true_positives: int
  false_positives: int


def curve(scores: Float[ArrayLike, "E"], members: Bool[ArrayLike, "E"]) -> Curve:
  """All vertices of the ROC curve, one per distinct score, and the origin.

  No vertex is dropped: collinear vertices are vertices, and the rates at them are reachable.

  Args:
    scores: float[E], attack statistic, may be infinite.
    members: bool[E], true membership.
  Raises:
    ValueError: if a score is NaN, the lengths differ, or there is no member or no non-member.
  """
  scores, members = _checked(scores, members)
  order = np.argsort(-scores, kind="stable")
  ordered = scores[order]
  last_of_tie = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
  true_positives = np.append(0, np.cumsum(members[order])[last_of_tie])
  false_positives = np.append(0, last_of_tie + 1) - true_positives
  return Curve(
    fpr=false_positives / false_positives[-1],
    tpr=true_positives / true_positives[-1],
    thresholds=np.append(np.inf, ordered[last_of_tie]),
    false_positives=false_positives,
    true_positives=true_positives,
  )


def auc(scores: Float[ArrayLike, "E"], members: Bool[ArrayLike, "E"]) -> float:
  """Area under the ROC curve: the chance that a member outscores a non-member, ties counting half.

  Raises:
    ValueError: as `curve`.
  """
  return area(curve(scores, members))


def balanced_accuracy(scores: Float[ArrayLike, "E"], members: Bool[ArrayLike, "E"]) -> float:
  """Largest (TPR + 1 - FPR) / 2 over all thresholds, in [1/2, 1].

  The threshold is picked on the scores it is judged by, so this is optimistic for small sets: with
  no leakage at all it exceeds 1/2 by about 0.43 * sqrt(1 / members + 1 / non-members).

  Raises:
    ValueError: as `curve`.
  """
  return best_balanced_accuracy(curve(scores, members))


def tpr_at_fpr(
  scores: Float[ArrayLike, "E"],
  members: Bool[ArrayLike, "E"],
  *,
  fpr: float,
  rule: Rule = "at_most",
) -> float:
  """Largest true-positive rate at a false-positive rate at most (or below) `fpr`.

  Ties count on the cautious side: equal scores are accepted together or not at all.

  Args:
    scores: float[E], attack statistic; higher means member.
    members: bool[E], true membership.
    fpr: in (0, 1]; below 1 / (number of non-members) the answer rests on no false positive at all.
    rule: "at_most": vertices with FPR <= fpr; "below": the last vertex with FPR < fpr, as the
      public LiRA scripts have it.
  Returns:
    float in [0, 1].
  Raises:
    ValueError: if one of the two groups is empty, a score is NaN, or `fpr` or `rule` is unknown.
  Reference: Carlini et al. 2022, arXiv:2112.03570.
  """
  return point_at_fpr(curve(scores, members), fpr=fpr, rule=rule).tpr


def precision_at_fpr(
  scores: Float[ArrayLike, "E"],
  members: Bool[ArrayLike, "E"],
  *,
  prior: float,
  fpr: float,
  rule: Rule = "at_most",
) -> float:
  """Share of members among the accepted, were a share `prior` of all candidates members.

  prior * TPR / (prior * TPR + (1 - prior) * fpr), with the *nominal* rate `fpr` in place of the
  realised one: the realised rate is at most `fpr` and may be zero by luck, so this is cautious.

  Raises:
    ValueError: as `tpr_at_fpr`, or `prior` outside (0, 1).
  Reference: Jayaraman et al. 2021, arXiv:2005.10881.
  """
  return precision(tpr_at_fpr(scores, members, fpr=fpr, rule=rule), fpr, prior=prior)


def precision(tpr, fpr, *, prior: float):
  """Bayes: share of members among the accepted, from the two rates; 0 where nobody is accepted.

  >>> round(float(precision(0.5, 0.01, prior=0.01)), 3)
  0.336
  """
  if not 0 < prior < 1:
    raise ValueError(f"prior is {prior}; it must lie in (0, 1).")
  accepted = prior * np.asarray(tpr) + (1 - prior) * np.asarray(fpr)
  return np.where(accepted > 0, prior * np.asarray(tpr) / np.maximum(accepted, 1e-300), 0.0)[()]


def area(curve: Curve) -> float:
  """Area under the vertices joined by straight lines (so that ties count half)."""
  return float(np.sum(np.diff(curve.fpr) * (curve.tpr[1:] + curve.tpr[:-1])) / 2)


def best_balanced_accuracy(curve: Curve) -> float:
  """Largest (TPR + 1 - FPR) / 2 over the vertices."""
  return float(np.max(1 + curve.tpr - curve.fpr) / 2)


def point_at_fpr(curve: Curve, *, fpr: float, rule: Rule = "at_most") -> Point:
  """The vertex with the largest TPR among those whose FPR is at most (or below) `fpr`."""
  if not 0 < fpr <= 1:
    raise ValueError(f"fpr is {fpr}; it must lie in (0, 1].")
  if rule not in ("at_most", "below"):
    raise ValueError(f"rule is {rule!r}; it must be 'at_most' or 'below'.")
  side = "right" if rule == "at_most" else "left"
  last = int(np.searchsorted(curve.fpr, fpr, side=side)) - 1
  return Point(
    tpr=float(curve.tpr[last]),
    fpr=float(curve.fpr[last]),
    threshold=float(curve.thresholds[last]),
    true_positives=int(curve.true_positives[last]),
    false_positives=int(curve.false_positives[last]),
  )


def point_at_threshold(
  scores: Float[ArrayLike, "E"], members: Bool[ArrayLike, "E"], *, threshold: float
) -> Point:
  """The rates realised by a threshold that was set elsewhere, for example on shadow models.

  Raises:
    ValueError: as `curve`.
  """
  scores, members = _checked(scores, members)
  accepted = scores >= threshold
  true_positives, false_positives = (
    int((accepted & members).sum()),
    int((accepted & ~members).sum()),
  )
  return Point(
    tpr=true_positives / int(members.sum()),
    fpr=false_positives / int((~members).sum()),
    threshold=float(threshold),
    true_positives=true_positives,
    false_positives=false_positives,
  )


def tpr_on_grid(curve: Curve, fpr: Float[ArrayLike, "K"]) -> Float[np.ndarray, "K"]:
  """Largest TPR at FPR at most each value of a grid: the curve as steps, to average and plot."""
  return curve.tpr[np.searchsorted(curve.fpr, np.asarray(fpr), side="right") - 1]


def _checked(scores, members):
  scores, members = np.asarray(scores), np.asarray(members).astype(bool)
  if scores.ndim != 1 or scores.shape != members.shape:
    raise ValueError(
      f"scores {scores.shape} and members {members.shape} must be of one length; for several "
      "targets call once per target."
    )
  if not members.any() or members.all():
    raise ValueError(
      f"{int(members.sum())} of {len(members)} examples are members; a ROC curve needs both "
      "members and non-members."
    )
  if np.isnan(scores).any():
    raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; no order.")
  return scores, members
