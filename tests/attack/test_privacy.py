"""Lower bounds on epsilon: known counts, mechanisms with a known epsilon, never above it."""

import numpy as np
import pytest
from scipy import stats

from ptq_jax.attack import privacy


def test_counts_against_scipy_limits():
  counts = privacy.Counts(60, 400, 3, 500)

  def limit(count, trials, side):
    test = stats.binomtest(count, trials).proportion_ci(1 - 2 * 0.05 / 4)
    return getattr(test, side)

  tpr, fpr = limit(60, 400, "low"), limit(3, 500, "high")
  tnr, fnr = limit(497, 500, "low"), limit(340, 400, "high")
  expected = max(np.log((tpr - 0.01) / fpr), np.log((tnr - 0.01) / fnr))
  assert privacy.epsilon_of_counts(counts, delta=0.01) == pytest.approx(expected)
  rejecting = privacy.Counts(400, 400, 440, 500)  # only the rejected tell anything
  assert privacy.epsilon_of_counts(rejecting, delta=0.0) == pytest.approx(
    np.log(limit(60, 500, "low") / limit(0, 400, "high"))
  )


def test_guessing_refutes_nothing():
  assert privacy.epsilon_of_counts(privacy.Counts(50, 100, 50, 100)) == 0
  assert privacy.gaussian_of_counts(privacy.Counts(50, 100, 50, 100)) == 0
  assert privacy.epsilon_of_counts(privacy.Counts(0, 100, 0, 100)) == 0
  rng = np.random.default_rng(0)
  members = rng.random((1, 1000)) < 0.5
  above = sum(
    privacy.lower_bound(rng.normal(size=(1, 1000)), members).epsilon > 0 for _ in range(40)
  )
  assert above <= 5  # 2 expected


def test_randomised_response_is_not_overstated_and_nearly_reached():
  """Reporting the truth with odds e^epsilon is epsilon-private; many trials reach it."""
  rng, epsilon = np.random.default_rng(1), 1.5
  honest = np.exp(epsilon) / (1 + np.exp(epsilon))
  bounds = []
  for _ in range(30):
    members = rng.random((1, 4000)) < 0.5
    scores = np.where(rng.random((1, 4000)) < honest, members, ~members).astype(float)
    bounds.append(privacy.lower_bound(scores, members, delta=0.0).epsilon)
  assert np.mean(np.array(bounds) > epsilon) <= 0.1
  assert np.median(bounds) > 1.2


def test_gaussian_mechanism():
  """Scores N(0, 1) and N(mu, 1) are what a mu-Gaussian mechanism leaves."""
  rng, mu = np.random.default_rng(2), 1.0
  truth = privacy.epsilon_of_mu(mu, delta=1e-5)
  one = stats.norm.cdf(mu / 2 - truth / mu)
  other = np.exp(truth) * stats.norm.cdf(-mu / 2 - truth / mu)
  assert one - other == pytest.approx(1e-5, rel=1e-6)
  found = []
  for _ in range(20):
    members = rng.random((1, 4000)) < 0.5
    scores = rng.normal(size=(1, 4000)) + mu * members
    found.append(privacy.lower_bound(scores, members, delta=1e-5))
  assert np.mean([bound.gaussian > truth for bound in found]) <= 0.15
  assert np.median([bound.gaussian for bound in found]) > 0.75 * truth
  assert np.median([bound.epsilon for bound in found]) < truth


def test_more_targets_are_not_more_trials():
  """Ten copies of a target say no more than it does."""
  rng = np.random.default_rng(3)
  members = rng.random((1, 500)) < 0.5
  scores = rng.normal(size=(1, 500)) + 2 * members
  alone = privacy.lower_bound(scores, members)
  copies = privacy.lower_bound(np.repeat(scores, 10, axis=0), np.repeat(members, 10, axis=0))
  assert copies == pytest.approx(alone)
  assert alone.epsilon > 0.5


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="delta is 1"):
    privacy.epsilon_of_counts(privacy.Counts(1, 2, 1, 2), delta=1.0)
  with pytest.raises(ValueError, match=r"counts are 3 of 2"):
    privacy.epsilon_of_counts(privacy.Counts(3, 2, 1, 2))
  with pytest.raises(ValueError, match="no member, or no non-member"):
    privacy.lower_bound(np.zeros((1, 10)), np.ones((1, 10), bool))
