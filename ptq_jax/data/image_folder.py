"""Images sorted into one folder per class: train/<class>/* and test/<class>/* or val/<class>/*."""

import os

import numpy as np

from ptq_jax.data import decode, splits
from ptq_jax.data.cache import Source
from ptq_jax.data.files import Files, open_files
from ptq_jax.data.splits import Splits

TEST_FOLDERS = ("test", "val", "validation")


def source(path: str | os.PathLike) -> Source:
  """The images at a path, a folder or a zip archive of one; grayscale images become RGB.

  Classes are the folder names in train/, in alphabetical order; images may lie deeper. Of test/,
  val/ and validation/ the first with images in folders of these classes is the test split. What is
  left out (folders and files without images, other splits) is said in the notes.

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
    ValueError: for an image outside the class folders, a test class without training images,
      training images in two places, or an image that cannot be decoded.
  """
  root = _root(files)
  train = _by_class(files, f"{root}train/")
  folders = tuple(sorted({name for _, name in train}))
  test_folder = _test_folder(files, root, folders)
  test = _by_class(files, test_folder)
  label_of = {name: label for label, name in enumerate(folders)}
  class_names = tuple(map(_readable, folders))
  unknown = [(image, name) for image, name in test if name not in label_of]
  if unknown:
    raise ValueError(
      f"the test image {unknown[0][0]!r} in {str(files.path)!r} is of the class {unknown[0][1]!r}, "
      f"which has no training images; the classes of {root}train/ are {_some(class_names)}."
    )
  arrays, changes = [], []
  for examples in (train, test):
    pixels, changed = files.decoded([image for image, _ in examples], image_size=image_size)
    arrays += [pixels, np.array([label_of[name] for _, name in examples], np.int32)]
    changes += changed
  notes = (*_notes(files, f"{root}train/", test_folder, folders), *decode.notes(changes))
  return splits.checked(*arrays, class_names=class_names, source=str(files.path), notes=notes)


def _root(files: Files) -> str:
  """What stands before the first folder "train" in the names of images, of those the highest.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if there are two.
  """
  paths = [name.split("/") for name in files.images_below("")]
  roots = {tuple(path[: path.index("train")]) for path in paths if "train" in path[:-1]}
  highest = sorted(root for root in roots if len(root) == min(map(len, roots)))
  if not highest:
    raise FileNotFoundError(
      f"{str(files.path)!r} has no training images; put them into train/<class>/ and test images "
      "into test/<class>/."
    )
  if len(highest) > 1:
    first, second = ("/".join((*root, "train")) for root in highest[:2])
    raise ValueError(
      f"{str(files.path)!r} has training images in both {first!r} and {second!r}; give the folder "
      "that holds one of them as the path."
    )
  return "".join(f"{part}/" for part in highest[0])


def _test_folder(files: Files, root: str, classes: tuple[str, ...]) -> str:
  """The first of the test folders that is sorted by class; if none is, the first with images."""
  found = [f"{root}{name}/" for name in TEST_FOLDERS if files.images_below(f"{root}{name}/")]
  if not found:
    raise FileNotFoundError(
      f"{str(files.path)!r} has no test images; put them into {root}test/<class>/ or "
      f"{root}val/<class>/."
    )
  known = set(classes)
  for folder in found:
    images = files.images_below(folder)
    if any(name.removeprefix(folder).split("/")[0] in known for name in images):
      return folder
  return found[0]


def _notes(files: Files, train: str, test: str, classes: tuple[str, ...]) -> tuple[str, ...]:
  """One sentence for each sort of thing that is there and was not read."""
  notes, shown = [], f"{_readable(train)} and {_readable(test)}"
  if test.split("/")[-2] != TEST_FOLDERS[0]:
    notes.append(f"{_readable(test)} is the test split.")
  others = [name for name in files.images_below("") if not name.startswith((train, test))]
  if others:
    notes.append(f"{len(others)} images outside {shown} are not used{_such_as(others)}.")
  images = set(files.images_below(""))
  odd = [name for name in files.names if name.startswith((train, test)) and name not in images]
  if odd:
    notes.append(
      f"{len(odd)} files in {shown} are left out, as their names do not end like those "
      f"of images that can be read{_such_as(odd)}."
    )
  entries = (*files.names, *files.folders)
  below = [name.removeprefix(train) for name in entries if name.startswith(train)]
  inside = {name.split("/")[0] for name in below if "/" in name}
  empty = sorted(inside - {*classes, ""})
  if empty:
    notes.append(
      f"{len(empty)} folders of {_readable(train)} hold no image and are no classes"
      f"{_such_as(empty)}."
    )
  return tuple(notes)


def _such_as(names: list[str]) -> str:
  """One of them as an example."""
  return f", such as {names[0]!r}"


def _readable(name: str) -> str:
  r"""A folder name as text: bytes that are not UTF-8 as \xe9."""
  return os.fsencode(name).decode("utf-8", "backslashreplace")


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
