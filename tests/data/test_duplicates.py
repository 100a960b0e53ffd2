import itertools

import numpy as np

from ptq_jax.data import duplicates


def naive(train_images, train_labels, test_images, test_labels):
  """All pairs, one by one."""
  examples = [(i.tobytes(), y, True) for i, y in zip(train_images, train_labels, strict=True)]
  examples += [(i.tobytes(), y, False) for i, y in zip(test_images, test_labels, strict=True)]
  pairs = [(a, b) for a, b in itertools.combinations(examples, 2) if a[0] == b[0]]
  return duplicates.Duplicates(
    pool_pairs=sum(a[2] and b[2] for a, b in pairs),
    test_pairs=sum(not a[2] and not b[2] for a, b in pairs),
    cross_pairs=sum(a[2] != b[2] for a, b in pairs),
    differing_labels=sum(a[1] != b[1] for a, b in pairs),
    pool_examples=sum(
      sum(a[0] == b[0] for b in examples) > 1 for a in examples[: len(train_images)]
    ),
  )


def test_a_case_by_hand():
  grey = [np.full((2, 2, 1), value, np.uint8) for value in range(9)]
  train = np.stack([grey[0], grey[1], grey[0], grey[2], grey[3]])  # 0 twice
  test = np.stack([grey[3], grey[4], grey[4], grey[4]])  # 3 across, 4 three times
  found = duplicates.count(
    train, np.array([0, 1, 0, 1, 1], np.int32), test, np.array([0, 1, 1, 0], np.int32)
  )
  assert found == duplicates.Duplicates(
    pool_pairs=1, test_pairs=3, cross_pairs=1, differing_labels=3, pool_examples=3
  )
  assert found.pairs == 5


def test_random_sets_equal_the_naive_count():
  random = np.random.default_rng(0)
  train = random.integers(0, 3, (60, 2, 2, 1)).astype(np.uint8)
  test = random.integers(0, 3, (40, 2, 2, 1)).astype(np.uint8)
  labels = random.integers(0, 2, 100).astype(np.int32)
  arguments = (train, labels[:60], test, labels[60:])
  found = duplicates.count(*arguments)
  assert found == naive(*arguments)
  assert min(found) > 0


def test_distinct_images_have_no_duplicates():
  images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1)
  labels = np.zeros(30, np.int32)
  assert duplicates.count(images[:20], labels[:20], images[20:], labels[20:]) == (0, 0, 0, 0, 0)
