import numpy as np
import pytest

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
