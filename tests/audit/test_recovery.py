"""What is missing, damaged or cannot be read in a workdir, and what becomes of it."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest

from ptq_jax import storage
from ptq_jax.audit import preflight, reporting
from tests.audit.conftest import assert_same, leakage, opened, run, scores

DAMAGES = {
  "deleted": lambda path: path.unlink(),
  "empty": lambda path: path.write_bytes(b""),
  "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
  "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
  "null": lambda path: path.write_bytes(b"null"),
  "list": lambda path: path.write_bytes(b"[]"),
  "object": lambda path: path.write_bytes(b"{}"),
}

FILES = (
  "index.html",
  "results.csv",
  "results.md",
  "results.jsonl",
  "figures/roc.png",
  "figures/privacy_utility.svg",
  "exposure.csv",
  "membership.npz",
  "manifest.json",
  "config.json",
  "seconds.json",
  "models/work.json",
  "models/membership.npz",
  "scores/full_precision/shadows-00000-00004.npz",
  "scores/obc-3-3/shadows-00004-00008.npz",
  "quantized/nearest-3-3/shadows-00000-00004.npz",
)

NOTES = ["1 of 10 classes have no test example, such as '5'."]
"""What is said of the data at every start."""


def flipped(data):
  """A bit of each of 128 bytes: a header inside an archive is shorter, and may say nothing."""
  start = len(data) // 2
  stop = start + 128
  return data[:start] + bytes(byte ^ 1 for byte in data[start:stop]) + data[stop:]


@pytest.mark.parametrize("how", ["deleted", "half", "flipped", "list"])
def test_damage_to_every_file_is_made_good(finished, copied, how):
  """One file at a time, and in more ways: `bench faults`."""
  spared = "models/work.json" if how in ("half", "list") else "models/membership.npz"
  expected = {name: (finished / name).read_bytes() for name in FILES}
  for name in FILES:
    if name != spared:
      DAMAGES[how](copied / name)
  heard = "\n".join(run(copied))
  for name in ("scores/full_precision/shadows-00000", "scores/obc-3-3/shadows-00004"):
    assert how == "deleted" or name in heard
  assert "quantized/nearest-3-3/shadows-00000-00004.npz is" in heard
  for name in FILES:
    if name == "models/work.json" or name.endswith((".csv", ".svg")):
      assert (copied / name).read_bytes() == expected[name], name
    assert (copied / name).stat().st_size > 0
  assert_same(finished, copied)
  assert run(copied) == NOTES


@pytest.mark.parametrize("name", ["index.html", "figures/roc.png", "results.jsonl", "exposure.csv"])
def test_what_was_made_from_results_is_watched(copied, name):
  DAMAGES["flipped"](copied / name)
  assert any(name in sentence and "anew" in sentence for sentence in run(copied))


def test_nothing_is_written_when_nothing_is_to_be_done(copied):
  run(copied)
  before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if "lock" not in str(path)}
  assert run(copied) == NOTES
  after = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if "lock" not in str(path)}
  assert after == before


def test_results_with_a_changed_number_are_not_shown(copied):
  path = copied / "results.jsonl"
  lines = path.read_text().splitlines()
  record = json.loads(lines[3])
  record["auc"]["value"] = 0.5
  path.write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]) + "\n")
  with pytest.raises(storage.CorruptFileError, match="is not as it was written"):
    reporting.report(copied)


def test_lost_models_are_named_and_trained_again(finished, copied):
  """Together with scores that need them; all end as they were."""
  chunk = next((copied / "models").glob("shadows-*"))
  for path in (chunk / "trained").rglob("d/*"):
    path.write_bytes(b"damaged")
  shutil.rmtree(copied / "scores" / "obc-3-3")
  heard = run(copied)
  assert any("is damaged" in sentence and "2.damaged" in sentence for sentence in heard)
  assert len(list((chunk / "trained").glob("2.damaged/*"))) == 2  # renamed, not deleted
  assert_same(finished, copied)


def test_other_models_make_their_other_scores_anew(finished, copied, monkeypatch):
  """A chunk that had to be trained again elsewhere, with other roundings, takes no old scores."""
  (copied / "scores" / "obc-3-3" / "shadows-00000-00004.npz").unlink()
  chunk = copied / "models" / "shadows-00000-00004"
  shutil.rmtree(chunk / "trained")
  original = storage.Checkpoints.save

  def rounded(checkpoints, step, tree, metadata):
    tree = jax.tree.map(lambda leaf: leaf * np.float32(1 + 1e-3), tree)
    original(checkpoints, step, tree, metadata)

  monkeypatch.setattr(storage.Checkpoints, "save", rounded)
  run(copied)
  run(copied)
  model = {str(arrays["model"]) for name, arrays in scores(copied).items() if "00000-00004" in name}
  assert len(model) == 1


def test_a_lost_work_list_is_refused_and_not_guessed(copied):
  for name in ("work.json", "membership.npz"):
    (copied / "models" / name).unlink()
  before = sorted(copied.rglob("*"))
  with pytest.raises(ValueError, match="nobody knows who trained on what"):
    opened(copied)
  assert [path for path in sorted(copied.rglob("*")) if "lock" not in path.name] == [
    path for path in before if "lock" not in path.name
  ]


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    MemoryError(),
  ],
  ids=repr,
)
def test_what_cannot_be_read_now_is_left_as_it_is(copied, monkeypatch, error):
  """Nor are models taken to be too many for a program."""
  for variant in ("full_precision", "obc-3-3"):
    shutil.rmtree(copied / "scores" / variant)
  files = [copied / "models" / "work.json", *(copied / "models").rglob("*/trained/**/*")]
  before = {path: path.read_bytes() for path in files if path.is_file()}

  def fail(*_arguments, **_options):
    raise error

  monkeypatch.setattr(storage.Checkpoints, "_read", fail)
  with pytest.raises(type(error)):
    run(copied)
  assert {path: path.read_bytes() for path in before} == before
  monkeypatch.undo()
  monkeypatch.setattr(storage, "_file_checksum", fail)
  with pytest.raises(type(error)):
    run(copied)
  assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("where", ["scores/obc-3-3", "quantized/obc-3-3", "figures"])
def test_a_full_disk_is_one_sentence_and_the_rest_comes_later(finished, copied, monkeypatch, where):
  shutil.rmtree(copied / where)
  replace = storage.os.fsync

  def full(number):
    if where in storage.os.readlink(f"/proc/self/fd/{number}"):
      raise OSError(errno.ENOSPC, "No space left on device")
    replace(number)

  monkeypatch.setattr(storage.os, "fsync", full)
  with pytest.raises(OSError, match=r"could not be written \(No space left on device.*make room"):
    run(copied)
  monkeypatch.undo()
  run(copied)
  assert_same(finished, copied)


def test_verify_names_what_is_wrong_and_changes_nothing(copied):
  assert preflight.verify(opened(copied)) == []
  DAMAGES["flipped"](copied / "scores" / "obc-3-3" / "shadows-00000-00004.npz")
  (copied / "quantized" / "nearest-3-3" / "shadows-00000-00004.npz").unlink()
  DAMAGES["half"](next((copied / "models" / "shadows-00004-00008" / "trained" / "2").rglob("d/*")))
  DAMAGES["empty"](copied / "index.html")
  found = "\n".join(preflight.verify(opened(copied)))
  for name in ("obc-3-3", "quantized/nearest-3-3", "shadows-00004-00008", "index.html"):
    assert name in found
  assert (copied / "index.html").read_bytes() == b""


def test_a_diverged_model_is_left_out_with_its_partner_and_named(copied):
  path = copied / "scores" / "full_precision" / "shadows-00000-00004.npz"
  arrays = storage.load_arrays(path)
  arrays["scores"][3] = np.nan
  storage.save_arrays(path, **arrays)
  shutil.rmtree(copied / "scores" / "nearest-3-3")
  run(copied)
  found = storage.read_records(copied / "results.jsonl")
  assert any("shadows 2, 3 are left out" in record.get("message", "") for record in found)
  assert {record["num_targets"] for record in leakage(copied)} == {6}
  quantized = storage.load_arrays(copied / "scores" / "nearest-3-3" / path.name)["scores"]
  assert list(np.isfinite(quantized).all(axis=(1, 2))) == [True, True, True, False]
