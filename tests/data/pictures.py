"""Small data sets in the formats that people have, made on the fly."""

import io
import pathlib
import zipfile

import numpy as np
from PIL import Image


def random_images(count, *, size=8, channels=3, seed=0):
  """uint8 [count, size, size, channels]."""
  shape = (count, size, size, channels)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(image, suffix="png"):
  """Bytes of an image file; PNG is lossless."""
  buffer = io.BytesIO()
  Image.fromarray(image.squeeze()).save(buffer, {"png": "PNG", "JPEG": "JPEG"}[suffix])
  return buffer.getvalue()


def write_folder(root, files):
  """Writes {name: bytes or text} below a folder."""
  for name, contents in files.items():
    path = pathlib.Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
  return pathlib.Path(root)


def write_zip(path, files):
  """The same as a zip archive."""
  with zipfile.ZipFile(path, "w") as archive:
    for name, contents in files.items():
      archive.writestr(name, contents)
  return pathlib.Path(path)


def tiny_imagenet_files(root="tiny-imagenet-200/"):
  """The official layout of 2 classes, 3 + 2 images each, one grayscale; and the arrays in it."""
  wnids = ["n02", "n01"]
  train = random_images(6, seed=1)
  train[4] = train[4, ..., :1]
  test = random_images(4, seed=2)
  files = {
    f"{root}wnids.txt": "\n".join(wnids) + "\n",
    f"{root}words.txt": "n01\tgoldfish, Carassius auratus\nn02\ttabby\nn03\tother\n",
  }
  for index, image in enumerate(train):
    wnid = wnids[index // 3]
    image = image[..., :1] if index == 4 else image
    files[f"{root}train/{wnid}/images/{wnid}_{index % 3}.png"] = encoded(image)
    files[f"{root}train/{wnid}/{wnid}_boxes.txt"] = "not an image"
  lines = []
  for index, image in enumerate(test):
    files[f"{root}val/images/val_{index}.png"] = encoded(image)
    lines.append(f"val_{index}.png\t{wnids[index % 2]}\t0\t0\t7\t7")
  files[f"{root}val/val_annotations.txt"] = "\n".join(lines) + "\n"
  return files, (train, np.repeat([0, 1], 3), test, np.array([0, 1, 0, 1]))
