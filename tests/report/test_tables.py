import csv
import io
import math
import re

import pytest

from ptq_jax.report import records, tables


def cell(table, row, heading, group=""):
  [index] = [i for i, c in enumerate(table.columns) if (c.name, c.group) == (heading, group)]
  return table.rows[row][index]


FULL, MATCHED = "full-precision shadows", "matched shadows"


def test_results_show_both_attackers_side_by_side(example):
  plain = example.rate(0.02, fpr=0.01, rule="at_most", false_positives=250)
  matched = example.rate(0.04, fpr=0.01, rule="at_most", false_positives=250)
  table = tables.results(
    [
      example.leakage(
        "obc",
        3,
        256,
        "matched",
        tpr=[matched],
        accuracy=0.5,
        minus_full_precision_shadows=example.differences(0.02),
        minus_full_precision=example.differences(-0.001),
      ),
      example.leakage("obc", 3, 256, tpr=[plain], accuracy=0.5),
      example.leakage(),
    ],
    fprs=(0.01,),
  )
  assert [row[0].text for row in table.rows] == ["full precision", "OBC"]
  assert [c.text for c in table.rows[1][:3]] == ["OBC", "1.58", "8"]
  assert cell(table, 1, "test\naccuracy %")[:2] == ("50.0", "49.5\u201350.5")
  assert cell(table, 1, "TPR % at\n1% FPR", FULL)[:2] == ("2.0", "1.8\u20132.2")
  assert cell(table, 1, "TPR % at\n1% FPR", MATCHED)[:2] == ("4.0", "3.6\u20134.4")
  assert cell(table, 1, "under-\nestimate")[:2] == ("+2.0", "1.8\u20132.2")
  assert cell(table, 1, "under-\nestimate").mark == ""
  assert cell(table, 1, "change", MATCHED)[:2] == ("-0.1", "-0.3 to 0.1")
  assert cell(table, 1, "change", MATCHED).mark == "≈"
  assert cell(table, 0, "AUC", MATCHED).text == tables.SAME
  assert cell(table, 0, "under-\nestimate").text == tables.MISSING
  assert table.notes[0] == "Intervals: over examples and models, 95 %."


def test_notes_say_what_the_intervals_cover(example):
  accuracy = records.number(0.7, 0.6, 0.8, interval="t-interval over targets, 95 %")
  found = [example.leakage(test_accuracy=accuracy)]
  rates = "Intervals: over examples and models, 95 %"
  assert tables.results(found).notes[0] == f"{rates}; accuracy: {accuracy['interval']}."
  assert tables.attacks(found).notes[0] == f"{rates}."


def test_differences_that_may_be_zero_are_marked(example):
  fields = {"minus_full_precision_shadows": example.differences(0.001, fpr=0.001)}
  pair = [example.leakage("obc", 3, 3), example.leakage("obc", 3, 3, "matched", **fields)]
  table = tables.results(pair)
  assert cell(table, 0, "under-\nestimate").mark == "≈"
  assert "≈" in tables.to_text(table)


@pytest.mark.parametrize(
  ("attackers", "first"),
  [(("full_precision", "matched", "best"), "best"), (("full_precision", "matched"), "matched")],
)
def test_who_counts_stands_first_with_the_change(example, attackers, first):
  """Of a wide table, what stands first is what is seen."""
  fields = {"minus_full_precision": example.differences(-0.02, fpr=0.001)}
  found = [example.leakage("obc", 3, 3, who, **fields) for who in attackers]
  names = [records.ATTACKERS[who] for who in attackers]
  for narrow in (False, True):
    table = tables.results(found, narrow=narrow)
    groups = list(dict.fromkeys(c.group for c in table.columns if c.group))
    assert groups[0] == records.ATTACKERS[first]
    assert cell(table, 0, "change", groups[0]).text == "-2.00"
    assert [column.name for column in table.columns].count("change") == 1
    if not narrow:
      assert groups[1:] == [name for name in names if name != groups[0]]
    for write in (tables.to_text, tables.to_markdown, tables.to_latex):
      places = [write(table._replace(notes=[])).index(name) for name in groups]
      assert places == sorted(places)


def test_thresholds_classes_and_epsilon_are_shown(example):
  entry = example.rate(0.1, fpr=0.01, rule="at_most", false_positives=250)
  entry["transferred"] = {"tpr": example.rate(0.09), "fpr": example.rate(0.012)}
  record = example.leakage(
    tpr=[entry],
    epsilon={"epsilon": 1.234, "gaussian": 1.5, "delta": 1e-5, "confidence": 0.95},
    classes=[{"class": "cat", "num_examples": 9, "auc": example.rate(0.8)}],
  )
  table = tables.thresholds([record])
  assert cell(table, 0, "TPR %", "aimed at 1% FPR").text == "9.00"
  assert cell(table, 0, "FPR %", "aimed at 1% FPR").text == "1.20"
  assert cell(tables.classes([record]), 0, "class").text == "cat"
  assert cell(tables.results([record]), 0, "epsilon\nat least").text == "1.23"
  assert "epsilon_gaussian" in tables.to_csv([record]).splitlines()[0]
  assert tables.thresholds([example.leakage()]).rows == []


@pytest.mark.parametrize(("non_members", "mark"), [(25_000, ""), (2_000, "†"), (900, "‡")])
def test_weak_rates_carry_a_mark_and_a_footnote(example, non_members, mark):
  table = tables.results([example.leakage(non_members=non_members)])
  assert cell(table, 0, "TPR % at\n0.1% FPR", FULL).mark == mark
  text = tables.to_text(table)
  assert ("†" in text, "‡" in text) == (mark == "†" or non_members == 900, mark == "‡")
  assert ("fewer than 10 false positives" in text) == ("†" in text)
  assert ("fewer non-members than 1/FPR" in text) == ("‡" in text)


def test_text_is_aligned_and_fits_a_terminal(example):
  attackers = ("full_precision", "matched", "best")
  found = example.audit(non_members=2000, attackers=attackers)
  assert MATCHED in {column.group for column in tables.results(found).columns}
  text = tables.to_text(tables.results(found, narrow=True))
  lines = text.splitlines()
  assert max(map(len, lines)) <= 140
  rule = next(i for i, line in enumerate(lines) if line.startswith("──"))
  body = [
    line for line in lines[rule + 1 :] if line.startswith(("full", "Near", "Ada", "BR", "OB"))
  ]
  assert len(body) == 1 + 4 * 3 + 3 * 4
  [end] = [line.index("accuracy %") + len("accuracy %") for line in lines if "accuracy %" in line]
  assert [float(line[end - 4 : end]) for line in body][:2] == [70.0, 69.2]
  assert all(line[end - 5] == line[end] == " " and line[end - 2] == "." for line in body)


def test_long_names_wrap_and_strange_ones_stay_on_their_line(example):
  name = "a_very_long_method_name_" * 6
  text = tables.to_text(
    tables.results([example.leakage(name, 4, 4), example.leakage("x\ny\x1b[31m", 4, 4)])
  )
  assert max(map(len, text.splitlines())) <= 140
  assert "\x1b" not in text
  assert "x y [31m" in text
  joined = "".join(line[:24].strip() for line in text.splitlines())
  assert "a_very_long_method_name_" in joined
  warning = records.make("warning", about="seeds", message="word " * 100)
  text = tables.to_text(tables.warnings([warning]))
  assert text.count("word") == 100
  assert max(map(len, text.splitlines())) <= 140


def test_missing_values_are_dashes(example):
  nothing = records.number(None)
  record = dict(
    example.leakage("obc", 4, 4), auc=nothing, size_kb=None, tpr=[], num_non_members=None
  )
  record["test_accuracy"] = {"value": math.nan, "low": math.nan, "high": 1.0}
  table = tables.results([record])
  assert cell(table, 0, "AUC", FULL).text == tables.MISSING
  assert MATCHED not in {column.group for column in table.columns}  # nobody has it
  assert cell(table, 0, "size\nkB").text == tables.MISSING
  assert cell(table, 0, "test\naccuracy %")[:2] == (tables.MISSING, "")
  assert cell(table, 0, "under-\nestimate").text == tables.MISSING
  assert "nan" not in tables.to_text(table).lower()


def test_one_sided_interval_is_not_shown(example):
  record = dict(example.leakage(), auc=records.number(0.6, 0.5, None))
  assert cell(tables.results([record]), 0, "AUC", FULL)[:2] == ("0.600", "")


def test_markdown_escapes_and_keeps_its_columns(example):
  table = tables.results([example.leakage("a|b<script>*x*", 4, 4), example.leakage()])
  text = tables.to_markdown(table)
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
  assert len(rows) == 2 + 2
  assert "a\\|b&lt;script&gt;\\*x\\*" in text
  assert "<sub>69.3\u201370.7</sub>" in text


def test_csv_is_long_and_exact(example):
  audit = example.audit()
  lines = list(csv.DictReader(io.StringIO(tables.to_csv(audit))))
  leakage = [record for record in audit if record["kind"] == "leakage"]
  assert len(lines) == len(leakage)
  assert [lines[0][k] for k in ("method", "levels", "last_layer_levels")] == [
    "none",
    "full",
    "full",
  ]
  by_key = {
    (
      line["method"],
      line["levels"],
      line["last_layer_levels"],
      line["attacker"],
      line["attack"],
    ): line
    for line in lines
  }
  record = next(r for r in leakage if r["attacker"] == "matched" and r["levels"] == 3)
  line = by_key[record["method"], "3", str(record["last_layer_levels"]), "matched", "lira_online"]
  assert float(line["auc_low"]) == record["auc"]["low"]
  assert line["auc_interval"] == record["auc"]["interval"]
  tpr = records.tpr_at(record, 0.001)
  assert float(line["tpr_at_0.001_at_most"]) == tpr["value"]
  assert float(line["tpr_at_0.001_at_most_high"]) == tpr["high"]
  assert int(line["tpr_at_0.001_at_most_false_positives"]) == 25
  assert float(line["precision_prior_0.5_fpr_0.01"]) == record["precision"][0]["value"]
  assert line["bits"] == "1.58"


def test_csv_has_the_parts_of_an_entry(example):
  entry = example.rate(0.1, fpr=0.01, rule="below", total_false_positives=40) | {
    "over_targets": records.number(0.1, 0.05, 0.15),
    "transferred": {"tpr": records.number(0.09), "fpr": records.number(0.011)},
  }
  [line] = csv.DictReader(io.StringIO(tables.to_csv([example.leakage(tpr=[entry])])))
  name = "tpr_at_0.01_below"
  assert line[f"{name}_total_false_positives"] == "40"
  assert line[f"{name}_over_targets_low"] == "0.05"
  assert line[f"{name}_transferred_fpr"] == "0.011"
  assert f"{name}_rule" not in line


def test_csv_quotes_text_that_starts_a_formula(example):
  record = dict(example.leakage(), members="=cmd|' /C calc'!A0", auc=records.number(-0.5))
  [line] = csv.DictReader(io.StringIO(tables.to_csv([record])))
  assert line["members"] == "'=cmd|' /C calc'!A0"
  assert line["auc"] == "-0.5"


def test_csv_leaves_missing_numbers_empty(example):
  record = dict(example.leakage(), auc=records.number(None))
  [line] = csv.DictReader(io.StringIO(tables.to_csv([record, example.run()])))
  assert line["auc"] == line["auc_low"] == ""
  assert line["members"] == "all"


def test_attacks_list_every_attack_and_part_of_the_members(example):
  found = [
    example.leakage(attack="loss_threshold"),
    example.leakage("obc", 3, 3, "matched"),
    example.leakage("obc", 3, 3, "matched", members="calibration"),
  ]
  table = tables.attacks(found)
  assert cell(table, 0, "attack").text == "loss threshold"
  assert [cell(table, i, "members").text for i in (1, 2)] == ["all", "calibration"]
  assert cell(table, 1, "shadows").text == "matched shadows"
  assert cell(table, 0, "TPR % at\n10% FPR").below
  assert len(tables.attacks(found[:2]).columns) == len(table.columns) - 1


def test_the_best_attacker_names_the_attacks_that_were_chosen(example):
  """Not the main attack, under whose name its record stands."""
  served = [("matched", "rmia_online", 9), ("combined", "lira_online", 4),
            ("full_precision", "rmia_online", 3)]  # fmt: skip
  chosen = [dict(zip(("attacker", "attack", "targets"), each, strict=True)) for each in served]
  found = [example.leakage("obc", 3, 3, "best", chosen=some) for some in (chosen, chosen[:1])]
  table = tables.attacks(found)
  texts = [cell(table, i, "attack").text for i in (0, 1)]
  assert texts == ["RMIA online (12), LiRA online (4)", "RMIA online"]


def test_precision_groups_priors_by_fpr(example):
  precision = [
    example.rate(value, prior=prior, fpr=fpr)
    for value, prior, fpr in [(0.9, 0.5, 0.01), (0.5, 0.1, 0.01), (0.7, 0.5, 0.001)]
  ]
  table = tables.precision([example.leakage(precision=precision)])
  headings = [(c.group, c.name) for c in table.columns if c.group]
  assert headings == [
    ("precision % at 1% FPR", "50%\nmembers"),
    ("precision % at 1% FPR", "10%\nmembers"),
    ("precision % at 0.1% FPR", "50%\nmembers"),
  ]
  assert [c.text for c in table.rows[0][-3:]] == ["90.0", "50.0", "70.0"]


def test_rates_that_nobody_can_resolve_are_left_out_of_long_tables(example):
  precision = [example.rate(0.9, prior=0.5, fpr=fpr) for fpr in (0.1, 0.001)]
  found = [example.leakage(non_members=500, precision=precision)]
  for table in (tables.attacks(found), tables.precision(found)):
    assert not any("0.1% FPR" in c.name + c.group for c in table.columns)
    assert any("10% FPR" in c.name + c.group for c in table.columns)
    assert any(note.startswith("Not shown: 0.1% FPR") for note in table.notes)
  larger = [*found, example.leakage("obc", 3, 3, non_members=1000)]
  assert any("0.1% FPR" in c.name for c in tables.attacks(larger).columns)
  smallest = tables.attacks([example.leakage(non_members=5)])
  assert any("0.1% FPR" in c.name for c in smallest.columns)


def test_units_compare_with_nearest_rounding(example):
  found = [
    example.unit("obc", 3, 256, "stem", before=0.04, after=0.01),
    example.unit("obc", 3, 256, "head", before=0.0, after=None, steps=None),
  ]
  table = tables.units(found)
  assert cell(table, 0, "kept %").text == "25.0"
  assert cell(table, 1, "kept %").text == tables.MISSING
  assert cell(table, 1, "steps").text == tables.MISSING


def test_empty_tables_say_so(example):
  for make in (tables.results, tables.attacks, tables.precision, tables.units, tables.warnings):
    table = make([example.run()])
    assert "none recorded" in tables.to_text(table)
    assert "None recorded" in tables.to_markdown(table)
  assert tables.to_csv([]).strip() == ""


def test_accuracy_on_members_and_moments_of_scores_are_shown(example):
  moments = {side: {"mean": mean, "sd": 1.25} for side, mean in (("members", 4.5),
                                                                ("non_members", -2.0))}  # fmt: skip
  fields = {"member_accuracy": example.rate(0.999, spread=0.001), "scores": {"targets": moments}}
  found = [example.leakage(**fields), example.leakage("obc", 3, 3)]
  table = tables.results(found)
  assert cell(table, 0, "member\naccuracy %")[:2] == ("99.9", "99.8\u2013100.0")
  assert cell(table, 1, "member\naccuracy %").text == tables.MISSING
  headings = [[c.name for c in tables.results(found[1:]).columns],
              [c.name for c in tables.results(found, narrow=True).columns]]  # fmt: skip
  assert all("member\naccuracy %" not in names for names in headings)
  table = tables.score_shift(found)
  assert len(table.rows) == 1
  assert cell(table, 0, "members", "targets")[:2] == ("4.50", "sd 1.25")
  assert cell(table, 0, "non-members", "targets").text == "-2.00"
  assert tables.score_shift(found[1:]).rows == []
  [line] = csv.DictReader(io.StringIO(tables.to_csv(found[:1])))
  assert float(line["scores_targets_non_members_mean"]) == -2
  assert float(line["member_accuracy"]) == 0.999


def test_calibration_members_stand_beside_the_others(example):
  def parts(who, levels, change):
    entry = {"method": "obc", "levels": levels, "last": levels, "attacker": who}
    return [
      example.leakage(**entry, members="calibration members",
                      minus_other_members=example.differences(change)),
      example.leakage(**entry, members="other members", separation=0.5),
      example.leakage(**entry, members="calibration among members", auc=example.rate(0.6)),
    ]  # fmt: skip

  found = [example.leakage(), *parts("best", 3, 0.03), *parts("best", 4, 0.001)]
  found += parts("rescaled", 3, 0.0022)  # p = .03: alone sure, for it is one of one
  table = tables.calibration(found)
  group = "TPR % at 1% FPR"
  assert [row[1].text for row in table.rows] == ["2", "1.58", "1.58"]
  assert cell(table, 1, "AUC of\none by other").text == "0.600"
  assert cell(table, 1, "difference", group)[:2] == ("+3.0", "2.8\u20133.2")
  assert cell(table, 0, "difference", group).mark == tables.OVERLAP
  assert cell(table, 2, "difference", group).mark == ""
  pair = [cell(table, 1, f"{part}\nmembers", group).sort for part in ("calibration", "other")]
  assert pair[0] == records.tpr_at(found[1], 0.01)["value"]
  assert pair[1] == records.tpr_at(found[2], 0.01)["value"]
  groups = {column.group for column in tables.calibration(found, fprs=(0.05,)).columns}
  assert groups == {"", *(f"TPR % at {rate} FPR" for rate in ("10%", "1%", "0.1%"))}
  assert tables.calibration([example.leakage()]).rows == []


def test_marks_that_all_numbers_carry_go_to_the_heading(example):
  weak = example.leakage(non_members=2_000)
  lifted = tables.lift_marks(tables.results([weak, example.leakage("obc", 3, 3, "matched")]))
  own, other = ([c.mark for c in lifted.columns if c.group == group] for group in (FULL, MATCHED))
  assert (own, other) == (["", "", "†"], ["", "", "", ""])
  assert {cell.mark for row in lifted.rows for cell in row} == {""}
  table = tables.results([weak, example.leakage("obc", 3, 3)])
  assert tables.lift_marks(table) == table
  for write in (tables.to_text, tables.to_markdown, tables.to_latex):
    assert "% FPR†" in write(tables.results([weak])).replace("\\", "")


def test_latex_escapes_and_keeps_its_columns(example):
  fields = {"minus_full_precision_shadows": example.differences(0.001, fpr=0.001)}
  name = "a_b&<50%>$x^2${}\x1b"
  found = [
    example.leakage(),
    example.leakage(name, 3, 3),
    example.leakage(name, 3, 3, "matched", **fields),
  ]
  table = tables.results(found)
  text = tables.to_latex(table)
  start, body = text.split("\\midrule\n")
  rows = body.split("\\bottomrule")[0].splitlines()
  assert len(rows) == len(table.rows)
  assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.columns) - 1}
  assert "a\\_b\\&<50\\%>\\$x\\textasciicircum 2\\$\\{\\}" in rows[1]
  assert "0.760 (0.753\u20130.768)" in rows[0]
  assert "+0.10 (-0.10 to 0.30)$\\approx$" in rows[1]
  assert "\\multicolumn{4}{c}{matched shadows}" in start
  assert all(line.startswith("%") for line in start.split("\\begin")[0].splitlines())
  assert tables.to_latex(tables.results([example.run()])).endswith(": none recorded.\n")


def test_csv_keeps_integers_beside_gaps(example):
  few = example.rate(0.1, fpr=0.5, rule="at_most", false_positives=3)
  found = [example.leakage(), example.leakage("obc", 3, 3, tpr=[few])]
  lines = list(csv.DictReader(io.StringIO(tables.to_csv(found))))
  name = "tpr_at_0.5_at_most_false_positives"
  assert [line[name] for line in lines] == ["", "3"]
