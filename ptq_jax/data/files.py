"""The files of a folder or of a zip archive, read alike."""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from ptq_jax.base import UInt8
from ptq_jax.data import decode

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

Stamp = tuple[str, int, int]
"""Name, bytes and modification time in nanoseconds of one file."""


@dataclasses.dataclass(frozen=True)
class Files:
  """Names relative to the root, with "/", sorted; hidden files are left out."""

  path: pathlib.Path  # of the folder or archive
  names: tuple[str, ...]
  stamps: tuple[Stamp, ...]  # of the files of a folder, or of the archive alone
  archive: zipfile.ZipFile | None

  def read(self, name: str) -> bytes:
    """Contents of one file.

    Raises:
      ValueError: if the archive is damaged there.
      FileNotFoundError: if there is none.
    """
    if self.archive is None:
      return (self.path / name).read_bytes()
    try:
      return self.archive.read(name)
    except KeyError as error:
      raise FileNotFoundError(f"there is no {name!r} in {str(self.path)!r}.") from error
    except Exception as error:  # broken bytes raise BadZipFile, zlib.error, EOFError and others
      raise ValueError(
        f"{name!r} in the archive {str(self.path)!r} cannot be read ({error}); get the archive "
        "again."
      ) from error

  def text_lines(self, name: str) -> list[str]:
    """Non-empty lines of a UTF-8 text file."""
    return [
      line for line in self.read(name).decode("utf-8", "replace").splitlines() if line.strip()
    ]

  def images_below(self, folder: str) -> list[str]:
    """Names of image files, by suffix, anywhere below a folder such as "train/", or "" for all."""
    return [
      name
      for name in self.names
      if name.startswith(folder) and name.lower().endswith(IMAGE_SUFFIXES)
    ]

  def decoded(
    self, names: Sequence[str], *, image_size: int | None
  ) -> UInt8[np.ndarray, "N H W 3"]:
    """The images of these names as RGB, see `decode.images`."""
    return decode.images(
      lambda start, stop: ((name, self.read(name)) for name in names[start:stop]),
      count=len(names),
      num_channels=3,
      image_size=image_size,
    )


def open_files(path: str | os.PathLike, *, dataset: str) -> Files:
  """Lists a folder or a zip archive.

  Args:
    path: of either.
    dataset: its name, for messages.
  Raises:
    FileNotFoundError: if there is nothing at the path.
    ValueError: if it is neither a folder nor a whole zip archive.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if path.is_dir():
    stamps = tuple(sorted(_walk(path, "")))
    return Files(path, tuple(name for name, _, _ in stamps), stamps, None)
  if not path.exists():
    raise FileNotFoundError(
      f"there is no file or folder {str(path)!r} for the dataset {dataset!r}."
    )
  try:
    archive = zipfile.ZipFile(path)
  except (zipfile.BadZipFile, OSError) as error:
    raise ValueError(
      f"{str(path)!r} is not a whole zip archive ({error}); it may be truncated: get it again."
    ) from error
  names = (info.filename for info in archive.infolist() if not info.is_dir())
  visible = sorted(name for name in names if not any(part[:1] == "." for part in name.split("/")))
  stat = path.stat()
  return Files(path, tuple(visible), ((path.name, stat.st_size, stat.st_mtime_ns),), archive)


def _walk(folder: os.PathLike | str, prefix: str) -> Iterator[Stamp]:
  """Stamps of the visible files below a folder."""
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      if entry.is_dir():
        yield from _walk(entry.path, f"{prefix}{entry.name}/")
      else:
        stat = entry.stat()
        yield f"{prefix}{entry.name}", stat.st_size, stat.st_mtime_ns
