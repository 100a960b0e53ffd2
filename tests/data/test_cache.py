import os
import warnings

import numpy as np
import pytest

from ptq_jax.data import cache
from ptq_jax.data.splits import Splits
from tests.data import pictures


class Counted:
  """A source of random images that counts how often it is decoded."""

  def __init__(self, folder, *, stamps=(("a", 1, 2),)):
    self.calls = 0
    self.source = cache.Source("kind", folder, "stem", stamps, self.decode)

  def decode(self, image_size):
    self.calls += 1
    size = image_size or 8
    labels = np.zeros(4, np.int32)
    images = pictures.random_images(4, size=size)
    return Splits(images, labels, images[:2], labels[:2], ("one", "two"))

  def read(self, *, image_size=None, cache_dir=None):
    return cache.decoded(self.source, image_size=image_size, cache_dir=cache_dir)


@pytest.fixture(autouse=True)
def no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def test_a_source_is_decoded_once(tmp_path):
  counted = Counted(tmp_path)
  first, second = counted.read(), counted.read()
  assert counted.calls == 1
  for name in cache.ARRAYS:
    np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert getattr(first, name).dtype == getattr(second, name).dtype
  assert second.class_names == ("one", "two")
  assert os.listdir(tmp_path) == ["stem-kind.uint8.npz"]


@pytest.mark.parametrize(
  "stamps",
  [(("a", 1, 3),), (("a", 2, 2),), (("b", 1, 2),), (("a", 1, 2), ("b", 1, 2))],
  ids=["time", "size", "name", "one more"],
)
def test_a_changed_source_is_decoded_again(tmp_path, stamps):
  Counted(tmp_path).read()
  changed = Counted(tmp_path, stamps=stamps)
  changed.read()
  changed.read()
  assert changed.calls == 1


def test_each_image_size_has_its_own_cache(tmp_path):
  counted = Counted(tmp_path)
  for _ in range(2):
    assert counted.read().train_images.shape[1] == 8
    assert counted.read(image_size=4).train_images.shape[1] == 4
  assert counted.calls == 2


def test_a_cache_folder_keeps_places_apart(tmp_path):
  kept = tmp_path / "new" / "cache"
  one, other = Counted(tmp_path / "one"), Counted(tmp_path / "other")
  for counted in (one, other, one, other):
    counted.read(cache_dir=kept)
  assert (one.calls, other.calls) == (1, 1)
  assert len(os.listdir(kept)) == 2
  assert not (tmp_path / "one").exists()


def test_a_damaged_cache_is_replaced(tmp_path):
  counted = Counted(tmp_path)
  counted.read()
  path = cache.cache_path(counted.source, image_size=None, cache_dir=None)
  path.write_bytes(path.read_bytes()[:500])
  with pytest.warns(UserWarning, match=r"is damaged .*; decoding again"):
    counted.read()
  counted.read()
  assert counted.calls == 2


def test_an_unwritable_place_only_costs_time(tmp_path):
  blocked = tmp_path / "file"
  blocked.write_text("no folder")
  counted = Counted(tmp_path)
  for _ in range(2):
    with pytest.warns(UserWarning, match=r"cannot be kept in .* unless cache_dir names a writable"):
      read = counted.read(cache_dir=blocked)
    assert read.train_images.shape == (4, 8, 8, 3)
  assert counted.calls == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError("no space left on device")

  monkeypatch.setattr(cache.os, "replace", full)
  with pytest.warns(UserWarning, match="no space left"):
    Counted(tmp_path).read()
  assert os.listdir(tmp_path) == []
