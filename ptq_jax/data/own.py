"""Sets that a function of yours gives, by its name: `data.name=package.module:function`.

It returns two sources, for training and for testing. A source has a length and gives the pair
(input, label) of a number, or a dict with both: a list, a data source or `MapDataset` of grain, an
`ArrayRecordDataSource` whose bytes you parse, a dataset of PyTorch. Everything is read into memory.
"""

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ptq_jax.data import splits
from ptq_jax.data.splits import Splits

NAME = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""A module and a function in it; what stands behind the colon of a set of TFDS is a version."""


def is_own(name: str) -> bool:
  """Whether a dataset's name is that of a function.

  >>> is_own("my.module:make"), is_own("cifar10:3.0.2"), is_own("cifar10")
  (True, False, False)
  """
  return re.fullmatch(NAME, name) is not None


def read(name: str, *, path: str | os.PathLike | None, columns: Sequence[str] | None) -> Splits:
  """Every example of both sources.

  Args:
    name: package.module:function.
    path: given to the function as `path`; None: it is called without.
    columns: of elements that are dicts, the keys of the input and of the label.
  Raises:
    ValueError: for a function that cannot be imported or fails, sources of something else, and what
      `splits.checked` refuses.
  """
  module, _, function = name.partition(":")
  whose = f"the dataset {name!r}"
  make = _tried(lambda: getattr(importlib.import_module(module), function), f"{whose} is missing")
  sources = _tried(lambda: make(**({} if path is None else {"path": path})), f"{whose} fails")
  if not isinstance(sources, tuple | list) or len(sources) != 2:
    kind = type(sources).__name__
    raise ValueError(f"{whose} is a {kind}; the function must give (training, test), two sources.")
  arrays = []
  for source, split in zip(sources, ("training", "test"), strict=True):
    whole = f"the {split} source of {name!r} cannot be read as one array"
    pairs = _tried(lambda s=source: [_pair(s[k], columns) for k in range(len(s))], whole)
    for part in (0, 1):
      arrays.append(_tried(lambda p=pairs, i=part: np.stack([each[i] for each in p]), whole))
  return splits.checked(*arrays, class_names=None, source=whose)


def _tried(call: Callable[[], Any], sentence: str) -> Any:
  """What a call of the user's code gives, or one sentence of whatever it raises."""
  try:
    return call()
  except Exception as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(f"{sentence}: {reason}") from error


def _pair(element: Any, columns: Sequence[str] | None) -> tuple[Any, Any]:
  """Input and label of an element."""
  if isinstance(element, Mapping) and columns is not None:
    element = tuple(element[key] for key in columns)
  if not isinstance(element, tuple | list) or len(element) != 2:
    raise TypeError(
      f"an element is a {type(element).__name__}; give (input, label), or a dict and its two keys "
      "with data.columns=INPUT,LABEL"
    )
  return tuple(element)
