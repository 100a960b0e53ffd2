import dataclasses
import io
import re
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest

from ptq_jax.data import load
from tests.data import pictures


def npz_arrays():
  return {
    "x_train": pictures.random_images(10, seed=1),
    "y_train": np.arange(10) % 3,
    "x_test": pictures.random_images(5, seed=2),
    "y_test": np.arange(5) % 3,
  }


@pytest.fixture
def npz(tmp_path):
  """Writes an .npz with some arrays replaced or, by None, left out; returns its path."""

  def write(**changes):
    arrays = {key: value for key, value in (npz_arrays() | changes).items() if value is not None}
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    return path

  return write


def test_digits_are_the_whole_set_in_one_fixed_split():
  digits = load.load("digits")
  assert digits.train_images.shape == (1498, 8, 8, 1)
  assert digits.test_images.shape == (299, 8, 8, 1)
  assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
  assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
  assert digits.class_names == tuple("0123456789")
  assert digits.image_shape == (8, 8, 1)
  assert digits.num_classes == 10
  assert digits.notes == ()
  both = np.concatenate([digits.train_images, digits.test_images])
  assert sorted(np.unique(both)) == [round(value * 255 / 16) for value in range(17)]
  assert np.bincount(digits.test_labels, minlength=10).min() >= 20
  assert digits.fingerprint == load.load("digits", seed=5).fingerprint
  assert digits.fingerprint.startswith("0aaa35112226"), (
    "the digits or their split have changed: recorded results on them no longer compare"
  )


def test_statistics_are_those_of_the_pool():
  digits = load.load("digits", pool_size=100)
  scaled = digits.train_images.astype(np.float64) / 255
  np.testing.assert_allclose(digits.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(digits.std, scaled.std(axis=(0, 1, 2)), rtol=1e-6)
  assert digits.mean.dtype == digits.std.dtype == np.float32


def test_a_constant_channel_has_deviation_one():
  mean, std = load.statistics(np.full((3, 2, 2, 1), 51, np.uint8))
  np.testing.assert_allclose(mean, 0.2)
  np.testing.assert_allclose(std, 1)


def test_a_smaller_pool_is_part_of_a_larger_one():
  whole = load.load("digits")
  large = load.load("digits", pool_size=400, test_size=50)
  small = load.load("digits", pool_size=100, test_size=50)
  assert len(large.test_labels) == 50
  assert set(small.train_ids) < set(large.train_ids)
  np.testing.assert_array_equal(large.train_images, whole.train_images[large.train_ids])
  np.testing.assert_array_equal(large.train_labels, whole.train_labels[large.train_ids])
  np.testing.assert_array_equal(small.test_images, large.test_images)
  other = load.load("digits", pool_size=100, test_size=50, seed=1)
  assert set(other.train_ids) != set(small.train_ids)
  assert other.fingerprint != small.fingerprint


def test_an_odd_pool_is_trimmed_by_one_and_says_so(npz):
  digits = load.load("digits", pool_size=101)
  assert len(digits.train_labels) == 100
  assert re.search("one example of 101 was dropped", digits.notes[0])
  odd = npz(x_train=pictures.random_images(9), y_train=np.zeros(9, int), y_test=np.zeros(5, int))
  assert len(load.load("npz", path=odd).train_labels) == 8


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"pool_size": 2000}, "pool_size is 2000; the training split has 1498 examples"),
    ({"pool_size": 1}, "pool_size is 1; .* choose from 2"),
    ({"test_size": 300}, "test_size is 300; the test split has 299 examples"),
    ({"test_size": 0}, "test_size is 0"),
    ({"image_size": 0}, "image_size is 0"),
  ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    load.load("digits", **sizes)


def test_digits_can_be_scaled():
  small = load.load("digits", pool_size=10, test_size=2)
  large = load.load("digits", pool_size=10, test_size=2, image_size=16)
  assert large.image_shape == (16, 16, 1)
  blocks = large.train_images.reshape(10, 8, 2, 8, 2).astype(float).mean(axis=(2, 4))
  correlation = np.corrcoef(blocks.ravel(), small.train_images.ravel())[0, 1]
  assert correlation > 0.97


def test_a_fingerprint_sees_every_array_and_the_class_names():
  images, labels = pictures.random_images(4), np.zeros(4, np.int32)
  prints = {load.fingerprint(images, labels, class_names=("a", "b"))}
  prints.add(load.fingerprint(images, labels + 1, class_names=("a", "b")))
  prints.add(load.fingerprint(images[::-1], labels, class_names=("a", "b")))
  prints.add(load.fingerprint(images.reshape(4, 4, 16, 3), labels, class_names=("a", "b")))
  prints.add(load.fingerprint(images, labels, class_names=("a", "c")))
  assert len(prints) == 5


def test_an_npz_is_read_as_it_is(npz):
  arrays = npz_arrays()
  read = load.load("npz", path=npz())
  np.testing.assert_array_equal(read.train_images, arrays["x_train"])
  np.testing.assert_array_equal(read.train_labels, arrays["y_train"])
  np.testing.assert_array_equal(read.test_images, arrays["x_test"])
  np.testing.assert_array_equal(read.test_labels, arrays["y_test"])
  assert read.class_names == ("0", "1", "2")
  column = {"y_train": arrays["y_train"][:, None].astype(np.uint8), "class_names": list("abcd")}
  other = load.load("npz", path=npz(**column))
  np.testing.assert_array_equal(other.train_labels, arrays["y_train"])
  assert other.class_names == tuple("abcd")


def with_nan():
  images = pictures.random_images(10).astype(np.float32)
  images[[3, 7], 0, 0, 0] = np.nan
  return images


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"y_test": None}, "has no array 'y_test'; it needs x_train, y_train, x_test, y_test and has"),
    ({"x_train": np.zeros((10, 8, 8), np.uint8)}, r"x_train have the shape \(10, 8, 8\).*channel"),
    *(
      ({"x_train": np.linspace(low, high, 1920).reshape(10, 8, 8, 3).astype(dtype)}, message)
      for low, high, dtype, message in (
        (0, 1, np.float32, r"are float32 from 0 to 1; pass uint8 .* .`np.round\(255 \* images\)"),
        (0, 255, np.float64, r"are float64 from 0 to 255; .*`np.round\(images\).astype"),
        (0, 255, np.int64, r"are int64 from 0 to 255; .*`np.round\(images\).astype"),
        (-1, 1, np.float16, r"from -1 to 1; .*`np.round\(127.5 \* \(images \+ 1\)\).astype"),
        (0, 9999, np.uint16, r"are uint16 from 0 to 9999; .* \(scale them first\)"),
        (-2, 2, np.float32, r"are float32 from -2 to 2; .* \(scale them first\)"),
        (0, 1, bool, r"are bool from 0 to 1; .*`np.round\(255 \* images\).astype"),
      )
    ),
    ({"x_train": np.zeros((10, 3, 8, 8), np.uint8)}, r"looks like \[N, channels, .*transpose"),
    ({"x_train": with_nan()}, "NaN or infinite pixels in 2 of 10 images, the first at index 3"),
    ({"x_train": np.zeros((0, 8, 8, 3), np.uint8)}, "no pixel"),
    ({"x_test": np.zeros((5, 4, 4, 3), np.uint8)}, r"\(8, 8, 3\) and x_test \(4, 4, 3\)"),
    ({"y_train": np.arange(10) - 1}, "y_train hold -1 at index 0 .* 8"),
    ({"y_test": np.array([0, 1, 3, 2, 3])}, "y_test hold 3 at index 2 .*1 more.* from 0 to 2"),
    ({"class_names": ["a", "b"]}, "y_train hold 2 at index 2 .* with 2 classes"),
    ({"y_train": np.zeros(10)}, "y_train are float64; pass integers"),
    ({"y_train": np.zeros(9, int)}, r"y_train have the shape \(9,\) for 10 examples"),
    ({"y_train": np.zeros((10, 3), int)}, r"y_train have the shape \(10, 3\)"),
    ({"y_train": np.array([{}] * 10)}, "y_train is an array of type object; save it as a plain"),
    ({"y_train": np.array(list("ab" * 5))}, "y_train is an array of type <U1; .* of numbers"),
    ({"class_names": np.array(["a", "b", None])}, "class_names is .* object; .* plain text"),
    ({"y_train": np.arange(10) + 2**40}, "y_train hold 1099511627776 at index 0 .*10 examples"),
    ({"y_train": np.arange(10) + 10**9}, r"y_train hold 1000000000 at index 0 \(and 9 more"),
    ({"y_train": np.arange(10) % 3 + 0.5}, "y_train are float64; pass integers"),
    ({"y_test": np.full(5, 2**40)}, "y_test hold 1099511627776 at index 0 .* 3 classes"),
    ({"y_train": np.full(10, 2**63, np.uint64)}, "y_train hold 9223372036854775808 at index 0"),
  ],
)
def test_a_wrong_npz_is_refused(npz, changes, message):
  path = npz(**changes)
  with pytest.raises(ValueError, match=message) as caught:
    load.load("npz", path=path)
  assert str(path) in str(caught.value)
  assert "delete" not in str(caught.value)


def npy(array):
  """Bytes of an .npy file."""
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def write_members(path, members):
  """An .npz of (name, bytes), names twice included."""
  with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    warnings.simplefilter("ignore")  # of the duplicate name
    for name, contents in members:
      archive.writestr(name, contents)
  return path


def test_an_array_twice_in_an_npz_is_refused(tmp_path):
  members = [(f"{key}.npy", npy(array)) for key, array in npz_arrays().items()]
  for name in ("y_train.npy", "y_train"):
    path = write_members(tmp_path / "set.npz", [*members, (name, npy(np.zeros(10, int)))])
    with pytest.raises(ValueError, match=r"set.npz' holds 'y_train' twice"):
      load.load("npz", path=path)


def test_an_npz_header_must_agree_with_what_is_stored(tmp_path, monkeypatch):
  monkeypatch.setattr(np.lib.format, "read_array", None)  # it would ask for the memory
  contents = npy(np.zeros((10, 8, 8, 3), np.uint8))
  larger = contents.replace(b"(10, 8, 8, 3), ", b"(9**9, 8, 8, 3)").replace(b"9**9", b"9999")
  assert len(larger) == len(contents)
  path = write_members(tmp_path / "set.npz", [("x_train.npy", larger)])
  with pytest.raises(ValueError, match=r"set.npz: x_train .* damaged \(1919936 bytes declared"):
    load.load("npz", path=path)
  lengths = (struct.pack("<I", length) for length in (len(larger), 1919936))
  path.write_bytes(path.read_bytes().replace(*lengths))
  with pytest.raises(ValueError, match=r"x_train .* damaged \(1919936 bytes declared, 1919936"):
    load.load("npz", path=path)


def test_an_npz_member_of_another_length_is_refused(tmp_path):
  """Its directory says how long it is, and here as many bytes as that would pass every check."""
  array = npy(np.zeros((10, 8, 8, 3), np.uint8))
  path = write_members(tmp_path / "set.npz", [("x_train.npy", array + b"more")])
  whole, part = (struct.pack("<I", zlib.crc32(each)) for each in (array + b"more", array))
  lengths = [struct.pack("<I", len(array) + more) for more in (4, 0)]
  path.write_bytes(path.read_bytes().replace(whole, part).replace(*lengths))
  with pytest.raises(ValueError, match=r"x_train .* damaged \(longer than declared|CRC"):
    load.load("npz", path=path)


def test_a_broken_npz_is_refused(npz, tmp_path):
  path = npz()
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"not a whole .npz file"):
    load.load("npz", path=path)
  np.save(tmp_path / "one.npy", np.zeros(3))
  with pytest.raises(ValueError, match=r"not a whole .npz file"):
    load.load("npz", path=tmp_path / "one.npy")
  with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.npz"):
    load.load("npz", path=tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
  ("labels", "said"),
  [
    (np.arange(6) % 3, []),
    (
      np.arange(6) % 3 + 1,
      [
        "1 of 4 classes have no training example, such as '0'; labels go from 0 on: number them "
        "anew if these are no classes.",
        "1 of 4 classes have no test example, such as '0'.",
      ],
    ),
    (np.array([0, 1, 2, 0, 0, 1]), ["1 of 3 classes have no test example, such as '2'."]),
  ],
)
def test_classes_without_examples_are_said(labels, said):
  images = pictures.random_images(6)
  test = labels[[0, 1, 4, 5]] if len(said) == 1 else labels
  found = load.from_arrays(images, labels, images[: len(test)], test)
  assert list(found.notes) == said


def test_tables_with_their_columns_in_another_order_are_refused():
  train = pd.DataFrame({"age": [0.0, 1, 2, 3], "income": [5.0, 6, 7, 8]})
  labels = np.array([0, 1, 0, 1])
  loaded = load.from_arrays(train, labels, train + 1, labels)
  np.testing.assert_array_equal(loaded.test_images, train.to_numpy() + 1)
  with pytest.raises(ValueError, match=r"columns of x_test are \['income', 'age'\]"):
    load.from_arrays(train, labels, train[["income", "age"]], labels)


def test_what_is_no_array_is_named():
  images, labels = pictures.random_images(4), np.arange(4) % 2
  hidden = np.ma.masked_array(images, images > 200)
  with pytest.raises(ValueError, match=r"^x_train has masked entries; fill or drop them"):
    load.from_arrays(hidden, labels, images, labels)
  with pytest.raises(ValueError, match=r"^y_test is a list that is no array: setting an array"):
    load._as_array([[0, 1], 2, 3], "y_test")


@pytest.mark.parametrize("name", ["npz", "tiny_imagenet", "image_folder"])
def test_some_names_need_a_path(name):
  with pytest.raises(ValueError, match=f"the dataset '{name}' needs a path"):
    load.load(name)


def test_a_dataset_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    load.load("digits", pool_size=4).name = "other"
