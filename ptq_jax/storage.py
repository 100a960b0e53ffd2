"""Files: Orbax checkpoints for trees, .npz for arrays, JSON lines for records.

Every file appears whole or not at all: it is written under another name, flushed to the disk, and
renamed. What cannot be read back is a `CorruptFileError`, which says what to do.
"""

import contextlib
import csv
import io
import json
import logging
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ptq_jax.base import PyTree

Path = pathlib.Path


class CorruptFileError(ValueError):
  """A file or checkpoint that exists but cannot be read back."""


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
  """Yields a temporary path beside `path`; renames it to `path` when the block ends well.

  Raises:
    OSError: with a sentence, when the disk is full or the folder cannot be written. Whatever was at
      `path` before is still there.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    with temporary.open("rb") as written:
      os.fsync(written.fileno())
    temporary.replace(path)
  except OSError as error:
    raise type(error)(
      f"{path} could not be written ({error.strerror or error}); make room or choose another "
      "--workdir. What was written before is intact: the same command goes on from there."
    ) from error
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
  """Writes a text file atomically."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
  """Writes one JSON document atomically, with tuples as lists."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path | str) -> Any:
  """Reads what `write_json` wrote.

  Raises:
    CorruptFileError: if it is not JSON.
  """
  try:
    return json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise CorruptFileError(f"{path} is not readable JSON; delete it and run again.") from error


def write_records(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
  """Writes one JSON object per line, atomically."""
  write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path | str) -> list[dict[str, Any]]:
  """Reads what `write_records` wrote.

  Raises:
    FileNotFoundError: if there is no such file.
    CorruptFileError: naming the line that is not a JSON object.
  """
  records = []
  for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
    try:
      record = json.loads(line)
    except ValueError as error:
      raise CorruptFileError(
        f"{path}, line {number} is not JSON; delete it and run again."
      ) from error
    if not isinstance(record, dict):
      raise CorruptFileError(
        f"{path}, line {number} is not a JSON object; delete it and run again."
      )
    records.append(record)
  return records


def write_csv(path: Path | str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
  """Writes columns of equal length as comma-separated values with a header, atomically."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(columns)
  writer.writerows(zip(*columns.values(), strict=True))
  write_text(path, text.getvalue())


def save_arrays(path: Path | str, **arrays: np.ndarray | Sequence[Any]) -> None:
  """Writes named arrays to an .npz file atomically."""
  with replacing(path) as temporary, temporary.open("wb") as file:
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})


def load_arrays(path: Path | str) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz file; the checksums in it are verified.

  Raises:
    FileNotFoundError: if there is no such file.
    CorruptFileError: if it is truncated or damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
    if isinstance(error, FileNotFoundError):
      raise
    raise CorruptFileError(
      f"{path} is corrupt ({error}); delete it and run again, only that part is computed anew."
    ) from error


def require_writable(directory: Path | str) -> Path:
  """Makes the directory if need be.

  Raises:
    PermissionError, NotADirectoryError, OSError: one sentence, when nothing can be written there.
  """
  directory = Path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    reason = error.strerror or error
    kind = PermissionError if isinstance(error, PermissionError) else NotADirectoryError
    raise kind(f"--workdir {directory} cannot be written ({reason}); choose another.") from error
  return directory


RECORD = "record"
"""Name of the array of a checkpoint that holds its metadata and checksums, as JSON."""


class Saved(NamedTuple):
  """A checkpoint read back, or step 0 and no tree if there is none."""

  step: int
  tree: PyTree | None  # NumPy arrays
  metadata: dict[str, Any]
  skipped: tuple[str, ...]  # one sentence for each newer checkpoint that could not be read


class Checkpoints:
  """Checkpoints of one tree over time: written in the background, atomic, the last two kept.

  Orbax writes them. Where several processes run side by side, each with models of its own, .npz
  files take their place: Orbax then expects all processes to save one tree together.

  Every leaf has a checksum, so that damaged bytes are recognised and not trained on. Use it as a
  context manager: leaving it waits until everything is on the disk.
  """

  def __init__(self, directory: Path | str, *, keep: int = 2):
    self.directory = Path(directory).absolute()
    files = jax.process_count() > 1 or any(self.directory.glob("*.npz"))
    self._steps = (_FileSteps if files else _OrbaxSteps)(self.directory, keep)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self._steps.close()

  def save(self, step: int, tree: PyTree, metadata: Mapping[str, Any]) -> None:
    """Copies the tree to the host and writes it in the background.

    Raises:
      OSError: one sentence, if this or the write before failed; older checkpoints are intact.
    """
    leaves = _leaves(jax.device_get(tree))
    record = {"metadata": dict(metadata), "checksums": _checksums(leaves)}
    text = json.dumps(record).encode().ljust(_record_bytes(leaves))
    leaves[RECORD] = np.frombuffer(text, np.uint8)
    try:
      self._steps.save(step, leaves)
    except (OSError, ValueError, RuntimeError) as error:
      raise OSError(
        f"a checkpoint in {self.directory} could not be written ({error}); make room or choose "
        "another --workdir. Older checkpoints are intact: the same command goes on from there."
      ) from error

  def wait(self) -> None:
    """Until everything saved is on the disk."""
    self._steps.wait()

  def restore(self, like: PyTree) -> Saved:
    """The newest checkpoint that reads back whole; damaged ones are deleted and named.

    Args:
      like: a tree of the same structure, shapes and dtypes: arrays or `jax.ShapeDtypeStruct`.
    """
    skipped = []
    for step in sorted(self._steps.all(), reverse=True):
      try:
        tree, metadata = self._read(step, like)
        return Saved(step, tree, metadata, tuple(skipped))
      except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        skipped.append(f"checkpoint {self.directory / str(step)} is corrupt ({reason})")
        self._steps.delete(step)
    return Saved(0, None, {}, tuple(skipped))

  def _read(self, step, like):
    expected = _leaves(like)
    expected[RECORD] = np.empty(_record_bytes(expected), np.uint8)
    saved = self._steps.load(step, expected)
    leaves = {name: np.asarray(saved[name]) for name in expected}
    record = json.loads(leaves.pop(RECORD).tobytes())
    if _checksums(leaves) != record["checksums"]:
      raise CorruptFileError("its checksums do not match")
    tree = jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))
    return tree, record["metadata"]


class _OrbaxSteps:
  """Steps of a checkpoint as Orbax keeps them."""

  def __init__(self, directory, keep):
    import orbax.checkpoint as ocp  # takes seconds, and only training and quantizing need it

    logging.getLogger("absl").addFilter(_is_serious)  # Orbax logs every step it takes
    self._args = ocp.args
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(directory, options=options)
    self.all, self.delete = self._manager.all_steps, self._manager.delete
    self.wait, self.close = self._manager.wait_until_finished, self._manager.close

  def save(self, step, leaves):
    self._manager.save(step, args=self._args.StandardSave(leaves), force=True)

  def load(self, step, expected):
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
      name: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=here)
      for name, leaf in expected.items()
    }
    return self._manager.restore(step, args=self._args.StandardRestore(target))


class _FileSteps:
  """Steps of a checkpoint as one .npz file each."""

  def __init__(self, directory, keep):
    self._directory, self._keep = directory, keep

  def all(self):
    for path in self._directory.glob("[0-9]*"):
      if path.is_dir():
        raise ValueError(
          f"{path} was written by a process alone; finish this audit without --distributed."
        )
    return [int(path.stem) for path in self._directory.glob("[0-9]*.npz")]

  def delete(self, step):
    (self._directory / f"{step}.npz").unlink()

  def save(self, step, leaves):
    save_arrays(self._directory / f"{step}.npz", **leaves)
    for old in sorted(self.all())[: -self._keep]:
      self.delete(old)

  def load(self, step, expected):
    del expected
    return load_arrays(self._directory / f"{step}.npz")

  def wait(self):
    pass

  def close(self):
    pass


def _record_bytes(leaves):
  """Room for the metadata and the checksums of all leaves."""
  return 4096 + 64 * len(leaves)


def _is_serious(record):
  return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _leaves(tree):
  """Leaves by a name that survives any file system, in the order of `jax.tree.leaves`."""
  return {f"leaf_{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _checksums(leaves):
  return {name: zlib.crc32(np.ascontiguousarray(leaf)) for name, leaf in leaves.items()}
