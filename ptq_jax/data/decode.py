"""Encoded images (JPEG, PNG, ...) to one uint8 array, in parallel threads."""

import concurrent.futures
import io
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ptq_jax.base import UInt8

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for. Its other readers hand files to programs (EPS: Ghostscript)."""

CHUNK = 256  # images per task: enough that handing out tasks costs nothing

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of 8-bit images by number of channels

FORMS = {"1": "black and white", "L": "grayscale", "LA": "grayscale", "P": "palette",
         "PA": "palette", "RGBA": "RGB"}  # fmt: skip
"""Pillow's modes in words, transparency apart; others are called what they are, such as CMYK."""

Change = tuple[str, str]
"""What was done to an image, after "N images", and the name of the image."""


def images(
  fetch: Callable[[int, int], Iterable[tuple[str, bytes]]],
  *,
  count: int,
  num_channels: int,
  image_size: int | None,
) -> tuple[UInt8[np.ndarray, "N H W C"], list[Change]]:
  """Decodes images 0 .. count - 1; the first decides the shape that all must have.

  Args:
    fetch: called from several threads with (start, stop); gives name and encoded bytes of each.
    count: N.
    num_channels: 1, 3 or 4; images of another number are converted (grayscale to RGB, say).
    image_size: None keeps the size; a number scales the shorter side to it and cuts out the middle
      square.
  Returns:
    The images, and in their order what was changed in which, for `notes`.
  Raises:
    ValueError: names an image that `decode` refuses or that has another size.
  """
  first_name, first_bytes = next(iter(fetch(0, 1)))
  first, _ = decode(first_bytes, name=first_name, num_channels=num_channels, image_size=image_size)
  decoded = np.empty((count, *first.shape), np.uint8)

  def fill(start: int) -> list[Change]:
    stop, changes = min(start + CHUNK, count), []
    for index, (name, encoded) in enumerate(fetch(start, stop), start):
      image, changed = decode(encoded, name=name, num_channels=num_channels, image_size=image_size)
      if image.shape != first.shape:
        raise ValueError(
          f"image {name!r} is {_size(image)} and {first_name!r} is {_size(first)}; set image_size "
          "to scale all images to one size."
        )
      decoded[index] = image
      changes += [(what, name) for what in changed]
    return changes

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    tasks = [threads.submit(fill, start) for start in range(0, count, CHUNK)]
    try:
      return decoded, [change for task in tasks for change in task.result()]
    finally:
      threads.shutdown(cancel_futures=True)


def notes(changes: Sequence[Change]) -> tuple[str, ...]:
  """One sentence for every sort of change: how many images, and one of them.

  >>> notes([("are CMYK", "a.jpg"), ("are CMYK", "b.jpg")])
  ("2 images are CMYK, such as 'a.jpg'.",)
  """
  names: dict[str, list[str]] = {}
  for what, name in changes:
    names.setdefault(what, []).append(name)
  return tuple(f"{len(all_)} images {what}, such as {all_[0]!r}." for what, all_ in names.items())


def decode(
  encoded: bytes, *, name: str, num_channels: int, image_size: int | None
) -> tuple[UInt8[np.ndarray, "H W C"], list[str]]:
  """One image, turned as its EXIF orientation says; what is transparent becomes white.

  Where a fourth channel is wanted, transparency stays as it is. Also what was changed, in words.

  Raises:
    ValueError: if it is of none of `FORMATS`, cannot be decoded or has more than 8 bits per
      channel; `name` is in the text.
  """
  try:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile) for tile in image.tile)
    several = getattr(image, "is_animated", False)
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    image = ImageOps.exif_transpose(image)
  except UnidentifiedImageError as error:
    raise ValueError(
      f"image {name!r} cannot be decoded: it is none of {', '.join(FORMATS)}, whatever its name "
      "says; convert or remove it."
    ) from error
  except Exception as error:  # a decoder meets broken bytes with almost any exception
    raise ValueError(f"image {name!r} cannot be decoded ({error}); repair or remove it.") from error
  if deep:
    raise ValueError(
      f"image {name!r} has pixels of more than 8 bits (Pillow mode {image.mode!r}); convert it to "
      "8 bits per channel."
    )
  form, wanted = (FORMS.get(mode, mode) for mode in (image.mode, MODES[num_channels]))
  transparent = False
  if num_channels < 4 and image.has_transparency_data:
    image = image.convert("RGBA")
    transparent = image.getextrema()[3][0] < 255
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  changed = {
    "hold several pictures, of which the first is taken": several,
    "are turned as their EXIF orientation says": turned,
    "are transparent in part and put on white": transparent,
    f"are {form} and become {wanted}": form != wanted,
    "are not square and lose what is beside their middle": image_size
    and image.width != image.height,
  }
  image = _scaled(image.convert(MODES[num_channels]), image_size)
  pixels = np.asarray(image, np.uint8).reshape(image.height, image.width, num_channels)
  return pixels, [what for what, is_so in changed.items() if is_so]


def resized(
  pixels: UInt8[np.ndarray, "N H W C"], *, image_size: int
) -> UInt8[np.ndarray, "N S S C"]:
  """Decoded images scaled and cut like `images` does it, channel by channel."""

  def channel(plane: np.ndarray) -> np.ndarray:
    return np.asarray(_scaled(Image.fromarray(plane), image_size))

  planes = np.moveaxis(pixels, -1, 1)
  scaled = [np.stack([channel(plane) for plane in image], axis=-1) for image in planes]
  return np.stack(scaled)


def _scaled(image: Image.Image, image_size: int | None) -> Image.Image:
  """Shorter side scaled to `image_size` (bilinear, antialiased), middle square cut out."""
  if image_size is None or image.size == (image_size, image_size):
    return image
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  square = (left, top, left + side, top + side)
  return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=square)


def _size(image: np.ndarray) -> str:
  """Width x height, as image tools write it."""
  return f"{image.shape[1]}x{image.shape[0]}"
