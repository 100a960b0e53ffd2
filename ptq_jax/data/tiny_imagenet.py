"""TinyImageNet as its official zip archive or the folder in it: 200 classes, 64x64."""

import os

import numpy as np

from ptq_jax.data import decode, splits
from ptq_jax.data.cache import Source
from ptq_jax.data.files import Files, open_files
from ptq_jax.data.splits import Splits


def source(path: str | os.PathLike) -> Source:
  """TinyImageNet at a path; `val` is the test split, grayscale images become RGB.

  Class names are the first words of words.txt, or the ids themselves when there is no such file.

  Args:
    path: tiny-imagenet-200.zip, the folder tiny-imagenet-200, or a folder that holds it.
  Raises:
    FileNotFoundError: if there is nothing there.
    ValueError: for a truncated archive.
  """
  files = open_files(path, dataset="tiny_imagenet")
  return Source(
    kind="tiny_imagenet",
    folder=files.path.parent,
    stem=files.path.name,
    stamps=files.stamps,
    decode=lambda image_size: read(files, image_size=image_size),
  )


def read(files: Files, *, image_size: int | None) -> Splits:
  """Decodes all images: training by class in the order of wnids.txt, test as val_annotations.txt.

  Raises:
    FileNotFoundError: for a missing class list, annotations or image.
    ValueError: for a class that is not in the list or in it twice, a class without images, an image
      annotated twice, or one that cannot be decoded.
  """
  root = _root(files)
  wnids = [line.strip() for line in files.text_lines(f"{root}wnids.txt")]
  label_of = {wnid: label for label, wnid in enumerate(wnids)}
  if len(label_of) < len(wnids):
    twice = next(wnid for label, wnid in enumerate(wnids) if label_of[wnid] != label)
    raise ValueError(f"wnids.txt in {str(files.path)!r} names the class {twice!r} twice.")
  train = _train(files, root, label_of)
  test = _test(files, root, label_of)
  arrays, changes = [], []
  for examples in (train, test):
    pixels, changed = files.decoded([name for name, _ in examples], image_size=image_size)
    arrays += [pixels, np.array([label for _, label in examples], np.int32)]
    changes += changed
  return splits.checked(
    *arrays,
    class_names=_class_names(files, root, wnids),
    source=str(files.path),
    notes=decode.notes(changes),
  )


def _root(files: Files) -> str:
  """What stands before "wnids.txt" in its name: "" or "tiny-imagenet-200/"."""
  found = [name for name in files.names if name.rsplit("/", 1)[-1] == "wnids.txt"]
  if not found:
    raise FileNotFoundError(
      f"{str(files.path)!r} has no class list wnids.txt; TinyImageNet is the official "
      "tiny-imagenet-200.zip or the folder in it (for other images by class use 'image_folder')."
    )
  return min(found, key=len).removesuffix("wnids.txt")


def _train(files: Files, root: str, label_of: dict[str, int]) -> list[tuple[str, int]]:
  """Name and label of every training image."""
  by_class = {wnid: [] for wnid in label_of}
  for name in files.images_below(f"{root}train/"):
    wnid = name.removeprefix(f"{root}train/").split("/")[0]
    if wnid not in by_class:
      raise ValueError(
        f"the image {name!r} in {str(files.path)!r} is of the class {wnid!r}, which is not in "
        "wnids.txt."
      )
    by_class[wnid].append(name)
  empty = [wnid for wnid, names in by_class.items() if not names]
  if empty:
    raise ValueError(
      f"{str(files.path)!r} has no training images for {len(empty)} of {len(by_class)} classes of "
      f"wnids.txt, such as {empty[0]!r}; it may be half unpacked."
    )
  return [(name, label_of[wnid]) for wnid, names in by_class.items() for name in names]


def _test(files: Files, root: str, label_of: dict[str, int]) -> list[tuple[str, int]]:
  """Name and label of every validation image, in the order of val_annotations.txt."""
  annotations = f"{root}val/val_annotations.txt"
  if annotations not in files.names:
    raise FileNotFoundError(
      f"{str(files.path)!r} has no {annotations}, which holds the labels of val/; if val/ was "
      "sorted into one folder per class, load it as 'image_folder'."
    )
  present = set(files.names)
  examples = []
  for number, line in enumerate(files.text_lines(annotations), 1):
    image, wnid = (*line.split("\t"), "")[:2]
    name = f"{root}val/images/{image}"
    if wnid not in label_of:
      raise ValueError(
        f"line {number} of {annotations} gives {image!r} the class {wnid!r}, which is not in "
        "wnids.txt."
      )
    if name not in present:
      raise FileNotFoundError(f"{str(files.path)!r} has no image {name!r}, named in {annotations}.")
    examples.append((name, label_of[wnid]))
  if len(dict(examples)) < len(examples):
    raise ValueError(f"{annotations} in {str(files.path)!r} names an image twice.")
  if not examples:
    raise ValueError(f"{annotations} in {str(files.path)!r} names no image.")
  return examples


def _class_names(files: Files, root: str, wnids: list[str]) -> tuple[str, ...]:
  """First word of each class in words.txt: "goldfish" of "goldfish, Carassius auratus"."""
  if f"{root}words.txt" not in files.names:
    return tuple(wnids)
  words = dict(line.split("\t", 1) for line in files.text_lines(f"{root}words.txt") if "\t" in line)
  return tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
