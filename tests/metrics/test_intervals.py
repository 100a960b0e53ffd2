"""Bootstrap draws against explicit weights and known standard errors; intervals that cover."""

import jax
import numpy as np
import pytest
from scipy import stats

from ptq_jax.metrics import intervals, roc

LEVELS = tuple(intervals.Level(fpr, rule) for fpr in (0.2, 0.01) for rule in roc.RULES)


def draw(rng, num_targets, num_examples, gap, *, decimals=6):
  members = np.arange(num_examples) % 2 == rng.integers(0, 2, size=(num_targets, 1))
  scores = rng.normal(size=(num_targets, num_examples)) + gap * members
  return np.round(scores, decimals), members


def test_measure_is_roc_per_target():
  scores, members = draw(np.random.default_rng(0), 3, 50, 1.0)
  values = intervals.measure(scores, members, levels=LEVELS)
  for t, pair in enumerate(zip(scores, members, strict=True)):
    assert values.auc[t] == roc.auc(*pair)
    assert values.balanced_accuracy[t] == roc.balanced_accuracy(*pair)
    for i, (fpr, rule) in enumerate(LEVELS):
      assert values.tpr[t, i] == roc.tpr_at_fpr(*pair, fpr=fpr, rule=rule)


def repeated(weights, scores, members):
  return np.repeat(scores, weights), np.repeat(members, weights)


@pytest.mark.parametrize("decimals", [6, 0])
def test_resampled_rates_are_those_of_repeated_examples(key, decimals, monkeypatch):
  """Weights are counts: repeating each example so often gives the same rates, ties and all."""
  rng = np.random.default_rng(1)
  scores, members = draw(rng, 2, 60, 1.0, decimals=decimals)
  audited = rng.random((2, 60)) < 0.8
  weights = rng.poisson(1.0, size=(60, 5)).astype(np.uint8)
  monkeypatch.setattr(intervals, "_poisson_counts", lambda key, shape: weights)
  draws = intervals.resample(key, scores, members, levels=LEVELS, num_resamples=5, audited=audited)
  for r in range(5):
    for t in range(2):
      pair = repeated(weights[:, r] * audited[t], scores[t], members[t])
      for i, (fpr, rule) in enumerate(LEVELS):
        rate = roc.tpr_at_fpr(*pair, fpr=fpr, rule=rule)
        assert draws.tpr[r, t, i] == pytest.approx(rate, abs=1e-6)
      curve = roc.curve(scores[t, audited[t]], members[t, audited[t]])
      cut = curve.thresholds[np.argmax(curve.tpr - curve.fpr)]
      point = roc.point_at_threshold(*pair, threshold=cut)
      assert draws.balanced_accuracy[r, t] == pytest.approx((1 + point.tpr - point.fpr) / 2)


@pytest.mark.parametrize("decimals", [6, 0])
def test_resampled_areas_are_exact_to_first_order(key, decimals, monkeypatch):
  """What is left out falls faster than the resampled change of the area itself."""
  rng = np.random.default_rng(2)
  scores, members = draw(rng, 1, 4000, 1.0, decimals=decimals)
  weights = rng.poisson(1.0, size=(4000, 20)).astype(np.uint8)
  monkeypatch.setattr(intervals, "_poisson_counts", lambda key, shape: weights)
  draws = intervals.resample(key, scores, members, levels=(), num_resamples=20)
  exact = [roc.auc(*repeated(w, scores[0], members[0])) for w in weights.T]
  change = np.std(exact)
  np.testing.assert_allclose(draws.auc[:, 0], exact, atol=0.1 * change)
  assert np.corrcoef(draws.auc[:, 0], exact)[0, 1] > 0.999


def test_a_group_of_one_is_never_lost(key):
  scores, members = np.array([[3.0, 1.0, 2.0]]), np.array([[True, False, False]])
  draws = intervals.resample(key, scores, members, levels=LEVELS[:1], num_resamples=50)
  assert all(np.isfinite(part).all() for part in draws)


def test_counts_are_poisson(key):
  counts = np.asarray(intervals._poisson_counts(key, (1000, 300)))
  expected = stats.poisson(1).pmf(np.arange(6))
  observed = np.bincount(counts.ravel(), minlength=6)[:6] / counts.size
  np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / counts.size))
  assert counts.max() >= 6


def test_spread_of_the_area_matches_delong(key):
  scores, members = draw(np.random.default_rng(2), 1, 2000, 0.7)
  draws = intervals.resample(key, scores, members, levels=(), num_resamples=800)
  inside, outside = scores[members], scores[~members]
  above = (inside[:, None] > outside[None]).astype(float)
  error = np.sqrt(above.mean(1).var() / len(inside) + above.mean(0).var() / len(outside))
  assert draws.auc.std() == pytest.approx(error, rel=0.1)
  assert draws.tpr.shape == (800, 1, 0)


def test_blocks_of_resamples_are_of_one_kind(key, monkeypatch):
  scores, members = draw(np.random.default_rng(3), 2, 400, 0.7)
  whole = intervals.resample(key, scores, members, levels=LEVELS, num_resamples=150)
  monkeypatch.setattr(intervals, "BLOCK_ELEMENTS", 400 * 64)
  parts = intervals.resample(key, scores, members, levels=LEVELS, num_resamples=150)
  assert parts.tpr.shape == whole.tpr.shape == (150, 2, len(LEVELS))
  assert len(np.unique(parts.auc[:, 0])) == 150  # no block repeats another
  assert stats.ks_2samp(parts.auc[:, 0], whole.auc[:, 0]).pvalue > 1e-3


def test_intervals_cover_the_truth():
  """Known Gaussians, 100 studies: 95 % intervals hold the true AUC and TPR in most of them."""
  gap, num_studies = 1.0, 100
  truth = {"auc": stats.norm.cdf(gap / np.sqrt(2)), "tpr": stats.norm.sf(stats.norm.isf(0.2) - gap)}
  scores, members = draw(np.random.default_rng(4), num_studies, 600, gap)
  values = intervals.measure(scores, members, levels=LEVELS[:1])
  draws = intervals.resample(
    jax.random.key(5), scores, members, levels=LEVELS[:1], num_resamples=300
  )
  covered = {"auc": 0, "tpr": 0}
  for t in range(num_studies):
    one = slice(t, t + 1)
    area = intervals.over_examples(values.auc[one], draws.auc[:, one])
    rate = intervals.over_examples(values.tpr[one, 0], draws.tpr[:, one, 0])
    covered["auc"] += area.low <= truth["auc"] <= area.high
    covered["tpr"] += rate.low <= truth["tpr"] <= rate.high
    assert area.low < area.value < area.high
  assert 88 <= covered["auc"] <= 100  # 95 expected, two-sided 3 sigma
  assert 88 <= covered["tpr"] <= 100


def test_value_lies_within_its_interval_even_where_resamples_are_biased():
  """A maximum is larger in every resample; plain percentiles would exclude the value itself."""
  draws = 0.53 + 0.005 * np.random.default_rng(6).normal(size=(1000, 1))
  interval = intervals.over_examples(np.array([0.51]), draws)
  assert interval.low == pytest.approx(0.51 - 0.0098, abs=0.001)
  assert interval.high == pytest.approx(0.51 + 0.0098, abs=0.001)


def test_models_that_differ_widen_the_interval_over_both(key):
  members = np.broadcast_to(np.arange(400) % 2 == 0, (10, 400))
  rng = np.random.default_rng(7)
  gaps = np.linspace(0, 2, 10)[:, None]
  scores = rng.normal(size=(10, 400)) + gaps * members
  values = intervals.measure(scores, members, levels=())
  draws = intervals.resample(key, scores, members, levels=(), num_resamples=400)
  examples = intervals.over_examples(values.auc, draws.auc)
  both = intervals.over_both(values.auc, draws.auc)
  targets = intervals.over_targets(values.auc)
  assert examples.value == both.value == pytest.approx(targets.value)
  assert both.high - both.low > 2 * (examples.high - examples.low)
  assert both.high - both.low == pytest.approx(targets.high - targets.low, rel=0.3)
  names = [interval.interval for interval in (examples, both, targets)]
  assert names == [
    "bootstrap over examples, 95 %",
    "over examples and models, 95 %",
    "t-interval over targets, 95 %",
  ]


@pytest.mark.parametrize("num_targets", [2, 8])
@pytest.mark.parametrize("model_effect", [0.0, 1.0])
def test_two_way_variance_counts_the_interaction_once(num_targets, model_effect):
  """Known effects of examples, models and both: 95 % intervals hold the mean 92 to 98 % often."""
  rng = np.random.default_rng(0)
  held, trials, variances = 0, 1000, []
  for _ in range(trials):
    shared, own = rng.normal(), rng.normal(size=num_targets)
    values = shared + own + model_effect * rng.normal(size=num_targets)
    draws = rng.normal(size=(200, 1)) + rng.normal(size=(200, num_targets))
    variance, freedom = intervals.two_way(values, draws)
    held += abs(values.mean()) <= stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    variances.append(variance)
  assert 0.92 * trials <= held <= 0.985 * trials
  if num_targets == 8 and model_effect:  # elsewhere a negative share of the models is cut to 0
    assert np.mean(variances) == pytest.approx(1 + 2 / 8, rel=0.04)


def test_t_interval_against_scipy():
  values = np.array([0.2, 0.25, 0.3, 0.22])
  interval = intervals.over_targets(values, confidence=0.9)
  low, high = stats.t.interval(0.9, 3, loc=values.mean(), scale=stats.sem(values))
  assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
  assert interval.interval == "t-interval over targets, 90 %"
  assert intervals.over_targets(values[:1])[:3] == (0.2, 0.0, 1.0)


def test_one_target_falls_back_and_says_so(key):
  draws = np.linspace(0.4, 0.6, 101)[:, None]
  both = intervals.over_both(np.array([0.5]), draws)
  assert both == intervals.over_examples(np.array([0.5]), draws)
  assert both.interval.startswith("bootstrap over examples,")


def test_no_true_positive_gives_an_exact_upper_limit():
  interval = intervals.over_examples(np.zeros(1), np.zeros((50, 1)), trials=750)
  assert interval.low == 0
  assert interval.high == pytest.approx(1 - 0.025 ** (1 / 750))
  assert interval.interval == "exact binomial, 95 %"
  assert intervals.over_examples(np.zeros(1), np.zeros((50, 1))).high == 0


def test_bad_input_is_named(key):
  scores, members = draw(np.random.default_rng(8), 2, 20, 1.0)
  with pytest.raises(ValueError, match="num_resamples is 0"):
    intervals.resample(key, scores, members, levels=(), num_resamples=0)
  with pytest.raises(ValueError, match="20 of 20 examples are members"):
    intervals.resample(key, scores, np.ones_like(members), levels=())
  with pytest.raises(ValueError, match="fpr is 0"):
    intervals.resample(key, scores, members, levels=[intervals.Level(0.0)])


def test_paired_intervals_of_a_difference_cover_it_and_are_narrower(key):
  """Two attacks that share most of their noise: pairing tells them apart where overlap cannot."""
  rng = np.random.default_rng(7)
  covered, apart, trials = 0, 0, 60
  for trial in range(trials):
    base, members = draw(rng, 6, 400, 0.6)
    better = base + 0.25 * members + 0.1 * rng.normal(size=base.shape)
    k = jax.random.fold_in(key, trial)
    measured = [
      (
        intervals.measure(scores, members, levels=()).auc,
        intervals.resample(k, scores, members, levels=(), num_resamples=200).auc,
      )
      for scores in (better, base)
    ]
    found = intervals.of_difference(*measured[0], *measured[1])
    alone = [intervals.over_both(*pair) for pair in measured]
    assert found.value == pytest.approx(alone[0].value - alone[1].value)
    assert found.high - found.low < 0.5 * sum(i.high - i.low for i in alone)
    truth = stats.norm.cdf(0.85 / np.sqrt(2 + 0.01)) - stats.norm.cdf(0.6 / np.sqrt(2))
    covered += found.low <= truth <= found.high
    apart += found.low > 0
  assert covered >= 0.8 * trials
  assert apart >= 0.95 * trials
  assert found.interval == "paired, over examples and models, 95 %"


def test_a_difference_may_be_negative_and_of_one_target():
  values, draws = np.array([0.2]), np.full((50, 1), 0.2)
  found = intervals.of_difference(values, draws, values + 0.3, draws + 0.3)
  assert found[:3] == pytest.approx((-0.3, -0.3, -0.3))
  assert found.interval == "paired, over examples, 95 %"


def test_paired_intervals_of_a_ratio_cover_it():
  """Targets and examples vary both rates alike: the ratio .4 is surer than either rate."""
  rng, held, widths = np.random.default_rng(7), 0, []
  for _ in range(300):
    shared = rng.normal(size=(8, 1)) * 0.1, rng.normal(size=400) * 0.1
    noise = rng.normal(size=(2, 8, 1)) * 0.03
    rates = [
      0.3 * base * np.exp(shared[0] + own) for base, own in zip((0.4, 1), noise, strict=True)
    ]
    draws = [(rate.T * np.exp(shared[1][:, None])) for rate in rates]
    one, other = ((rate[:, 0], draw) for rate, draw in zip(rates, draws, strict=True))
    found = intervals.of_ratio(*one, *other)
    held += found.low <= 0.4 <= found.high
    widths.append(found.high / found.low)
  assert held >= 279  # 93 %
  assert np.mean(widths) < 1.1
  assert intervals.of_ratio(*one, *one)[:3] == (1.0, 1.0, 1.0)
  nothing = np.zeros(8), np.zeros((400, 8))
  assert intervals.of_ratio(*one, *nothing) is None
  assert intervals.of_ratio(*nothing, *one)[:2] == (0.0, 0.0)
  assert np.isnan(intervals.of_ratio(*nothing, *one).high)
  single = [part[..., :1] for part in (*one, *other)]
  assert intervals.of_ratio(*single).interval == "paired, over examples, 95 %"


def test_accuracy_of_one_target_rests_on_its_test_set():
  """Row 6: 95 % and 10 % of 1000 test images: binomial intervals, a difference of -85 points."""
  full, quantized = np.array([0.95]), np.array([0.10])
  alone = intervals.of_accuracy(full, num_examples=1000)
  assert (alone.low, alone.high) == intervals.binomial(950, 1000)[1:3]
  assert alone.low > 0.93
  change = intervals.of_accuracy_difference(quantized, full, num_examples=1000)
  assert change.value == pytest.approx(-0.85)
  assert -0.88 < change.low < change.high < -0.82
  assert change.p < 1e-9
  same = intervals.of_accuracy_difference(full, full, num_examples=1000)
  assert same.p == 1.0
  assert same.low < 0 < same.high
  assert intervals.of_accuracy_difference(full, full, num_examples=None) is None


def test_accuracy_that_all_targets_share_is_not_certain():
  found = intervals.of_accuracy(np.ones(8), num_examples=200)
  assert found.value == found.high == 1
  assert found.low == pytest.approx(0.025 ** (1 / 200))
  assert found.interval.startswith("exact binomial")


def test_accuracy_of_targets_is_compared_pairwise():
  full = np.array([0.90, 0.80, 0.85, 0.95])
  change = intervals.of_accuracy_difference(full - 0.01, full, num_examples=500)
  assert change[:3] == pytest.approx((-0.01, -0.01, -0.01))
  assert change.p < 1e-9
  noisy = full + np.array([0.01, -0.01, 0.01, -0.012])
  found = intervals.of_accuracy_difference(noisy, full, num_examples=500)
  expected = stats.ttest_rel(noisy, full)
  assert found.p == pytest.approx(expected.pvalue)
  bounds = expected.confidence_interval()
  assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))


def test_holm_against_its_definition():
  rng = np.random.default_rng(0)
  for _ in range(50):
    p = rng.random(6) ** 4
    adjusted, worst = {}, 0.0
    for rank, i in enumerate(np.argsort(p)):
      worst = max(worst, p[i] * (6 - rank))
      adjusted[i] = worst
    assert intervals.holm(p.tolist()) == [adjusted[i] <= 0.05 for i in range(6)]
