import pytest

from ptq_jax.report import findings, records


def rates(example, value, spread=0.1):
  return [example.rate(value, spread=spread, fpr=0.01, rule="at_most", false_positives=250)]


def audit(example, full, plain, matched, *, accuracy=(0.9, 0.8), spread=0.1):
  """Full precision and one variant, by TPR at 1 % FPR."""
  found = [example.leakage(tpr=rates(example, full, spread), accuracy=accuracy[0])]
  for attacker, value in (("full_precision", plain), ("matched", matched)):
    if value is not None:
      tpr = rates(example, value, spread)
      found.append(example.leakage("obc", 3, 3, attacker, tpr=tpr, accuracy=accuracy[1]))
  return found


def test_a_clear_drop_is_a_finding(example):
  found = findings.summarize([example.run(), *audit(example, 0.10, 0.02, 0.05)])
  assert found.headline == (
    "OBC at 1.58 bit lowers leakage from 10.0% to 5.0% of members found at 1% false positives,"
    " at a cost of 10.0 points of test accuracy."
  )
  assert found.audited == (
    "16 convnet models (19,562 parameters) on digits (1,500 images, each model trained on half of"
    " them); each is attacked with the others as shadows. Attack: LiRA online."
  )
  assert found.points == [
    "At full precision the attack finds 10.0% of members (9.0\u201311.0%) while accusing 1% of"
    " non-members, 10.0 times chance.",
    "1 of 1 quantized variants leaks less than full precision beyond the intervals; the widest of"
    " them is OBC at 1.58 bit.",
    "An attacker who does not quantize its shadows underestimates leakage most for OBC at 1.58 bit:"
    " it finds 2.0% of members where matched shadows find 5.0%. Matched shadows find more in 1 of 1"
    " quantized variants beyond the intervals.",
  ]


def test_a_clear_rise_is_said(example):
  found = findings.summarize(audit(example, 0.05, 0.10, 0.10))
  assert " raises leakage from 5.0% to 10.0% " in found.headline
  assert any("No quantized variant leaks less" in p and "; 1 more." in p for p in found.points)
  assert any("Nowhere do matched shadows find more" in point for point in found.points)


def test_the_attacker_who_finds_more_counts(example):
  found = findings.summarize(audit(example, 0.20, 0.10, 0.05))
  assert "lowers leakage from 20.0% to 10.0% of" in found.headline
  assert (
    "Nowhere do matched shadows find measurably more members than full-precision shadows; in 1 of 1"
    " quantized variants they find fewer, beyond the intervals. The findings quote the attacker who"
    " finds more."
  ) in found.points


def test_overlapping_intervals_are_no_finding(example):
  found = findings.summarize(audit(example, 0.10, 0.09, 0.095, accuracy=(0.9, 0.895)))
  assert found.headline == (
    "OBC at 1.58 bit: from 10.0% to 9.5% of members found at 1% false positives, a difference"
    " within the intervals, with test accuracy within the interval of full precision."
  )
  assert any(point.startswith("No quantized variant leaks less") for point in found.points)
  assert any("that difference is within the intervals." in point for point in found.points)
  assert any("within the interval of full precision (90.0%) is OBC" in p for p in found.points)


def test_missing_intervals_are_admitted(example):
  found = [dict(record) for record in audit(example, 0.10, 0.02, 0.05)]
  for record in found:
    record["tpr"] = [t | {"low": None, "high": None} for t in record["tpr"]]
  assert "(no intervals recorded)" in findings.summarize(found).headline


def test_leakage_at_chance_is_said(example):
  found = findings.summarize([example.leakage(tpr=rates(example, 0.0105))])
  assert found.headline == "Full precision: 1.1% of members found at 1% false positives."
  assert found.points == [
    "At full precision the attack finds 1.1% of members (0.9\u20131.2%) while accusing 1% of"
    " non-members; chance (1%) is within the interval."
  ]


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


def test_the_headline_takes_the_most_accurate_of_the_narrowest(example):
  found = [
    example.leakage("nearest", 3, 3, accuracy=0.5),
    example.leakage("obc", 3, 3, accuracy=0.8),
    example.leakage("obc", 4, 4, accuracy=0.9),
    example.leakage("brecq", 3, 3, accuracy=0.7),
  ]
  rows = records.side_by_side(found)
  assert findings.narrowest(rows, 0.01).variant.method == "obc"
  assert findings.narrowest(rows, 0.01).variant.levels == 3
  assert findings.narrowest([], 0.01) is None
  assert findings.summarize(found).headline.startswith("OBC at 1.58 bit: ")


def test_dedicated_targets_are_described(example):
  run = example.run(protocol="dedicated targets", targets=10, models=64, model={}, data={})
  audited = findings.summarize([run]).audited
  assert audited.startswith("10 target model models on data, attacked with 64 shadows")


@pytest.mark.parametrize("lost", ["tpr", "all"])
def test_nothing_measured_is_said(example, lost):
  found = [example.leakage(tpr=[])] if lost == "tpr" else [example.run()]
  assert findings.summarize(found).headline == "No leakage was measured."
  nothing = example.leakage(tpr=[records.number(None) | {"fpr": 0.01}])
  assert findings.summarize([nothing]).headline == "No leakage was measured."
