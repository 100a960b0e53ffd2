"""The two splits of a labelled set as arrays, and the checks that every source must pass."""

import dataclasses

import numpy as np

from ptq_jax.base import Int, Shaped
from ptq_jax.data import inputs


@dataclasses.dataclass(frozen=True)
class Splits:
  """Everything a source holds, decoded, in the order of the source."""

  train_images: Shaped[np.ndarray, "N ..."]  # or vectors or tokens, see `inputs`
  train_labels: Int[np.ndarray, "N"]  # int32 in 0 .. len(class_names) - 1
  test_images: Shaped[np.ndarray, "T ..."]  # of the same kind and shape
  test_labels: Int[np.ndarray, "T"]  # int32
  class_names: tuple[str, ...]  # by label
  notes: tuple[str, ...] = ()  # sentences on what was found and not read, or taken otherwise


def checked(
  train_images: Shaped[np.ndarray, "..."],
  train_labels: Shaped[np.ndarray, "..."],
  test_images: Shaped[np.ndarray, "..."],
  test_labels: Shaped[np.ndarray, "..."],
  *,
  class_names: tuple[str, ...] | None,
  source: str,
  notes: tuple[str, ...] = (),
  names: tuple[str, str, str, str] = (
    "the training images",
    "the training labels",
    "the test images",
    "the test labels",
  ),
) -> Splits:
  """Arrays of any origin as `Splits`, or the first thing that is wrong with them.

  Args:
    train_images: and the other three; labels [N] or [N, 1] of any integer type.
    class_names: None names the classes 0, 1, ... up to the largest training label.
    source: where the arrays come from, for messages.
    notes: of the result.
    names: what messages call the four arrays.
  Raises:
    ValueError: for what `inputs` refuses, labels that are not integers or not one per example or
      outside the classes, more unnamed classes than training examples, or splits of two kinds or
      shapes.
  """
  given = train_images, test_images
  train_images, said = inputs.checked(train_images, name=names[0], source=source)
  test_images, more = inputs.checked(test_images, name=names[2], source=source)
  both = [{"kind": inputs.kind(x.dtype), "shape": x.shape[1:]} for x in (train_images, test_images)]
  for what, one in both[0].items():
    if one != both[1][what]:
      raise ValueError(
        f"{source}: {names[0]} have the {what} {one} and {names[2]} {both[1][what]}; both splits "
        f"need one {what}."
      )
  inputs.require_told_apart(*given, names=names[::2], source=source)
  train_labels = _labels(train_labels, len(train_images), name=names[1], source=source)
  test_labels = _labels(test_labels, len(test_images), name=names[3], source=source)
  if class_names is None:
    largest = max(0, int(train_labels.max()))
    if largest >= len(train_images):
      _check_range(train_labels, len(train_images), name=names[1], source=source, unnamed=True)
    class_names = tuple(str(label) for label in range(largest + 1))
  for labels, name in ((train_labels, names[1]), (test_labels, names[3])):
    _check_range(labels, len(class_names), name=name, source=source)
  return Splits(
    train_images,
    train_labels.astype(np.int32),
    test_images,
    test_labels.astype(np.int32),
    class_names,
    (*notes, *said, *more),
  )


def _labels(labels: np.ndarray, num_images: int, *, name: str, source: str) -> np.ndarray:
  """Labels as int[N], one per image."""
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"{source}: {name} are {labels.dtype}; pass integers, one class per example.")
  if labels.shape != (num_images,):
    raise ValueError(
      f"{source}: {name} have the shape {labels.shape} for {num_images} examples; pass one label "
      "per example."
    )
  return labels


def _check_range(
  labels: np.ndarray, num_classes: int, *, name: str, source: str, unnamed: bool = False
) -> None:
  """Raises for a label outside 0 .. num_classes - 1; `unnamed`: there is one image per class."""
  bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if bad.size:
    classes = f"{num_classes} examples and no class_names" if unnamed else f"{num_classes} classes"
    raise ValueError(
      f"{source}: {name} hold {labels[bad[0]]} at index {bad[0]} (and {bad.size - 1} more outside "
      f"the range); with {classes} labels go from 0 to {num_classes - 1}."
    )
