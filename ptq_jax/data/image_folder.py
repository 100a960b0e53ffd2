"""Images sorted into one folder per class: train/<class>/* and test/<class>/* or val/<class>/*."""

import os

import numpy as np

from ptq_jax.data import splits
from ptq_jax.data.cache import Source
from ptq_jax.data.files import Files, open_files
from ptq_jax.data.splits import Splits

TEST_FOLDERS = ("test", "val", "validation")


def source(path: str | os.PathLike) -> Source:
  """The images at a path, a folder or a zip archive of one; grayscale images become RGB.

  Classes are the folder names in train/, in alphabetical order; images may lie deeper. Of test/,
  val/ and validation/ the first that holds images is the test split.

  Raises:
    FileNotFoundError: if there is nothing there.
    ValueError: for a truncated archive.
  """
  files = open_files(path, dataset="image_folder")
  return Source(
    kind="image_folder",
    folder=files.path.parent,
    stem=files.path.name,
    stamps=files.stamps,
    decode=lambda image_size: read(files, image_size=image_size),
  )


def read(files: Files, *, image_size: int | None) -> Splits:
  """Decodes all images in alphabetical order.

  Raises:
    FileNotFoundError: for missing training or test images.
    ValueError: for an image outside the class folders, a test class without training images, or an
      image that cannot be decoded.
  """
  root = _root(files)
  train = _by_class(files, f"{root}train/")
  test = next(filter(None, (_by_class(files, f"{root}{name}/") for name in TEST_FOLDERS)), None)
  if test is None:
    raise FileNotFoundError(
      f"{str(files.path)!r} has no test images; put them into {root}test/<class>/ or "
      f"{root}val/<class>/."
    )
  class_names = tuple(sorted({name for _, name in train}))
  label_of = {name: label for label, name in enumerate(class_names)}
  unknown = [(image, name) for image, name in test if name not in label_of]
  if unknown:
    raise ValueError(
      f"the test image {unknown[0][0]!r} in {str(files.path)!r} is of the class {unknown[0][1]!r}, "
      f"which has no training images; the classes of {root}train/ are {_some(class_names)}."
    )
  arrays = []
  for examples in (train, test):
    arrays.append(files.decoded([image for image, _ in examples], image_size=image_size))
    arrays.append(np.array([label_of[name] for _, name in examples], np.int32))
  return splits.checked(*arrays, class_names=class_names, source=str(files.path))


def _root(files: Files) -> str:
  """What stands before "train/" in the names of training images, the shortest if there are more."""
  roots = {name.split("train/")[0] for name in files.images_below("") if "train/" in name}
  roots = {root for root in roots if root == "" or root.endswith("/")}
  if not roots:
    raise FileNotFoundError(
      f"{str(files.path)!r} has no training images; put them into train/<class>/ and test images "
      "into test/<class>/."
    )
  return min(roots, key=len)


def _by_class(files: Files, folder: str) -> list[tuple[str, str]]:
  """Name and class of every image below a folder."""
  examples = []
  for name in files.images_below(folder):
    class_name, *rest = name.removeprefix(folder).split("/")
    if not rest:
      raise ValueError(
        f"the image {name!r} in {str(files.path)!r} lies in no class folder; move it into "
        f"{folder}<class>/."
      )
    examples.append((name, class_name))
  return examples


def _some(names: tuple[str, ...]) -> str:
  """At most five names."""
  return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
