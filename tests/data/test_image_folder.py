import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

from ptq_jax.data import files as files_lib
from ptq_jax.data import load
from tests.data import pictures

TRAIN = pictures.random_images(4, seed=1)
TEST = pictures.random_images(2, seed=2)


def files(root="", *, test="test"):
  """Classes cat and dog, one image deeper, and files that are no images."""
  return {
    f"{root}train/dog/0.png": pictures.encoded(TRAIN[2]),
    f"{root}train/dog/more/1.PNG": pictures.encoded(TRAIN[3]),
    f"{root}train/cat/a.png": pictures.encoded(TRAIN[0]),
    f"{root}train/cat/b.png": pictures.encoded(TRAIN[1]),
    f"{root}train/cat/notes.txt": "no image",
    f"{root}train/.hidden/c.png": "hidden",
    f"{root}{test}/cat/x.png": pictures.encoded(TEST[0]),
    f"{root}{test}/dog/x.png": pictures.encoded(TEST[1]),
  }


@pytest.mark.parametrize("test", ["test", "val", "validation"])
@pytest.mark.parametrize("root", ["", "pets/"])
@pytest.mark.parametrize("write", [pictures.write_folder, pictures.write_zip])
def test_folders_are_classes(tmp_path, write, root, test):
  path = write(tmp_path / "pets", files(root, test=test))
  read = load.load("image_folder", path=path)
  np.testing.assert_array_equal(read.train_images, TRAIN)
  np.testing.assert_array_equal(read.train_labels, [0, 0, 1, 1])
  np.testing.assert_array_equal(read.test_images, TEST)
  np.testing.assert_array_equal(read.test_labels, [0, 1])
  assert read.class_names == ("cat", "dog")
  assert any("'" + root + "train/cat/notes.txt'" in note for note in read.notes)
  assert (f"{root}{test}/ is the test split." in read.notes) == (test != "test")
  again = load.load("image_folder", path=path)  # from the cache
  assert again.notes == read.notes


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"test/cat/x.png": None, "test/dog/x.png": None}, FileNotFoundError, "has no test images"),
    (
      {"test/cow/x.png": pictures.encoded(TEST[0])},
      ValueError,
      "class 'cow', which has no tr.*cat",
    ),
    ({"train/x.png": pictures.encoded(TEST[0])}, ValueError, "'train/x.png' .* in no class folder"),
    ({"train/cat/b.png": "broken"}, ValueError, "image 'train/cat/b.png' cannot be decoded"),
    (
      {"train/cat/b.png": pictures.encoded(pictures.random_images(1, size=9)[0])},
      ValueError,
      "'train/cat/b.png' is 9x9 and 'train/cat/a.png' is 8x8; set image_size",
    ),
  ],
)
def test_wrong_contents_are_refused(tmp_path, change, error, message):
  chosen = {name: data for name, data in (files() | change).items() if data is not None}
  with pytest.raises(error, match=message):
    load.load("image_folder", path=pictures.write_folder(tmp_path / "pets", chosen))


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no training images"):
    load.load("image_folder", path=tmp_path)


@pytest.mark.parametrize("write", [pictures.write_folder, pictures.write_zip])
@pytest.mark.parametrize("root", ["retrain/", "a/b/constrain/c/"])
def test_train_is_a_whole_folder_name(tmp_path, write, root):
  read = load.load("image_folder", path=write(tmp_path / "pets", files(root)))
  np.testing.assert_array_equal(read.train_images, TRAIN)


def test_a_class_may_be_called_train(tmp_path):
  more = {"train/train/0.png": pictures.encoded(TEST[0])}
  read = load.load("image_folder", path=pictures.write_folder(tmp_path, files() | more), seed=1)
  assert read.class_names == ("cat", "dog", "train")


def test_two_training_folders_are_refused(tmp_path):
  path = pictures.write_folder(tmp_path, files("a/") | files("b/"))
  with pytest.raises(ValueError, match="training images in both 'a/train' and 'b/train'"):
    load.load("image_folder", path=path)


@pytest.mark.parametrize("unlabelled", ["test/images/1.png", "test/1.png"])
def test_the_labelled_split_is_the_test_split(tmp_path, unlabelled):
  chosen = files(test="val") | {unlabelled: pictures.encoded(TRAIN[0])}
  read = load.load("image_folder", path=pictures.write_folder(tmp_path, chosen))
  np.testing.assert_array_equal(read.test_images, TEST)
  assert "val/ is the test split." in read.notes
  assert f"1 images outside train/ and val/ are not used, such as {unlabelled!r}." in read.notes


def test_what_is_left_out_is_named(tmp_path):
  chosen = files() | {"train/cat/c.heic": "?", "train/bird/only.heic": "?"}
  path = pictures.write_folder(tmp_path, chosen)
  (path / "train" / "cow").mkdir()
  notes = " ".join(load.load("image_folder", path=path).notes)
  assert "3 files in train/ and test/ are left out" in notes
  assert "2 folders of train/ hold no image and are no classes, such as 'bird'." in notes


def test_what_was_changed_is_said_once_for_both_splits(tmp_path):
  gray = pictures.encoded(TRAIN[0][..., :1])
  chosen = files() | {"train/cat/a.png": gray, "test/dog/x.png": gray}
  path = pictures.write_folder(tmp_path / "pets", chosen)
  for _ in range(2):  # decoded, then from the cache
    said = [note for note in load.load("image_folder", path=path).notes if "become" in note]
    assert said == ["2 images are grayscale and become RGB, such as 'train/cat/a.png'."]


def test_jfif_is_read(tmp_path):
  jpeg = pictures.encoded(TRAIN[0], "JPEG")
  chosen = files() | {"train/cat/c.jfif": jpeg, "train/dog/c.JFIF": jpeg}
  read = load.load("image_folder", path=pictures.write_folder(tmp_path, chosen))
  np.testing.assert_array_equal(np.bincount(read.train_labels), [3, 3])


def test_names_that_are_not_utf_8(tmp_path):
  root = pictures.write_folder(tmp_path / "pets", files())
  for split in ("train", "test"):
    os.rename(root / split / "dog", os.fsencode(root / split) + b"/d\xf6g")
  for _ in range(2):  # decoded, then from the cache
    read = load.load("image_folder", path=root)
    np.testing.assert_array_equal(read.train_images, TRAIN)
    assert read.class_names == ("cat", r"d\xf6g")
    "".join((*read.class_names, *read.notes)).encode()


def test_links_in_a_circle_and_into_nothing_are_refused(tmp_path):
  root = pictures.write_folder(tmp_path / "pets", files())
  link = root / "train" / "cat" / "again"
  link.symlink_to(root, target_is_directory=True)
  with pytest.raises(ValueError, match=r"cat/again' is a link to .*pets', which holds it"):
    load.load("image_folder", path=root)
  link.unlink()
  link.symlink_to(link)
  with pytest.raises(ValueError, match="cat/again' is a broken link"):
    load.load("image_folder", path=root)
  link.unlink()
  os.mkfifo(link)
  with pytest.raises(ValueError, match="cat/again' is no regular file"):
    load.load("image_folder", path=root)
  link.unlink()
  (root / "train" / "dog").rename(tmp_path / "dog")
  (root / "train" / "dog").symlink_to(tmp_path / "dog")
  np.testing.assert_array_equal(load.load("image_folder", path=root).train_images, TRAIN)


def test_an_image_file_has_a_largest_size(tmp_path, monkeypatch):
  monkeypatch.setattr(files_lib, "MAX_BYTES", 1000)
  chosen = files() | {"train/cat/b.png": bytes(1001)}
  for write, place in ((pictures.write_folder, "folder"), (pictures.write_zip, "zip")):
    with pytest.raises(ValueError, match=r"'train/cat/b.png' in .* has more than"):
      load.load("image_folder", path=write(tmp_path / place, chosen))


def test_a_name_twice_in_an_archive_is_refused(tmp_path):
  path = pictures.write_zip(tmp_path / "pets.zip", files())
  with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
    archive.writestr("train/cat/a.png", b"other")
  with pytest.raises(ValueError, match=r"pets.zip' holds 'train/cat/a.png' twice"):
    load.load("image_folder", path=path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_longer_than_declared_is_refused(tmp_path, method):
  """Length and checksum of the directory fit the beginning of what is there."""
  good, path = files()["train/cat/a.png"], tmp_path / "pets.zip"
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, contents in (files() | {"train/cat/a.png": good + bytes(50)}).items():
      archive.writestr(name, contents)
  parts = [struct.pack("<I", zlib.crc32(each)) for each in (good + bytes(50), good)]
  lengths = [struct.pack("<I", len(good) + more) for more in (50, 0)]
  with zipfile.ZipFile(path) as archive:
    packed = struct.pack("<I", archive.getinfo("train/cat/a.png").compress_size)
  whole = path.read_bytes()
  whole = whole.replace(parts[0] + packed + lengths[0], parts[1] + packed + lengths[1])
  path.write_bytes(whole)
  with zipfile.ZipFile(path) as archive:
    assert archive.read("train/cat/a.png") == good  # nothing else would notice
  with pytest.raises(ValueError, match=r"'train/cat/a.png' in the archive .* cannot be read"):
    load.load("image_folder", path=path)
