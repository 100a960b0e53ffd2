"""The files of a folder or of a zip archive, read alike."""

import codecs
import collections
import copy
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ptq_jax.base import UInt8
from ptq_jax.data import decode

IMAGE_SUFFIXES = (
  ".jpeg", ".jpg", ".jfif", ".jpe", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pnm",
  ".tif", ".tiff",
)  # fmt: skip

MAX_BYTES = 128 * 2**20
"""Bytes, unpacked, that one image or text file may have."""

Stamp = tuple[str, int, int]
"""Name, bytes and modification time in nanoseconds of one file."""


@dataclasses.dataclass(frozen=True)
class Files:
  """Names relative to the root, with "/", sorted; what is hidden is left out.

  Bytes of names that are not UTF-8 are kept as `os.fsdecode` has them.
  """

  path: pathlib.Path  # of the folder or archive
  names: tuple[str, ...]
  folders: tuple[str, ...]  # likewise, with "/" at the end; empty ones too
  stamps: tuple[Stamp, ...]  # of what is in a folder, or of the archive alone
  archive: zipfile.ZipFile | None

  def read(self, name: str) -> bytes:
    """Contents of one file.

    Raises:
      ValueError: if the archive is damaged there, or the file has more than `MAX_BYTES`.
      FileNotFoundError: if there is none.
    """
    if self.archive is None:
      with open(self.path / name, "rb") as file:
        contents = file.read(MAX_BYTES + 1)
      return self._bounded(contents, name, len(contents))
    try:
      info = self.archive.getinfo(name)
    except KeyError as error:
      raise FileNotFoundError(f"there is no {name!r} in {str(self.path)!r}.") from error
    self._bounded(b"", name, info.file_size)
    try:
      with opened(self.archive, info) as file:
        contents = file.read(info.file_size + 1)
      if len(contents) != info.file_size:
        raise zipfile.BadZipFile(f"{info.file_size} bytes declared, {len(contents)} or more there")
      return contents
    except Exception as error:  # broken bytes raise BadZipFile, zlib.error, EOFError and others
      raise ValueError(
        f"{name!r} in the archive {str(self.path)!r} cannot be read ({error}); get the archive "
        "again."
      ) from error

  def _bounded(self, contents: bytes, name: str, num_bytes: int) -> bytes:
    """The contents, unless the file is too large."""
    if num_bytes > MAX_BYTES:
      raise ValueError(
        f"{name!r} in {str(self.path)!r} has more than {MAX_BYTES // 2**20} MiB, which no image of "
        "a class is expected to have; make it smaller or leave it out."
      )
    return contents

  def text_lines(self, name: str) -> list[str]:
    """Non-empty lines of a text file, UTF-8 or UTF-16 with the mark that editors put in front."""
    contents = self.read(name)
    utf_16 = contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = contents.decode("utf-16" if utf_16 else "utf-8-sig", "replace")
    return [line for line in text.splitlines() if line.strip()]

  def images_below(self, folder: str) -> list[str]:
    """Names of image files, by suffix, anywhere below a folder such as "train/", or "" for all."""
    return [
      name
      for name in self.names
      if name.startswith(folder) and name.lower().endswith(IMAGE_SUFFIXES)
    ]

  def decoded(
    self, names: Sequence[str], *, image_size: int | None
  ) -> tuple[UInt8[np.ndarray, "N H W 3"], list[decode.Change]]:
    """The images of these names as RGB, and what was changed, see `decode.images`."""
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
    ValueError: if it is neither a folder nor a whole zip archive, if the archive holds a name
      twice, and for links in a circle, broken ones, and what is no file (pipes, sockets).
  """
  path = pathlib.Path(path).expanduser().absolute()
  if path.is_dir():
    stamps = tuple(sorted(_walk(path, "", (os.path.realpath(path),))))
    return Files(path, *_split(name for name, _, _ in stamps), stamps, None)
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
  check_unique(archive.namelist(), path)
  visible = sorted(
    name for name in archive.namelist() if not any(part[:1] == "." for part in name.split("/"))
  )
  stat = path.stat()
  return Files(path, *_split(visible), ((path.name, stat.st_size, stat.st_mtime_ns),), archive)


def check_unique(names: Sequence[str], path: str | os.PathLike) -> None:
  """Raises ValueError for a name that an archive holds twice: readers differ in which they take."""
  twice = [name for name, count in collections.Counter(names).items() if count > 1]
  if twice:
    raise ValueError(
      f"the archive {str(path)!r} holds {twice[0]!r} twice (and {len(twice) - 1} other names); "
      "pack it again with each name once."
    )


def opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> zipfile.ZipExtFile:
  """A member that can be read to one byte past its declared end, which shows that there is more.

  `zipfile` stops at the declared length, and where that is wrong unpacks gigabytes to get there if
  it is not told how many bytes to read.
  """
  info = copy.copy(info)
  info.file_size += 1
  return archive.open(info)


def _split(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Names of files, and those of folders, which end with a slash."""
  names = tuple(names)
  return (
    tuple(name for name in names if not name.endswith("/")),
    tuple(name for name in names if name.endswith("/")),
  )


def _walk(folder: os.PathLike | str, prefix: str, above: tuple[str, ...]) -> Iterator[Stamp]:
  """Stamps of what is visible below a folder; `above`: real paths of it and of what holds it."""
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      broken = entry.is_symlink() and not os.path.exists(entry.path)
      if broken or not (entry.is_dir() or entry.is_file()):
        raise ValueError(
          f"{entry.path!r} is {'a broken link' if broken else 'no regular file'}; repair it or "
          "take it out of the folder."
        )
      if entry.is_dir():
        real = os.path.realpath(entry.path)
        if real in above:
          raise ValueError(
            f"{entry.path!r} is a link to {real!r}, which holds it: images would be found again "
            "and again; take the link out of the folder."
          )
        yield f"{prefix}{entry.name}/", 0, 0
        yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
      else:
        stat = entry.stat()
        yield f"{prefix}{entry.name}", stat.st_size, stat.st_mtime_ns
