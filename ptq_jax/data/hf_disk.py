"""Sets of Hugging Face's `datasets`, from a folder that `DatasetDict.save_to_disk` wrote.

Needs the package `datasets` (the extra `hf`); nothing else imports it.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ptq_jax.data import cache, decode, splits
from ptq_jax.data.files import open_files
from ptq_jax.data.splits import Splits

TEST_SPLITS = ("test", "validation")


def read(
  path: str | os.PathLike,
  *,
  columns: Sequence[str] | None,
  image_size: int | None,
  cache_dir: str | os.PathLike | None,
) -> Splits:
  """The splits "train" and "test" (or "validation"): images, vectors or token ids with labels.

  Args:
    path: of the folder.
    columns: names of the input and of the label; None: the only Image and the only ClassLabel.
    image_size, cache_dir: as in `load.load`; images are decoded once, see `cache.decoded`.
  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: without the package, for a folder of something else, columns that are not there or
      not to be told, images that cannot be decoded, and what `splits.checked` refuses.
  """
  path = pathlib.Path(path).expanduser()
  parts = _opened(path)
  features = parts["train"].features
  given, label = columns = _columns(features, columns, path)
  for part in parts.values():
    if part.features != features:
      raise ValueError(f"the splits of {str(path)!r} have different columns; save them alike.")

  def decoded(size: int | None) -> Splits:
    arrays, changes = [], []
    for name, part in parts.items():
      examples, changed = _inputs(part, given, name, size)
      arrays += [examples, _array(part, label, name)]
      changes += changed
    names = (f"{each!r} of {split}" for split in parts for each in columns)
    class_names = getattr(features[label], "names", None)
    return splits.checked(
      *arrays,
      class_names=None if class_names is None else tuple(class_names),
      source=str(path),
      names=tuple(names),
      notes=decode.notes(changes),
    )

  if not _holds(features[given], "Image"):
    if cache_dir is not None:
      raise ValueError(
        f"data.cache_dir is {cache_dir}, but {given!r} of {str(path)!r} holds no images to decode; "
        "leave it out."
      )
    return decoded(None)
  source = cache.Source(
    kind="-".join(("hf_disk", *columns)),
    folder=path.parent,
    stem=path.name,
    stamps=open_files(path, dataset="hf_disk").stamps,
    decode=decoded,
  )
  return cache.decoded(source, image_size=image_size, cache_dir=cache_dir)


def _opened(path: pathlib.Path) -> dict[str, Any]:
  """The two splits by name, the training split first."""
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
      f"the dataset 'hf_disk' needs the package datasets ({error}): pip install datasets, or "
      "ptq_jax[hf]."
    ) from error
  if not path.is_dir():
    raise FileNotFoundError(f"there is no folder {str(path)!r} for the dataset 'hf_disk'.")
  try:
    found = datasets.load_from_disk(str(path))
  except Exception as error:  # files that are missing, cut off or of something else
    reason = " ".join(str(error).split())
    raise ValueError(
      f"{str(path)!r} is no folder that DatasetDict.save_to_disk wrote, or is damaged: {reason}"
    ) from error
  there = sorted(found) if isinstance(found, datasets.DatasetDict) else ["a single one, unnamed"]
  test = next((split for split in TEST_SPLITS if split in there), None)
  if "train" not in there or test is None:
    raise ValueError(
      f"{str(path)!r} has the splits {there}; it needs 'train' and 'test' or 'validation'."
    )
  return {"train": found["train"], test: found[test]}


def _holds(feature, kind: str) -> bool:
  return type(feature).__name__ == kind


def _columns(features, chosen, path) -> tuple[str, str]:
  """Names of the columns of inputs and of labels."""
  if chosen is not None:
    missing = [name for name in chosen if name not in features]
    if len(chosen) != 2 or missing:
      raise ValueError(
        f"data.columns is {','.join(chosen)}; give two columns of {str(path)!r}, the input and the "
        f"label: it has {', '.join(features)}."
      )
    return tuple(chosen)
  found = []
  for kind in ("Image", "ClassLabel"):
    names = [name for name, feature in features.items() if _holds(feature, kind)]
    if len(names) != 1:
      raise ValueError(
        f"{str(path)!r} has {len(names)} columns of the type {kind}; name the input and the label "
        f"with data.columns=INPUT,LABEL: it has {', '.join(features)}."
      )
    found += names
  return tuple(found)


def _array(part, column: str, split: str) -> np.ndarray:
  """A column of numbers, or of lists of them of one length, in their own type."""
  import pyarrow.compute

  found = part.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
  is_list = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
  if not any(check(found.type) for check in is_list):
    return found.to_numpy(zero_copy_only=False)
  lengths = set(pyarrow.compute.list_value_length(found).to_pylist())
  if len(lengths) > 1:
    raise ValueError(
      f"{column!r} of {split} has lists of {len(lengths)} lengths; cut or fill them up to "
      "one length."
    )
  return found.flatten().to_numpy(zero_copy_only=False).reshape(len(found), -1)


def _inputs(
  part, column: str, split: str, image_size: int | None
) -> tuple[np.ndarray, list[decode.Change]]:
  """The column of inputs; images are gray if the first is, otherwise RGB, see `decode.images`."""
  if not _holds(part.features[column], "Image"):
    return _array(part, column, split), []
  rows = part.select_columns([column]).cast_column(
    column, type(part.features[column])(decode=False)
  )

  def fetch(start: int, stop: int) -> list[tuple[str, bytes]]:
    found = rows[start:stop][column]
    return [
      (f"{split} {start + k}", (each or {}).get("bytes") or b"") for k, each in enumerate(found)
    ]

  mode = None
  with contextlib.suppress(Exception):  # `decode` says what is wrong with it
    mode = Image.open(io.BytesIO(fetch(0, 1)[0][1]), formats=decode.FORMATS).mode
  channels = 1 if mode == "L" else 3
  if not len(rows):
    return np.zeros((0, 1, 1, channels), np.uint8), []
  return decode.images(fetch, count=len(rows), num_channels=channels, image_size=image_size)
