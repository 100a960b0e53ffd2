"""Folders of Hugging Face's `datasets`, written by it; without the package it is named."""

import sys

import numpy as np
import pytest

from ptq_jax.data import load
from tests.data import pictures

LABELS = [0, 1, 1, 0, 1, 0]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match=r"'hf_disk' needs the package datasets .*ptq_jax\[hf\]"):
    load.load("hf_disk", path=tmp_path)


def test_columns_are_for_those_who_have_them():
  with pytest.raises(ValueError, match=r"data.columns is a,b, but the dataset .digits. has no use"):
    load.load("digits", columns=("a", "b"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The path of a set with images, vectors, tokens and two sorts of labels, and its images."""
  datasets = pytest.importorskip("datasets", exc_type=ImportError)
  from PIL import Image

  images = pictures.random_images(12, seed=1)
  features = datasets.Features(
    img=datasets.Image(),
    fine=datasets.ClassLabel(names=["cat", "dog"]),
    numbers=datasets.Sequence(datasets.Value("float64")),
    ids=datasets.Sequence(datasets.Value("int64")),
    ragged=datasets.Sequence(datasets.Value("int64")),
    plain=datasets.Value("int64"),
  )

  def split(pixels):
    return datasets.Dataset.from_dict(
      {
        "img": [Image.fromarray(each) for each in pixels],
        "fine": LABELS,
        "numbers": [[k + 0.1, 2.0 * k] for k in range(6)],
        "ids": [[k, 7, 0] for k in range(6)],
        "ragged": [[k] * (k + 1) for k in range(6)],
        "plain": LABELS,
      },
      features=features,
    )

  path = tmp_path_factory.mktemp("hf") / "set"
  both = datasets.DatasetDict(train=split(images[:6]), validation=split(images[6:]))
  both.save_to_disk(path)
  both["train"].save_to_disk(path.with_name("one"))
  odd = datasets.DatasetDict(train=both["train"], test=both["train"].remove_columns("ids"))
  odd.save_to_disk(path.with_name("odd"))
  return path, images


def test_images_and_labels_are_found_by_type(saved, tmp_path):
  path, images = saved
  for _ in range(2):  # the second time from the cache
    found = load.load("hf_disk", path=path, cache_dir=tmp_path)
    np.testing.assert_array_equal(found.train_images, images[:6])
    np.testing.assert_array_equal(found.test_images, images[6:])
    np.testing.assert_array_equal(found.train_labels, LABELS)
    assert found.class_names == ("cat", "dog")
  assert len(list(tmp_path.glob("*hf_disk-img-fine*"))) == 1
  small = load.load("hf_disk", path=path, cache_dir=tmp_path, image_size=4)
  assert small.image_shape == (4, 4, 3)


def test_images_are_like_the_first_and_others_said(tmp_path):
  datasets = pytest.importorskip("datasets", exc_type=ImportError)
  from PIL import Image

  gray = pictures.random_images(2)
  gray[0] = gray[0, ..., :1]
  pixels = [Image.fromarray(gray[0, ..., 0]), Image.fromarray(gray[1])]
  features = datasets.Features(img=datasets.Image(), fine=datasets.ClassLabel(names=["a", "b"]))
  split = datasets.Dataset.from_dict({"img": pixels, "fine": [0, 1]}, features=features)
  datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "set")
  found = load.load("hf_disk", path=tmp_path / "set")
  assert found.image_shape == (8, 8, 1)
  assert found.notes == ("2 images are RGB and become grayscale, such as 'train 1'.",)


@pytest.mark.parametrize(
  ("column", "kind", "last"),
  [("numbers", "vectors", [np.float32(5.1), 10]), ("ids", "tokens", [5, 7, 0])],
)
def test_lists_of_numbers_are_vectors_or_tokens(saved, column, kind, last):
  found = load.load("hf_disk", path=saved[0], columns=(column, "plain"))
  assert found.kind == kind
  said = "rounded to float32" if kind == "vectors" else "taken for token ids"
  assert [said in note for note in found.notes] == [True, True]
  np.testing.assert_array_equal(found.train_images[-1], last)
  assert found.class_names == ("0", "1")
  with pytest.raises(ValueError, match=f"image_size is 4, but these are {kind}"):
    load.load("hf_disk", path=saved[0], columns=(column, "plain"), image_size=4)


@pytest.mark.parametrize(
  ("name", "columns", "sentence"),
  [
    ("set", ("img", "coarse"), "give two columns of .*: it has img, fine, numbers, ids, ragged"),
    ("set", ("img",), "data.columns is img; give two columns"),
    ("set", ("ragged", "fine"), "'ragged' of train has lists of 6 lengths; cut or fill"),
    ("set", ("ids", "numbers"), "'numbers' of train are float64; pass integers"),
    ("one", None, "has the splits .'a single one, unnamed'.; it needs 'train' and"),
    ("odd", None, "the splits of .* have different columns; save them alike"),
    ("", None, "is no folder that DatasetDict.save_to_disk wrote, or is damaged"),
  ],
)
def test_what_cannot_be_read_is_one_sentence(saved, name, columns, sentence):
  with pytest.raises(ValueError, match=sentence) as caught:
    load.load("hf_disk", path=saved[0].parent / name, columns=columns)
  assert len(str(caught.value).splitlines()) == 1
  with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
    load.load("hf_disk", path=saved[0].parent / "nowhere")
