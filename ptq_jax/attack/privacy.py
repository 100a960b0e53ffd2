"""Lower bounds on epsilon from an attack: what differential privacy the model cannot have.

(epsilon, delta)-differential privacy limits every attack: TPR <= exp(epsilon) FPR + delta, and the
same of the two errors' complements. So an attack that is good enough refutes small epsilons. Counts
become rates with exact (Clopper-Pearson) limits, and the threshold is set on other examples than it
is judged by, so that picking the best one does not count as leakage. The limits take the examples
for independent trials; those of one model share it, so a bound is evidence about this training
recipe, not a proof. Natural logarithms. HIGHER SCORE MEANS MEMBER.

References: Jagielski, Ullman and Oprea 2020, arXiv:2006.07709 (Clopper-Pearson); Nasr et al. 2023,
arXiv:2302.07956 (Gaussian differential privacy); Dong, Roth and Su 2019, arXiv:1905.02383.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from ptq_jax.base import ArrayLike, Shaped, as_members, as_scores

DELTA = 1e-5
MAX_THRESHOLDS = 200
"""Thresholds that are tried on the examples set aside: quantiles of their scores."""


class Counts(NamedTuple):
  """How many of each group a threshold accepts, of how many; numbers, or arrays of one shape."""

  true_positives: float | np.ndarray
  members: int | np.ndarray
  false_positives: float | np.ndarray
  non_members: int | np.ndarray


class Bound(NamedTuple):
  """Lower bounds on epsilon at `delta`, each with the stated confidence."""

  epsilon: float  # from the rates alone
  gaussian: float  # were the mechanism Gaussian: tighter, and an assumption
  delta: float
  confidence: float


def epsilon_of_counts(counts: Counts, *, delta: float = DELTA, confidence: float = 0.95) -> float:
  """The largest epsilon that these counts refute, at least 0.

  log((TPR - delta) / FPR), or the same of the rejected, log((TNR - delta) / FNR), with TPR and TNR
  at their lower limits and FPR and FNR at their upper ones; each of the four limits has a quarter
  of 1 - confidence.

  >>> round(epsilon_of_counts(Counts(100, 1000, 0, 1000), delta=0.0), 2)
  2.9

  Raises:
    ValueError: if a group is empty, or `delta` or `confidence` is out of range.
  """
  return float(_epsilons(counts, delta=delta, confidence=confidence))


def gaussian_of_counts(counts: Counts, *, delta: float = DELTA, confidence: float = 0.95) -> float:
  """The same if the mechanism is mu-Gaussian differentially private: epsilon at `delta` of that mu.

  mu = Phi^-1(TPR) - Phi^-1(FPR) at the limits, each with half of 1 - confidence; then the epsilon
  with delta = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu).
  """
  _check(delta, confidence)
  return epsilon_of_mu(max(mu_of_counts(counts, confidence=confidence), 0.0), delta=delta)


def _epsilons(counts: Counts, *, delta: float, confidence: float) -> np.ndarray:
  """`epsilon_of_counts` of arrays of counts."""
  _check(delta, confidence)
  tail = (1 - confidence) / 4
  tpr, fnr = _limits(counts.true_positives, counts.members, tail)
  tnr, fpr = _limits(counts.non_members - counts.false_positives, counts.non_members, tail)
  ratios = np.maximum((tpr - delta) / fpr, (tnr - delta) / fnr)
  return np.asarray(np.log(np.maximum(ratios, 1.0)))


def mu_of_counts(counts: Counts, *, confidence: float = 0.95) -> float:
  """Lower limit of Phi^-1(TPR) - Phi^-1(FPR); each limit has half of 1 - confidence."""
  return float(_mus(counts, confidence=confidence))


def _mus(counts: Counts, *, confidence: float) -> np.ndarray:
  """`mu_of_counts` of arrays of counts."""
  tail = (1 - confidence) / 2
  tpr, _ = _limits(counts.true_positives, counts.members, tail)
  _, fpr = _limits(counts.non_members - counts.false_positives, counts.non_members, tail)
  useless = (tpr == 0) | (fpr == 1)
  tpr, fpr = np.where(useless, 0.5, (tpr, fpr))
  return np.where(useless, -np.inf, scipy.special.ndtri(tpr) - scipy.special.ndtri(fpr))


def epsilon_of_mu(mu: float, *, delta: float = DELTA) -> float:
  """Epsilon at `delta` of mu-Gaussian differential privacy (Dong, Roth and Su 2019, corollary 1).

  >>> round(epsilon_of_mu(1.0, delta=1e-5), 2)
  4.38
  """
  if mu == 0:
    return 0.0
  if delta == 0:
    return np.inf

  def excess(epsilon):
    one = scipy.special.ndtr(mu / 2 - epsilon / mu)
    other = scipy.special.log_ndtr(-mu / 2 - epsilon / mu) + epsilon
    return one - np.exp(other) - delta

  if excess(0.0) <= 0:
    return 0.0
  from scipy import optimize  # half a second, which few commands need

  return float(optimize.brentq(excess, 0.0, mu**2 / 2 + 10 * mu + 10))


def lower_bound(
  scores: Shaped[ArrayLike, "T E"],
  members: Shaped[ArrayLike, "T E"],
  *,
  delta: float = DELTA,
  confidence: float = 0.95,
  seed: int = 0,
) -> Bound:
  """What an attack's scores refute, the threshold set on one half and judged on the other.

  The half of the examples on which thresholds are tried is random, the same for all targets. Rates
  are means over targets, and their limits those of the examples of *one* target: the others share
  its examples, and are not counted as so many more trials.

  Args:
    scores: float[T, E], an attack's scores.
    members: bool[T, E].
    delta: in [0, 1).
    confidence: in (0, 1).
    seed: of the split.
  Raises:
    ValueError: if shapes differ, a score is NaN, or a half lacks members or non-members.
  """
  scores, members = np.asarray(as_scores(scores)), np.asarray(as_members(members))
  if scores.ndim != 2 or scores.shape != members.shape or np.isnan(scores).any():
    raise ValueError(
      f"scores {scores.shape} and members {members.shape} must both be [T, E], and no score NaN."
    )
  first = np.random.default_rng(seed).permutation(scores.shape[1]) < scores.shape[1] // 2
  tried = np.unique(
    np.quantile(scores[:, first], np.linspace(0, 1, MAX_THRESHOLDS), method="lower")
  )
  options = {"delta": delta, "confidence": confidence}
  counts = _counts(scores[:, first], members[:, first], tried)
  judged = [
    _counts(scores[:, ~first], members[:, ~first], tried[np.argmax(values)])
    for values in (_epsilons(counts, **options), _mus(counts, confidence=confidence))
  ]
  return Bound(
    epsilon_of_counts(judged[0], **options),
    gaussian_of_counts(judged[1], **options),
    delta,
    confidence,
  )


def _counts(scores, members, thresholds):
  """Mean counts of thresholds over targets, of the examples of the one with the fewest."""
  parts = []
  for side in (members, ~members):
    sizes = side.sum(axis=1)
    if sizes.min() == 0:
      raise ValueError("half of the examples has no member, or no non-member; give more examples.")
    rates = [
      1 - np.searchsorted(np.sort(row[chosen]), thresholds) / size
      for row, chosen, size in zip(scores, side, sizes, strict=True)
    ]
    parts += [np.mean(rates, axis=0) * sizes.min(), int(sizes.min())]
  return Counts(*parts)


def _limits(count, trials, tail):
  """Lower limits of rates, and upper limits of their complements, at one tail each."""
  count, trials = np.asarray(count), np.asarray(trials)
  if not ((count >= 0) & (count <= trials) & (trials > 0)).all():
    raise ValueError(f"counts are {count} of {trials}; need 0 to all of at least one.")
  some = np.where(count > 0, count, 1)
  low = np.where(count > 0, scipy.special.betaincinv(some, trials - some + 1, tail), 0.0)
  return low, 1 - low


def _check(delta, confidence):
  if not 0 <= delta < 1 or not 0 < confidence < 1:
    raise ValueError(
      f"delta is {delta}, confidence {confidence}; need delta in [0, 1), confidence in (0, 1)."
    )
