"""Sources that a function gives: lists, dicts, array_record files, and what is wrong with them."""

import io
import re
import sys
import types

import numpy as np
import pytest
from array_record.python import array_record_data_source, array_record_module

from ptq_jax.data import load
from tests.data import pictures

IMAGES, LABELS = pictures.random_images(6), np.arange(6) % 2


class Parsed:
  """Array records whose bytes are parsed, as a grain `MapDataset` does it."""

  def __init__(self, path):
    self.source = array_record_data_source.ArrayRecordDataSource(str(path))

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    with np.load(io.BytesIO(self.source[index])) as arrays:
      return {"x": arrays["x"], "y": arrays["y"]}


@pytest.fixture
def module(monkeypatch):
  """A module of functions that give sources; more can be put into it."""
  pairs = list(zip(IMAGES, LABELS, strict=True))
  made = types.ModuleType("own_sources")
  made.lists = lambda: (pairs, pairs[:4])
  made.records = lambda path: [Parsed(path / split) for split in ("train", "test")]
  monkeypatch.setitem(sys.modules, "own_sources", made)
  return made


def write_records(path):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for image, label in zip(IMAGES, LABELS, strict=True):
    buffer = io.BytesIO()
    np.savez(buffer, x=image, y=label)
    writer.write(buffer.getvalue())
  writer.close()


def test_sources_are_read_whole(module):
  found = load.load("own_sources:lists")
  np.testing.assert_array_equal(found.train_images, IMAGES)
  np.testing.assert_array_equal(found.test_images, IMAGES[:4])
  np.testing.assert_array_equal(found.train_labels, LABELS)
  assert load.load("own_sources:lists", image_size=4).image_shape == (4, 4, 3)


def test_array_records_are_sources(module, tmp_path):
  for split in ("train", "test"):
    write_records(tmp_path / split)
  found = load.load("own_sources:records", path=tmp_path, columns=("x", "y"))
  np.testing.assert_array_equal(found.train_images, IMAGES)
  np.testing.assert_array_equal(found.test_labels, LABELS)
  with pytest.raises(
    ValueError, match=r"cannot be read .* an element is a dict; give .input, label"
  ):
    load.load("own_sources:records", path=tmp_path)
  with pytest.raises(ValueError, match=r"training source .* cannot be read .* KeyError: 'image'"):
    load.load("own_sources:records", path=tmp_path, columns=("image", "y"))


@pytest.mark.parametrize(
  ("name", "made", "options", "sentence"),
  [
    ("own_sources:other", None, {}, "the dataset 'own_sources:other' is missing: AttributeError"),
    ("no_module_so:made", None, {}, "the dataset 'no_module_so:made' is missing: ModuleNotFound"),
    ("own_sources:lists", None, {"path": "x"}, "fails: TypeError"),
    ("own_sources:lists", None, {"cache_dir": "x"}, "data.cache_dir is x, but the dataset 'own_s"),
    ("own_sources:made", lambda: 1 / 0, {}, "fails: ZeroDivisionError: division by zero"),
    ("own_sources:made", lambda: {"train": 1}, {}, "is a dict; the function must give (training,"),
    (
      "own_sources:made",
      lambda: (iter([1]), []),
      {},
      "the training source of 'own_sources:made' c",
    ),
    ("own_sources:made", lambda: ([(IMAGES[0], 0)], []), {}, "the test source of"),
    (
      "own_sources:made",
      lambda: ([(IMAGES[0], 0), (IMAGES[0, :3], 1)],) * 2,
      {},
      "training source of 'own_sources:made' cannot be read as one array: ValueError: all input",
    ),
    (
      "own_sources:made",
      lambda: ([(IMAGES[0] / 255, 0)],) * 2,
      {},
      "are float64 from 0 to 1; pass uint8",
    ),
  ],
)
def test_what_is_no_source_is_one_sentence(module, name, made, options, sentence):
  module.made = made
  with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
    load.load(name, **options)
  assert len(str(caught.value).splitlines()) == 1
