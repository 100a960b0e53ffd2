"""Receiver operating characteristic on exact vertices: AUC, balanced accuracy, rates, precision.

HIGHER SCORE MEANS MEMBER, everywhere. A vertex accepts every example whose score is at least its
threshold, so equal scores are accepted together or not at all. Scores may be of any real type and
infinite (only their order counts): a score of +inf is accepted at every finite threshold. A NaN is
an error.

NumPy arrays and lists give Python floats and NumPy arrays. JAX arrays stay on their device and give
JAX arrays, under `jax.jit` and `jax.vmap` too; what is an error when values are known gives NaN
when they are traced. Counts are exact there, rates float32 (float64 if the scores are).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import (
  ArrayLike,
  Float,
  Nested,
  Shaped,
  as_members,
  as_scores,
  is_traced,
  on_device,
)

Real = float | Float[jax.Array, ""]
Scores = Shaped[ArrayLike, "E"] | Nested
Members = Shaped[ArrayLike, "E"] | Nested

Rule = Literal["at_most", "below"]
RULES: tuple[Rule, ...] = ("at_most", "below")
"""Which vertices count at a false-positive rate: "at_most" (<=), or "below" (<, as the paper)."""


class Curve(NamedTuple):
  """Vertices of a ROC curve, from nobody accepted to everybody accepted.

  On a device there are E + 1, those of equal scores repeating the vertex before.
  """

  fpr: Float[ArrayLike, "K"]  # false positives / non-members, non-decreasing from 0 to 1
  tpr: Float[ArrayLike, "K"]  # true positives / members, non-decreasing from 0 to 1
  thresholds: Float[ArrayLike, "K"]  # accept scores >= threshold; +inf (nobody) at the first vertex
  false_positives: ArrayLike  # int[K]
  true_positives: ArrayLike  # int[K]


class Point(NamedTuple):
  """What an attacker reaches with one threshold."""

  tpr: float  # true positives / members
  fpr: float  # false positives / non-members, the realised rate
  threshold: float  # accept scores >= threshold; +inf accepts nobody
  true_positives: int
  false_positives: int


def curve(scores: Scores, members: Members) -> Curve:
  """All vertices of the ROC curve, one per distinct score, and the origin.

  No vertex is dropped: collinear vertices are vertices, and the rates at them are reachable.

  Args:
    scores: float[E], attack statistic, may be infinite.
    members: bool[E], true membership.
  Raises:
    ValueError: if a score is NaN, the lengths differ, or there is no member or no non-member.
  """
  scores, members = checked(scores, members)
  if on_device(scores, members):
    return _device_curve(scores, members)
  order = np.argsort(scores, kind="stable")[::-1]
  return from_ranked(scores[order], members[order])


def from_ranked(ordered: Shaped[np.ndarray, "E"], members: Shaped[np.ndarray, "E"]) -> Curve:
  """The curve of scores that are sorted already, from high to low; nothing is checked."""
  last_of_tie = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
  true_positives = np.append(0, np.cumsum(members)[last_of_tie])
  false_positives = np.append(0, last_of_tie + 1) - true_positives
  thresholds = ordered[last_of_tie].astype(np.float64)
  return Curve(
    fpr=false_positives / false_positives[-1],
    tpr=true_positives / true_positives[-1],
    thresholds=np.append(np.inf, np.minimum(thresholds, np.finfo(np.float64).max)),
    false_positives=false_positives,
    true_positives=true_positives,
  )


@jax.jit
def _device_curve(scores, members):
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  order = jnp.argsort(scores)[::-1]
  ordered, inside = scores[order], members[order]
  is_vertex = jnp.append(ordered[1:] != ordered[:-1], True)
  counts = [jnp.cumsum(side.astype(jnp.int32)) for side in (inside, ~inside)]
  found = [
    jnp.append(0, jax.lax.cummax(jnp.where(is_vertex, count, 0))).astype(count.dtype)
    for count in counts
  ]
  wide = jnp.minimum(ordered.astype(dtype), jnp.finfo(dtype).max)
  last = jax.lax.cummin(jnp.where(is_vertex, wide, jnp.inf))
  none = (found[0][-1] == 0) | (found[1][-1] == 0)
  if jnp.issubdtype(scores.dtype, jnp.floating):
    none |= jnp.isnan(scores).any()
  tpr, fpr = [jnp.where(none, jnp.nan, side / side[-1].astype(dtype)) for side in found]
  return Curve(fpr, tpr, jnp.append(jnp.asarray(jnp.inf, dtype), last), found[1], found[0])


def auc(scores: Scores, members: Members) -> Real:
  """Area under the ROC curve: the chance that a member outscores a non-member, ties counting half.

  Raises:
    ValueError: as `curve`.
  """
  return area(curve(scores, members))


def balanced_accuracy(scores: Scores, members: Members) -> Real:
  """Largest (TPR + 1 - FPR) / 2 over all thresholds, in [1/2, 1].

  The threshold is picked on the scores it is judged by, so this is optimistic for small sets: with
  no leakage at all it exceeds 1/2 by about 0.43 * sqrt(1 / members + 1 / non-members).

  Raises:
    ValueError: as `curve`.
  """
  return best_balanced_accuracy(curve(scores, members))


def tpr_at_fpr(
  scores: Scores,
  members: Members,
  *,
  fpr: float,
  rule: Rule = "at_most",
) -> Real:
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
  scores: Scores,
  members: Members,
  *,
  prior: float,
  fpr: float,
  rule: Rule = "at_most",
) -> Real:
  """Share of members among the accepted, were a share `prior` of all candidates members.

  prior * TPR / (prior * TPR + (1 - prior) * rate), where `rate` is what the threshold can promise
  for new non-members, `chance`, and not the share of these, which may be zero by luck.

  Raises:
    ValueError: as `tpr_at_fpr`, or `prior` outside (0, 1).
  Reference: Jayaraman et al. 2021, arXiv:2005.10881.
  """
  found = curve(scores, members)
  rate = chance(found.false_positives[-1], fpr=fpr, rule=rule)
  return _plain(precision(point_at_fpr(found, fpr=fpr, rule=rule).tpr, rate, prior=prior))


def chance(num_non_members, *, fpr: float, rule: Rule = "at_most"):
  """What a guesser reaches at a false-positive rate judged on so many non-members.

  A threshold between the non-members number k and k + 1 from the top, k the most that `fpr` allows,
  is passed by another draw from the same distribution with probability (k + 1) / (n + 1): so much
  TPR shows an attack that knows nothing, and so often the threshold accuses new non-members.

  >>> chance(8, fpr=0.01), round(chance(749, fpr=1e-5), 5), round(chance(25_000, fpr=0.001), 5)
  (0.1111111111111111, 0.00133, 0.00104)

  Args:
    num_non_members: n, a number or an array.
    fpr, rule: as `tpr_at_fpr`.
  """
  n = num_non_members
  k = (n * fpr) // 1
  if rule == "at_most":
    k = k + ((k + 1) / n <= fpr) - (k / n > fpr)
  else:
    k = k + ((k + 1) / n < fpr) - (k / n >= fpr)
  return (k + 1) / (n + 1)


def precision(tpr, fpr, *, prior: float):
  """Bayes: share of members among the accepted, from the two rates; 0 where nobody is accepted.

  >>> round(float(precision(0.5, 0.01, prior=0.01)), 3)
  0.336
  """
  if not 0 < prior < 1:
    raise ValueError(f"prior is {prior}; it must lie in (0, 1).")
  library = jnp if on_device(tpr, fpr) else np
  tpr, fpr = library.asarray(tpr), library.asarray(fpr)
  accepted = prior * tpr + (1 - prior) * fpr
  return library.where(accepted > 0, prior * tpr / library.maximum(accepted, 1e-30), accepted)[()]


def area(curve: Curve) -> Real:
  """Area under the vertices joined by straight lines (so that ties count half)."""
  return _plain(((curve.fpr[1:] - curve.fpr[:-1]) * (curve.tpr[1:] + curve.tpr[:-1])).sum() / 2)


def best_balanced_accuracy(curve: Curve) -> Real:
  """Largest (TPR + 1 - FPR) / 2 over the vertices."""
  return _plain((1 + curve.tpr - curve.fpr).max() / 2)


def point_at_fpr(curve: Curve, *, fpr: float, rule: Rule = "at_most") -> Point:
  """The vertex with the largest TPR among those whose FPR is at most (or below) `fpr`."""
  if not 0 < fpr <= 1:
    raise ValueError(f"fpr is {fpr}; it must lie in (0, 1].")
  if rule not in ("at_most", "below"):
    raise ValueError(f"rule is {rule!r}; it must be 'at_most' or 'below'.")
  found, limit = curve.fpr, fpr
  if on_device(found):  # a rate is rounded there: compare counts, with room for that of the limit
    limit = fpr * curve.false_positives[-1] * (1 + (1e-6 if rule == "at_most" else -1e-6))
    found = curve.false_positives + 0 * curve.fpr
  allowed = found <= limit if rule == "at_most" else found < limit
  last = allowed.sum() - 1
  names = ("tpr", "fpr", "thresholds", "true_positives", "false_positives")
  return Point(*(_plain(getattr(curve, name)[last]) for name in names))


def point_at_threshold(scores: Scores, members: Members, *, threshold: Real | int) -> Point:
  """The rates realised by a threshold that was set elsewhere, for example on shadow models.

  A threshold of +inf accepts nobody, every other one all scores of +inf.

  Raises:
    ValueError: as `curve`.
  """
  scores, members = checked(scores, members)
  accepted = (scores >= threshold) & (threshold < np.inf)
  found = [(accepted & side).sum() for side in (members, ~members)]
  tpr, fpr = [count / side.sum() for count, side in zip(found, (members, ~members), strict=True)]
  threshold = threshold if isinstance(threshold, jax.Array) else float(threshold)
  return Point(*map(_plain, (tpr, fpr)), threshold, *map(_plain, found))


def tpr_on_grid(curve: Curve, fpr: Float[ArrayLike, "G"]) -> Float[ArrayLike, "G"]:
  """Largest TPR at FPR at most each value of a grid: the curve as steps, to average and plot."""
  library = jnp if on_device(curve.fpr) else np
  return curve.tpr[library.searchsorted(curve.fpr, library.asarray(fpr), side="right") - 1]


def _plain(number):
  """A number of the host as Python's; one on a device as it is."""
  return number if isinstance(number, jax.Array) else number.item()


def checked(scores: Scores, members: Members) -> tuple[ArrayLike, ArrayLike]:
  """Scores and membership as arrays that have a curve.

  Raises:
    ValueError: as `curve`.
  """
  scores, members = as_scores(scores), as_members(members)
  if scores.ndim != 1 or scores.shape != members.shape:
    raise ValueError(
      f"scores {scores.shape} and members {members.shape} must be of one length; for several "
      "targets call once per target."
    )
  if on_device(scores, members):
    scores, members = jnp.asarray(scores), jnp.asarray(members)
    if is_traced(scores, members):
      return scores, members
  if not bool(members.any()) or bool(members.all()):
    raise ValueError(
      f"{int(members.sum())} of {len(members)} examples are members; a ROC curve needs both "
      "members and non-members."
    )
  if jnp.issubdtype(scores.dtype, jnp.floating) and bool((scores != scores).any()):
    count = int((scores != scores).sum())
    raise ValueError(f"{count} of {len(scores)} scores are NaN; no order.")
  return scores, members
