"""Studies side by side: verdicts of each study's own, what differs, and what cannot be compared."""

import csv
import io

import numpy as np
import pytest
from scipy import stats

from ptq_jax.report import comparison, figures, records, tables
from tests.report.test_page import Reader

OBC, ADA, NEAREST = ("obc", 3), ("adaround", 3), ("nearest", 3)


@pytest.fixture
def two(example):
  """OBC falls in one of them, AdaRound in both, nearest rounding in none."""
  return {
    "deep": example.study(
      {OBC: -0.08, ADA: -0.05, NEAREST: 0.0005},
      fit={OBC: -0.05},
      ratios={("full_precision", *OBC): 0.1},
    ),
    "shallow": example.study({OBC: -0.001, ADA: -0.04, NEAREST: 0.001}, models=32),
  }


def test_where_studies_differ_is_said_with_numbers(two):
  found = comparison.summarize(two)
  less = "Less leakage than full precision (best attacker) is measurable in"
  assert found.headline == (
    "1 of 3 shared variants leaks measurably less than full precision in every study;"
    " OBC at 1.58 bit in some only."
  )
  assert (
    f"{less} deep, but not in shallow, for OBC at 1.58 bit (deep -8.0 points (-8.2 to -7.8);"
    " shallow -0.1 points (-0.3 to +0.1))."
  ) in found.points
  assert f"{less} every study of AdaRound at 1.58 bit." in found.points
  assert f"{less} no study of Nearest at 1.58 bit." in found.points
  fit = "A loss of accuracy on members is measurable in deep, but not in shallow, for OBC"
  assert any(point.startswith(fit) for point in found.points)
  assert any(point.startswith("The studies attack differently (models):") for point in found.points)
  assert any(
    "deep: of 3 quantized variants 2 leak measurably less to an attacker who takes scores as they"
    " are, 2 to the best" in point for point in found.points
  )  # fmt: skip


def test_variants_are_named_together_whatever_other_studies_have(example):
  """And of many studies two are quoted: where a variant falls most, where least of the others."""
  change = {"a": {OBC: -0.08, ADA: -0.04}, "b": {OBC: -0.06, ADA: -0.02, NEAREST: -0.03},
            "c": {OBC: -0.001, NEAREST: -0.02}, "d": {OBC: 0.001}}  # fmt: skip
  found = comparison.summarize({name: example.study(own) for name, own in change.items()})
  [every, differ] = [point for point in found.points if point.startswith("Less leakage")]
  assert every.endswith(" in every study of Nearest at 1.58 bit and AdaRound at 1.58 bit.")
  assert " in a and b, but not in c or d, for OBC at 1.58 bit (a -8.0 points (" in differ
  assert "; d +0.1 points (" in differ
  assert "b -6.0" not in differ
  assert found.audited.count("Attack: LiRA online.") == 1


def test_studies_that_agree(example):
  same = {name: example.study({OBC: -0.08, ADA: 0.0}) for name in ("a", "b")}
  assert comparison.summarize(same).headline == (
    "The studies agree: 1 of 2 shared variants leaks measurably less than full precision in every"
    " study."
  )
  apart = {"a": example.study({OBC: -0.08}), "b": example.study({ADA: -0.08})}
  assert comparison.summarize(apart).headline == "2 studies that share no quantized variant."


def test_verdicts_are_paired_and_by_holm_not_by_overlap(example):
  """Intervals far apart, a paired difference that may be 0: no fall. Many small ones: Holm."""
  wide = example.differences(-0.05, half=0.2)
  record = example.leakage(
    "obc", 3, 3, "best", minus_full_precision=wide,
    tpr=[example.rate(0.05, spread=0.01, fpr=0.01, rule="at_most")],
  )  # fmt: skip
  full = example.leakage(tpr=[example.rate(0.1, spread=0.01, fpr=0.01, rule="at_most")])
  [change] = comparison.verdicts([full, record], 0.01)["leakage"].values()
  assert not change.sure
  one = example.differences(-0.0022)  # p = .03
  alone = [full, dict(record, minus_full_precision=one)]
  assert comparison.verdicts(alone, 0.01)["leakage"][records.Variant(*OBC, 3)].sure
  none = {"tpr": record["tpr"], "minus_full_precision": example.differences(0.0)}
  more = [example.leakage("nearest", n, n, "best", **none) for n in (3, 4)]
  assert not comparison.verdicts([*alone, *more], 0.01)["leakage"][records.Variant(*OBC, 3)].sure


def test_rates_in_common(example):
  one, other = ({OBC: -0.08}, {OBC: -0.07})
  two = {"a": example.study(one), "b": example.study(other)}
  shared = {"fpr": 0.001, "rule": "at_most", "false_positives": 2}
  for record in two["a"][1:]:
    record["tpr"].append(example.rate(0.01, **shared))
  assert comparison.common_fprs(two) == [0.01]
  assert comparison.headline_fpr(two) == 0.01
  points = comparison.summarize(two).points
  assert any("only those in common are compared: 1%." in point for point in points)
  for record in two["b"][1:]:
    record["tpr"].append(example.rate(0.01, **(shared | {"false_positives": 25})))
  assert comparison.common_fprs(two) == [0.01, 0.001]
  assert comparison.headline_fpr(two) == 0.01  # the lower one rests on 2 false positives in a
  for record in two["b"][1:]:
    record["tpr"] = record["tpr"][1:]
    record["tpr"][0]["fpr"] = 0.002
  with pytest.raises(ValueError, match=r"no false-positive rate in common \(a: 1%, 0.1%; b: 0.2%"):
    comparison.require_comparable(two)


def test_what_is_no_comparison_is_refused(example, two):
  with pytest.raises(ValueError, match="needs 2 to 15 studies, not 1"):
    comparison.require_comparable({"deep": two["deep"]})
  with pytest.raises(ValueError, match="results of b have no run record"):
    comparison.require_comparable({"a": two["deep"], "b": two["deep"][1:]})
  with pytest.raises(ValueError, match="results of b have no leakage record"):
    comparison.require_comparable({"a": two["deep"], "b": [example.run()]})
  comparison.require_comparable(two)


def test_settings_of_the_attack_come_first_and_the_rest_is_named(example):
  config = {"queries": {"views": 1}, "train": {"epochs": 3}, "name": "b"}
  two = {
    "a": example.study({OBC: 0.0}, config=config | {"queries": {"views": 2}, "name": "a"}),
    "b": example.study({OBC: 0.0}, config=config | {"train": {"epochs": 4}}, date="tomorrow"),
  }
  table = comparison.settings(two)
  assert [[cell.text for cell in row] for row in table.rows] == [
    ["config.queries.views", "2", "1"],
    ["config.train.epochs", "3", "4"],
  ]
  for record in two["b"][1:]:
    record["attack"] = "lira_online_pooled"
  points = comparison.summarize(two).points
  assert points[0].startswith("The studies attack differently (attack and config.queries.views):")
  assert points[1] == "The studies also differ in config.train.epochs."


def test_member_fit_is_related_to_leakage(example):
  changes = {(m, n): -0.01 * n for m in ("obc", "brecq") for n in (3, 4, 5)}
  fit = {key: -0.02 * i for i, key in enumerate(changes)}
  two = {"a": example.study(changes, fit=fit), "b": example.study({OBC: -0.05})}
  points = comparison.summarize(two).points
  expected = stats.spearmanr(
    [*(-lost for lost in fit.values()), 0], [*(1 + c / 0.1 for c in changes.values()), 0.5]
  ).statistic
  assert any(f"rank correlation {expected:+.2f} over 7 variants" in point for point in points)
  assert (
    "Accuracy on members falls by less than 1 point in 2 of 7 variants of a and b: the best"
    " attacker still finds 50% to 70% of what it finds in full precision."
  ) in points
  rng = np.random.default_rng(0)
  one, other = rng.integers(0, 4, (2, 20))
  found = comparison._rank_correlation(*(x.astype(float).tolist() for x in (one, other)))
  assert found == pytest.approx(stats.spearmanr(one, other).statistic)
  assert comparison._rank_correlation([1.0, 1.0], [1.0, 2.0]) is None


def test_studies_without_member_accuracy_are_named(example, two):
  for record in two["shallow"][1:]:
    record.pop("member_accuracy_minus_full_precision", None)
  assert any(
    point.startswith("shallow tells nothing of the accuracy on members")
    for point in comparison.summarize(two).points
  )
  assert list(comparison.draw(two)) == ["member_fit"]
  for record in two["deep"][1:]:
    record.pop("member_accuracy_minus_full_precision", None)
  assert comparison.draw(two) == {}


def test_nothing_to_find_in_full_precision_is_said(example, two):
  for record in records.select(two["shallow"], "leakage", method="none"):
    record["tpr"][0] |= {"value": 0.011, "low": 0.008}
  points = comparison.summarize(two).points
  said = "shallow finds nothing measurable in full precision, so no fall can show there, and"
  assert any(point.startswith(said) for point in points)
  assert any("less than 1 point in 2 of 3 variants of deep" in point for point in points)
  legend = comparison.draw(two)["member_fit"].legends[0].get_texts()
  assert "shallow" not in [text.get_text() for text in legend]


def test_the_table_has_every_variant_of_every_study_with_its_changes(two):
  table = comparison.results(two)
  names = [(row[0].text, row[3].text) for row in table.rows]
  assert names == [(m, s) for m in ("full precision", "Nearest", "AdaRound", "OBC") for s in two]
  groups = [column.group for column in table.columns if column.group]
  as_is, *others, best = records.COMPARED.values()
  assert list(dict.fromkeys(groups)) == [best, as_is, *others]  # who counts comes first
  row = dict(zip([(c.group, c.name) for c in table.columns], table.rows[-2], strict=True))
  assert row["", "member acc.\nchange"].text == "-5.0"
  assert row["", "member acc.\nchange"].mark == ""
  assert row["", "test acc.\nchange"][:2] == ("-0.1", "-0.3 to 0.1")
  assert row["", "test acc.\nchange"].mark == "≈"
  assert row["best attacker", "TPR % at\n1% FPR"].text == "2.0"
  changes = [c for (g, n), c in row.items() if g == "best attacker" and n == "change"]
  assert changes[-1].text == "-8.0"
  assert tables.SAME in {cell.text for cell in table.rows[0]}
  assert max(map(len, tables.to_text(comparison.results(two, narrow=True)).splitlines())) <= 140


def test_the_figure_has_a_mark_per_study_and_its_points(two):
  figure = figures.member_fit(two, fpr=0.01)
  titles = [axes.get_title("left") for axes in figure.axes]
  assert titles == ["Scores as they are", "Scores rescaled", "Best attacker"]

  def points(axes, mark):
    return {tuple(line.get_xydata()[0].round(6)) for line in axes.get_lines()
            if line.get_marker() == mark}  # fmt: skip

  assert points(figure.axes[2], "o") == {(5.0, 0.2), (0.0, 0.5), (0.0, 1.005)}
  assert points(figure.axes[0], "o") == {(5.0, 0.1), (0.0, 0.5), (0.0, 1.005)}
  assert points(figure.axes[2], "s") == {(0.0, 0.99), (0.0, 0.6), (0.0, 1.01)}
  assert figure.axes[0].get_yscale() == "log"
  lost = records.fits(two["deep"], 0.01)["best"][records.Variant(*OBC, 3)].lost
  assert lost[:3] == pytest.approx((0.05, 0.048, 0.052))
  legend = [text.get_text() for text in figure.legends[0].get_texts()]
  assert {"deep", "shallow", "OBC"} <= set(legend)


def test_the_figure_of_one_audit_and_what_it_cannot_draw(example):
  one = example.study({OBC: -0.1, ADA: -0.05}, ratios={("best", *OBC): 0.0})
  drawn = figures.draw(one)
  legend = [text.get_text() for text in drawn["member_fit"].legends[0].get_texts()]
  assert "1.58 bit" in legend
  note = drawn["member_fit"].legends[0].get_title().get_text()
  assert note == "not drawn: 3 points where no member is found"
  with pytest.raises(ValueError, match="no variant has its accuracy on members"):
    figures.member_fit({"": [example.leakage()]}, fpr=0.01)
  with pytest.raises(ValueError, match="16 studies are too many"):
    figures.member_fit({str(i): one for i in range(16)}, fpr=0.01)


def test_the_page_and_the_csv(example, two):
  evil = "<script>alert('x')</script>"
  two = {"deep": two["deep"], evil: two["shallow"]}
  text = comparison.render(two, comparison.draw(two))
  reader = Reader(text)
  assert reader.open == []
  assert reader.tags.count("svg") == 1
  assert text.count("<script>") == 1
  lines = list(csv.DictReader(io.StringIO(tables.to_csv(two))))
  assert [line["study"] for line in lines] == ["deep"] * 15 + [evil] * 15
  line = next(row for row in lines if (row["method"], row["attacker"]) == ("obc", "best"))
  assert float(line["tpr_ratio_at_0.01_at_most_minus_full_precision"]) == pytest.approx(0.2)
  assert float(line["member_accuracy_minus_full_precision"]) == -0.05
