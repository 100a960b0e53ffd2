import numpy as np
import pytest

from ptq_jax.data import load
from tests.data import pictures


def write(tmp_path, place, files):
  """The files as an archive or as a folder; returns what a user passes as path."""
  if place == "zip":
    return pictures.write_zip(tmp_path / "tiny-imagenet-200.zip", files)
  return pictures.write_folder(tmp_path / "data", files)


@pytest.mark.parametrize(
  ("place", "root"),
  [("zip", "tiny-imagenet-200/"), ("folder", "tiny-imagenet-200/"), ("folder", "")],
)
def test_the_official_layout(tmp_path, place, root):
  files, (train, train_labels, test, test_labels) = pictures.tiny_imagenet_files(root)
  path = write(tmp_path, place, files)
  for _ in range(2):  # decoded, then from the cache
    read = load.load("tiny_imagenet", path=path)
    np.testing.assert_array_equal(read.train_images, train)
    np.testing.assert_array_equal(read.train_labels, train_labels)
    np.testing.assert_array_equal(read.test_images, test)
    np.testing.assert_array_equal(read.test_labels, test_labels)
    assert read.class_names == ("tabby", "goldfish")
    said = f"1 images are grayscale and become RGB, such as '{root}train/n01/images/n01_1.png'."
    assert read.notes == (said,)
  assert list(tmp_path.glob("*-tiny_imagenet.uint8.npz"))


def test_words_are_optional_and_sizes_are_free(tmp_path):
  files, _ = pictures.tiny_imagenet_files()
  del files["tiny-imagenet-200/words.txt"]
  read = load.load("tiny_imagenet", path=write(tmp_path, "zip", files), image_size=4)
  assert read.class_names == ("n02", "n01")
  assert read.image_shape == (4, 4, 3)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("place", ["zip", "folder"])
def test_text_files_may_start_with_a_byte_order_mark(tmp_path, place, encoding):
  files, (train, train_labels, _, test_labels) = pictures.tiny_imagenet_files()
  for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
    text = files[f"tiny-imagenet-200/{name}"].replace("\n", "\r\n")
    files[f"tiny-imagenet-200/{name}"] = text.encode(encoding)
  read = load.load("tiny_imagenet", path=write(tmp_path, place, files))
  np.testing.assert_array_equal(read.train_images, train)
  np.testing.assert_array_equal(read.train_labels, train_labels)
  np.testing.assert_array_equal(read.test_labels, test_labels)
  assert read.class_names == ("tabby", "goldfish")


def test_a_changed_folder_is_read_again(tmp_path):
  files, _ = pictures.tiny_imagenet_files("")
  path = write(tmp_path, "folder", files)
  before = load.load("tiny_imagenet", path=path)
  fresh = pictures.random_images(1, seed=9)[0]
  pictures.write_folder(path, {"train/n02/images/n02_9.png": pictures.encoded(fresh)})
  pictures.write_folder(path, {"train/n01/images/n01_9.png": pictures.encoded(fresh)})
  after = load.load("tiny_imagenet", path=path)
  assert len(after.train_labels) == len(before.train_labels) + 2
  np.testing.assert_array_equal(after.train_images[3], fresh)


@pytest.mark.parametrize("place", ["zip", "folder"])
@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"wnids.txt": None}, FileNotFoundError, "no class list wnids.txt"),
    ({"wnids.txt": "n01\n"}, ValueError, "n02_0.png.* class 'n02', which is not in wnids.txt"),
    ({"wnids.txt": "n01\nn02\nn07\n"}, ValueError, "no training images for 1 of 3.*'n07'"),
    ({"wnids.txt": "n01\nn02\nn01\n"}, ValueError, "wnids.txt .* names the class 'n01' twice"),
    ({"val/val_annotations.txt": "val_0.png\tn01\n" * 2}, ValueError, "names an image twice"),
    ({"val/val_annotations.txt": None}, FileNotFoundError, "no .*val_annotations.txt"),
    ({"val/val_annotations.txt": "\n"}, ValueError, "names no image"),
    (
      {"val/val_annotations.txt": "val_0.png\tn01\nval_1.png\tn99\n"},
      ValueError,
      "line 2 of .*'val_1.png' the class 'n99', which is not in wnids.txt",
    ),
    ({"val/val_annotations.txt": "val_0.png n01\n"}, ValueError, "line 1 .* class ''"),
    ({"val/images/val_2.png": None}, FileNotFoundError, "no image .*val/images/val_2.png"),
    (
      {"train/n01/images/n01_1.png": b"\x89PNG"},
      ValueError,
      "image .*train/n01/images/n01_1.png' cannot be decoded",
    ),
  ],
)
def test_wrong_contents_are_refused(tmp_path, place, change, error, message):
  files, _ = pictures.tiny_imagenet_files()
  files |= {f"tiny-imagenet-200/{name}": contents for name, contents in change.items()}
  files = {name: contents for name, contents in files.items() if contents is not None}
  with pytest.raises(error, match=message):
    load.load("tiny_imagenet", path=write(tmp_path, place, files))


def test_a_truncated_archive_is_refused(tmp_path):
  files, _ = pictures.tiny_imagenet_files()
  path = write(tmp_path, "zip", files)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match=r"not a whole zip archive .* may be truncated"):
    load.load("tiny_imagenet", path=path)


def test_a_damaged_archive_names_the_file(tmp_path):
  files, _ = pictures.tiny_imagenet_files()
  name = "tiny-imagenet-200/train/n02/images/n02_1.png"
  path = write(tmp_path, "zip", files)
  contents = path.read_bytes()
  path.write_bytes(contents.replace(files[name][20:60], bytes(40)))
  with pytest.raises(ValueError, match=r"n02_1.png' in the archive .* cannot be read .*CRC"):
    load.load("tiny_imagenet", path=path)


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
    load.load("tiny_imagenet", path=tmp_path / "nowhere")
