import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from ptq_jax.data import decode
from tests.data import pictures


def run(files, *, num_channels=3, image_size=None):
  """Decodes a list of (name, bytes)."""
  return images_and_notes(files, num_channels=num_channels, image_size=image_size)[0]


def images_and_notes(files, **options):
  """Likewise, with what is said of them."""
  decoded, changes = decode.images(
    lambda start, stop: files[start:stop],
    count=len(files),
    **({"num_channels": 3, "image_size": None} | options),
  )
  return decoded, decode.notes(changes)


def test_many_images_come_in_order():
  images = pictures.random_images(2 * decode.CHUNK + 10, size=3)
  files = [(str(index), pictures.encoded(image)) for index, image in enumerate(images)]
  np.testing.assert_array_equal(run(files), images)


def test_grayscale_becomes_rgb_and_back():
  gray = pictures.random_images(2, channels=1)
  files = [(str(index), pictures.encoded(image)) for index, image in enumerate(gray)]
  np.testing.assert_array_equal(run(files), np.repeat(gray, 3, axis=-1))
  np.testing.assert_array_equal(run(files, num_channels=1), gray)


def test_scaling_takes_the_middle_square():
  wide = pictures.random_images(1, size=24)[0, 4:16]
  whole = np.asarray(Image.fromarray(wide).resize((8, 4), Image.Resampling.BILINEAR))
  decoded = run([("wide", pictures.encoded(wide))], image_size=4)
  np.testing.assert_allclose(decoded[0].astype(int), whole[:, 2:6].astype(int), atol=1)
  np.testing.assert_array_equal(decode.resized(wide[None], image_size=4), decoded)
  square = pictures.random_images(2, size=8)
  files = [(str(index), pictures.encoded(image)) for index, image in enumerate(square)]
  np.testing.assert_array_equal(decode.resized(square, image_size=5), run(files, image_size=5))
  np.testing.assert_array_equal(decode.resized(square, image_size=8), square)


def test_an_undecodable_image_is_named():
  good = [(str(index), pictures.encoded(pictures.random_images(1)[0])) for index in range(300)]
  for broken in (b"no image", good[0][1][:-40], b""):
    with pytest.raises(ValueError, match=r"image 'bad/one.png' cannot be decoded"):
      run([*good, ("bad/one.png", broken)])


def saved(image, form="PNG", **options):
  """Bytes of a Pillow image."""
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()


def deep_rgb():
  """A PNG of one pixel with 3 x 16 bits, which Pillow does not write."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

  header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
  pixels = chunk(b"IDAT", zlib.compress(bytes(7)))
  return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def test_deep_pixels_are_refused():
  gray = saved(Image.fromarray(np.full((4, 4), 40000, np.uint16)))
  for deep in (gray, deep_rgb()):
    with pytest.raises(ValueError, match="'deep' has pixels of more than 8 bits"):
      run([("deep", deep)])


def test_only_known_formats_reach_a_decoder(monkeypatch):
  def never(*_, **__):
    raise AssertionError("a program was started")

  monkeypatch.setattr(subprocess, "Popen", never)
  monkeypatch.setattr(subprocess, "check_call", never)
  image = Image.fromarray(pictures.random_images(1)[0])
  for form in ("EPS", "TGA", "ICO", "PCX"):
    with pytest.raises(ValueError, match=r"'cat/x.jpg' cannot be decoded: it is none of PNG, JPEG"):
      run([("cat/x.jpg", saved(image, form))])
  for form in ("PNG", "BMP", "PPM", "TIFF", "WEBP"):
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(run([("x", saved(image, form, **options))])[0], image)


def test_exif_orientation_is_followed():
  pixels = pictures.random_images(1, size=6)[0][:4]
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
  turned = run([("photo", saved(Image.fromarray(pixels), exif=exif))])[0]
  np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


def test_transparent_pixels_become_white():
  pixels = np.full((2, 2, 4), 90, np.uint8)
  pixels[..., 3] = [[255, 0], [0, 255]]
  rgba = saved(Image.fromarray(pixels))
  np.testing.assert_array_equal(run([("a", rgba)])[0, ..., 0], [[90, 255], [255, 90]])
  np.testing.assert_array_equal(run([("a", rgba)], num_channels=4)[0], pixels)
  palette = saved(Image.fromarray(np.eye(2, dtype=np.uint8)).convert("P"), transparency=0)
  assert (run([("p", palette)])[0, 0, 1] == 255).all()


def test_images_of_two_sizes_are_refused_unless_scaled():
  files = [
    (name, pictures.encoded(pictures.random_images(1, size=size)[0]))
    for name, size in (("a", 8), ("b", 6))
  ]
  with pytest.raises(ValueError, match="image 'b' is 6x6 and 'a' is 8x8; set image_size"):
    run(files)
  assert run(files, image_size=4).shape == (2, 4, 4, 3)


def test_what_is_changed_is_said_with_counts():
  pixels = pictures.random_images(1)[0]
  image, gray = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
  exif = Image.Exif()
  exif[0x0112] = 3
  clear = np.dstack([pixels, np.full((8, 8), 255, np.uint8)])
  opaque = saved(Image.fromarray(clear))
  clear[0, 0, 3] = 254
  frames = {"save_all": True, "append_images": [image.rotate(90)]}
  files = [
    ("plain", saved(image)),
    ("opaque", opaque),
    ("clear", saved(Image.fromarray(clear))),
    ("turned", saved(image, exif=exif)),
    ("gray", saved(gray)),
    ("print", saved(image.convert("CMYK"), "JPEG")),
    ("other print", saved(image.convert("CMYK"), "TIFF")),
    ("pages", saved(image, "WEBP", lossless=True, **frames)),
    ("moving", saved(gray, "GIF", **frames)),
    ("colours", saved(image.convert("P"))),
    ("bits", saved(image.convert("1"))),
  ]
  decoded, notes = images_and_notes(files)
  assert set(notes) == {
    "1 images are black and white and become RGB, such as 'bits'.",
    "2 images are palette and become RGB, such as 'moving'.",
    "1 images are transparent in part and put on white, such as 'clear'.",
    "1 images are turned as their EXIF orientation says, such as 'turned'.",
    "2 images are CMYK and become RGB, such as 'print'.",
    "1 images are grayscale and become RGB, such as 'gray'.",
    "2 images hold several pictures, of which the first is taken, such as 'pages'.",
  }
  assert len(notes) == 7
  np.testing.assert_array_equal(decoded[[0, 1, 7]], [pixels] * 3)
  assert images_and_notes(files[:2], num_channels=4)[1] == ()
  assert images_and_notes(files[:1], num_channels=1)[1] == (
    "1 images are RGB and become grayscale, such as 'plain'.",
  )
  wide = [files[0], ("wide", saved(image.resize((12, 8))))]
  said = "1 images are not square and lose what is beside their middle, such as 'wide'."
  assert images_and_notes(wide, image_size=4)[1] == (said,)
