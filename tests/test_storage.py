import errno
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import storage

TREE = {"a": jnp.arange(1000.0), "b": (np.ones((3, 4), np.float32), jnp.int32(3))}


def damage(path: pathlib.Path):
  content = bytearray(path.read_bytes())
  for i in range(len(content) // 2, len(content) // 2 + 8):
    content[i] ^= 0xFF
  path.write_bytes(content)


def test_arrays_come_back_exactly(tmp_path):
  path = tmp_path / "deep" / "x.npz"
  arrays = {"scores": np.float32([[1.5, -np.inf]]), "names": np.array(["a", "b"])}
  storage.save_arrays(path, **arrays)
  loaded = storage.load_arrays(path)
  assert loaded.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(loaded[name], array)
    assert loaded[name].dtype == array.dtype
  assert [p.name for p in path.parent.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("how", ["damaged", "truncated", "empty"])
def test_corrupt_arrays_are_recognised(tmp_path, how):
  path = tmp_path / "x.npz"
  storage.save_arrays(path, scores=np.arange(10_000.0))
  if how == "damaged":
    damage(path)
  else:
    path.write_bytes(path.read_bytes()[: 1000 if how == "truncated" else 0])
  with pytest.raises(storage.CorruptFileError, match=r"is corrupt \("):
    storage.load_arrays(path)


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  storage.write_json(path, {"value": 1})

  def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(storage.os, "fsync", full)
  with pytest.raises(
    OSError, match=r"\(No space left on device, it takes about 40 bytes\); make r"
  ):
    storage.write_json(path, {"value": 2})
  monkeypatch.undo()
  assert storage.read_json(path) == {"value": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_records_are_json_lines(tmp_path):
  path = tmp_path / "r.jsonl"
  records = [{"kind": "run", "x": 1}, {"kind": "warning", "text": "a\nb"}]
  storage.write_records(path, records)
  assert [json.loads(line) for line in path.read_text().splitlines()] == records
  assert storage.read_records(path) == records
  path.write_text(path.read_text() + '{"kind": ')
  with pytest.raises(storage.CorruptFileError, match="line 3 is not JSON"):
    storage.read_records(path)


def test_unwritable_directory_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError, match=r"cannot be written .* choose another"):
    storage.require_writable(tmp_path / "file" / "runs")


def test_checkpoints_keep_two_and_restore_the_newest(tmp_path):
  with storage.Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, TREE), {"epoch": step})
  with storage.Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(TREE)
  assert (saved.step, saved.metadata, saved.skipped) == (3, {"epoch": 3}, ())
  np.testing.assert_array_equal(saved.tree["a"], 3 * np.arange(1000.0))
  assert jax.tree.structure(saved.tree) == jax.tree.structure(TREE)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "2.json", "3", "3.json"]


def test_nothing_to_restore(tmp_path):
  with storage.Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(TREE) == storage.Saved(0, None, {}, ())


@pytest.mark.parametrize("how", ["flipped", "file gone", "folder gone", "empty", "record"])
def test_a_damaged_checkpoint_is_renamed_and_an_older_one_restored(tmp_path, how):
  with storage.Checkpoints(tmp_path) as checkpoints:
    for step in (7, 8):
      checkpoints.save(step, TREE, {})
  if how == "folder gone":
    shutil.rmtree(tmp_path / "8")
  elif how == "record":
    damage(tmp_path / "8.json")
  else:
    for path in (tmp_path / "8").rglob("d/*"):
      {"flipped": damage, "file gone": pathlib.Path.unlink, "empty": empty}[how](path)
  with storage.Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(TREE)
    assert saved.step == 7
    assert len(saved.skipped) == 1
    assert "8 is damaged" in saved.skipped[0]
    assert "now called 8.damaged" in saved.skipped[0]
    np.testing.assert_array_equal(saved.tree["a"], np.arange(1000.0))
    checkpoints.save(9, TREE, {})
  assert checkpoints.steps() == [7, 9]
  assert (tmp_path / "8.damaged").exists()


def empty(path):
  path.write_bytes(b"")


@pytest.mark.parametrize(
  "like",
  [TREE | {"c": jnp.zeros(2)}, TREE | {"a": jnp.zeros(999)}, TREE | {"a": jnp.zeros(1000, int)}],
)
def test_a_checkpoint_of_other_arrays_is_refused_and_stays(tmp_path, like):
  with storage.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, TREE, {})
    checkpoints.wait()
    with pytest.raises(ValueError, match="holds other arrays than these models"):
      checkpoints.restore(like)
    assert checkpoints.restore(TREE).step == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_now_stays(tmp_path, monkeypatch, code):
  with storage.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, TREE, {})
    checkpoints.wait()

    def fail(path):
      raise OSError(code, "not now")

    monkeypatch.setattr(storage, "_file_checksum", fail)
    with pytest.raises(OSError, match="not now"):
      checkpoints.restore(TREE)
    monkeypatch.undo()
    assert checkpoints.restore(TREE).step == 1


def test_a_write_that_fails_in_the_background_is_one_sentence(tmp_path, monkeypatch):
  with storage.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, TREE, {})
    checkpoints.wait()

    def full(*_arguments, **_options):
      raise ValueError("RESOURCE_EXHAUSTED: ENOSPC: writing\nmore lines")

    monkeypatch.setattr(storage, "_orbax", full)
    checkpoints.save(2, TREE, {})
    with pytest.raises(OSError, match=r"2 could not be written \(RESOURCE_E.*takes about [\d,]+ b"):
      checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.restore(TREE).step == 1
    checkpoints.save(2, TREE, {})
  assert checkpoints.steps() == [1, 2]


def test_no_damage_to_an_archive_of_ours_goes_unnoticed(tmp_path):
  """Any byte flipped, any cut: the same arrays come out, or CorruptFileError."""
  path = tmp_path / "x.npz"
  arrays = {"scores": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "bc"])}
  storage.save_arrays(path, **arrays)
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  for position in rng.permutation(len(whole))[:400]:
    for damaged in (
      whole[:position] + bytes([whole[position] ^ 1 << rng.integers(8)]) + whole[position + 1 :],
      whole[:position],
    ):
      path.write_bytes(damaged)
      try:
        found = storage.load_arrays(path)
      except storage.CorruptFileError:
        continue
      assert found.keys() == arrays.keys()
      for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_no_flipped_bit_in_json_goes_unnoticed(tmp_path):
  """But for one in the word crc32, which leaves a document with one name more."""
  path = tmp_path / "x.json"
  document = {"chunks": [["shadows", 0, 4]], "rate": 0.25, "name": "\u00e4"}
  storage.write_json(path, document)
  assert storage.read_json(path) == document
  whole, noticed = path.read_bytes(), 0
  for position in range(8 * len(whole)):
    byte = whole[position // 8] ^ 1 << position % 8
    path.write_bytes(whole[: position // 8] + bytes([byte]) + whole[position // 8 + 1 :])
    try:
      assert storage.read_json(path).items() >= document.items()
    except storage.CorruptFileError:
      noticed += 1
  assert noticed > 7 * len(whole)


def test_memory_that_runs_out_is_not_damage(tmp_path, monkeypatch):
  storage.save_arrays(tmp_path / "x.npz", scores=np.arange(10.0))

  def fail(*_arguments, **_options):
    raise MemoryError("Unable to allocate 8 GiB")

  monkeypatch.setattr(storage.np, "load", fail)
  with pytest.raises(MemoryError):
    storage.load_arrays(tmp_path / "x.npz")
  damage(tmp_path / "x.npz")
  with pytest.raises(storage.CorruptFileError):
    storage.load_arrays(tmp_path / "x.npz")


def test_a_checkpoint_without_its_record_is_set_aside_and_not_overwritten(tmp_path):
  with storage.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, TREE, {})
  kept = sorted(path.read_bytes() for path in (tmp_path / "1").rglob("d/*"))
  (tmp_path / "1.json").unlink()
  with storage.Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(TREE)
    assert saved.tree is None
    assert "1.json, which says what is in it, is missing" in saved.skipped[0]
    checkpoints.save(1, TREE, {})
    checkpoints.wait()
    assert checkpoints.restore(TREE).step == 1
  assert sorted(path.read_bytes() for path in (tmp_path / "1.damaged").rglob("d/*")) == kept


@pytest.mark.parametrize("text", ["[]", "null", "5", "", "{"])
def test_json_of_another_kind_is_recognised(tmp_path, text):
  (tmp_path / "x.json").write_text(text)
  with pytest.raises(storage.CorruptFileError, match=r"x\.json"):
    storage.read_json(tmp_path / "x.json")
