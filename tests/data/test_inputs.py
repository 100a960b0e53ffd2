"""Vectors and token ids: what is taken, as what, and what is refused."""

import numpy as np
import pytest

from ptq_jax.data import augment, duplicates, inputs, load

LABELS = np.arange(10) % 3


def vectors(num=10, seed=0):
  return np.random.default_rng(seed).normal(3, [1, 10, 0.1], (num, 3)).astype(np.float32)


def tokens(num=10, seed=0):
  return np.random.default_rng(seed).integers(0, 50, (num, 4))


def dataset(x_train, x_test=None, **options):
  x_test = x_train[:5] if x_test is None else x_test
  return load.from_arrays(x_train, LABELS[: len(x_train)], x_test, LABELS[: len(x_test)], **options)


@pytest.mark.parametrize(
  ("given", "kind", "note"),
  [
    (vectors(), "vectors", None),
    (vectors().astype(np.float16), "vectors", None),
    (vectors().astype(np.float64), "vectors", "float64; they are rounded to float32"),
    (vectors() > 3, "vectors", "bool; they are taken as vectors of the numbers 0 and 1"),
    (tokens(), "tokens", "taken for token ids"),
    (tokens().astype(np.int8), "tokens", "taken for token ids"),
    (tokens().astype(">u2"), "tokens", "taken for token ids"),
    (np.ones((10, 2, 2, 1), np.uint8), "images", None),
  ],
  ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_a_kind_is_known_by_the_dtype(given, kind, note):
  found = dataset(given)
  assert (found.kind, inputs.KINDS[str(found.train_images.dtype)]) == (kind, kind)
  np.testing.assert_array_equal(found.train_images, given)
  assert found.test_images.dtype == found.train_images.dtype
  assert found.image_shape == given.shape[1:]
  assert [note in said for said in found.notes] == ([] if note is None else [True, True])
  assert found.fed(2).dtype == (np.int32 if kind == "tokens" else np.float32)
  assert found.fed(2).shape == (2, *given.shape[1:])
  assert found.vocabulary == (1 + given.max() if kind == "tokens" else None)


def changed(array, where, value):
  array = array.copy()
  array[where] = value
  return array


@pytest.mark.parametrize(
  ("x_train", "x_test", "message"),
  [
    (changed(vectors(), (4, 1), np.nan), None, "x_train have NaN .* numbers in 1 of 10 .* index 4"),
    (vectors(), changed(vectors(), (2, 0), -np.inf), "x_test have NaN or infinite .* index 2"),
    (vectors().astype(np.uint8), None, r"x_train are uint8 \[10, 3\], which may mean anything"),
    (vectors()[:, :, None], None, r"x_train are float32 \[10, 3, 1\]; pass images as uint8"),
    (vectors()[:, 0], None, r"x_train are float32 \[10\]; pass images"),
    (tokens()[:, :, None], None, r"x_train are int64 \[10, 4, 1\]; pass images"),
    (vectors().astype(complex), None, "x_train are complex128"),
    (np.zeros((10, 0), np.float32), None, "no number in them"),
    (changed(tokens(), (3, 1), -1), None, r"x_train hold the id -1 at \[3, 1\]"),
    (tokens(), changed(tokens(), (1, 0), 2**40), r"x_test hold the id 1099511627776 at \[1, 0\]"),
    (tokens(), tokens().astype(np.float32), "have the kind tokens and x_test vectors"),
    (tokens(), tokens()[:, :3], r"have the shape \(4,\) and x_test \(3,\)"),
    (vectors() + 1e9 * np.ones(3), None, r"3 features that float32 cannot .* first is \[:, 0\]"),
    (changed(vectors().astype(float), (0, 2), 1e300), None, r"1 features .* first is \[:, 2\]"),
    (vectors(), np.float32(3e38) * np.ones((5, 3), np.float32), r"test split .* feature \[:, 2\]"),
  ],
)
def test_what_is_neither_is_refused(x_train, x_test, message):
  with pytest.raises(ValueError, match=message) as caught:
    dataset(x_train, x_test)
  assert len(str(caught.value).splitlines()) == 1


def test_blur_is_judged_by_the_pool():
  """Two rows of a test split may be as near as they like, and a constant has nothing to blur."""
  near = np.array([[1000.0, 0.1], [1000.0 + 1e-6, 0.1]])
  pool = np.random.default_rng(0).normal(1000, 5, (10, 2))
  pool[:, 1] = 0.1  # ten of these have a deviation of 1e-17, by rounding
  np.testing.assert_allclose(dataset(pool, near).test_images, near, rtol=1e-6)


def test_vectors_are_standardised_per_feature_and_constant_ones_by_one():
  given = np.hstack([vectors(), np.full((10, 1), 0.1), np.full((10, 1), 1e-42)]).astype(np.float32)
  given[0, -1] = 0  # varies by less than float32 can divide by
  found = dataset(given)
  np.testing.assert_allclose(found.mean[:3], given[:, :3].astype(float).mean(axis=0), rtol=1e-6)
  np.testing.assert_array_equal(found.std[3:], 1)
  scaled = np.asarray(augment.normalise(found.train_images, found.mean, found.std))
  np.testing.assert_allclose(scaled[:, :3].mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(scaled[:, :3].std(axis=0), 1, rtol=1e-5)
  np.testing.assert_allclose(scaled[:, 3:], 0, atol=1e-6)


def test_tokens_stay_as_they_are():
  found = dataset(tokens())
  assert found.mean.shape == found.std.shape == (0,)
  fed = augment.normalise(found.train_images, found.mean, found.std)
  np.testing.assert_array_equal(fed, tokens())
  assert fed.dtype == np.int32


def test_other_dtypes_are_not_normalised():
  with pytest.raises(ValueError, match="inputs are float16; give images as uint8, vectors as"):
    augment.normalise(vectors().astype(np.float16), np.zeros(3), np.ones(3))


def test_zeros_of_both_signs_are_copies():
  given = changed(changed(vectors(), (0, 0), 0.0), (1, 0), -0.0)
  given[1, 1:] = given[0, 1:]
  found = dataset(given, vectors(5, seed=1))
  split = (found.train_images, found.train_labels, found.test_images, found.test_labels)
  assert duplicates.count(*split).pool_pairs == 1
  assert found.fingerprint != dataset(changed(given, (2, 2), 9), vectors(5, seed=1)).fingerprint


@pytest.mark.parametrize("make", [vectors, tokens])
def test_an_npz_holds_them_as_well(tmp_path, make):
  path = tmp_path / "set.npz"
  np.savez(path, x_train=make(), y_train=LABELS, x_test=make(5, seed=1), y_test=LABELS[:5])
  whole = load.load("npz", path=path)
  np.testing.assert_array_equal(whole.test_images, make(5, seed=1))
  some = load.load("npz", path=path, pool_size=6)
  np.testing.assert_array_equal(some.train_images, make()[some.train_ids])
  with pytest.raises(ValueError, match=f"image_size is 8, but these are {whole.kind}"):
    load.load("npz", path=path, image_size=8)
