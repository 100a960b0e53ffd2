"""Attacks on saved scores: what is said of them, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from ptq_jax import audit, settings, storage
from ptq_jax.audit import reporting, saved_scores
from ptq_jax.report import records

M, E = 8, 240


def save(path, **changes):
  rng = np.random.default_rng(4)
  half = np.arange(M)[:, None] % 2 == 0
  members = rng.permuted(np.broadcast_to(half, (M, 2000)), axis=0)
  arrays = {"scores": rng.normal(size=(M, 2000)).astype(np.float32), "members": members} | changes
  np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
  return path


def attack_saved(folder, *files):
  config = settings.audit_defaults()
  config.attack.resamples = 60
  config.attack.attacks = ("lira_online", "lira_online_pooled")
  saved_scores.attack(config, folder, *map(str, files))
  return storage.read_records(folder / "results.jsonl")


def test_saved_scores_that_know_nothing_show_nothing(tmp_path):
  """Row 5, and what is said of the file is true: guards run, nothing is called full precision."""
  found = attack_saved(tmp_path, save(tmp_path / "mine.npz"))
  for record in records.select(found, "leakage"):
    assert record["auc"]["low"] <= 0.5 <= record["auc"]["high"]
    assert record["attacker"] == "given"
    assert (record["method"], record["levels"]) == ("scores", None)
    assert "member_accuracy" not in record
  warning = [record for record in found if record["kind"] == "warning"]
  assert any(record["about"] == "false-positive rates" for record in warning)
  text = reporting.summary(reporting.report(tmp_path), tmp_path)
  assert "saved scores" in text
  assert "full-precision" not in text
  page = (tmp_path / "index.html").read_text()
  assert "each model trained on half of them" in page
  results = json.dumps(found)
  assert "full precision" not in results


def test_saved_scores_say_what_they_are(tmp_path):
  rng = np.random.default_rng(5)
  members = rng.random((16, 2000)) < 0.3
  members[:3], members[3:6] = True, False
  members = rng.permuted(members, axis=0)
  scores = rng.normal(size=(16, 2000))
  path = save(tmp_path / "a.npz", scores=scores, members=members,
              method=np.array("brecq"), levels=np.array(4), accuracy=np.full(16, 0.8),
              member_accuracy=np.full(16, 0.95))  # fmt: skip
  found = attack_saved(tmp_path, path)
  [first, *_] = records.select(found, "leakage")
  assert (first["method"], first["levels"], first["last_layer_levels"]) == ("brecq", 4, 4)
  assert first["test_accuracy"]["value"] == pytest.approx(0.8)
  assert first["member_accuracy"]["value"] == pytest.approx(0.95)
  assert first["scores"]["targets"]["members"]["mean"] == pytest.approx(scores[members].mean())
  reporting.report(tmp_path)
  assert (
    f"each model trained on {members.mean():.0%} of them" in (tmp_path / "index.html").read_text()
  )


def test_targets_of_their_own(tmp_path):
  shadows = save(tmp_path / "shadows.npz")
  scores = np.random.default_rng(5).normal(size=(M, 2000))
  named = {"levels": np.array(3), "method": np.array("obc")}
  targets = save(tmp_path / "targets.npz", scores=scores, **named)
  found = attack_saved(tmp_path, shadows, targets)
  assert {record["method"] for record in records.select(found, "leakage")} == {"obc"}


BAD = {
  "objects": ({"scores": np.array([[1.0], [1.0, 2.0]], object)}, "array 'scores' holds Python obj"),
  "bfloat16": (
    {"scores": np.zeros((M, 2000), ml_dtypes.bfloat16)},
    "raw type .*save it as float32",
  ),
  "text": ({"scores": np.full((M, 2000), "1.5")}, "scores are of type <U3"),
  "far label": ({"labels": np.r_[10**9, np.zeros(1999, int)]}, "labels must be one class number"),
  "half label": ({"labels": np.full(2000, 1.5)}, "labels must be one class number"),
  "signs": ({"members": np.ones((M, 2000)) * -1}, "members hold -1.0"),
  "words": ({"members": np.full((M, 2000), "False")}, "members are of type <U5; they must be bool"),
  "unknown": ({"members": np.full((M, 2000), np.nan)}, "members hold nan"),
  "infinite": ({"scores": np.full((M, 2000), np.inf)}, "scores of models 0, 1, .* NaN or infinite"),
  "missing": ({"members": None}, "has no array 'members'; it has scores"),
  "shape": ({"members": np.ones((M, 3), bool)}, "must be \\[models, examples, views\\]"),
  "levels": ({"levels": np.array(1)}, "levels is 1; it must be one integer of at least 2"),
  "accuracy": ({"accuracy": np.full(M, 80.0)}, "accuracy must be one number in"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_and_stays(tmp_path, name):
  """Rows 11 and 12: the array and the file are named, and the user's only copy is left alone."""
  changes, message = BAD[name]
  path = save(tmp_path / "mine.npz", **changes)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=message) as error:
    saved_scores.read(str(path))
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)
  assert "delete" not in str(error.value)
  assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 but no more"])
def test_a_file_of_something_else_is_one_sentence(tmp_path, content):
  path = tmp_path / "mine.npz"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"mine.npz (is not|cannot be read as) an .npz file"):
    saved_scores.read(str(path))
  np.save(tmp_path / "mine.npy", np.zeros((2, 3)))
  with pytest.raises(ValueError, match=r"mine\.npy is not an \.npz file; save its arrays together"):
    saved_scores.read(str(tmp_path / "mine.npy"))


def test_members_may_be_numbers(tmp_path):
  path = save(tmp_path / "mine.npz")
  members = np.load(path)["members"]
  other = save(tmp_path / "other.npz", members=members.astype(np.float32))
  np.testing.assert_array_equal(saved_scores.read(str(other))["members"], members)


def test_the_folder_of_tensorflow_privacy(tmp_path):
  """experiment-k_N/{keep.npy, scores/EPOCH.npy}: the last epoch counts, models by name."""
  rng = np.random.default_rng(6)
  scores, members = rng.normal(size=(M, 50, 2)), rng.random((M, 60)) < 0.5
  for k in range(M):
    experiment = tmp_path / f"experiment-{k}_{M}"
    (experiment / "scores").mkdir(parents=True)
    np.save(experiment / "keep.npy", members[k])
    np.save(experiment / "scores" / "0000000010.npy", scores[k] - 1)
    np.save(experiment / "scores" / "0000000020.npy", scores[k])
  found = saved_scores.read(str(tmp_path))
  np.testing.assert_array_equal(found["scores"], scores)
  np.testing.assert_array_equal(found["members"], members[:, :50])
  (tmp_path / f"experiment-0_{M}" / "keep.npy").unlink()
  with pytest.raises(ValueError, match=r"keep\.npy cannot be read"):
    saved_scores.read(str(tmp_path))


@pytest.mark.parametrize("name", ["rmia", "loss"])
def test_the_folder_of_privacy_meter(tmp_path, name):
  """signals [E, M] of probabilities or losses become log-odds [M, E, 1]."""
  rng = np.random.default_rng(7)
  odds, members = 3 * rng.normal(size=(M, 40)), rng.random((M, 40)) < 0.5
  p = 1 / (1 + np.exp(-odds))
  for part in ("signals", "models"):
    (tmp_path / part).mkdir()
  np.save(tmp_path / "models" / "memberships.npy", members)
  signals = tmp_path / "signals" / f"{name}_signals.npy"
  np.save(signals, (p if name == "rmia" else -np.log(p)).T)
  found = saved_scores.read(str(tmp_path))
  np.testing.assert_allclose(found["scores"][..., 0], odds, rtol=1e-9)
  np.testing.assert_array_equal(found["members"], members)
  np.save(signals, np.full((40, M), 2.0 if name == "rmia" else -2.0))
  with pytest.raises(ValueError, match="holds no"):
    saved_scores.read(str(tmp_path))
  signals.unlink()
  with pytest.raises(ValueError, match="has neither experiment"):
    saved_scores.read(str(tmp_path))


def scores_of(num_models, seed=0):
  rng = np.random.default_rng(seed)
  half = rng.permuted(np.tile(np.arange(40) % 2 == 0, (num_models // 2, 1)), axis=1)
  members = np.stack([half, ~half], axis=1).reshape(num_models, 40)
  return {"scores": rng.normal(size=members.shape) + 3 * members, "members": members}


def test_losses_for_scores_are_said(tmp_path):
  given = scores_of(8)
  options = {"attack.attacks": ("loss_threshold",), "attack.resamples": 20, "figures": False}
  for name, sign in {"losses": -1, "scores": 1}.items():
    scores = given | {"scores": sign * given["scores"]}
    found = audit.run_scores(scores, workdir=tmp_path / name, **options).records
    said = {record["about"]: record["message"] for record in records.select(found, "warning")}
    assert ("scores" in said) == (name == "losses")
    if name == "losses":
      assert "to loss threshold members are surely the lower ones (AUC 0.0" in said["scores"]


def test_a_model_that_is_there_twice_is_refused(tmp_path):
  given, others = scores_of(8), scores_of(4, seed=1)
  twice = {name: array[[0, 1, 2, 3, 4, 5, 2, 7]] for name, array in given.items()}
  with pytest.raises(ValueError, match="shadow 2 and shadow 6 have the same scores and members"):
    audit.run_scores(twice, workdir=tmp_path)
  others["scores"][3], others["members"][3] = given["scores"][5], given["members"][5]
  with pytest.raises(ValueError, match="shadow 5 and target 3 have the same scores"):
    audit.run_scores(given, others, workdir=tmp_path)
