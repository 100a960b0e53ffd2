"""The leakage record: what it says follows from its parts; transferred thresholds; calibration."""

import json

import jax
import numpy as np
import pytest
from scipy import stats

from ptq_jax.metrics import intervals, leakage, roc

T, E = 4, 500


@pytest.fixture(scope="module")
def audit():
  rng = np.random.default_rng(0)
  members = np.stack([rng.permutation(E) < E // 2 for _ in range(T)])
  return rng.normal(size=(T, E)) + 1.5 * members, members


@pytest.fixture(scope="module")
def record(audit):
  return leakage.summarise(jax.random.key(0), *audit, num_resamples=200)


def test_record_is_json_and_complete(record):
  again = json.loads(json.dumps(record, allow_nan=False))
  assert again == record
  assert (record["num_targets"], record["num_members"], record["num_non_members"]) == (T, 250, 250)
  assert [(p["fpr"], p["rule"]) for p in record["tpr"]] == [
    (fpr, rule) for rule in ("at_most", "below") for fpr in leakage.FPRS
  ]
  assert [(p["prior"], p["fpr"]) for p in record["precision"]] == [
    (prior, fpr) for prior in leakage.PRIORS for fpr in leakage.FPRS
  ]


def test_numbers_are_means_over_targets(audit, record):
  scores, members = audit
  pairs = list(zip(scores, members, strict=True))
  assert record["auc"]["value"] == pytest.approx(np.mean([roc.auc(*p) for p in pairs]))
  for row in record["tpr"]:
    level = {"fpr": row["fpr"], "rule": row["rule"]}
    points = [roc.point_at_fpr(roc.curve(*p), **level) for p in pairs]
    assert row["value"] == pytest.approx(np.mean([point.tpr for point in points]))
    assert row["false_positives"] == min(point.false_positives for point in points)
    assert row["total_false_positives"] == sum(point.false_positives for point in points)
    assert row["few_false_positives"] == (row["false_positives"] < 10)
    for number in (row, row["over_examples"], row["over_targets"]):
      assert number["low"] <= number["value"] <= number["high"]
  for row in record["precision"]:
    tpr = np.mean([roc.tpr_at_fpr(*p, fpr=row["fpr"]) for p in pairs])
    promised = roc.chance(250, fpr=row["fpr"])
    assert row["value"] == pytest.approx(roc.precision(tpr, promised, prior=row["prior"]))
    assert row["low"] <= row["value"] <= row["high"]
  curve = record["curve"]
  at = int(np.argmin(np.abs(np.array(curve["fpr"]) - 0.1)))
  expected = np.mean([roc.tpr_at_fpr(*p, fpr=curve["fpr"][at]) for p in pairs])
  assert curve["tpr"][at] == pytest.approx(expected)


def naive_transfer(scores, members, t, fpr, rule, pool):
  """Tries every score of the pool, and one above all, as threshold 'accept what is above'."""
  rates = {cut: (pool > cut).mean() for cut in [*pool, -np.inf]}
  allowed = [c for c, rate in rates.items() if (rate <= fpr if rule == "at_most" else rate < fpr)]
  accepted = scores[t] > min(allowed)
  return accepted[members[t]].mean(), accepted[~members[t]].mean()


def test_a_comparison_is_of_the_same_examples_and_targets(audit, record):
  """An attack does not differ from itself; from another by the difference of the two records."""
  scores, members = audit
  key = jax.random.key(0)
  worse = scores - 0.5 * members
  one, other = (leakage.sample(key, rows, members, num_resamples=200) for rows in (scores, worse))
  same = leakage.compare(one, one)
  assert {same["auc"][part] for part in ("value", "low", "high")} == {0.0}
  assert same["auc"]["p"] == 1.0
  found = leakage.compare(one, other)
  assert found["auc"]["p"] < 1e-3
  worse_record = leakage.summarise(key, worse, members, sampled=other)
  gap = record["auc"]["value"] - worse_record["auc"]["value"]
  assert found["auc"]["value"] == pytest.approx(gap)
  assert 0 < found["auc"]["low"] < gap < found["auc"]["high"]
  levels = [(p["fpr"], p["rule"]) for p in record["tpr"]]
  assert [(p["fpr"], p["rule"]) for p in found["tpr"]] == levels
  assert leakage.summarise(key, scores, members, sampled=one) == record


def test_ratios_at_every_level_are_those_of_the_rates(audit, record):
  scores, members = audit
  key, options = jax.random.key(0), {"num_resamples": 50, "fprs": (0.1, 0.01)}
  weak = leakage.sample(key, scores + 2 * np.random.default_rng(3).normal(size=scores.shape),
                        members, **options)  # fmt: skip
  plain = leakage.sample(key, scores, members, **options)
  ratios = leakage.compare(weak, plain)["tpr_ratio"]
  assert [(r["fpr"], r["rule"]) for r in ratios] == [tuple(level) for level in plain.levels]
  for i, ratio in enumerate(ratios):
    expected = weak.values.tpr[:, i].mean() / plain.values.tpr[:, i].mean()
    assert ratio["value"] == pytest.approx(expected)
    assert 0 < ratio["low"] < ratio["value"] < ratio["high"]
  nothing = plain._replace(values=plain.values._replace(tpr=0 * plain.values.tpr))
  assert leakage.compare(weak, nothing)["tpr_ratio"] == []


def test_member_accuracy_and_moments_against_loops():
  rng = np.random.default_rng(4)
  members = rng.random((3, 20)) < [[0.5], [0.2], [0.9]]
  correct, scores = rng.random((3, 20, 2)) < 0.7, rng.normal(size=(3, 20, 2))
  found, moments = leakage.member_accuracy(correct, members), leakage.score_moments(scores, members)
  for side, wanted in (("members", True), ("non_members", False)):
    values = [scores[m, e, v] for m in range(3) for e in range(20) for v in range(2)
              if members[m, e] == wanted]  # fmt: skip
    mean = sum(values) / len(values)
    assert moments[side]["mean"] == pytest.approx(mean)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert moments[side]["sd"] == pytest.approx(variance**0.5)
  for m in range(3):
    own = [correct[m, e, v] for e in range(20) for v in range(2) if members[m, e]]
    assert found[m] == pytest.approx(sum(own) / len(own))
  assert np.isnan(leakage.member_accuracy(correct[:1], np.zeros((1, 20), bool))).all()


@pytest.mark.parametrize("rule", ["at_most", "below"])
def test_thresholds_are_set_on_other_models(audit, rule):
  scores, members = np.round(audit[0], 1), audit[1]
  levels = [intervals.Level(fpr, rule) for fpr in (1.0, 0.1, 0.01, 1e-5)]
  rows = leakage.transferred(scores, members, levels=levels)
  shadows = leakage.Pool(np.round(scores[::-1] + 0.5, 1), members[::-1])
  given = leakage.transferred(scores[:1], members[:1], levels=levels, shadows=shadows)
  for i, (fpr, _) in enumerate(levels):
    for t in range(T):
      others = np.concatenate([scores[o][~members[o]] for o in range(T) if o != t])
      expected = naive_transfer(scores, members, t, fpr, rule, others)
      assert (rows[i][t].tpr, rows[i][t].fpr) == pytest.approx(expected)
    pool = shadows.scores[~shadows.members]
    expected = naive_transfer(scores, members, 0, fpr, rule, pool)
    assert (given[i][0].tpr, given[i][0].fpr) == pytest.approx(expected)
  assert leakage.transferred(scores[:1], members[:1], levels=levels) is None


def test_transferred_rate_is_what_was_aimed_at(record):
  row = record["tpr"][0]
  assert row["transferred"]["fpr"]["value"] == pytest.approx(0.01, abs=0.01)
  assert row["transferred"]["tpr"]["value"] == pytest.approx(row["value"], abs=0.1)


def test_one_target_is_marked_as_such(audit):
  scores, members = audit
  record = leakage.summarise(
    jax.random.key(0), scores[:1], members[:1], fprs=(0.01,), priors=(), num_resamples=200
  )
  assert record["num_targets"] == 1
  assert record["auc"]["interval"].startswith("bootstrap over examples,")
  assert record["tpr"][0]["transferred"] is None
  assert record["precision"] == []


def test_only_the_audited_count(audit):
  scores, members = audit
  audited = np.arange(E)[None] < np.array([300, 310, 320, 330])[:, None]
  record = leakage.summarise(
    jax.random.key(0), scores, members, audited=audited, fprs=(0.1,), num_resamples=100
  )
  cut = [(scores[t, :n], members[t, :n]) for t, n in enumerate((300, 310, 320, 330))]
  assert record["auc"]["value"] == pytest.approx(np.mean([roc.auc(*pair) for pair in cut]))
  assert record["auc"]["low"] < record["auc"]["value"] < record["auc"]["high"]
  assert record["tpr"][0]["value"] == pytest.approx(
    np.mean([roc.tpr_at_fpr(*pair, fpr=0.1) for pair in cut])
  )
  assert record["num_non_members"] == min((~inside).sum() for _, inside in cut)


def test_nobody_found_has_an_upper_limit():
  """All non-members above all members: TPR is 0, but 0 of 250 does not mean 0."""
  members = np.arange(E)[None] < E // 2
  scores = np.arange(E, dtype=float)[None]
  record = leakage.summarise(jax.random.key(0), scores, members, fprs=(0.01,), num_resamples=100)
  assert record["tpr"][0]["value"] == 0
  assert record["tpr"][0]["high"] == pytest.approx(1 - 0.025 ** (1 / 250))


def test_calibration_members_are_audited_apart(audit):
  scores, members = audit
  rng = np.random.default_rng(1)
  calibrated = members & (rng.random((T, E)) < 0.4)
  exposed = scores + 2.0 * calibrated
  audits = leakage.calibration_audits(members, calibrated)
  assert list(audits) == ["calibration members", "other members", "calibration among members"]
  areas = {}
  for name, (chosen, audited) in audits.items():
    values = intervals.measure(exposed, chosen, levels=(), audited=audited)
    areas[name] = values.auc.mean()
  for t in range(T):
    keep = ~members[t] | calibrated[t]
    expected = roc.auc(exposed[t, keep], members[t, keep])
    audit_ = audits["calibration members"]
    one = intervals.measure(
      exposed[t : t + 1], audit_.members[t : t + 1], levels=(), audited=audit_.audited[t : t + 1]
    )
    assert one.auc[0] == expected
  assert areas["calibration members"] > areas["other members"] + 0.05
  assert areas["calibration among members"] > 0.85
  disjoint = leakage.calibration_audits(members, ~members & (rng.random((T, E)) < 0.4))
  assert list(disjoint) == ["other members", "calibration among non-members"]
  untouched = disjoint["other members"].audited
  assert not (untouched & ~members & disjoint["calibration among non-members"].members).any()


def test_noise_does_not_exceed_chance_where_no_false_positive_is_allowed():
  """Row 2: 749 non-members, FPR 1e-5, pure noise: chance is .133 %, and TPR is that on average."""
  rng = np.random.default_rng(0)
  members = np.arange(1498)[None] < 749
  rates, exceeded = [], 0
  for trial in range(200):
    scores = rng.normal(size=(1, 1498))
    rates.append(roc.tpr_at_fpr(scores[0], members[0], fpr=1e-5))
    if trial < 30:
      entry = leakage.summarise(
        jax.random.key(trial), scores, members, fprs=(1e-5,), rules=("at_most",), num_resamples=50
      )["tpr"][0]
      assert entry["chance"] == pytest.approx(1 / 750)
      assert entry["realised_fpr"]["value"] == 0
      assert entry["realised_fpr"]["high"] == pytest.approx(1 - 0.025 ** (1 / 749))
      exceeded += entry["low"] > entry["chance"]
  assert np.mean(rates) == pytest.approx(1 / 750, abs=4 * np.std(rates) / np.sqrt(200))
  assert exceeded <= 6


def test_precision_holds_what_the_threshold_truly_does():
  """Row 4: one target, 749 non-members, FPR 1e-5, prior 1 %: the interval holds the truth."""
  rng = np.random.default_rng(1)
  members = np.arange(1498)[None] < 749
  held = 0
  for trial in range(40):
    scores = rng.normal(size=(1, 1498)) + 2.0 * members
    entry = leakage.summarise(
      jax.random.key(trial), scores, members, fprs=(1e-5,), rules=("at_most",), priors=(0.01,),
      num_resamples=100,
    )["precision"][0]  # fmt: skip
    cut = scores[0][~members[0]].max()
    truth = roc.precision(stats.norm.sf(cut - 2.0), stats.norm.sf(cut), prior=0.01)
    held += entry["low"] <= truth <= entry["high"]
    assert entry["value"] < 0.75
  assert held >= 36


def test_infinite_scores_of_non_members_are_realised(audit):
  """Row 15: a threshold set elsewhere accepts every +inf; the realised rate says so."""
  members = np.stack([np.arange(300) < 150] * 2)
  scores = np.random.default_rng(0).normal(size=(2, 300)) + members
  scores[:, -3:] = np.inf
  record = leakage.summarise(
    jax.random.key(0), scores, members, fprs=(0.01, 0.05), rules=("at_most",), num_resamples=50
  )
  blind, able = record["tpr"]
  assert blind["value"] == blind["realised_fpr"]["value"] == 0
  assert blind["transferred"]["fpr"]["value"] == 0
  assert able["transferred"]["fpr"]["value"] >= 0.02
  assert able["value"] > 0
