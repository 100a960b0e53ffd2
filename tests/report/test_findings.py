import pytest

from ptq_jax.report import findings, records


def rates(example, value, spread=0.1):
  return [example.rate(value, spread=spread, fpr=0.01, rule="at_most", false_positives=250)]


def audit(example, full, plain, matched, *, accuracy=(0.9, 0.8), spread=0.1):
  """Full precision and one variant, by TPR at 1 % FPR."""
  found = [example.leakage(tpr=rates(example, full, spread), accuracy=accuracy[0])]
  half = 0.006
  for attacker, value in (("full_precision", plain), ("matched", matched)):
    if value is not None:
      fields = {
        "minus_full_precision": example.differences(value - full, half=half),
        "accuracy_minus_full_precision": example.paired(accuracy[1] - accuracy[0], half=0.01),
      }
      if attacker == "matched":
        fields["minus_full_precision_shadows"] = example.differences(value - plain, half=half)
      tpr = rates(example, value, spread)
      found.append(example.leakage("obc", 3, 3, attacker, tpr=tpr, accuracy=accuracy[1], **fields))
  return found


def test_a_clear_drop_is_a_finding(example):
  found = findings.summarize([example.run(), *audit(example, 0.10, 0.02, 0.05)])
  assert found.headline == (
    "OBC at 1.58 bit lowers leakage from 10.0% to 5.0% of members found at 1% false positives,"
    " at a cost of 10.0 points of test accuracy."
  )
  assert found.audited == (
    "16 convnet models (19,562 parameters) on digits (1,500 examples, each model trained on half of"
    " them); each is attacked with the others as shadows. Attack: LiRA online."
  )
  assert found.points == [
    "At full precision the attack finds 10.0% of members (9.0\u201311.0%) at 1% false"
    " positives, 10.0 times chance (1.0%).",
    "1 of 1 quantized variants leaks measurably less than full precision; the one with most bits is"
    " OBC at 1.58 bit.",
    "LiRA online with full-precision shadows, on scores as they are, underestimates leakage most"
    " for OBC at 1.58 bit: it finds 2.0% of members where the best attacker finds 5.0%. That one"
    " finds measurably more in 1 of 1 quantized variants.",
  ]


def test_a_clear_rise_is_said(example):
  found = findings.summarize(audit(example, 0.05, 0.10, 0.10))
  assert " raises leakage from 5.0% to 10.0% " in found.headline
  assert any("No quantized variant leaks measurably less" in p and "; 1 leaks more." in p
             for p in found.points)  # fmt: skip
  assert any("finds measurably more members than LiRA online with full-precision shadows nowhere"
             in point for point in found.points)  # fmt: skip


def test_the_attacker_chosen_beforehand_counts(example):
  """Not whoever happens to find more: that is known only from the membership."""
  found = findings.summarize(audit(example, 0.20, 0.10, 0.05))
  assert "lowers leakage from 20.0% to 5.0% of" in found.headline
  assert any("in 1 of 1 quantized variants it finds fewer" in p for p in found.points)


def test_a_paired_difference_beyond_chance_is_a_finding_though_intervals_overlap(example):
  """Row 1: 3.8 % to 2.4 % with wide intervals, paired -1.4 points (-2.0 to -0.8)."""
  found = findings.summarize(audit(example, 0.038, 0.024, 0.024, spread=0.4))
  assert "lowers leakage from 3.8% to 2.4%" in found.headline
  assert any("1 of 1 quantized variants leaks measurably less" in p for p in found.points)


def test_differences_that_may_be_chance_are_no_finding(example):
  found = findings.summarize(audit(example, 0.10, 0.09, 0.095, accuracy=(0.9, 0.895)))
  assert found.headline == (
    "Full precision: 10.0% of members found at 1% false positives; OBC at 1.58 bit: 9.5%, a"
    " difference that may be chance, with no measurable change of test accuracy."
  )
  assert any(
    point.startswith("No quantized variant leaks measurably less") for point in found.points
  )
  assert any("measurable loss of test accuracy against full precision (90.0%): OBC" in p
             for p in found.points)  # fmt: skip


def test_one_target_claims_no_more_than_it_can(example):
  """Row 6: 95 % to 10 % is a fall of 85 points, and one model is one model."""
  found = audit(example, 0.10, 0.02, 0.05, accuracy=(0.95, 0.10))
  found = findings.summarize([record | {"num_targets": 1} for record in found])
  assert "at a cost of 85.0 points of test accuracy" in found.headline
  assert any(point.startswith("One target was attacked") for point in found.points)
  assert not any("without a measurable loss" in point for point in found.points)


def test_small_changes_are_not_written_as_zero(example):
  found = audit(example, 0.10, 0.02, 0.05, accuracy=(0.9, 0.9004))
  change = example.paired(0.0004, half=0.0001)
  found = [r | {"accuracy_minus_full_precision": change} if r["levels"] else r for r in found]
  assert findings.summarize(found).headline.endswith("a gain of 0.04 points of test accuracy.")


def test_many_variants_are_judged_together(example):
  """Of 20 variants one misses 0 by a little: that many are expected by chance."""
  found = [example.leakage(tpr=rates(example, 0.1))]
  for levels in range(3, 23):
    change = example.differences(-0.0021 if levels == 3 else 0.0, half=0.002)
    found.append(example.leakage("obc", levels, levels, "best", tpr=rates(example, 0.1),
                                 minus_full_precision=change))  # fmt: skip
  points = findings.summarize(found).points
  assert any(
    "No quantized variant leaks measurably less" in p and "Holm's method for 20" in p
    for p in points
  )


def test_publishing_two_versions_has_a_cost(example):
  found = audit(example, 0.10, 0.02, 0.05)
  both = example.leakage("obc", 3, 3, "releases", tpr=rates(example, 0.13),
                         minus_full_precision=example.differences(0.03))  # fmt: skip
  assert any(
    "measurably more members than that on full precision alone for 1 of 1 versions, most for OBC"
    " at 1.58 bit: 3.0 points more." in point
    for point in findings.summarize([*found, both]).points
  )


def test_missing_intervals_are_admitted(example):
  found = [dict(record) for record in audit(example, 0.10, 0.02, 0.05)]
  for record in found:
    record.pop("minus_full_precision", None)
  assert findings.summarize(found).headline.endswith(
    "quantized: 5.0% (no paired interval recorded)."
  )


def test_leakage_at_chance_is_said(example):
  found = findings.summarize([example.leakage(tpr=rates(example, 0.0105))])
  assert found.headline == (
    "Nothing measurable was found: full precision shows 1.1% of members at 1% false positives, and"
    " guessing 1.0%."
  )
  assert found.points == [
    "At full precision the attack finds 1.1% of members (0.9\u20131.2%) at 1% false positives;"
    " chance (1.0%) is within the interval."
  ]


def test_leakage_below_chance_is_said(example):
  """Row 14."""
  [point] = findings.summarize([example.leakage(tpr=rates(example, 0.005))]).points
  assert point.endswith("; that is below chance (1.0%): the attack errs.")
  assert "within" not in point


def test_chance_is_that_of_few_non_members(example):
  """Row 3: at 8 non-members chance is 11.1 %, and TPR of 10.8 % claims nothing."""
  entry = rates(example, 0.108, 0.5)[0] | {"chance": 1 / 9}
  [point, *_] = findings.summarize([example.leakage(tpr=[entry])]).points
  assert point.endswith("; chance (11.1%) is within the interval.")
  assert "times" not in point


def test_a_rate_that_no_threshold_can_keep_is_not_quoted(example):
  """Of 20 non-members 1 % is none; one target speaks for itself alone."""
  tpr = rates(example, 0.5)
  few = example.leakage("scores", None, None, "given", non_members=20, tpr=tpr)
  found = findings.summarize([few | {"num_targets": 1}])
  assert "of members found at no false positive among 20 non-members." in found.headline
  assert any(point.startswith("One target was attacked") for point in found.points)


def test_unmatched_attacks_may_underestimate(example):
  found = findings.summarize(audit(example, 0.10, 0.02, None))
  assert "from 10.0% to 2.0%" in found.headline
  assert any("not measured for any quantized variant" in point for point in found.points)
  some = [*audit(example, 0.10, 0.02, 0.05), example.leakage("obc", 4, 4)]
  assert any("not measured for 1 of 2" in p for p in findings.summarize(some).points)


def test_weak_rates_are_pointed_out(example):
  assert any(
    "rest on fewer than 10 false positives" in point
    for point in findings.summarize([example.leakage(non_members=50)]).points
  )


def variant(example, method, levels, change, lost=None, *, half=0.002):
  """A quantized variant: its change of TPR at 1 % from .1, and what it loses in accuracy."""
  fields = {"minus_full_precision": example.differences(change, half=half)}
  if lost is not None:
    fields["accuracy_minus_full_precision"] = example.paired(-lost, half=0.004)
  return example.leakage(
    method, levels, levels, "best", tpr=rates(example, 0.1 + change), accuracy=0.9, **fields
  )


def headline(example, *quantized, full=0.1):
  found = findings.summarize([example.leakage(tpr=rates(example, full)), *quantized])
  return found.headline, found.variant


def test_the_headline_is_about_the_fall_that_costs_least(example):
  """Not about the fewest bits, whose fall is larger and whose accuracy is gone."""
  broken = variant(example, "nearest", 3, -0.08, 0.5)
  small = variant(example, "obc", 3, -0.03, 0.001)
  said, which = headline(example, broken, small, variant(example, "obc", 4, -0.01, 0.001))
  assert which == ("obc", 3, 3)
  assert said.endswith("with no measurable change of test accuracy.")
  said, which = headline(example, broken, variant(example, "obc", 16, 0.0, 0.001))
  assert which == ("nearest", 3, 3)
  assert said == (
    "Nearest at 1.58 bit lowers leakage from 10.0% to 2.0% of members found at 1% false positives,"
    " at a cost of 50.0 points of test accuracy; no variant that keeps its accuracy leaks"
    " measurably less."
  )


def test_a_fall_that_hardly_matters_comes_behind_one_that_costs_a_little(example):
  slight = variant(example, "obc", 16, -0.01, 0.0)
  said, which = headline(example, slight, variant(example, "obc", 3, -0.06, 0.02))
  assert which == ("obc", 3, 3)
  assert said.endswith(
    " at a cost of 2.0 points of test accuracy; of those that keep their accuracy, OBC at 4 bit"
    " leaks least, 9.0%."
  )
  ruined = variant(example, "nearest", 3, -0.08, 0.5)
  assert headline(example, slight, ruined)[1] == ("obc", 16, 16)


def test_falls_of_like_cost_are_told_by_their_size(example):
  less = variant(example, "obc", 4, -0.02, 0.006)
  more = variant(example, "obc", 3, -0.05, 0.009)
  assert headline(example, less, more)[1] == ("obc", 3, 3)


def test_a_rise_is_told_where_nothing_falls(example):
  said, which = headline(
    example, variant(example, "obc", 3, 0.03), variant(example, "obc", 4, 0.01),
    variant(example, "obc", 16, -0.001),
  )  # fmt: skip
  assert which == ("obc", 3, 3)
  assert said.endswith("raises leakage from 10.0% to 13.0% of members found at 1% false positives;"
                       " no variant leaks measurably less.")  # fmt: skip


def test_nothing_significant_is_said_plainly(example):
  said, which = headline(example, variant(example, "obc", 3, -0.001), variant(example, "obc", 4, 0))
  assert which is None
  assert said == (
    "Full precision: 10.0% of members found at 1% false positives; none of 2 quantized variants"
    " leaks measurably less or more."
  )


def test_a_fall_below_chance_is_no_headline(example):
  """Full precision shows nothing; fewer bits can then protect nothing."""
  said, which = headline(example, variant(example, "obc", 3, -0.005), full=0.0105)
  assert which is None
  assert said.startswith("Nothing measurable was found: full precision shows 1.1% of members")


def test_without_full_precision_there_is_a_range(example):
  found = [example.leakage("obc", n, n, tpr=rates(example, r)) for n, r in ((3, 0.02), (4, 0.05))]
  assert findings.summarize(found).headline == (
    "2 quantized variants: 2.0% to 5.0% of members found at 1% false positives; full precision is"
    " missing."
  )
  assert findings.summarize(found[:1]).headline.startswith("OBC at 1.58 bit: 2.0% of members")


def test_dedicated_targets_are_described(example):
  run = example.run(protocol="dedicated targets", targets=10, models=64, model={}, data={})
  audited = findings.summarize([run]).audited
  assert audited.startswith("10 target models on data, attacked with 64 shadows")


@pytest.mark.parametrize("lost", ["tpr", "all"])
def test_nothing_measured_is_said(example, lost):
  found = [example.leakage(tpr=[])] if lost == "tpr" else [example.run()]
  assert findings.summarize(found).headline == "No leakage was measured."
  nothing = example.leakage(tpr=[records.number(None) | {"fpr": 0.01}])
  assert findings.summarize([nothing]).headline == "No leakage was measured."


def test_lost_member_fit_and_calibration_members_are_findings(example):
  changes = {("obc", 3): -0.05, ("obc", 4): 0.0}
  found = example.study(changes, fit={("obc", 3): -0.031, ("obc", 4): -0.001})
  assert (
    "Accuracy on members (99.0% at full precision) falls measurably in 1 of 2 quantized variants,"
    " most for OBC at 1.58 bit: by 3.1 points."
  ) in findings.summarize(found).points
  kept = findings.summarize(example.study(changes)).points
  assert any("falls measurably in none of 2 quantized variants" in point for point in kept)
  gap = {"members": "calibration members", "minus_other_members": example.differences(0.03)}
  more = [example.leakage("obc", 3, 3, "best", **gap)]
  assert (
    "The best attacker finds members that calibrated the quantizer measurably more often in 1 of 1"
    " variants than other members, the most for OBC at 1.58 bit: +3.0 points."
  ) in findings.summarize([*found, *more]).points
  gap["minus_other_members"] = example.differences(0.001)
  same = findings.summarize([*found, example.leakage("obc", 3, 3, "best", **gap)]).points
  assert any(
    "measurably neither more nor less often than other members in 1 variant." in p for p in same
  )
