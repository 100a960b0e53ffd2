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


def write_csv(path: Path | str, columns: Mapping[str, Sequence[Any]]) -> None:
  """Writes columns of equal length as comma-separated values with a header, atomically."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(columns)
  writer.writerows(zip(*columns.values(), strict=True))
  write_text(path, text.getvalue())


def save_arrays(path: Path | str, **arrays: np.ndarray) -> None:
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


class Saved(NamedTuple):
  """A checkpoint read back, or step 0 and no tree if there is none."""

  step: int
  tree: PyTree | None  # NumPy arrays
  metadata: dict[str, Any]
  skipped: tuple[str, ...]  # one sentence for each newer checkpoint that could not be read


class Checkpoints:
  """Orbax checkpoints of one tree over time: written in the background, atomic, the last two kept.

  Every leaf has a checksum, so that damaged bytes are recognised and not trained on. Use it as a
  context manager: leaving it waits until everything is on the disk.
  """

  def __init__(self, directory: Path | str, *, keep: int = 2):
    import orbax.checkpoint as ocp  # takes seconds, and only training and quantizing need it

    logging.getLogger("absl").addFilter(_is_serious)  # Orbax logs every step it takes
    self._ocp = ocp
    self.directory = Path(directory).absolute()
    process = jax.process_index()  # every process keeps checkpoints of its own models
    alone = ocp.options.MultiprocessingOptions(
      primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    self.directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=False, multiprocessing_options=alone
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self._manager.close()

  def save(self, step: int, tree: PyTree, metadata: Mapping[str, Any]) -> None:
    """Copies the tree to the host and writes it in the background.

    Raises:
      OSError: one sentence, if this or the write before failed; older checkpoints are intact.
    """
    leaves = _leaves(jax.device_get(tree))
    record = {"metadata": dict(metadata), "checksums": _checksums(leaves)}
    args = self._ocp.args
    try:
      self._manager.save(
        step,
        args=args.Composite(state=args.StandardSave(leaves), record=args.JsonSave(record)),
        force=True,
      )
    except (OSError, ValueError, RuntimeError) as error:
      raise OSError(
        f"a checkpoint in {self.directory} could not be written ({error}); make room or choose "
        "another --workdir. Older checkpoints are intact: the same command goes on from there."
      ) from error

  def wait(self) -> None:
    """Until everything saved is on the disk."""
    self._manager.wait_until_finished()

  def restore(self, like: PyTree) -> Saved:
    """The newest checkpoint that reads back whole; damaged ones are deleted and named.

    Args:
      like: a tree of the same structure, shapes and dtypes: arrays or `jax.ShapeDtypeStruct`.
    """
    skipped = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        tree, metadata = self._read(step, like)
        return Saved(step, tree, metadata, tuple(skipped))
      except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        skipped.append(f"checkpoint {self.directory / str(step)} is corrupt ({reason})")
        self._manager.delete(step)
    return Saved(0, None, {}, tuple(skipped))

  def _read(self, step, like):
    args = self._ocp.args
    names = _leaves(like)
    target = {
      name: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=_first_device())
      for name, leaf in names.items()
    }
    saved = self._manager.restore(
      step, args=args.Composite(state=args.StandardRestore(target), record=args.JsonRestore())
    )
    leaves = {name: np.asarray(saved.state[name]) for name in names}
    if _checksums(leaves) != saved.record["checksums"]:
      raise CorruptFileError("its checksums do not match")
    tree = jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))
    return tree, saved.record["metadata"]


def _is_serious(record):
  return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _first_device():
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _leaves(tree):
  """Leaves by a name that survives any file system, in the order of `jax.tree.leaves`."""
  return {f"leaf_{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _checksums(leaves):
  return {name: zlib.crc32(np.ascontiguousarray(leaf)) for name, leaf in leaves.items()}
