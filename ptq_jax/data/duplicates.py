"""Exact copies of images, vectors or tokens, which blur membership: a non-member's twin may have
been trained on."""

import hashlib
from typing import NamedTuple

import numpy as np

from ptq_jax.base import Int, Shaped


class Duplicates(NamedTuple):
  """Numbers of pairs of identical images; three identical images make three pairs."""

  pool_pairs: int  # both in the pool
  test_pairs: int  # both in the test split
  cross_pairs: int  # one in each
  differing_labels: int  # pairs of all three sorts whose two labels differ
  pool_examples: int  # examples of the pool with a copy in the pool or the test split

  @property
  def pairs(self) -> int:
    return self.pool_pairs + self.test_pairs + self.cross_pairs


def count(
  train_images: Shaped[np.ndarray, "E ..."],
  train_labels: Int[np.ndarray, "E"],
  test_images: Shaped[np.ndarray, "T ..."],
  test_labels: Int[np.ndarray, "T"],
) -> Duplicates:
  """Counts pairs of identical images within the pool, within the test split, and between them."""
  picture = _picture_ids(train_images, test_images)
  label = np.concatenate([train_labels, test_labels])
  in_pool = np.arange(len(picture)) < len(train_images)
  same_picture = _pairs(picture, in_pool)
  _, picture_and_label = np.unique(np.stack([picture, label]), axis=1, return_inverse=True)
  same_both = _pairs(picture_and_label.ravel(), in_pool)
  copies = np.bincount(picture)[picture]
  return Duplicates(
    *same_picture,
    differing_labels=sum(same_picture) - sum(same_both),
    pool_examples=int((copies[in_pool] > 1).sum()),
  )


def _picture_ids(*images: np.ndarray) -> Int[np.ndarray, "n"]:
  """One number per distinct image over all arrays, by 128-bit digests."""
  digests = [
    hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
    for array in images
    for image in array
  ]
  numbers: dict[bytes, int] = {}
  return np.array([numbers.setdefault(digest, len(numbers)) for digest in digests], np.int64)


def _pairs(group: np.ndarray, in_pool: np.ndarray) -> tuple[int, int, int]:
  """Pairs of equal group: within the pool, within the test split, one in each."""
  length = int(group.max()) + 1
  pool = np.bincount(group[in_pool], minlength=length)
  test = np.bincount(group[~in_pool], minlength=length)
  within = (int((counts * (counts - 1) // 2).sum()) for counts in (pool, test))
  return (*within, int((pool * test).sum()))
