import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.data import augment


def picture(height=5, width=6, channels=2, dtype=np.uint8):
  """No two pixels are equal and none is 0."""
  values = np.arange(1, height * width * channels + 1, dtype=dtype)
  return values.reshape(height, width, channels)


def windows(image, distance, mode):
  """Every image that a shift can give, by its offset: the naive reference."""
  margin = ((distance, distance), (distance, distance), (0, 0))
  padded = np.pad(image, margin, mode=mode)
  height, width, _ = image.shape
  offsets = range(2 * distance + 1)
  return {
    (top, left): padded[top : top + height, left : left + width]
    for top in offsets
    for left in offsets
  }


def draws(function, image, key, *, count):
  """`count` random results as NumPy."""
  return np.asarray(jax.vmap(function, in_axes=(0, None))(jax.random.split(key, count), image))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
  ("function", "distance", "mode"),
  [
    (lambda key, image: augment.crop(key, image, padding=2), 2, "constant"),
    (lambda key, image: augment.shift(key, image, distance=1), 1, "edge"),
    (lambda key, image: augment.shift(key, image, distance=1, fill="zero"), 1, "constant"),
  ],
)
def test_translations_are_uniform_over_all_windows(key, function, distance, mode, dtype):
  image = picture(dtype=dtype)
  offset_of = {w.tobytes(): offset for offset, w in windows(image, distance, mode).items()}
  results = draws(function, image, key, count=2000)
  assert results.dtype == dtype
  counts = collections.Counter(offset_of[result.tobytes()] for result in results)
  expected = 2000 / (2 * distance + 1) ** 2
  assert len(counts) == (2 * distance + 1) ** 2
  assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)


def test_flip_mirrors_the_columns_half_of_the_time(key):
  image = picture()
  results = draws(augment.flip, image, key, count=1000)
  mirrored = [np.array_equal(result, image[:, ::-1]) for result in results]
  kept = [np.array_equal(result, image) for result in results]
  assert sum(mirrored) + sum(kept) == 1000
  assert abs(sum(mirrored) - 500) < 80


def test_no_distance_is_the_identity(key):
  np.testing.assert_array_equal(augment.crop(key, picture(), padding=0), picture())


def test_make_applies_its_names_in_order(key):
  image = picture()

  def by_hand(key, image):
    flipped = augment.flip(jax.random.fold_in(key, 0), image)
    return augment.shift(jax.random.fold_in(key, 1), flipped, distance=1)

  both = augment.make(("flip", "shift1"))
  expected = draws(by_hand, image, key, count=50)
  np.testing.assert_array_equal(draws(both, image, key, count=50), expected)
  assert len({result.tobytes() for result in expected}) > 10
  np.testing.assert_array_equal(augment.make(())(key, image), image)


def test_equal_augmentations_are_one_static_argument(key):
  traced = []

  @jax.jit(static_argnums=0)
  def run(chosen, key, image):
    traced.append(chosen)
    return chosen(key, image)

  for _ in range(2):
    run(augment.make(["crop4", "flip"]), key, picture())
  assert len(traced) == 1


@pytest.mark.parametrize("name", ["flop", "crop", "shift-1", "flip2", "crop4.5", ""])
def test_unknown_names_are_refused(name):
  with pytest.raises(ValueError, match=f"no augmentation '{name}'"):
    augment.make(("flip", name))


def test_a_string_is_no_sequence_of_names():
  with pytest.raises(ValueError, match="names is the string 'flip'"):
    augment.make("flip")


def test_bad_shifts_are_refused(key):
  with pytest.raises(ValueError, match="distance is -1"):
    augment.shift(key, picture(), distance=-1)
  with pytest.raises(ValueError, match="fill is 'wrap'"):
    augment.shift(key, picture(), distance=1, fill="wrap")


def test_views_depend_on_view_and_example_alone(key):
  images = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 1)).astype(np.uint8)
  ids = np.arange(100, 112)
  chosen = augment.make(("flip", "crop2"))
  batch_views = jax.jit(augment.views, static_argnames=("num_views", "augment"))

  def views(part, *, num_views):
    return np.asarray(
      batch_views(key, images[part], ids[part], num_views=num_views, augment=chosen)
    )

  whole = views(slice(None), num_views=4)
  assert whole.shape == (4, 12, 6, 6, 1)
  assert whole.dtype == np.uint8
  halves = np.concatenate([views(slice(0, 6), num_views=4), views(slice(6, 12), num_views=4)], 1)
  np.testing.assert_array_equal(whole, halves)
  order = np.random.default_rng(1).permutation(12)
  np.testing.assert_array_equal(whole[:, order], views(order, num_views=4))
  np.testing.assert_array_equal(whole[:2], views(slice(None), num_views=2))
  np.testing.assert_array_equal(
    whole[2, 7], chosen(jax.random.fold_in(jax.random.fold_in(key, 2), 107), images[7])
  )
  assert all(not np.array_equal(whole[0], other) for other in whole[1:])


def test_views_need_a_view(key):
  with pytest.raises(ValueError, match="num_views is 0"):
    augment.views(key, picture()[None], np.arange(1), num_views=0, augment=augment.make(("flip",)))


def test_normalise_gives_mean_zero_and_deviation_one():
  images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
  scaled = images.astype(np.float64) / 255
  mean = scaled.mean(axis=(0, 1, 2)).astype(np.float32)
  std = scaled.std(axis=(0, 1, 2)).astype(np.float32)
  result = augment.normalise(images, mean, std)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, (scaled - mean) / std, atol=1e-5)
  np.testing.assert_allclose(np.asarray(result).std(axis=(0, 1, 2)), 1, atol=1e-5)
  one = jax.jit(augment.normalise)(images[0], mean, std)
  np.testing.assert_allclose(one, result[0], atol=1e-6)
