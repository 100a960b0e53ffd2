"""The two splits of a labelled image set as arrays, and the checks that every source must pass."""

import dataclasses

import numpy as np

from ptq_jax.base import Int, Shaped, UInt8


@dataclasses.dataclass(frozen=True)
class Splits:
  """Everything a source holds, decoded, in the order of the source."""

  train_images: UInt8[np.ndarray, "N H W C"]  # pixels 0 .. 255
  train_labels: Int[np.ndarray, "N"]  # int32 in 0 .. len(class_names) - 1
  test_images: UInt8[np.ndarray, "T H W C"]  # the same image shape
  test_labels: Int[np.ndarray, "T"]  # int32
  class_names: tuple[str, ...]  # by label
  notes: tuple[str, ...] = ()  # sentences on what was found and not read


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
    ValueError: for images that are not uint8 [N, H, W, C], NaN, no examples, labels that are not
      integers or not one per image or outside the classes, more unnamed classes than training
      images, or splits of two image shapes.
  """
  _check_images(train_images, name=names[0], source=source)
  _check_images(test_images, name=names[2], source=source)
  if train_images.shape[1:] != test_images.shape[1:]:
    raise ValueError(
      f"{source}: {names[0]} have the shape {train_images.shape[1:]} and {names[2]} "
      f"{test_images.shape[1:]}; both splits need one image shape."
    )
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
    np.ascontiguousarray(train_images),
    train_labels.astype(np.int32),
    np.ascontiguousarray(test_images),
    test_labels.astype(np.int32),
    class_names,
    notes,
  )


def _check_images(images: np.ndarray, *, name: str, source: str) -> None:
  """Raises unless the images are uint8 [N, H, W, C] with at least one pixel."""
  if np.issubdtype(images.dtype, np.floating):
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if bad.size:
      raise ValueError(
        f"{source}: {name} have NaN or infinite pixels in {bad.size} of {len(images)} images, the "
        f"first at index {bad[0]}; repair or drop them and pass uint8."
      )
  if images.dtype != np.uint8:
    raise ValueError(
      f"{source}: {name} are {images.dtype}; pass uint8 pixels from 0 to 255 (for floats from 0 to "
      "1: `np.round(255 * images).astype(np.uint8)`), they are normalised during training."
    )
  if images.ndim != 4:
    raise ValueError(
      f"{source}: {name} have the shape {images.shape}; pass [N, height, width, channels] "
      "(for grayscale images without a channel axis: `images[..., None]`)."
    )
  if 0 in images.shape:
    raise ValueError(
      f"{source}: {name} have the shape {images.shape}, so there is no pixel in them."
    )


def _labels(labels: np.ndarray, num_images: int, *, name: str, source: str) -> np.ndarray:
  """Labels as int[N], one per image."""
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"{source}: {name} are {labels.dtype}; pass integers, one class per image.")
  if labels.shape != (num_images,):
    raise ValueError(
      f"{source}: {name} have the shape {labels.shape} for {num_images} images; pass one label per "
      "image."
    )
  return labels


def _check_range(
  labels: np.ndarray, num_classes: int, *, name: str, source: str, unnamed: bool = False
) -> None:
  """Raises for a label outside 0 .. num_classes - 1; `unnamed`: there is one image per class."""
  bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if bad.size:
    classes = f"{num_classes} images and no class_names" if unnamed else f"{num_classes} classes"
    raise ValueError(
      f"{source}: {name} hold {labels[bad[0]]} at index {bad[0]} (and {bad.size - 1} more outside "
      f"the range); with {classes} labels go from 0 to {num_classes - 1}."
    )
