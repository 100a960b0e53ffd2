"""Files: Orbax checkpoints for trees, .npz for arrays, JSON lines for records.

Every file appears whole or not at all: it is written under another name, flushed to the disk, and
renamed. What we wrote says what is in it, so that any damage is found when it is read back: that is
a `CorruptFileError`. Nothing is deleted because it could not be read: only a checksum that does not
match condemns a checkpoint, and then it is renamed to NAME.damaged.
"""

import concurrent.futures
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ptq_jax.base import PyTree, csv_cell

Path = pathlib.Path


class CorruptFileError(ValueError):
  """A file or checkpoint of ours that exists but does not hold what was written."""


def user_cache() -> Path:
  """Where this user's programs keep what they can make again: this one's folder."""
  return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ptq_jax"


@contextlib.contextmanager
def replacing(path: Path | str, *, num_bytes: int | None = None) -> Iterator[Path]:
  """Yields a temporary path beside `path`; renames it to `path` when the block ends well.

  Args:
    path: what is to appear.
    num_bytes: about how much is written, for the error.
  Raises:
    OSError: with a sentence, when the disk is full or the folder cannot be written. Whatever was at
      `path` before is still there.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    with temporary.open("rb") as written:
      os.fsync(written.fileno())
    temporary.replace(path)
  except OSError as error:
    raise _unwritten(path, error, num_bytes) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def _unwritten(path, error, num_bytes):
  """The sentence about something that could not be written, as the same kind of exception."""
  needs = "" if num_bytes is None else f", it takes about {num_bytes:,} bytes"
  reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
  kind = type(error) if isinstance(error, OSError) else OSError
  return kind(
    f"{path} could not be written ({reason[:200]}{needs}); make room or choose another --workdir. "
    "What was written before is intact: the same command goes on from there."
  )


def write_text(path: Path | str, text: str) -> None:
  """Writes a text file atomically."""
  data = text.encode()
  with replacing(path, num_bytes=len(data)) as temporary:
    temporary.write_bytes(data)


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
  """A JSON object with its checksum in it."""
  return {**document, "crc32": _checksum(document)}


def unsealed(document: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
  """What `sealed` took; one without a checksum is as an earlier version wrote it.

  Raises:
    CorruptFileError: if the checksum of what was read from `path` does not match.
  """
  content = dict(document)
  checksum = content.pop("crc32", None)
  if checksum is not None and checksum != _checksum(content):
    raise CorruptFileError(f"{path} does not match its checksum.")
  return content


def write_json(path: Path | str, document: Mapping[str, Any]) -> None:
  """Writes one JSON object atomically, sealed, with tuples as lists."""
  write_text(path, json.dumps(sealed(document), indent=2) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
  """Reads what `write_json` wrote.

  Raises:
    FileNotFoundError: if there is no such file.
    CorruptFileError: if it is not a JSON object, or not the one that was written.
  """
  try:
    value = json.loads(Path(path).read_text(encoding="utf-8"))
  except ValueError as error:
    raise CorruptFileError(f"{path} is not readable JSON.") from error
  if not isinstance(value, dict):
    raise CorruptFileError(f"{path} holds a JSON {type(value).__name__}, not an object.")
  return unsealed(value, path)


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
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise CorruptFileError(f"{path} is not UTF-8 text.") from error
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
    except ValueError as error:
      raise CorruptFileError(f"{path}, line {number} is not JSON.") from error
    if not isinstance(record, dict):
      raise CorruptFileError(f"{path}, line {number} is not a JSON object.")
    records.append(record)
  return records


def write_csv(path: Path | str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
  """Writes columns of equal length as comma-separated values with a header, atomically."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(map(csv_cell, columns))
  writer.writerows([csv_cell(v) for v in row] for row in zip(*columns.values(), strict=True))
  write_text(path, text.getvalue())


# ---- arrays ----

CONTENTS = "contents.json"
"""The member of an .npz file of ours that says what arrays there are, with their checksums."""


def save_arrays(path: Path | str, **arrays: np.ndarray | Sequence[Any]) -> None:
  """Writes named arrays to an .npz file atomically, and into it what they are."""
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  contents = json.dumps({name: _description(array) for name, array in arrays.items()})
  size = sum(array.nbytes for array in arrays.values())
  with replacing(path, num_bytes=size) as temporary:
    with temporary.open("wb") as file:
      np.savez(file, **arrays)
    with zipfile.ZipFile(temporary, "a") as archive:
      archive.writestr(CONTENTS, contents)


def load_arrays(path: Path | str) -> dict[str, np.ndarray]:
  """Reads what `save_arrays` wrote, and checks names, shapes, dtypes and contents.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if the disk does not give it.
    CorruptFileError: if anything in it is not what was written.
  """
  data = Path(path).read_bytes()  # apart, so that an error of the disk is not taken for damage
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      contents = json.loads(archive.read(CONTENTS))
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
      arrays = {name: file[name] for name in contents}
    wrong = [name for name, array in arrays.items() if _description(array) != contents[name]]
  except Exception as error:  # damage in a zip archive comes out as any of a dozen exceptions
    if isinstance(error, MemoryError) and _is_whole(data):
      raise  # else a damaged header asked for it
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise CorruptFileError(f"{path} is corrupt ({reason}).") from error
  if wrong:
    raise CorruptFileError(f"{path} is corrupt (the array {wrong[0]!r} is not what was written).")
  return arrays


def _is_whole(data):
  """Whether every member of a zip archive has its checksum."""
  with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
    return archive.testzip() is None
  return False


def _description(array):
  """What an array is, as JSON."""
  return [array.dtype.str, list(array.shape), zlib.crc32(np.ascontiguousarray(array))]


def digest(path: Path | str) -> str:
  """SHA-256 of a file, hexadecimal."""
  with Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(directory: Path | str, *, flag: str = "--workdir") -> Path:
  """Makes the directory if need be.

  Args:
    directory: where something is to be written; ~ is the home.
    flag: what errors call it.
  Raises:
    ValueError: for no name at all, or a URL.
    PermissionError, NotADirectoryError, OSError: one sentence, when nothing can be written there.
  """
  if not isinstance(directory, str | os.PathLike):
    raise ValueError(f"{flag} is {directory!r}; name the folder that everything is written to.")
  if not str(directory).strip():
    raise ValueError(f"{flag} is empty; name the folder that everything is written to.")
  scheme = str(directory).partition(":/")
  if scheme[1] and len(scheme[0]) > 1 and scheme[0].isalnum():
    raise ValueError(
      f"{flag} {directory} is a URL; give a folder, such as one where that bucket is mounted."
    )
  try:
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      pass
  except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a byte of zero
    reason = getattr(error, "strerror", None) or error
    kind = PermissionError if isinstance(error, PermissionError) else NotADirectoryError
    raise kind(f"{flag} {directory} cannot be written ({reason}); choose another.") from error
  return directory


# ---- checkpoints ----


class Saved(NamedTuple):
  """A checkpoint read back, or step 0 and no tree if there is none."""

  step: int
  tree: PyTree | None  # NumPy arrays
  metadata: dict[str, Any]
  skipped: tuple[str, ...]  # one sentence for each newer checkpoint that was damaged


class Checkpoints:
  """Checkpoints of one tree over time: written in the background, atomic, the last two kept.

  Orbax writes DIRECTORY/STEP; when that is complete, DIRECTORY/STEP.json says what the tree is and
  gives the checksum of every file, and only then the checkpoint counts. Use it as a context
  manager: leaving it waits until everything is on the disk.
  """

  def __init__(self, directory: Path | str, *, keep: int = 2):
    self.directory = Path(directory).absolute()
    self._keep = keep
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
    self._writing: concurrent.futures.Future | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    try:
      self.wait()
    finally:
      self._thread.shutdown()

  def save(self, step: int, tree: PyTree, metadata: Mapping[str, Any]) -> None:
    """Copies the tree to the host and writes it in the background.

    Raises:
      OSError: one sentence, if the write before failed; older checkpoints are intact.
    """
    leaves = _leaves(jax.device_get(tree))
    self.wait()
    self._writing = self._thread.submit(self._write, step, leaves, dict(metadata))

  def wait(self) -> None:
    """Until everything saved is on the disk; raises what `save` raises."""
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def steps(self) -> list[int]:
    """Steps of the checkpoints that were completed, in ascending order."""
    return sorted(int(path.stem) for path in self.directory.glob("*.json") if path.stem.isdigit())

  def _begun(self) -> list[int]:
    """The same, with those whose record is lost or was never written."""
    names = {path.name.removesuffix(".json") for path in self.directory.glob("*")}
    return sorted(int(name) for name in names if name.isdigit())

  def restore(self, like: PyTree) -> Saved:
    """The newest checkpoint that is as it was written; damaged ones are renamed and named.

    Args:
      like: a tree of the same structure, shapes and dtypes: arrays or `jax.ShapeDtypeStruct`.
    Raises:
      ValueError: if the newest sound one holds another tree.
      OSError, and whatever else reading raises: nothing is deleted or renamed then.
    """
    self.wait()
    skipped = []
    for step in reversed(self._begun()):
      path = self.directory / str(step)
      try:
        record = self._checked(step)
      except CorruptFileError as error:
        aside = self._set_aside(step)
        skipped.append(f"checkpoint {path} is damaged ({error}) and now called {aside.name}")
        continue
      _require_alike(path, record["leaves"], like)
      return Saved(step, self._read(path, like), record["metadata"], tuple(skipped))
    return Saved(0, None, {}, tuple(skipped))

  def _read(self, path, like):
    """The tree of a checkpoint, straight to the host: no device need hold all models."""
    hosted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _leaves(like).items()}
    with _orbax() as checkpointer:
      restored = checkpointer.restore(path, hosted)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in hosted])

  def check(self, step: int) -> None:
    """Raises CorruptFileError if any file of a checkpoint is not as it was written."""
    self._checked(step)

  def _checked(self, step):
    """The record of a checkpoint whose files all have their checksums."""
    try:
      found = read_json(self.directory / f"{step}.json")
    except FileNotFoundError:
      raise CorruptFileError(f"{step}.json, which says what is in it, is missing") from None
    record = found.get("record", found)  # an earlier version had it one level deeper
    if not {"files", "leaves", "metadata"} <= record.keys():
      raise CorruptFileError(f"{step}.json does not say what is in it")
    for name, (size, checksum) in record["files"].items():
      path = self.directory / str(step) / name
      try:
        found_size = path.stat().st_size
      except (FileNotFoundError, NotADirectoryError):
        raise CorruptFileError(f"the file {name} is missing") from None
      if found_size != size or _file_checksum(path) != checksum:
        raise CorruptFileError(f"the checksum of {name} does not match")
    return record

  def _set_aside(self, step):
    """Renames what belongs to a step to a free name that ends in .damaged."""
    number = 0
    while (aside := self.directory / f"{step}{f'-{number}' if number else ''}.damaged").exists():
      number += 1
    aside.mkdir()
    for name in (str(step), f"{step}.json"):
      if (self.directory / name).exists():
        (self.directory / name).rename(aside / name)
    return aside

  def _write(self, step, leaves, metadata):
    """In the background: the arrays, then the record that makes them count, then older ones go."""
    path = self.directory / str(step)
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)
      (self.directory / f"{step}.json").unlink(missing_ok=True)
      with _orbax() as checkpointer:
        checkpointer.save(path, leaves, force=True)
      files = {
        str(file.relative_to(path)): [file.stat().st_size, _file_checksum(file)]
        for file in sorted(path.rglob("*"))
        if file.is_file()
      }
      described = {k: [leaf.dtype.name, list(leaf.shape)] for k, leaf in leaves.items()}
      record = {"metadata": metadata, "leaves": described, "files": files}
      write_json(self.directory / f"{step}.json", record)
    except Exception as error:  # TensorStore reports a full disk as a ValueError
      for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)
      size = sum(leaf.nbytes for leaf in leaves.values())
      raise _unwritten(path, error, size) from error
    for old in self.steps()[: -self._keep]:
      (self.directory / f"{old}.json").unlink()
      shutil.rmtree(self.directory / str(old), ignore_errors=True)


def _orbax():
  """A checkpointer; Orbax takes seconds to import, and only training and quantizing need it."""
  import orbax.checkpoint as ocp

  logger = logging.getLogger("absl")
  if _is_serious not in logger.filters:
    logger.addFilter(_is_serious)  # Orbax logs every step it takes
  return ocp.StandardCheckpointer()


def _require_alike(path, described, like):
  """Raises ValueError if a checkpoint was made of other arrays."""
  wanted = {name: [np.dtype(v.dtype).name, list(v.shape)] for name, v in _leaves(like).items()}
  if described != wanted:
    names = sorted(described.keys() | wanted.keys())
    name = next(name for name in names if described.get(name) != wanted.get(name))
    there, here = (
      f"{one[name][0]}{one[name][1]}" if name in one else "nothing" for one in (described, wanted)
    )
    raise ValueError(
      f"checkpoint {path} holds other arrays than these models ({len(described)} there, "
      f"{len(wanted)} here; {name} is {there} there, {here} here); it was left as it is. Use the "
      "version and the settings that wrote it, or another --workdir."
    )


def _is_serious(record):
  return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _leaves(tree):
  """Leaves by a name that survives any file system, in the order of `jax.tree.leaves`."""
  return {f"leaf_{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _checksum(document):
  return f"{zlib.crc32(json.dumps(document).encode()):08x}"


def _file_checksum(path):
  checksum = 0
  with path.open("rb") as file:
    while block := file.read(1 << 20):
      checksum = zlib.crc32(block, checksum)
  return checksum
