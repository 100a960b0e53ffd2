"""Classification sets by name, as arrays on the host with their statistics."""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ptq_jax.base import Float, Int, Shaped
from ptq_jax.data import (
  cache,
  decode,
  hf_disk,
  image_folder,
  inputs,
  npz,
  own,
  splits,
  tfds_sets,
  tiny_imagenet,
)
from ptq_jax.data.splits import Splits

DIGITS_TEST_SIZE = 299
DIGITS_SPLIT_SEED = 1797

LARGEST_IMAGE = 4096
"""Pixels of a side to which images are scaled."""

PATH_NAMES = {
  "npz": "the .npz file with x_train, y_train, x_test and y_test",
  "tiny_imagenet": "tiny-imagenet-200.zip or the folder in it",
  "image_folder": "the folder that holds train/ and test/ (or val/)",
  "hf_disk": "the folder that DatasetDict.save_to_disk wrote",
}

WHERE = {
  "digits": (),
  "npz": ("path",),
  "tiny_imagenet": ("path", "cache_dir"),
  "image_folder": ("path", "cache_dir"),
  "hf_disk": ("path", "columns", "cache_dir"),
}
"""What a source uses of the settings that say where and how data lies; others take
`WHERE_OWN` (functions) or `WHERE_TFDS`."""

WHERE_TFDS = ("data_dir", "cache_dir")
WHERE_OWN = ("path", "columns")


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A pool, from which members are drawn, and a test split. `jax.device_put` the arrays once."""

  name: str
  train_images: Shaped[np.ndarray, "E ..."]  # the pool, of any kind that `inputs` knows, E even
  train_labels: Int[np.ndarray, "E"]  # int32
  train_ids: Int[np.ndarray, "E"]  # int32, positions in the source's training split, ascending
  test_images: Shaped[np.ndarray, "T ..."]
  test_labels: Int[np.ndarray, "T"]  # int32
  class_names: tuple[str, ...]  # by label
  mean: Float[np.ndarray, "C"]  # float32, of the pool, see `statistics`
  std: Float[np.ndarray, "C"]  # likewise
  fingerprint: str  # SHA-256 of the arrays and class names, hexadecimal
  notes: tuple[str, ...]  # sentences on what differs from the source, such as a dropped example

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Height, width, channels; or the number of features or of tokens alone."""
    return self.train_images.shape[1:]

  @property
  def kind(self) -> str:
    """ "images", "vectors" or "tokens"."""
    return inputs.kind(self.train_images.dtype)

  @functools.cached_property
  def vocabulary(self) -> int | None:
    """One more than the largest token id; None for what is no tokens."""
    if self.kind != "tokens":
      return None
    return 1 + int(max(self.train_images.max(), self.test_images.max()))

  @property
  def sizes(self) -> dict[str, int | None]:
    """What a factory of models has to know, see `models.make`."""
    return {"num_classes": self.num_classes, "num_tokens": self.vocabulary}

  def fed(self, count: int) -> jax.ShapeDtypeStruct:
    """So many examples as a model gets them: shape and dtype alone."""
    dtype = inputs.fed_dtype(self.train_images.dtype)
    return jax.ShapeDtypeStruct((count, *self.image_shape), dtype)


def load(
  name: str,
  *,
  data_dir: str | os.PathLike | None = None,
  path: str | os.PathLike | None = None,
  columns: Sequence[str] | None = None,
  cache_dir: str | os.PathLike | None = None,
  pool_size: int | None = None,
  test_size: int | None = None,
  image_size: int | None = None,
  seed: int = 0,
) -> Dataset:
  """Loads a set of labelled images, vectors or token ids.

  Args:
    name: one of
      "digits": scikit-learn's 1797 handwritten digits, 8x8x1, installed with it;
      "npz": a file with the arrays x_train, x_test (see `inputs`), the integer arrays y_train,
        y_test [N] and perhaps class_names;
      "tiny_imagenet": the official zip archive, or the folder in it;
      "image_folder": train/<class>/* and test/<class>/* (or val/), a folder or a zip archive;
      "hf_disk": a folder that `datasets.DatasetDict.save_to_disk` wrote, see `hf_disk`;
      "package.module:function": of yours, which gives two sources of examples, see `own`;
      or an image classification set of TensorFlow Datasets, such as "cifar10" or "cifar100:3.0.2",
      prepared as array_record in `data_dir` (TensorFlow is not needed).
    data_dir: of TensorFlow Datasets; None for its own default.
    path: of "npz", "tiny_imagenet", "image_folder", "hf_disk" and what your function takes.
    columns: of "hf_disk" and of dicts of your function's, the names of the input and of the label;
      None: by their types.
    cache_dir: where decoded images are kept as uint8; None for beside the data. See
      `cache.decoded`.
    pool_size: examples from which members are drawn, the first of a shuffle of the training split
      with `seed`, so that a smaller pool is part of a larger one; None takes all. An odd pool is
      trimmed by one, see `Dataset.notes`.
    test_size: likewise for the test split, odd or even.
    image_size: side in pixels to which images are scaled (shorter side, then the middle square);
      None keeps their size, which must then be the same for all.
    seed: of the two selections.
  Raises:
    ValueError: for an unknown name, contents that are no labelled set, too few examples, or an
      argument that the source has no use for.
    FileNotFoundError: for missing files or an unprepared set.
  """
  where = {"data_dir": data_dir, "path": path, "columns": columns, "cache_dir": cache_dir}
  whole = _read(name, image_size=image_size, **where)
  return _select(name, whole, pool_size=pool_size, test_size=test_size, seed=seed)


def from_arrays(
  x_train: Any,
  y_train: Any,
  x_test: Any,
  y_test: Any,
  *,
  class_names: Sequence[str] | None = None,
  pool_size: int | None = None,
  test_size: int | None = None,
  image_size: int | None = None,
  seed: int = 0,
  **where: Any,
) -> Dataset:
  """The same from arrays at hand.

  Args:
    x_train, x_test: images, vectors or token ids [N, ...], see `inputs`: arrays, tables with the
      same columns, or what else `numpy.asarray` takes.
    y_train, y_test: labels [N] from 0 on, likewise.
    class_names: by label; None: the labels themselves.
    pool_size, test_size, image_size, seed: as in `load`.
    **where: its other arguments, all None: arrays are nowhere.
  Raises:
    ValueError: for arrays that are no labelled set, and as in `load`.
  """
  _require_used("arrays", where, (), image_size)
  names = ("x_train", "y_train", "x_test", "y_test")
  named = [list(x.columns) for x in (x_train, x_test) if hasattr(x, "columns")]
  if len(named) == 2 and named[0] != named[1]:
    raise ValueError(
      f"the columns of x_test are {named[1]}, those of x_train {named[0]}; give both tables the "
      "same ones in the same order."
    )
  whole = splits.checked(
    *map(_as_array, (x_train, y_train, x_test, y_test), names),
    class_names=None if class_names is None else tuple(map(str, class_names)),
    source="the data",
    names=names,
  )
  whole = _resized(whole, image_size)
  return _select("arrays", whole, pool_size=pool_size, test_size=test_size, seed=seed)


def _as_array(given: Any, name: str) -> np.ndarray:
  """An array of what there is of numbers, nothing of it masked."""
  if np.ma.is_masked(given):
    raise ValueError(f"{name} has masked entries; fill or drop them.")
  try:
    return np.asarray(given)
  except Exception as error:  # lists of different lengths, tensors on a device, and others
    reason = " ".join(str(error).split())
    raise ValueError(f"{name} is a {type(given).__name__} that is no array: {reason}") from error


def _require_used(
  name: str, where: dict[str, Any], used: tuple[str, ...], image_size: int | None
) -> None:
  """Raises ValueError for the first setting that a source would pass over, or a size of nothing."""
  if image_size is not None and not 1 <= image_size <= LARGEST_IMAGE:
    raise ValueError(
      f"data.image_size is {image_size}; it must be at least 1 pixel and at most {LARGEST_IMAGE}, "
      "or None."
    )
  for key, value in where.items():
    if value is not None and key not in used:
      value = ",".join(value) if key == "columns" else value
      others = ", ".join((*used, "image_size", "pool_size", "test_size"))
      raise ValueError(
        f"data.{key} is {value}, but the dataset {name!r} has no use for it; leave it out (it "
        f"takes {others})."
      )


def _read(name: str, *, image_size, **where) -> Splits:
  """All examples of a source."""
  is_own = own.is_own(name)
  if name not in WHERE and not is_own:
    source = tfds_sets.source(name, where["data_dir"], known=tuple(WHERE))
  _require_used(name, where, WHERE.get(name, WHERE_OWN if is_own else WHERE_TFDS), image_size)
  path, columns, cache_dir = where["path"], where["columns"], where["cache_dir"]
  if name == "digits":
    return _resized(read_digits(), image_size)
  if name in PATH_NAMES and path is None:
    raise ValueError(f"the dataset {name!r} needs a path: {PATH_NAMES[name]}.")
  if is_own:
    return _resized(own.read(name, path=path, columns=columns), image_size)
  if name == "npz":
    return _resized(read_npz(path), image_size)
  if name == "hf_disk":
    options = {"columns": columns, "image_size": image_size, "cache_dir": cache_dir}
    return _resized(hf_disk.read(path, **options), image_size)
  if name == "tiny_imagenet":
    source = tiny_imagenet.source(path)
  elif name == "image_folder":
    source = image_folder.source(path)
  return cache.decoded(source, image_size=image_size, cache_dir=cache_dir)


def _resized(whole: Splits, image_size: int | None) -> Splits:
  """The same examples at another size."""
  if image_size is None:
    return whole
  images = (whole.train_images, whole.test_images)
  if inputs.kind(images[0].dtype) != "images":
    kind = inputs.kind(images[0].dtype)
    raise ValueError(f"data.image_size is {image_size}, but these are {kind}; leave it out.")
  height, width = images[0].shape[1:3]
  cut = f"all images are {width}x{height} and lose what is beside their middle square."
  train, test = (decode.resized(each, image_size=image_size) for each in images)
  notes = (*whole.notes, *([cut] if height != width else []))
  return dataclasses.replace(whole, train_images=train, test_images=test, notes=notes)


def _digits_table() -> np.ndarray:
  """64 pixels and the digit per row, from scikit-learn's file: importing it takes seconds."""
  package = importlib.util.find_spec("sklearn")
  path = pathlib.Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
  if path.is_file():
    return np.loadtxt(path, delimiter=",")
  from sklearn import datasets

  digits = datasets.load_digits()
  return np.column_stack([digits.data, digits.target])


def read_digits() -> Splits:
  """scikit-learn's handwritten digits: 1498 + 299 images of 8x8x1, in a fixed random split."""
  table = _digits_table()
  images = np.round(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  labels = table[:, -1].astype(np.int32)
  order = shuffled(len(images), seed=DIGITS_SPLIT_SEED)
  test, train = order[:DIGITS_TEST_SIZE], order[DIGITS_TEST_SIZE:]
  names = tuple(str(digit) for digit in range(10))
  return Splits(images[train], labels[train], images[test], labels[test], names)


def read_npz(path: str | os.PathLike) -> Splits:
  """The arrays x_train, y_train, x_test, y_test and perhaps class_names of an .npz file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no .npz file, lacks an array, or fails a check of `splits.checked`.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {str(path)!r} for the dataset 'npz'.")
  keys = ("x_train", "y_train", "x_test", "y_test")
  arrays, present = npz.read(path, keys, text=("class_names",))
  missing = [key for key in keys if key not in present]
  if missing:
    raise ValueError(
      f"{path} has no array {missing[0]!r}; it needs {', '.join(keys)} and has "
      f"{', '.join(present) or 'none'}."
    )
  names = arrays.get("class_names")
  class_names = None if names is None else tuple(str(each) for each in names.ravel())
  return splits.checked(
    *(arrays[key] for key in keys), class_names=class_names, source=str(path), names=keys
  )


def shuffled(num_examples: int, *, seed: int) -> Int[np.ndarray, "n"]:
  """A permutation that no NumPy release changes: only the raw bit stream of PCG64 is used."""
  return np.argsort(np.random.PCG64(seed).random_raw(num_examples), kind="stable")


def _select(
  name: str, source: Splits, *, pool_size: int | None, test_size: int | None, seed: int
) -> Dataset:
  """The pool and the test examples of a source, with statistics."""
  notes = list(source.notes)
  num_train, num_test = len(source.train_labels), len(source.test_labels)
  pool_size = num_train if pool_size is None else pool_size
  test_size = num_test if test_size is None else test_size
  _check_size("data.pool_size", pool_size, num_train, least=2, split="training")
  _check_size("data.test_size", test_size, num_test, least=1, split="test")
  if pool_size % 2:
    pool_size -= 1
    notes.append(
      f"one example of {pool_size + 1} was dropped: a pool needs an even number of examples, so "
      "that every model trains on half of it."
    )
  pool = np.sort(shuffled(num_train, seed=seed)[:pool_size])
  test = np.sort(shuffled(num_test, seed=seed + 1)[:test_size])
  arrays = (
    _take(source.train_images, pool),
    _take(source.train_labels, pool),
    _take(source.test_images, test),
    _take(source.test_labels, test),
  )
  for split, labels in (("training", arrays[1]), ("test", arrays[3])):
    absent = np.flatnonzero(np.bincount(labels, minlength=len(source.class_names)) == 0)
    if absent.size:
      first = source.class_names[absent[0]]
      anew = "; labels go from 0 on: number them anew if these are no classes"
      notes.append(
        f"{absent.size} of {len(source.class_names)} classes have no {split} example, such as "
        f"{first!r}{anew if split == 'training' else ''}."
      )
  mean, std = statistics(arrays[0])
  for split, array in (("training", arrays[0]), ("test", arrays[2])):
    inputs.require_finite_when_normalised(array, mean, std, split=split)
  return Dataset(
    name=name,
    train_images=arrays[0],
    train_labels=arrays[1],
    train_ids=pool.astype(np.int32),
    test_images=arrays[2],
    test_labels=arrays[3],
    class_names=source.class_names,
    mean=mean,
    std=std,
    fingerprint=fingerprint(*arrays, class_names=source.class_names),
    notes=tuple(notes),
  )


def _take(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """The chosen examples; without a copy when these are all."""
  return array if len(indices) == len(array) else array[indices]


def _check_size(argument: str, size: int, available: int, *, least: int, split: str) -> None:
  """Raises unless least <= size <= available."""
  if not least <= size <= available:
    raise ValueError(
      f"{argument} is {size}; the {split} split has {available} examples, so choose from {least} "
      f"to {available}."
    )


def statistics(
  images: Shaped[np.ndarray, "N ..."],
) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
  """Mean and population deviation by which inputs are normalised, float32.

  Of images per channel, of pixels scaled to 0 .. 1, from exact counts; of vectors per feature; of
  tokens none. What is constant gets the deviation 1, so that normalising keeps it finite.
  """
  kind = inputs.kind(images.dtype)
  if kind == "tokens":
    return np.zeros(0, np.float32), np.zeros(0, np.float32)
  if kind == "vectors":
    mean, std = images.mean(axis=0, dtype=np.float64), images.std(axis=0, dtype=np.float64)
    varies = std >= np.finfo(np.float32).tiny
  else:
    values = np.arange(256) / 255
    channels = range(images.shape[-1])
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in channels])
    frequency = counts / counts.sum(axis=1, keepdims=True)
    mean = frequency @ values
    std = np.sqrt((frequency * (values - mean[:, None]) ** 2).sum(axis=1))
    varies = std > 0
  return mean.astype(np.float32), np.where(varies, std, 1).astype(np.float32)


def fingerprint(*arrays: np.ndarray, class_names: tuple[str, ...]) -> str:
  """SHA-256 over shapes, dtypes, contents and class names, in hexadecimal."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(f"{array.shape} {array.dtype.str} ".encode())
    digest.update(np.ascontiguousarray(array))
  digest.update("\n".join(class_names).encode(errors="surrogateescape"))
  return digest.hexdigest()
