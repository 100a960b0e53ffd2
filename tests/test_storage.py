import errno
import json
import pathlib

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
  with pytest.raises(storage.CorruptFileError, match=r"is corrupt .* delete it and run again"):
    storage.load_arrays(path)


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  storage.write_json(path, {"value": 1})

  def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_text", full)
  with pytest.raises(OSError, match=r"could not be written \(No space left on device\); make room"):
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


@pytest.fixture(params=["orbax", "files"])
def either_kind(request, monkeypatch):
  """Checkpoints of a process alone, and of one of two."""
  if request.param == "files":
    monkeypatch.setattr(jax, "process_count", lambda: 2)


@pytest.mark.usefixtures("either_kind")
def test_checkpoints_keep_two_and_restore_the_newest(tmp_path):
  with storage.Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, TREE), {"epoch": step})
  with storage.Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(TREE)
  assert (saved.step, saved.metadata, saved.skipped) == (3, {"epoch": 3}, ())
  np.testing.assert_array_equal(saved.tree["a"], 3 * np.arange(1000.0))
  assert jax.tree.structure(saved.tree) == jax.tree.structure(TREE)
  assert sorted(p.stem for p in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.usefixtures("either_kind")
def test_nothing_to_restore(tmp_path):
  with storage.Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(TREE) == storage.Saved(0, None, {}, ())


@pytest.mark.usefixtures("either_kind")
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
  with storage.Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, TREE, {})
  for path in [*(tmp_path / "2").rglob("d/*"), *tmp_path.glob("2.npz")]:
    damage(path)
  with storage.Checkpoints(tmp_path) as checkpoints:
    saved = checkpoints.restore(TREE)
  assert saved.step == 1
  assert len(saved.skipped) == 1
  assert "is corrupt" in saved.skipped[0]
  np.testing.assert_array_equal(saved.tree["a"], np.arange(1000.0))


def test_wrong_bytes_that_still_decode_are_recognised(tmp_path, monkeypatch):
  with storage.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, TREE, {})
    checkpoints.wait()
    monkeypatch.setattr(storage, "_checksums", lambda leaves: dict.fromkeys(leaves, 0))
    saved = checkpoints.restore(TREE)
  assert saved.tree is None
  assert "checksums do not match" in saved.skipped[0]


def test_several_processes_read_no_checkpoint_of_one_and_one_reads_theirs(tmp_path, monkeypatch):
  with storage.Checkpoints(tmp_path / "one") as checkpoints:
    checkpoints.save(1, TREE, {})
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with (
    storage.Checkpoints(tmp_path / "one") as checkpoints,
    pytest.raises(ValueError, match="finish this audit without --distributed"),
  ):
    checkpoints.restore(TREE)
  with storage.Checkpoints(tmp_path / "two") as checkpoints:
    checkpoints.save(1, TREE, {})
  monkeypatch.undo()
  with storage.Checkpoints(tmp_path / "two") as checkpoints:
    assert checkpoints.restore(TREE).step == 1
