"""Random augmentation of one image, and the fixed augmented views that an attack queries.

Every function takes one key and one image [H, W, C], uint8 or float, and keeps shape and dtype;
vmap over batches and models outside. Augment pixels before `normalise`: the zero of a padded crop
is black there, as in the usual recipes, and bytes are cheaper to move than floats.

A translation pads the image and takes a `dynamic_slice`, which vmap turns into one gather. On 2 CPU
cores, keys and random bits included, milliseconds for [16 models x 64 x 8x8x1, shift 1] and
[4 x 128 x 32x32x3, crop 4] of uint8:

  pad + one slice of rows and columns 0.13 / 0.32     one gather by flat index 0.14 / 0.28
  two slices, rows then columns       0.12 / 0.69     `take` along both axes   0.16 / 0.61
  select among all static slices      0.17 / 1.3      one-hot matrix products  0.24 / 1.8
  drawing the random bits alone       0.12 / 0.12

The first is the simplest of those that tie, and about 0.1 % of a training step.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import Array, ArrayLike, Float, Int, Key, Shaped
from ptq_jax.data import inputs

Image = Shaped[ArrayLike, "H W C"]

PADDING = {"zero": "constant", "edge": "edge"}


def flip(key: Key, image: Image) -> Image:
  """Mirrors left and right with probability one half."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def crop(key: Key, image: Image, *, padding: int) -> Image:
  """Pads by `padding` zero pixels on every side and cuts out a random window of the old size."""
  return shift(key, image, distance=padding, fill="zero")


def shift(key: Key, image: Image, *, distance: int, fill: str = "edge") -> Image:
  """Moves by a whole number of pixels, uniform in -distance .. distance on each axis on its own.

  Args:
    key: consumed once.
    image: uint8 or float [H, W, C].
    distance: largest move, in pixels; 0 leaves the image as it is.
    fill: "edge" repeats the border into the pixels that come free, "zero" leaves them 0.
  Raises:
    ValueError: for a negative distance or an unknown fill.
  """
  if distance < 0:
    raise ValueError(f"distance is {distance}; a shift or crop moves by 0 or more pixels.")
  if fill not in PADDING:
    raise ValueError(f"fill is {fill!r}; choose one of {sorted(PADDING)}.")
  margin = ((distance, distance), (distance, distance), (0, 0))
  padded = jnp.pad(image, margin, mode=PADDING[fill])
  corner = jax.random.bits(key, (2,)) % np.uint32(2 * distance + 1)
  return jax.lax.dynamic_slice(padded, (corner[0], corner[1], np.uint32(0)), image.shape)


TRANSFORMATIONS: dict[str, Callable[..., Image]] = {
  "flip": lambda key, image: flip(key, image),
  "crop": lambda key, image, pixels: crop(key, image, padding=pixels),
  "shift": lambda key, image, pixels: shift(key, image, distance=pixels),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Transformations one after another; call it with a key and one image. Equal steps are equal."""

  steps: tuple[
    tuple[str, tuple[int, ...]], ...
  ]  # name in TRANSFORMATIONS, its whole-number arguments

  def __call__(self, key: Key, image: Shaped[ArrayLike, "..."]) -> Shaped[ArrayLike, "..."]:
    """The image altered; without steps any input as it is."""
    for position, (name, arguments) in enumerate(self.steps):
      image = TRANSFORMATIONS[name](jax.random.fold_in(key, position), image, *arguments)
    return image


def make(names: Sequence[str]) -> Augmentation:
  """An augmentation from names: "flip", "crop4" (zero-padded by 4), "shift1" (edge-padded by 1).

  >>> make(("flip", "crop4")).steps
  (('flip', ()), ('crop', (4,)))

  Args:
    names: applied in this order; empty for no augmentation at all.
  Raises:
    ValueError: for a name that is none of these.
  """
  if isinstance(names, str):
    raise ValueError(
      f"names is the string {names!r}; pass a sequence of names, such as ({names!r},)."
    )
  return Augmentation(tuple(_parse(name) for name in names))


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
  """ "crop4" -> ("crop", (4,))."""
  match = re.fullmatch(r"(flip)|(crop|shift)(\d+)", name)
  if not match:
    raise ValueError(
      f"there is no augmentation {name!r}; use 'flip', 'crop<pixels>' such as 'crop4', or "
      "'shift<pixels>' such as 'shift1'."
    )
  return (match[1], ()) if match[1] else (match[2], (int(match[3]),))


def views(
  key: Key,
  images: Shaped[ArrayLike, "n ..."],
  example_ids: Int[ArrayLike, "n"],
  *,
  num_views: int,
  augment: Callable[[Key, Image], Image],
) -> Shaped[Array, "V n ..."]:
  """Augmented queries of each example that are the same for every model, batch split and restart.

  View v of example i is drawn from `fold_in(fold_in(key, v), i)`, whatever else is in the batch.

  Args:
    key: one for the whole audit; may be passed again for the next batch.
    images: a batch of the pool.
    example_ids: their positions in the pool.
    num_views: V.
    augment: what `make` returns, or any function of a key and one image.
  Returns:
    [V, n, ...], of the dtype of `images`.
  Raises:
    ValueError: for fewer than one view.
  """
  if num_views < 1:
    raise ValueError(f"num_views is {num_views}; an attack needs at least one view of an example.")

  def view(index):
    of_example = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = of_example(jax.random.fold_in(key, index), jnp.asarray(example_ids))
    return jax.vmap(augment)(keys, jnp.asarray(images))

  return jax.vmap(view)(jnp.arange(num_views))


def normalise(
  images: Shaped[ArrayLike, "..."], mean: Float[ArrayLike, "C"], std: Float[ArrayLike, "C"]
) -> Shaped[Array, "..."]:
  """What a model gets: pixels 0 .. 255 or numbers as float32 of mean 0 and deviation 1.

  Args:
    images: uint8 [..., H, W, C]; or float32 vectors [..., F]; or int32 tokens, which stay as they
      are.
    mean: per channel, of the pixels scaled to 0 .. 1, or per feature, as in `load.Dataset`.
    std: likewise.
  """
  kind = inputs.kind(images.dtype)
  if kind == "tokens":
    return jnp.asarray(images)
  per_channel = (1,) * (images.ndim - 1) + (-1,)
  mean, std = (jnp.asarray(each, jnp.float32).reshape(per_channel) for each in (mean, std))
  scaled = jnp.asarray(images, jnp.float32) / 255 if kind == "images" else jnp.asarray(images)
  return (scaled - mean) / std
