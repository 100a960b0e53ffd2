import json
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ptq_jax.data import load
from tests.data import pictures

TRAIN = pictures.random_images(21, size=32, seed=1)
TEST = pictures.random_images(8, size=32, seed=2)


def prepare(name, data_dir, examples, *, labels=None):
  """Runs TFDS's own builder on our examples, without downloads."""
  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  if labels is not None:
    builder.info.features["label"].names = labels
  builder._split_generators = lambda *_, **__: {
    split: enumerate(chosen) for split, chosen in examples.items()
  }
  builder.download_and_prepare()


def cifar10_examples(images, split):
  return [
    {"id": f"{split}_{index}", "image": Image.fromarray(image), "label": index % 10}
    for index, image in enumerate(images)
  ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder with a CIFAR-10 of 21 + 8 random images, and an MNIST without a test split.

  Images go in as Pillow's, which TFDS encodes as PNG without TensorFlow.
  """
  folder = tmp_path_factory.mktemp("tfds")
  splits = {"train": cifar10_examples(TRAIN, "train"), "test": cifar10_examples(TEST, "test")}
  prepare("cifar10", folder, splits, labels=list("abcdefghij"))
  only = [{"image": Image.new("L", (28, 28)), "label": 3}] * 4
  prepare("mnist", folder, {"train": only})
  return folder


@pytest.fixture
def own(prepared, tmp_path):
  """A copy of the folder that a test may break."""
  return shutil.copytree(prepared, tmp_path / "tfds", ignore=shutil.ignore_patterns("*.npz"))


def test_a_prepared_set_is_read_without_tensorflow(own):
  for _ in range(2):  # decoded, then from the cache
    read = load.load("cifar10", data_dir=own)
    order = [
      next(i for i, t in enumerate(TRAIN) if np.array_equal(t, r)) for r in read.train_images
    ]
    assert len(set(order)) == len(order) == 20  # TFDS shuffles; 21 is trimmed by one
    np.testing.assert_array_equal(read.train_labels, np.array(order) % 10)
    assert sorted(read.test_images.tolist()) == sorted(TEST.tolist())
    assert read.class_names == tuple("abcdefghij")
  assert [path.name for path in own.glob("*.npz")] == ["cifar10-3.0.2-tfds.uint8.npz"]
  assert "tensorflow" not in sys.modules
  small = load.load("cifar10:3.0.2", data_dir=str(own), image_size=16)
  assert small.image_shape == (16, 16, 3)


def test_an_unprepared_set_says_how_to_prepare_it(own, tmp_path):
  with pytest.raises(FileNotFoundError, match="'cifar100' is not prepared in") as caught:
    load.load("cifar100", data_dir=own)
  command = re.search(r"python -c '(.*)'$", str(caught.value))
  compile(command[1], "command", "exec")
  assert 'file_format="array_record").download_and_prepare()' in command[1]
  with pytest.raises(FileNotFoundError, match="'cifar10' is not prepared in"):
    load.load("cifar10", data_dir=tmp_path / "nowhere")


def test_an_unknown_name_gets_a_suggestion(own):
  with pytest.raises(ValueError, match=r"no dataset 'cifar11'.* did you mean .*'cifar10'"):
    load.load("cifar11", data_dir=own)
  with pytest.raises(ValueError, match=r"no dataset 'digit'.* did you mean 'digits'"):
    load.load("digit", data_dir=own)


def test_a_half_written_set_is_refused(own):
  version = own / "cifar10" / "3.0.2"
  version.rename(own / "cifar10" / "incomplete.ABC_3.0.2")
  with pytest.raises(FileNotFoundError, match=r"only the half-written .*incomplete.ABC_3.0.2"):
    load.load("cifar10", data_dir=own)


def delete(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [delete, truncate])
@pytest.mark.parametrize("pattern", ["cifar10-test*", "dataset_info.json"])
def test_a_damaged_set_is_refused(own, harm, pattern):
  harm(next((own / "cifar10" / "3.0.2").glob(pattern)))
  with pytest.raises(ValueError, match=r"damaged or half written .* prepare it again") as caught:
    load.load("cifar10", data_dir=own)
  assert "delete" not in str(caught.value)


@pytest.mark.parametrize(
  "name", ["", " ", ".", "..", "/", "../tfds", "cifar10/..", ":3.0.2", "a\0b"]
)
def test_a_name_is_no_path(own, name):
  with pytest.raises(ValueError, match=r"there is no dataset .*: it is none of digits, npz"):
    load.load(name, data_dir=own)


def test_a_set_without_a_test_split_is_refused(own):
  with pytest.raises(ValueError, match=r"'mnist' has the splits \['train'\]; it needs 'train' and"):
    load.load("mnist", data_dir=own)


def edit(path, change):
  """Changes a JSON file in place."""
  contents = json.loads(path.read_text())
  change(contents)
  path.write_text(json.dumps(contents))


def test_a_set_in_another_file_format_is_refused(own):
  edit(own / "cifar10/3.0.2/dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
  with pytest.raises(ValueError, match=r"prepared as tfrecord; prepare it again with file_format="):
    load.load("cifar10", data_dir=own)


def test_a_set_without_labels_is_refused(own):
  features = own / "cifar10" / "3.0.2" / "features.json"
  edit(features, lambda contents: contents["featuresDict"]["features"].pop("label"))
  with pytest.raises(ValueError, match="has 0 features of the type ClassLabel and none is called"):
    load.load("cifar10", data_dir=own)


def test_labels_out_of_range_are_refused(own):
  names = own / "cifar10" / "3.0.2" / "label.labels.txt"
  names.write_text("\n".join("abcdefghi") + "\n")
  with pytest.raises(ValueError, match=r"hold 9 at index .* with 9 classes"):
    load.load("cifar10", data_dir=own)
