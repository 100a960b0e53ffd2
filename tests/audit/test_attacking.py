"""What attacking one variant records."""

import types

import numpy as np
import pytest

from ptq_jax import settings
from ptq_jax.attack import protocol
from ptq_jax.audit import attacking, layout
from ptq_jax.data import load
from ptq_jax.metrics import roc
from ptq_jax.report import records
from ptq_jax.report.records import Variant

M, E = 8, 240
OBC = Variant("obc", 3, 3)


def paired(rng, num_models):
  half = rng.permuted(np.tile(np.arange(E) % 2 == 0, (num_models // 2, 1)), axis=1)
  return np.stack([half, ~half], axis=1).reshape(num_models, E)


class Audit(layout.Audit):
  """Scores from memory instead of a workdir."""

  members = None  # set below
  more = types.MappingProxyType({})  # arrays of a variant

  def load_scores(self, variant, group):
    scores = self.scores[variant, group]
    rows = np.ones(len(scores))
    fit = (1.0 if variant == layout.FULL_PRECISION else 0.8) - 0.01 * np.arange(len(scores))
    return {"scores": scores, "accuracy": 0.9 * rows, "bits_per_weight": rows, "size_kb": rows,
            "member_accuracy": fit} | self.more.get(variant, {})  # fmt: skip


def audit(scores, members, root):
  config = settings.audit_defaults()
  config.attack.resamples = 60
  config.attack.fprs = (0.1, 0.01)
  config.attack.attacks = ("lira_online_pooled", "loss_threshold")
  labels = np.arange(E) % 4
  images = np.zeros((E, 2, 2, 1), np.uint8)
  data = load.from_arrays(images, labels, images[:50], labels[:50])
  found = Audit(config=config, root=root, trained=root, given_data=data)
  found.scores, found.members = scores, members
  found.sound = {group: np.ones(len(rows), bool) for group, rows in members.items()}
  return found


def draw(rng, members, offset=0.0, scale=1.0):
  common = 2 * np.random.default_rng(9).normal(size=(1, E, 1))
  scores = common + rng.normal(size=(*members.shape, 1)) + 2.0 * members[..., None]
  return scale * scores + offset


@pytest.fixture
def leave_one_out(tmp_path, monkeypatch):
  """Eight models; quantizing shifts and narrows all scores and adds a little noise."""
  rng = np.random.default_rng(0)
  members = paired(rng, M)
  full = draw(rng, members)
  quantized = 0.5 * full - 3 + 0.2 * rng.normal(size=full.shape)
  scores = {(layout.FULL_PRECISION, "shadows"): full, (OBC, "shadows"): quantized}
  monkeypatch.setattr(attacking, "unit_records", lambda *_: [])
  return audit(scores, {"shadows": members}, tmp_path)


def attack(found):
  full = attacking.scores_of(found, layout.FULL_PRECISION)
  base = attacking.attack_variant(found, layout.FULL_PRECISION, full, None)
  return base, attacking.attack_variant(found, OBC, full, base)


def by_attacker(attacked, name="lira_online_pooled"):
  return {
    record["attacker"]: record
    for record in records.select(attacked.records, "leakage", attack=name)
  }


def test_every_attacker_is_a_row_with_paired_differences(leave_one_out):
  base, quantized = attack(leave_one_out)
  records.validate_all([*base.records, *quantized.records])
  rows = by_attacker(quantized)
  assert set(rows) == set(records.ATTACKERS) - {"given"}
  in_full = by_attacker(base)
  assert set(in_full) == {"full_precision", "rescaled", "best"}
  like = {"rescaled": "rescaled", "matched_rescaled": "rescaled", "combined": "rescaled"}
  for name, row in rows.items():
    change = row["minus_full_precision"]["auc"]
    full = in_full[like.get(name, "best" if name == "best" else "full_precision")]
    assert change["value"] == pytest.approx(row["auc"]["value"] - full["auc"]["value"]), name
    assert 0 <= change["p"] <= 1
    assert row["accuracy_minus_full_precision"]["value"] == 0
    gap = row["minus_full_precision_shadows"]["auc"] if name != "full_precision" else None
    if gap:
      assert gap["value"] == pytest.approx(
        row["auc"]["value"] - rows["full_precision"]["auc"]["value"]
      )
    assert row["epsilon"]["epsilon"] >= 0
  assert set(by_attacker(quantized, "loss_threshold")) == {"full_precision", "matched"}
  assert rows["rescaled"]["auc"]["value"] > rows["full_precision"]["auc"]["value"] + 0.05
  for row in rows.values():
    assert row["member_accuracy"]["value"] == pytest.approx(0.8 - 0.035)
    assert row["member_accuracy_minus_full_precision"]["value"] == pytest.approx(-0.2)
    assert row["scores"]["full_precision_shadows"] == in_full["best"]["scores"]["targets"]
    assert set(row["scores"]) == {"targets", "full_precision_shadows"}  # matched are the targets
    targets, shadows = row["scores"]["targets"], row["scores"]["full_precision_shadows"]
    for side, gap in (("members", 2.0), ("non_members", 0.0)):
      assert shadows[side]["mean"] == pytest.approx(gap, abs=0.3)
      assert targets[side]["mean"] == pytest.approx(0.5 * shadows[side]["mean"] - 3, abs=0.05)
      assert targets[side]["sd"] < 0.6 * shadows[side]["sd"]
  assert "member_accuracy_minus_full_precision" not in in_full["best"]
  ratio = records.tpr_at({"tpr": rows["best"]["minus_full_precision"]["tpr_ratio"]}, 0.1)
  rates = [records.tpr_at(found["best"], 0.1)["value"] for found in (rows, in_full)]
  assert ratio["value"] == pytest.approx(rates[0] / rates[1])
  assert [entry["class"] for entry in rows["best"]["classes"]] != []
  assert sum(entry["targets"] for entry in rows["best"]["chosen"]) == M


def test_the_best_attacker_does_not_look_at_the_targets_membership():
  """Swapping a target's members for its non-members, and its partner's, changes nothing for it."""
  rng = np.random.default_rng(1)
  members = paired(rng, M)
  candidates = {
    (who, "lira_online"): attacking.Scores(rng.normal(size=(M, E)) + gap * members, None)
    for who, gap in (("full_precision", 1.0), ("matched", 1.1), ("rescaled", 1.05))
  }
  rescaled = "rescaled", "lira_online"
  chosen = attacking.best_attacker(candidates, members, members, (0.1,))
  for t in range(M):
    swapped = members.copy()
    swapped[[t, t ^ 1]] = ~swapped[[t, t ^ 1]]
    assert attacking.best_attacker(candidates, swapped, members, (0.1,))[t] == chosen[t]
  known = {
    pair: rows._replace(known=rng.normal(size=(4, E)) + (2.0 if pair == rescaled else 0))
    for pair, rows in candidates.items()
  }
  shadows = paired(rng, 4)
  known = {
    pair: rows._replace(known=rows.known * (2 * shadows - 1)) for pair, rows in known.items()
  }
  assert attacking.best_attacker(known, members, shadows, (0.1,)) == [rescaled] * M
  for few in (1, 2):  # nobody is left but the partner
    alone = {pair: rows._replace(targets=rows.targets[:few]) for pair, rows in candidates.items()}
    pairs = attacking.best_attacker(alone, members[:few], members, (0.1,))
    assert pairs == [("matched", "lira_online")] * few


def test_the_best_attacker_has_every_attack(leave_one_out):
  """An attack that is not the main one may find most, as RMIA does on the digits."""
  leave_one_out.config.attack.attacks = ("loss_threshold", "rmia_online")
  _, quantized = attack(leave_one_out)
  best = by_attacker(quantized, "loss_threshold")["best"]
  assert {entry["attack"] for entry in best["chosen"]} == {"rmia_online"}
  found = {who: records.tpr_at(record, 0.1)["value"]
           for who, record in by_attacker(quantized, "loss_threshold").items()}  # fmt: skip
  assert found["best"] > max(rate for who, rate in found.items() if who != "best") + 0.05


def test_dedicated_targets_are_attacked_by_the_shadows_best_attacker(leave_one_out):
  rng = np.random.default_rng(2)
  members = leave_one_out.members["shadows"]
  targets = paired(rng, 2)
  leave_one_out.members = {"shadows": members, "targets": targets}
  leave_one_out.sound["targets"] = np.ones(2, bool)
  full = draw(rng, targets)
  leave_one_out.scores[layout.FULL_PRECISION, "targets"] = full
  leave_one_out.scores[OBC, "targets"] = 0.5 * full - 3
  base, quantized = attack(leave_one_out)
  rows = by_attacker(quantized)
  assert "matched_shadows" not in by_attacker(base)["best"]["scores"]
  assert rows["best"]["num_targets"] == 2
  assert [entry["targets"] for entry in rows["best"]["chosen"]] == [2]
  assert rows["best"]["tpr"][0]["transferred"] is not None
  moments = rows["best"]["scores"]
  assert set(moments) == {"targets", "full_precision_shadows", "matched_shadows"}
  assert moments["matched_shadows"] != moments["targets"]
  own = leave_one_out.scores[OBC, "shadows"][members]
  assert moments["matched_shadows"]["members"]["mean"] == pytest.approx(own.mean())


def test_members_that_calibrated_are_compared_with_the_others(leave_one_out):
  """Every third member calibrates; the scores of these alone are raised."""
  members = leave_one_out.members["shadows"]
  chosen = np.stack([np.flatnonzero(row)[::3] for row in members])
  raised = leave_one_out.scores[OBC, "shadows"].copy()
  np.put_along_axis(raised[..., 0], chosen, 2.0 + np.take_along_axis(raised[..., 0], chosen, 1), 1)
  leave_one_out.scores[OBC, "shadows"] = raised
  leave_one_out.more = {OBC: {"calibration": chosen}}
  _, quantized = attack(leave_one_out)
  for who in records.COMPARED:
    rows = {
      record["members"]: record
      for record in quantized.records
      if record["attacker"] == who and record["attack"] == "lira_online_pooled"
    }
    assert set(rows) == {
      "all", "calibration members", "other members", "calibration among members"}  # fmt: skip
    gap = records.calibration_gap(rows["calibration members"], 0.1)
    rates = [records.tpr_at(rows[f"{part} members"], 0.1) for part in ("calibration", "other")]
    assert gap.value == pytest.approx(rates[0]["value"] - rates[1]["value"])
    assert gap.sure
    assert gap.value > 0.1
  assert not any(record["attacker"] == "combined" and record.get("members", "all") != "all"
                 for record in quantized.records)  # fmt: skip


def test_scores_of_an_earlier_version_say_nothing_of_their_members(leave_one_out):
  leave_one_out.more = {OBC: {"member_accuracy": None}}
  base, quantized = attack(leave_one_out)
  assert "member_accuracy" in by_attacker(base)["best"]
  row = by_attacker(quantized)["best"]
  assert not {"member_accuracy", "member_accuracy_minus_full_precision"} & set(row)
  assert "not known of 1 of 2 variants" in attacking.uncounted([*base.records, *quantized.records])
  assert attacking.uncounted(base.records) is None


@pytest.mark.parametrize(
  ("trained", "seen", "asked", "told"),
  [
    (0.996, 0.959, (), True),
    (0.996, 0.959, ("shift1",), True),
    (0.996, 0.959, ("flip",), False),  # members are not asked about as they were seen
    (0.996, 0.98, (), False),
    (0.8, 0.99, (), False),
    (None, 0.99, (), False),
    (0.996, None, (), False),
  ],
)
def test_networks_that_are_worse_in_evaluation_mode_are_named(trained, seen, asked, told):
  config = settings.audit_defaults()
  config.train.augmentation, config.queries.augmentation = ("shift1",), asked
  found = [
    {"kind": "leakage", "member_accuracy": {"value": seen}, **layout.FULL_PRECISION._asdict()},
    {"kind": "training", "accuracy": [0.3, trained]},
  ]
  sentence = attacking.behind_training(found, config)
  assert bool(sentence) == told
  assert not told or "99.6% of their members, in evaluation mode 95.9%" in sentence
  assert attacking.behind_training(found[:1], config) is None


def test_a_model_that_quantizing_broke_is_left_out_of_its_variant_only(leave_one_out):
  """Row 16: one NaN in one image of one quantized model of eight."""
  leave_one_out.scores[OBC, "shadows"][3, 17, 0] = np.nan
  base, quantized = attack(leave_one_out)
  assert by_attacker(base)["full_precision"]["num_targets"] == M
  rows = by_attacker(quantized)
  assert {row["num_targets"] for row in rows.values()} == {M - 1}
  assert quantized.left_out.startswith("OBC at 1.58 bit is without model 3 ")
  assert "not finite" in quantized.left_out
  assert rows["matched"]["auc"]["value"] > 0.6
  change = rows["matched"]["minus_full_precision"]["auc"]["value"]
  scores = protocol.leave_one_out(
    leave_one_out.scores[layout.FULL_PRECISION, "shadows"],
    leave_one_out.members["shadows"],
    attacks=["lira_online_pooled"],
  )["lira_online_pooled"]
  keep = np.arange(M) != 3
  pairs = zip(scores[keep], leave_one_out.members["shadows"][keep], strict=True)
  full = np.mean([roc.auc(*pair) for pair in pairs])
  assert change == pytest.approx(rows["matched"]["auc"]["value"] - full)
  evidence = {
    layout.FULL_PRECISION: (base.scores, base.kept),
    OBC: (quantized.scores, quantized.kept),
  }
  assert len(attacking.exposures(leave_one_out, evidence)) == 2


# ---- saved scores ----
