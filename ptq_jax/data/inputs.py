"""What a model may be trained on: images, vectors of numbers, or token ids.

A kind is known by the dtype in which its arrays are kept, so nothing else has to carry it:

    images    uint8 [N, H, W, C]    pixels, normalised per channel; the only ones to be augmented
    vectors   float32 [N, F]        numbers, standardised per feature
    tokens    int32 [N, L]          ids from 0, given to the model as they are

Elsewhere "images" stands for any of them unless a function says otherwise.
"""

import numpy as np

from ptq_jax.base import ArrayLike, Float, Shaped

KINDS = {"uint8": "images", "float32": "vectors", "int32": "tokens"}
"""Kind by the dtype in which it is kept."""

MOST_IDS = 2**24
"""Rows that the table of an embedding may need."""


def kind(dtype: np.dtype | str) -> str:
  """The kind of what is kept in a dtype: "images", "vectors" or "tokens".

  Raises:
    ValueError: for a dtype in which none is kept.
  """
  if str(dtype) not in KINDS:
    known = ", ".join(f"{name} as {kept}" for kept, name in KINDS.items())
    raise ValueError(f"inputs are {dtype}; give {known}.")
  return KINDS[str(dtype)]


def fed_dtype(dtype: np.dtype | str) -> np.dtype:
  """The dtype in which a model gets what is kept in one: integers for tokens, else floats."""
  return np.dtype(np.int32 if kind(dtype) == "tokens" else np.float32)


def kept_dtype(inputs: Shaped[ArrayLike, "..."]) -> np.dtype | None:
  """The dtype in which an array is kept, by its own and its number of axes; None if in none."""
  dtype, axes = inputs.dtype, inputs.ndim
  if dtype == np.uint8:
    return np.dtype(np.uint8) if axes == 4 else None
  if axes == 2 and dtype.kind in "fb":
    return np.dtype(np.float32)
  return np.dtype(np.int32) if axes == 2 and dtype.kind in "iu" else None


def checked(
  inputs: Shaped[np.ndarray, "..."], *, name: str, source: str
) -> tuple[Shaped[np.ndarray, "N ..."], list[str]]:
  """Inputs of one split as they are kept, and sentences on what was taken how.

  Args:
    inputs: uint8 [N, H, W, C]; floats or bool [N, F]; integers but uint8 [N, L].
    name: of the array, for messages.
    source: where it comes from, likewise.
  Raises:
    ValueError: for anything else, no example or nothing in it, NaN or infinite numbers, and ids
      below 0 or from `MOST_IDS` on.
  """
  whose, shape = f"{source}: {name}", inputs.shape
  if inputs.dtype.kind == "f" and inputs.size and inputs.ndim:
    _require_finite(inputs, whose)
  dtype = kept_dtype(inputs)
  if dtype is None:
    raise ValueError(_unknown(inputs, whose))
  if 0 in shape:
    nothing = {4: "pixel", 2: "number"}[inputs.ndim]
    raise ValueError(f"{whose} have the shape {shape}, so there is no {nothing} in them.")
  if dtype == np.int32:
    require_ids(inputs, whose)
    note = f"{name} are {inputs.dtype}; they are taken for token ids, not for numbers (float32)."
    return np.ascontiguousarray(inputs, dtype), [note]
  if dtype == np.uint8:
    if shape[1] in (1, 3) and min(shape[2:]) > 4:
      raise ValueError(
        f"{whose} have the shape {shape}, which looks like [N, channels, height, width]; pass [N, "
        "height, width, channels]: `images.transpose(0, 2, 3, 1)`."
      )
    return np.ascontiguousarray(inputs), []
  notes = []
  with np.errstate(over="ignore"):
    kept = np.ascontiguousarray(inputs, dtype) + dtype.type(0)  # -0.0 becomes 0.0: the same bytes
  if inputs.dtype.kind == "b":
    notes = [f"{name} are bool; they are taken as vectors of the numbers 0 and 1."]
  elif inputs.dtype.itemsize > dtype.itemsize:
    notes = [f"{name} are {inputs.dtype}; they are rounded to float32."]
  return kept, notes


def _unknown(inputs, whose) -> str:
  """The sentence about an array that is no input."""
  if inputs.dtype == np.uint8 and inputs.ndim == 2:
    return (
      f"{whose} are uint8 {list(inputs.shape)}, which may mean anything; pass float32 [N, features]"
      " for vectors of numbers, int32 [N, length] for token ids, or uint8 [N, height, width, "
      "channels] for images."
    )
  if inputs.dtype == np.uint8:
    return (
      f"{whose} have the shape {inputs.shape}; pass [N, height, width, channels] "
      "(for grayscale images without a channel axis: `images[..., None]`)."
    )
  if inputs.ndim == 4 and inputs.size and inputs.dtype.kind in "biuf":
    low, high = inputs.min(), inputs.max()
    return (
      f"{whose} are {inputs.dtype} from {low:g} to {high:g}; pass uint8 pixels from 0 to 255 "
      f"({_as_pixels(float(low), float(high))}), they are normalised during training."
    )
  return (
    f"{whose} are {inputs.dtype} {list(inputs.shape)}; pass images as uint8 [N, height, width, "
    "channels], vectors of numbers as float32 [N, features], or token ids as int32 [N, length]."
  )


def _as_pixels(low: float, high: float) -> str:
  """How images in a range become pixels."""
  if low < -1 or high > 255 or (low < 0 and high > 1):
    return "scale them first"
  scaled = "127.5 * (images + 1)" if low < 0 else "images" if high > 1 else "255 * images"
  return f"`np.round({scaled}).astype(np.uint8)`"


def _require_finite(inputs, whose):
  """Raises ValueError for NaN and infinite numbers."""
  bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
  if bad.size:
    what, instead = ("pixels", "images") if inputs.ndim == 4 else ("numbers", "examples")
    then = " and pass uint8" if inputs.ndim == 4 else ""
    raise ValueError(
      f"{whose} have NaN or infinite {what} in {bad.size} of {len(inputs)} {instead}, the first at "
      f"index {bad[0]}; repair or drop them{then}."
    )


def require_ids(tokens: Shaped[np.ndarray, "N L"], whose: str) -> None:
  """Raises ValueError for ids that no table has."""
  bad = np.argwhere((tokens < 0) | (tokens >= MOST_IDS))
  if len(bad):
    row, column = bad[0]
    raise ValueError(
      f"{whose} hold the id {tokens[row, column]} at [{row}, {column}] (and {len(bad) - 1} more "
      f"such); token ids go from 0 to at most {MOST_IDS - 1}. Pass float32 if these are numbers."
    )


def require_told_apart(train: Shaped[np.ndarray, "N ..."], test: Shaped[np.ndarray, "T ..."], *,
  names: tuple[str, str], source: str) -> None:  # fmt: skip
  """Raises ValueError for a feature that float32 blurs by over a thousandth of its deviation."""
  for given, name in zip((train, test), names, strict=True):
    if given.dtype.kind != "f" or given.dtype.itemsize <= 4:
      continue
    with np.errstate(over="ignore", invalid="ignore"):
      off = np.abs(given - given.astype(np.float32)).max(axis=0)
      spread = np.where(train.min(axis=0) < train.max(axis=0), train.std(axis=0), np.inf)
    bad = np.flatnonzero(~np.isfinite(off) | (off > 1e-3 * spread))
    if bad.size:
      raise ValueError(
        f"{source}: {name} have {bad.size} features that float32 cannot hold or tell apart, the "
        f"first is [:, {bad[0]}]; subtract their mean or scale them first."
      )


def require_finite_when_normalised(
  inputs: Shaped[np.ndarray, "N ..."],
  mean: Float[np.ndarray, "C"],
  std: Float[np.ndarray, "C"],
  *,
  split: str,
) -> None:
  """Raises ValueError for vectors that standardising takes beyond float32."""
  if kind(inputs.dtype) != "vectors":
    return
  with np.errstate(over="ignore"):
    ends = [(end - mean) / std for end in (inputs.min(axis=0), inputs.max(axis=0))]
  bad = np.flatnonzero(~np.isfinite(ends).all(axis=0))
  if bad.size:
    raise ValueError(
      f"the {split} split has numbers that are too large once they are standardised, the first in "
      f"feature [:, {bad[0]}]; clip or scale it first."
    )
