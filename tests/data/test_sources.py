"""Every setting of data with every source: honoured, or refused by name; never passed over."""

import os

import numpy as np
import pytest

from ptq_jax import settings
from ptq_jax.data import load
from tests.data import pictures, test_image_folder, test_load, test_tfds_sets

KEYS = tuple(key for key in settings.SETTINGS["data"] if key != "name")

TAKEN = {
  "digits": "",
  "arrays": "",
  "npz": "path",
  "npz of vectors": "path",
  "tiny_imagenet": "path cache_dir",
  "image_folder": "path cache_dir",
  "cifar10": "data_dir cache_dir",
  "hf_disk": "path cache_dir columns",
  "hf_disk of vectors": "path columns",
}
"""What a source uses beside pool_size, test_size and, of images, image_size."""


def saved_by_datasets(path):
  datasets = pytest.importorskip("datasets", exc_type=ImportError)
  from PIL import Image

  images = [Image.fromarray(each) for each in pictures.random_images(6)]
  both = {"img": images, "label": [0, 1] * 3, "other": [1, 0] * 3, "x": [[0.5, 1.0]] * 6}
  features = datasets.Features(
    img=datasets.Image(),
    label=datasets.ClassLabel(names=["a", "b"]),
    other=datasets.Value("int64"),
    x=datasets.Sequence(datasets.Value("float32")),
  )
  split = datasets.Dataset.from_dict(both, features=features)
  datasets.DatasetDict(train=split, test=split).save_to_disk(path)
  return path


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """Arguments of `load.load` for a source by name, made when it is first asked for."""
  made = {}

  def arguments(source, folder):
    name = source.partition(" ")[0]
    if name == "npz":
      arrays = test_load.npz_arrays()
      if source != name:
        arrays |= {k: arrays[k].reshape(len(arrays[k]), -1) / 7 for k in ("x_train", "x_test")}
      np.savez(folder / "set.npz", **arrays)
      return {"path": folder / "set.npz"}
    if name == "tiny_imagenet":
      return {"path": pictures.write_folder(folder / "set", pictures.tiny_imagenet_files("")[0])}
    if name == "image_folder":
      return {"path": pictures.write_folder(folder / "set", test_image_folder.files())}
    if name == "hf_disk":
      columns = {} if source == name else {"columns": ("x", "label")}
      return {"path": saved_by_datasets(folder / "set")} | columns
    if name == "cifar10":
      examples = test_tfds_sets.cifar10_examples(test_tfds_sets.TRAIN, "x")
      test_tfds_sets.prepare(name, folder, {"train": examples, "test": examples})
      return {"data_dir": folder}
    return {}

  def get(source):
    if source not in made:
      made[source] = arguments(source, tmp_path_factory.mktemp("source"))
    return dict(made[source])

  return get


def load_as(source, given):
  if source == "arrays":
    return load.from_arrays(*test_load.npz_arrays().values(), **given)
  return load.load(source.partition(" ")[0], **given)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("source", TAKEN)
def test_a_setting_is_honoured_or_refused(make, tmp_path, source, key):
  given = make(source)
  values = {"pool_size": 4, "test_size": 2, "image_size": 4, "columns": ("img", "other")}
  value = values.get(key, given.get(key, tmp_path))
  if source == "hf_disk of vectors" and key == "columns":
    value = ("x", "other")
  sizes = "pool_size test_size" + " image_size" * ("vectors" not in source)
  if key not in (TAKEN[source] + " " + sizes).split():
    with pytest.raises(ValueError, match=f"^data.{key} is .*; leave it out") as caught:
      load_as(source, given | {key: value})
    assert len(str(caught.value).splitlines()) == 1
    return
  found = load_as(source, given | {key: value})
  if key == "columns":
    np.testing.assert_array_equal(found.train_labels, [1, 0] * 3)
  shown = {
    "pool_size": len(found.train_labels) == 4,
    "test_size": len(found.test_labels) == 2,
    "image_size": found.image_shape[:2] == (4, 4),
    "cache_dir": len(os.listdir(tmp_path)) == 1,
  }
  assert shown.get(key, True)


def test_a_middle_square_is_said():
  images = pictures.random_images(4, size=12)[:, :8]
  arrays = (images, np.arange(4) % 2)
  found = load.from_arrays(*arrays, *arrays, image_size=4)
  assert found.image_shape == (4, 4, 3)
  assert found.notes == ("all images are 12x8 and lose what is beside their middle square.",)
  assert load.from_arrays(*arrays, *arrays).notes == ()
