"""Rows of a benchmark in a file, so that a start goes on where the last one was stopped."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ptq_jax import storage


class Rows:
  """Rows by what they were made of: version (compiler, chip, sizes) and key.

  Args:
    path: JSON lines, one row each; made with the first row.
    version: rows of another one stay in the file and do not count.
  """

  def __init__(self, path: pathlib.Path | str, *, version: str):
    self.path, self._version = pathlib.Path(path), version
    self._all = storage.read_records(self.path) if self.path.exists() else []

  def find(self, key: Sequence[Any]) -> dict | None:
    """The row of this key, if it was made."""
    wanted = (self._version, list(key))
    return next((row for row in self._all if (row["version"], row["key"]) == wanted), None)

  def add(self, key: Sequence[Any], measured: dict) -> dict:
    """Keeps a row in the file and returns it."""
    self._all.append({"version": self._version, "key": list(key), **measured})
    self.path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_records(self.path, self._all)
    return self._all[-1]
