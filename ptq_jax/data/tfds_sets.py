"""Any prepared image classification set of TensorFlow Datasets, read without TensorFlow."""

import difflib
import os
import pathlib
import re

import numpy as np

from ptq_jax.data import decode, splits
from ptq_jax.data.cache import Source
from ptq_jax.data.files import Stamp
from ptq_jax.data.splits import Splits

NAME = r"[A-Za-z]\w*(/[\w.+-]*\w)?(:[\w.*]+)?"
"""What a set may be called, "cifar10" or "name/config:3.0.2": no path, and not nothing."""

TEST_SPLITS = ("test", "validation")


def source(name: str, data_dir: str | os.PathLike | None, *, known: tuple[str, ...]) -> Source:
  """A set that TFDS has prepared as array_record files.

  Args:
    name: as TFDS writes it, such as "cifar10" or "cifar10:3.0.2".
    data_dir: where it was prepared; None for TFDS's own default.
    known: other datasets, to suggest one for an unknown name.
  Raises:
    ValueError: if TFDS has no such set.
    FileNotFoundError: if it is not prepared there; the text says how to do that.
  """
  builder = _builder(name, data_dir, known=known)
  path = pathlib.Path(builder.data_path)
  parts = builder.info.full_name.split("/")
  return Source(
    kind="tfds",
    folder=path.parents[len(parts) - 1],
    stem="-".join(parts),
    stamps=tuple(sorted(_stamp(file) for file in path.iterdir() if file.is_file())),
    decode=lambda image_size: read(builder, image_size=image_size),
  )


def read(builder, *, image_size: int | None) -> Splits:
  """Decodes the splits "train" and "test" (or "validation") of a TFDS builder, in its order.

  Raises:
    ValueError: for a set without those splits or without one image and one label per example, for
      damaged files, and for an image that cannot be decoded.
  """
  test = next((split for split in TEST_SPLITS if split in builder.info.splits), None)
  if "train" not in builder.info.splits or test is None:
    raise ValueError(
      f"the dataset {builder.name!r} has the splits {sorted(builder.info.splits)}; it needs "
      "'train' and 'test' or 'validation'."
    )
  image, label = _feature_names(builder)
  num_classes = builder.info.features[label].num_classes
  names = builder.info.features[label].names if num_classes is not None else None
  arrays, changes = [], []
  for split in ("train", test):
    (pixels, changed), labels = _read_split(
      builder, split, image=image, label=label, image_size=image_size
    )
    arrays += [pixels, labels]
    changes += changed
  return splits.checked(
    *arrays,
    class_names=None if names is None else tuple(names),
    source=f"the dataset {builder.name!r}",
    notes=decode.notes(changes),
  )


def _builder(name: str, data_dir: str | os.PathLike | None, *, known: tuple[str, ...]):
  """TFDS's reader of a prepared set."""
  import tensorflow_datasets as tfds

  if not re.fullmatch(NAME, name):
    raise ValueError(_unknown(name, (*known, *tfds.list_builders(with_community_datasets=False))))
  folder = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
  base = re.split("[/:]", name)[0]
  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
  except tfds.core.DatasetNotFoundError as error:
    known = (*known, *tfds.list_builders(with_community_datasets=False))
    if base not in known and not os.path.isdir(os.path.join(folder, base)):
      raise ValueError(_unknown(name, known)) from error
    raise FileNotFoundError(_unprepared(name, folder, base)) from error
  except Exception as error:  # dataset_info.json missing, cut off or of another format
    raise ValueError(
      f"the prepared dataset {name!r} in {folder!r} is damaged or half written ({error}); "
      "move it aside and prepare it again, or name another folder with data_dir."
    ) from error


def _unknown(name: str, known: tuple[str, ...]) -> str:
  """Message for a name that nobody knows."""
  close = difflib.get_close_matches(name, known, n=3)
  hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
  return (
    f"there is no dataset {name!r}: it is none of {', '.join(known[:4])}, nor an image "
    f"classification set of TensorFlow Datasets{hint}"
  )


def _unprepared(name: str, folder: str, base: str) -> str:
  """Message for a set that TFDS knows and that is not in the folder."""
  half_written = sorted(pathlib.Path(folder, base).glob("incomplete.*"))
  found = f" (only the half-written {str(half_written[0])!r})" if half_written else ""
  prepare = (
    "python -c 'import tensorflow_datasets as tfds; "
    f'tfds.builder("{name}", data_dir="{folder}", file_format="array_record")'
    ".download_and_prepare()'"
  )
  return (
    f"the dataset {name!r} is not prepared in {folder!r}{found}; name the folder where it is with "
    f"data_dir, or prepare it there, with TensorFlow installed for this once: {prepare}"
  )


def _feature_names(builder) -> tuple[str, str]:
  """Names of the image and of the label, in the features of a set."""
  import tensorflow_datasets as tfds

  names = []
  for kind, usual in ((tfds.features.Image, "image"), (tfds.features.ClassLabel, "label")):
    found = [key for key, value in builder.info.features.items() if isinstance(value, kind)]
    if usual not in found and len(found) != 1:
      raise ValueError(
        f"the dataset {builder.name!r} has {len(found)} features of the type {kind.__name__} and "
        f"none is called {usual!r}; only sets of one image and one label per example can be read."
      )
    names.append(usual if usual in found else found[0])
  return names[0], names[1]


def _read_split(
  builder, split: str, *, image: str, label: str, image_size: int | None
) -> tuple[tuple[np.ndarray, list[decode.Change]], np.ndarray]:
  """Images, see `decode.images`, and labels of one split."""
  import tensorflow_datasets as tfds

  feature = builder.info.features[image]
  if feature.np_dtype != np.uint8 or feature.shape[-1] not in decode.MODES:
    raise ValueError(
      f"the images of the dataset {builder.name!r} are {np.dtype(feature.np_dtype)} with "
      f"{feature.shape[-1]} channels; only uint8 with 1, 3 or 4 can be read."
    )
  try:
    examples = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
  except NotImplementedError as error:
    raise ValueError(
      f"the dataset {builder.name!r} in {str(builder.data_path)!r} is prepared as "
      f"{builder.info.file_format.value}; prepare it again with file_format='array_record'."
    ) from error
  labels = np.empty(len(examples), np.int64)

  def fetch(start: int, stop: int) -> list[tuple[str, bytes]]:
    try:
      batch = examples.__getitems__(range(start, stop))
      if not all(example[image] for example in batch):
        raise ValueError("an example is empty")  # what the reader makes of a file cut at a block
    except Exception as error:  # the reader raises RuntimeError for a lost or broken file
      raise ValueError(
        f"the prepared dataset {builder.name!r} in {str(builder.data_path)!r} is damaged or "
        f"half written ({error}); move it aside and prepare it again."
      ) from error
    labels[start:stop] = [example[label] for example in batch]
    return [(f"{split} {start + k}", example[image]) for k, example in enumerate(batch)]

  images = decode.images(
    fetch, count=len(examples), num_channels=feature.shape[-1], image_size=image_size
  )
  return images, labels


def _stamp(file: pathlib.Path) -> Stamp:
  """Name, bytes and modification time."""
  stat = file.stat()
  return file.name, stat.st_size, stat.st_mtime_ns
