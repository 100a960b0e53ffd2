import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.report import records
from ptq_jax.report.records import Variant


def test_a_whole_audit_is_valid_and_survives_json(example):
  audit = example.audit()
  records.validate_all(audit)
  assert [json.loads(json.dumps(r, allow_nan=False)) for r in audit] == audit
  assert all(next(iter(record)) == "kind" for record in audit)


def test_made_records_are_plain_python():
  record = records.make(
    "exposure",
    method="obc",
    levels=np.int64(3),
    last_layer_levels=None,
    jaccard=records.number(jnp.float32(0.5), np.float64("nan"), math.inf),
    ranking=np.array([3, 1]),
    shape=(8, 8, 1),
    note=None,
  )
  assert record["jaccard"] == {"value": 0.5, "low": None, "high": None, "interval": None}
  assert record["ranking"] == [3, 1]
  assert record["shape"] == [8, 8, 1]
  assert type(record["levels"]) is int


def test_run_says_what_ran_where(example):
  run = example.run()
  assert run["versions"]["jax"].count(".") >= 1
  assert "cores" in run["device"] or " x " in run["device"]
  assert example.run(device="TPU v5e", versions={})["device"] == "TPU v5e"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "leak"}, "record 2: a record has kind 'leak'; known kinds are run, leakage"),
    ({"attacker": "insider"}, "record 2: .*attacker 'insider'; use full_precision or "),
    ({"auc": 0.7}, "'auc' of a leakage record is 0.7; it must be a mapping"),
    ({"auc": {"value": "high"}}, "'auc' of a leakage record has value 'high'; it must be a number"),
    ({"levels": 1}, "'levels' of a leakage record is 1; it must be an integer of at least 2"),
    ({"levels": 1.58}, "'levels' of a leakage record is 1.58"),
    ({"tpr": {"fpr": 0.1}}, "'tpr' of a leakage record is .*; it must be a list"),
    ({"tpr": [{"value": 0.1}]}, r"'tpr' of a leakage record has fpr None; it must be in \(0, 1\]"),
    ({"tpr": [{"fpr": 0.1}]}, "'tpr' of a leakage record is .*; it must be a mapping with 'value'"),
    ({"precision": [{"value": 1, "fpr": 0.1}]}, "'precision' of a leakage record has prior None"),
    ({"curve": {"fpr": [0, 1], "tpr": [1]}}, "curve of a leakage record has 2 fpr but 1 tpr"),
  ],
)
def test_wrong_records_are_refused(example, change, message):
  with pytest.raises(ValueError, match=message):
    records.validate_all([example.run(), example.leakage() | change])


@pytest.mark.parametrize("kind", [kind for kind in records.REQUIRED if kind != "training"])
def test_every_required_field_is_required(example, kind):
  record = next(record for record in example.audit() if record["kind"] == kind)
  for name in records.REQUIRED[kind]:
    incomplete = {key: value for key, value in record.items() if key != name}
    with pytest.raises(ValueError, match=f"a {kind} record has no '{name}'; it has kind"):
      records.validate(incomplete)


def test_a_run_record_needs_mappings(example):
  with pytest.raises(ValueError, match="'data' of a run record is 'digits'; it must be a mapping"):
    example.run(data="digits")


def test_two_records_about_the_same_thing_are_refused(example):
  pair = [example.leakage("obc", 3, 256), example.run(), example.leakage("obc", 3, 256)]
  with pytest.raises(ValueError, match=r"records 1 and 3 are both about OBC at 1.58 bit \(last"):
    records.validate_all(pair)
  pair[2] = dict(pair[2], members="calibration")
  records.validate_all(pair)


def test_select_leaves_out_parts_of_the_members_unless_asked(example):
  found = [example.leakage(), example.leakage(members="calibration")]
  assert records.select(found, "leakage") == found[:1]
  assert records.select(found, "leakage", members="calibration") == found[1:]
  assert records.select(found, "leakage", method="obc") == []
  assert records.select(found, "unit") == []


def test_variants_are_ordered_for_reading(example):
  found = [
    example.leakage(*variant)
    for variant in [
      ("zeta", 4, 4), ("obc", 3, 3), ("alpha", 4, 4), ("obc", 3, None), ("none", None, None),
      ("nearest", 3, 256), ("obc", 3, 256), ("nearest", 16, 16),
    ]
  ]  # fmt: skip
  assert records.variants(found) == [
    Variant("none", None, None),
    Variant("nearest", 16, 16),
    Variant("nearest", 3, 256),
    Variant("obc", 3, None),
    Variant("obc", 3, 256),
    Variant("obc", 3, 3),
    Variant("alpha", 4, 4),
    Variant("zeta", 4, 4),
  ]


def test_side_by_side_pairs_the_attackers(example):
  full, plain = example.leakage(), example.leakage("obc", 3, 256)
  matched = example.leakage("obc", 3, 256, "matched", accuracy=0.5)
  offline = example.leakage("obc", 4, 4, attack="lira_offline")
  rows = records.side_by_side([matched, offline, plain, full, example.run()])
  assert rows == [
    records.Row(Variant("none", None, None), full),
    records.Row(Variant("obc", 3, 256), plain, matched),
  ]
  assert rows[0].counted is full
  assert rows[1].counted is matched
  best = example.leakage("obc", 3, 256, "best", separation=0.1)
  [_, row] = records.side_by_side([full, plain, matched, best])
  assert row.counted is best  # though others happen to find more
  assert row.shown == [plain, matched, best]
  [row] = records.side_by_side([offline, full], attack="lira_offline")
  assert row.full_precision is offline


def test_main_attack_is_the_first_recorded(example):
  names = ["rmia_offline", "lira_offline"]
  found = [example.leakage(attack=name) for name in names]
  assert records.main_attack(found) == "rmia_offline"
  assert records.main_attack([*found, example.leakage()]) == found[0]["attack"]
  assert records.main_attack([]) == "lira_online"


def test_main_rows_take_the_usual_last_layer(example):
  lasts = {16: (16, 256), 3: (3, 256, None), 4: (None, 256)}
  found = [example.leakage("obc", n, last) for n, some in lasts.items() for last in some]
  rows = records.side_by_side(found)
  usual = {row.variant.levels: row.variant.last_layer_levels for row in records.main_rows(rows)}
  assert usual == {16: 16, 4: None, 3: 256}
  assert {key: len(group) for key, group in records.sweeps(rows).items()} == {
    ("obc", 16): 2, ("obc", 4): 2, ("obc", 3): 3,
  }  # fmt: skip


def test_tpr_at_prefers_the_rule_and_misses_politely(example):
  entries = [
    example.rate(0.2, fpr=0.01, rule="below"),
    example.rate(0.3, fpr=0.01, rule="at_most"),
    example.rate(0.1, fpr=0.001, rule="below"),
  ]
  record = example.leakage(tpr=entries)
  assert records.tpr_at(record, 0.01)["value"] == 0.3
  assert records.tpr_at(record, 0.01, "below")["value"] == 0.2
  assert records.tpr_at(record, 0.001)["value"] == 0.1
  assert records.tpr_at(record, 0.1) is None
  assert records.tpr_at(None, 0.01) is None


@pytest.mark.parametrize(
  ("non_members", "solid", "at_1_per_mille"),
  [(25_000, 0.001, None), (2_000, 0.01, "false_positives"), (999, 0.1, "non_members")],
)
def test_weak_rates_are_found(example, non_members, solid, at_1_per_mille):
  record = example.leakage(non_members=non_members)
  assert records.weakness(record, records.tpr_at(record, 0.001)) == at_1_per_mille
  assert records.solid_fpr([record]) == solid


def test_exactly_one_over_fpr_non_members_are_enough_for_one_false_positive(example):
  record = example.leakage(non_members=1000)
  assert records.weakness(record, records.tpr_at(record, 0.001)) == "false_positives"


def test_solid_fpr_needs_every_row_and_has_a_last_resort(example):
  strong, weak = example.leakage(), example.leakage("obc", 3, 256, non_members=50)
  assert records.solid_fpr([strong, weak]) == 0.1
  assert records.solid_fpr([example.leakage(tpr=[])]) is None
  assert records.solid_fpr([example.leakage()], among=(0.1, 0.01)) == 0.01
  assert records.solid_fpr([example.leakage(non_members=50)], among=(0.01, 0.001)) == 0.01


def test_solid_fpr_is_one_that_every_record_has(example):
  coarse = example.leakage("obc", 3, 3, tpr=[example.rate(0.2, fpr=0.01, rule="at_most")])
  assert records.solid_fpr([example.leakage(), coarse]) == 0.01


def test_changes_are_the_recorded_paired_differences(example):
  record = example.leakage("obc", 3, 3, minus_full_precision=example.differences(-0.014))
  change = records.change(record, 0.01)
  assert change[:3] == pytest.approx((-0.014, -0.016, -0.012))
  assert change.sure is True
  assert change.p < 1e-6
  assert records.change(record, 0.5) is None
  assert records.change(example.leakage(), 0.01) is None
  unsure = example.leakage("obc", 3, 3, minus_full_precision=example.differences(-0.001))
  assert records.change(unsure, 0.01).sure is False
  accuracy = example.leakage("obc", 3, 3, accuracy_minus_full_precision=example.paired(0.1))
  assert records.accuracy_change(accuracy).value == 0.1


def test_underestimate_goes_by_the_paired_difference(example):
  fields = {"minus_full_precision_shadows": example.differences(0.01)}
  plain, matched = example.leakage("obc", 3, 3), example.leakage("obc", 3, 3, "matched", **fields)
  [row] = records.side_by_side([plain, matched])
  assert records.underestimate(row, 0.01).value == 0.01
  best = example.leakage("obc", 3, 3, "best", minus_full_precision_shadows=(
    example.differences(0.02)))  # fmt: skip
  [row] = records.side_by_side([plain, matched, best])
  assert records.underestimate(row, 0.01).value == 0.02
  assert records.underestimate(records.side_by_side([plain])[0], 0.01) is None


def test_many_comparisons_ask_for_more(example):
  """One of 24 intervals that just misses 0 is expected by chance, and no finding."""
  just = records.Difference(-0.01, -0.019, -0.001, 0.03, True)
  clear = records.Difference(-0.01, -0.012, -0.008, 1e-6, True)
  found = records.surely({i: just for i in range(23)} | {23: clear, 24: None})
  assert [which for which, change in found.items() if change.sure] == [23]
  assert records.surely({0: just})[0].sure
