"""Decodes a source once and keeps the uint8 arrays beside it, until the source changes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import uuid
import warnings
from collections.abc import Callable

import numpy as np

from ptq_jax.data.files import Stamp
from ptq_jax.data.splits import Splits

FORMAT = 3  # raise it when decoding changes what the arrays or notes hold
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
TEXT = ("class_names", "notes")


@dataclasses.dataclass(frozen=True)
class Source:
  """Encoded images somewhere on disk."""

  kind: str  # how they are laid out, such as "tiny_imagenet"
  folder: pathlib.Path  # beside the data: where the cache goes by default
  stem: str  # name of the data within that folder
  stamps: tuple[Stamp, ...]  # of all files that hold the data
  decode: Callable[[int | None], Splits]  # from an image size, None to keep that of the images


def decoded(
  source: Source, *, image_size: int | None, cache_dir: str | os.PathLike | None
) -> Splits:
  """The arrays of a source, from the cache when it is of the very same files.

  The cache is one .npz of arrays in `cache_dir`, or beside the data. It is written to a temporary
  file first and then renamed. Where it cannot be written, a warning says so and the data is decoded
  on every call.
  """
  path = cache_path(source, image_size=image_size, cache_dir=cache_dir)
  fingerprint = _fingerprint(source, image_size)
  splits = _read(path, fingerprint)
  if splits is None:
    splits = source.decode(image_size)
    _write(path, fingerprint, splits)
  return splits


def cache_path(
  source: Source, *, image_size: int | None, cache_dir: str | os.PathLike | None
) -> pathlib.Path:
  """Where the arrays of a source are kept."""
  size = "" if image_size is None else f"-{image_size}x{image_size}"
  name = f"{source.stem}-{source.kind}{size}.uint8.npz"
  if cache_dir is None:
    return source.folder / name
  place = hashlib.sha256(os.fsencode(source.folder.resolve())).hexdigest()[:8]
  return pathlib.Path(cache_dir).expanduser() / f"{place}-{name}"


def _fingerprint(source: Source, image_size: int | None) -> str:
  """SHA-256 of what the arrays depend on: layout, size, and name, bytes and time of each file."""
  parts = (FORMAT, source.kind, image_size, source.stamps)
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: pathlib.Path, fingerprint: str) -> Splits | None:
  """The cached arrays; None when there are none, or of other files."""
  if not path.exists():
    return None
  try:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
      if str(archive["fingerprint"]) != fingerprint:
        return None
      arrays = {name: archive[name] for name in ARRAYS}
      text = {name: tuple(str(each) for each in archive[name]) for name in TEXT}
      return Splits(**arrays, **text)
  except Exception as error:  # a damaged file fails in many ways, all with the same remedy
    warnings.warn(f"the cache {str(path)!r} is damaged ({error}); decoding again.", stacklevel=5)
    return None


def _write(path: pathlib.Path, fingerprint: str, splits: Splits) -> None:
  """Writes the arrays, all or nothing; warns where that is impossible."""
  arrays = {name: getattr(splits, name) for name in ARRAYS}
  arrays |= {name: np.array(getattr(splits, name), np.str_) for name in TEXT}
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "xb") as file:
      np.savez(file, **arrays, fingerprint=fingerprint)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    warnings.warn(
      f"the decoded images cannot be kept in {str(path)!r} ({error}); they will be decoded on "
      "every run unless cache_dir names a writable folder.",
      stacklevel=5,
    )
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
