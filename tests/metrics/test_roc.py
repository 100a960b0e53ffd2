"""ROC vertices against scikit-learn and a loop over thresholds; ties, infinities, bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from ptq_jax.metrics import roc

SETS = {
  "continuous": lambda rng, n: rng.normal(size=n),
  "tied": lambda rng, n: rng.integers(0, 6, size=n).astype(np.float32),
  "constant": lambda rng, n: np.ones(n),
  "infinite": lambda rng, n: rng.choice([-np.inf, 0.0, 1.5, np.inf], size=n),
}


@pytest.fixture(params=SETS)
def scored(request):
  rng = np.random.default_rng(7)
  members = rng.random(200) < 0.4
  return SETS[request.param](rng, 200) + 0.5 * members, members


def rates(scores, members, threshold):
  accepted = scores >= threshold
  return accepted[~members].mean(), accepted[members].mean()


def test_curve_is_every_threshold(scored):
  scores, members = scored
  curve = roc.curve(scores, members)
  thresholds = [*np.sort(np.unique(scores))[::-1]]
  expected = [(0.0, 0.0)] + [rates(scores, members, t) for t in thresholds]
  np.testing.assert_allclose(np.stack([curve.fpr, curve.tpr], 1), expected)
  np.testing.assert_array_equal(curve.thresholds[1:], thresholds)
  assert curve.false_positives[-1] == (~members).sum()
  assert curve.true_positives[-1] == members.sum()


@pytest.mark.parametrize("rule", ["at_most", "below"])
@pytest.mark.parametrize("fpr", [1.0, 0.5, 0.1, 0.05, 0.01, 1e-5])
def test_tpr_at_fpr_is_the_best_allowed_threshold(scored, fpr, rule):
  scores, members = scored
  points = [(0.0, 0.0)] + [rates(scores, members, t) for t in np.unique(scores)]
  allowed = [tpr for rate, tpr in points if (rate <= fpr if rule == "at_most" else rate < fpr)]
  assert roc.tpr_at_fpr(scores, members, fpr=fpr, rule=rule) == max(allowed)


def test_areas_match_scikit_learn(scored):
  scores, members = scored
  ranks = np.unique(scores, return_inverse=True)[1]  # scikit-learn refuses infinities
  assert roc.auc(scores, members) == pytest.approx(metrics.roc_auc_score(members, ranks), abs=1e-14)
  fpr, tpr, _ = metrics.roc_curve(members, ranks, drop_intermediate=False)
  assert roc.balanced_accuracy(scores, members) == pytest.approx(np.max(1 + tpr - fpr) / 2)


def test_hand_table():
  scores = np.array([9.0, 8.0, 8.0, 7.0, 6.0, 5.0])
  members = np.array([True, True, False, True, False, False])
  curve = roc.curve(scores, members)
  np.testing.assert_allclose(curve.fpr, [0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
  np.testing.assert_allclose(curve.tpr, [0, 1 / 3, 2 / 3, 1, 1, 1])
  assert roc.auc(scores, members) == pytest.approx(5 / 6)  # 7 pairs won, 1 tied, of 9
  assert roc.balanced_accuracy(scores, members) == pytest.approx(5 / 6)
  at_third = {rule: roc.tpr_at_fpr(scores, members, fpr=1 / 3, rule=rule) for rule in roc.RULES}
  assert at_third == {"at_most": 1.0, "below": pytest.approx(1 / 3)}
  assert roc.precision_at_fpr(scores, members, prior=0.1, fpr=1 / 3) == pytest.approx(0.25)


def test_rates_are_exact_fractions():
  # 3 of 3000 non-members are exactly the rate 0.001: "at_most" accepts them, "below" does not.
  scores = np.concatenate([np.arange(3000.0), [2998.5, 2996.5, 2995.5]])
  members = np.arange(3003) >= 3000
  assert roc.tpr_at_fpr(scores, members, fpr=0.001) == pytest.approx(2 / 3)
  assert roc.tpr_at_fpr(scores, members, fpr=0.001, rule="below") == pytest.approx(1 / 3)


def test_constant_scores_say_nothing():
  scores, members = np.zeros(10), np.arange(10) < 5
  assert roc.auc(scores, members) == roc.balanced_accuracy(scores, members) == 0.5
  assert roc.tpr_at_fpr(scores, members, fpr=0.99) == 0.0


def test_order_and_growing_functions_do_not_matter(scored):
  scores, members = scored
  shuffle = np.random.default_rng(0).permutation(len(scores))
  for other, labels in ((scores[shuffle], members[shuffle]), (np.arctan(scores) * 3 + 1, members)):
    curve, again = roc.curve(scores, members), roc.curve(other, labels)
    np.testing.assert_array_equal(curve.false_positives, again.false_positives)
    np.testing.assert_array_equal(curve.true_positives, again.true_positives)


def test_jax_arrays_give_the_same(scored):
  scores, members = scored
  scores = scores.astype(np.float32)
  on_device = roc.auc(jnp.asarray(scores), jnp.asarray(members))
  assert on_device == roc.auc(scores, members)


def test_point_at_threshold_realises_the_vertex(scored):
  scores, members = scored
  vertex = roc.point_at_fpr(roc.curve(scores, members), fpr=0.3)
  if vertex.tpr > 0:
    assert roc.point_at_threshold(scores, members, threshold=vertex.threshold) == vertex


def test_grid_reads_the_steps(scored):
  scores, members = scored
  grid = np.array([1e-3, 0.1, 0.5, 1.0])
  expected = [roc.tpr_at_fpr(scores, members, fpr=fpr) for fpr in grid]
  np.testing.assert_array_equal(roc.tpr_on_grid(roc.curve(scores, members), grid), expected)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s, m: (s, np.ones_like(m)), "10 of 10 examples are members"),
    (lambda s, m: (s, np.zeros_like(m)), "0 of 10 examples are members"),
    (lambda s, m: (np.where(m, np.nan, s), m), "5 of 10 scores are NaN"),
    (lambda s, m: (s[:0], m[:0]), "0 of 0 examples"),
  ],
)
def test_what_has_no_curve_is_refused(change, message):
  scores, members = change(np.arange(10.0), np.arange(10) < 5)
  for function in (roc.curve, roc.auc, roc.balanced_accuracy):
    with pytest.raises(ValueError, match=message):
      function(scores, members)


def test_options_out_of_range_are_refused():
  scores, members = np.arange(10.0), np.arange(10) < 5
  for fpr in (0.0, -0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match="fpr is"):
      roc.tpr_at_fpr(scores, members, fpr=fpr)
  with pytest.raises(ValueError, match="prior is"):
    roc.precision_at_fpr(scores, members, prior=1.0, fpr=0.1)
  with pytest.raises((ValueError, TypeError), match="interpolated"):
    roc.tpr_at_fpr(scores, members, fpr=0.1, rule="interpolated")
  with pytest.raises((ValueError, TypeError)):
    roc.curve(scores, members[:-1])
