"""Plain arrays of an .npz file that anyone may have written: checked before they are read."""

import math
import os
import zipfile
from collections.abc import Sequence

import numpy as np

from ptq_jax.base import Shaped
from ptq_jax.data import files

MAX_RATIO = 1100
"""Bytes that deflate, the compression of .npz files, can make of one: 1032, and some slack."""

HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


def read(
  path: str | os.PathLike, numbers: Sequence[str], *, text: Sequence[str] = ()
) -> tuple[dict[str, Shaped[np.ndarray, "..."]], tuple[str, ...]]:
  """Those of the named arrays that there are, and the names of all.

  Nothing is unpickled. Before memory is asked for, the header of an array must agree with the
  length of its member, and that with its bytes in the file.

  Args:
    path: of the file.
    numbers: names of arrays of numbers.
    text: names of arrays of text.
  Raises:
    ValueError: for a damaged file, one that holds an array twice, and an array of another type.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      names = tuple(info.filename.removesuffix(".npy") for info in archive.infolist())
      files.check_unique(names, path)
      wanted = {name: "biufc" for name in numbers} | {name: "U" for name in text}
      members = dict(zip(names, archive.infolist(), strict=True))
      arrays = {
        name: _array(archive, members[name], f"{path}: {name}", kinds)
        for name, kinds in wanted.items()
        if name in members
      }
  except zipfile.BadZipFile as error:
    raise ValueError(
      f"{path} is not a whole .npz file ({error}); get it again, or save the arrays again with "
      "`np.savez`."
    ) from error
  return arrays, names


class _WrongTypeError(Exception):
  """An array of a type that is not wanted."""


def _array(
  archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, kinds: str
) -> Shaped[np.ndarray, "..."]:
  """One array whose dtype is of one of these kinds; `name` starts each message."""
  try:
    with archive.open(info) as file:
      shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
      num_bytes = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.kind not in kinds:
      plain = "plain text" if kinds == "U" else "a plain array of numbers"
      raise _WrongTypeError(f"{name} is an array of type {dtype}; save it as {plain}.")
    if not num_bytes == info.file_size <= MAX_RATIO * info.compress_size:
      raise zipfile.BadZipFile(f"{num_bytes} bytes declared, {info.file_size} stored")
    with files.opened(archive, info) as file:
      array = np.lib.format.read_array(file, allow_pickle=False)
      if file.read(1):
        raise zipfile.BadZipFile("longer than declared")
  except _WrongTypeError as error:
    raise ValueError(str(error)) from error
  except Exception as error:  # broken bytes raise BadZipFile, zlib.error, KeyError and others
    raise ValueError(
      f"{name} in this .npz file is damaged ({error}); get the file again, or save its "
      "arrays again with `np.savez`."
    ) from error
  return array
