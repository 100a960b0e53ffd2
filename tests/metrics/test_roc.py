"""ROC vertices against scikit-learn and a loop over thresholds; ties, infinities, bad input."""

import functools

import jax
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
  finite = np.minimum(thresholds, np.finfo(np.float64).max)  # +inf passes every finite threshold
  np.testing.assert_array_equal(curve.thresholds[1:], finite)
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
  # One of three non-members may be accused: chance is 2 / 4, not 1 / 3.
  found = roc.precision_at_fpr(scores, members, prior=0.1, fpr=1 / 3)
  assert found == pytest.approx(0.1 / (0.1 + 0.9 * 0.5))


def test_chance_is_what_noise_reaches():
  """Rows 2 and 3: a rate below 1 / n is not kept; with n non-members noise shows 1 / (n + 1)."""
  assert roc.chance(749, fpr=1e-5) == pytest.approx(1 / 750)
  assert roc.chance(8, fpr=0.01) == pytest.approx(1 / 9)
  assert roc.chance(1000, fpr=0.001) == pytest.approx(2 / 1001)
  assert roc.chance(1000, fpr=0.001, rule="below") == pytest.approx(1 / 1001)
  rng, members = np.random.default_rng(0), np.arange(60) < 40
  for fpr, rule in ((0.01, "at_most"), (0.1, "at_most"), (0.1, "below")):
    draws = [roc.tpr_at_fpr(rng.normal(size=60), members, fpr=fpr, rule=rule) for _ in range(2000)]
    expected = roc.chance(20, fpr=fpr, rule=rule)
    assert np.mean(draws) == pytest.approx(expected, abs=4 * np.std(draws) / np.sqrt(2000))


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


METRICS = {
  "auc": roc.auc,
  "balanced_accuracy": roc.balanced_accuracy,
  "at_most": functools.partial(roc.tpr_at_fpr, fpr=0.1),
  "below": functools.partial(roc.tpr_at_fpr, fpr=0.1, rule="below"),
  "precision": functools.partial(roc.precision_at_fpr, prior=0.1, fpr=0.1),
}


@pytest.mark.parametrize("name", METRICS)
def test_on_device_jit_is_eager_is_the_host(scored, name):
  """Row 13's sibling: traced metrics are those of NumPy, ties, infinities and all."""
  scores, members = scored[0].astype(np.float32), scored[1]
  function = METRICS[name]
  expected = function(scores, members)
  assert isinstance(expected, float)
  device = jnp.asarray(scores), jnp.asarray(members)
  eager = function(*device)
  assert isinstance(eager, jax.Array)
  assert float(eager) == pytest.approx(expected, abs=1e-6)
  assert float(jax.jit(function)(*device)) == pytest.approx(expected, abs=1e-6)
  rows = jnp.stack([device[0], -device[0]]), jnp.stack([device[1], ~device[1]])
  each = [function(*pair) for pair in zip(*map(np.asarray, rows), strict=True)]
  np.testing.assert_allclose(jax.vmap(function)(*rows), each, atol=1e-6)


def test_device_curve_has_the_vertices_of_the_host(scored):
  scores, members = scored[0].astype(np.float32), scored[1]
  curve, device = roc.curve(scores, members), jax.jit(roc.curve)(*map(jnp.asarray, scored))
  assert len(device.fpr) == len(scores) + 1
  pairs = {*zip(device.false_positives.tolist(), device.true_positives.tolist(), strict=True)}
  assert pairs == {*zip(curve.false_positives.tolist(), curve.true_positives.tolist(), strict=True)}
  point = roc.point_at_fpr(device, fpr=0.3)
  assert int(point.false_positives) == roc.point_at_fpr(curve, fpr=0.3).false_positives


def test_large_counts_stay_exact_on_a_device():
  """3 of 3000 is exactly .001 in float32 too; 2e5 examples sum without drift."""
  rng = np.random.default_rng(0)
  scores = np.concatenate([np.arange(3000.0), [2998.5, 2996.5, 2995.5]]).astype(np.float32)
  members = np.arange(3003) >= 3000
  device = jnp.asarray(scores), jnp.asarray(members)
  assert float(roc.tpr_at_fpr(*device, fpr=0.001)) == pytest.approx(2 / 3)
  assert float(roc.tpr_at_fpr(*device, fpr=0.001, rule="below")) == pytest.approx(1 / 3)
  scores, members = rng.normal(size=200_000).astype(np.float32), rng.random(200_000) < 0.5
  device = roc.auc(jnp.asarray(scores), jnp.asarray(members))
  assert float(device) == pytest.approx(roc.auc(scores, members), abs=1e-5)


def test_what_is_an_error_is_nan_inside_jit():
  scores, members = jnp.arange(10.0), jnp.arange(10) < 5
  for pair in ((scores, jnp.ones(10, bool)), (scores, jnp.zeros(10, bool)),
               (scores.at[2].set(jnp.nan), members)):  # fmt: skip
    with pytest.raises(ValueError, match=r"examples are members|NaN"):
      roc.auc(*pair)
    for function in METRICS.values():
      assert np.isnan(jax.jit(function)(*pair))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, np.ndarray.tolist])
@pytest.mark.parametrize(
  ("scores", "area"),
  [
    (np.arange(6, dtype=np.uint8), 1.0),
    (np.array([-128, -3, 0, 1, 2, 127], np.int8), 1.0),
    (np.array([127, 2, 1, 0, -3, -128], np.int8), 0.0),
    (np.array([0, 0, 1, 0, 1, 1], bool), 6 / 9),
    (np.array([0, 0, 0, 1, 1, 1], bool), 1.0),
    (np.array([1, 1, 0, 0, 0, 1], bool), 3 / 9),
  ],
)
def test_scores_of_narrow_types_do_not_wrap(scores, area, convert):
  """Row 8: uint8, int8 with -128, and flags, as arrays of the host, of a device, and lists."""
  members = [0, 0, 0, 1, 1, 1]
  found = roc.auc(convert(scores), convert(np.array(members)))
  assert float(found) == pytest.approx(area)


def test_infinite_scores_pass_every_finite_threshold():
  """Row 15: three of 150 non-members have +inf, so an FPR of 1 % lets nobody be accused."""
  rng = np.random.default_rng(0)
  members = np.arange(300) < 150
  scores = rng.normal(size=300) + 2 * members
  scores[-3:] = np.inf
  curve = roc.curve(scores, members)
  nobody = roc.point_at_fpr(curve, fpr=0.01)
  assert nobody[:2] == (0.0, 0.0)
  assert roc.point_at_threshold(scores, members, threshold=nobody.threshold) == nobody
  three = roc.point_at_fpr(curve, fpr=0.02)
  assert three.false_positives == 3
  assert np.isfinite(three.threshold)
  assert roc.point_at_threshold(scores, members, threshold=three.threshold) == three
  assert roc.point_at_threshold(scores, members, threshold=1e300).fpr == 3 / 150
  assert roc.tpr_at_fpr(jnp.asarray(scores), jnp.asarray(members), fpr=0.01) == 0


@pytest.mark.parametrize(
  ("members", "message"),
  [
    (np.array([1, -1] * 5), "members hold -1"),
    (np.array([1.0, np.nan] * 5), "members hold nan"),
    (np.array(["True", "False"] * 5), "must be bool"),
    (jnp.array([1, -1] * 5), "members hold -1"),
  ],
)
def test_membership_is_a_flag(members, message):
  """Row 11."""
  with pytest.raises(ValueError, match=message):
    roc.auc(np.arange(10.0), members)
  with pytest.raises(ValueError, match="scores are of type"):
    roc.auc(np.array(list("abcdefghij")), np.arange(10) < 5)


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
