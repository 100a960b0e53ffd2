import collections

import jax
import numpy as np
import pytest

from ptq_jax.data import membership


def test_pairs_are_complementary_halves(key):
  members = np.asarray(membership.paired(key, num_models=6, num_examples=40))
  assert members.shape == (6, 40)
  assert members.dtype == bool
  np.testing.assert_array_equal(members.sum(axis=1), 20)
  np.testing.assert_array_equal(members.sum(axis=0), 3)
  np.testing.assert_array_equal(members[1::2], ~members[::2])
  assert len({row.tobytes() for row in members}) == 6


def test_an_odd_pool_gives_the_extra_example_to_the_odd_models(key):
  members = np.asarray(membership.paired(key, num_models=4, num_examples=7))
  np.testing.assert_array_equal(members.sum(axis=1), [3, 4, 3, 4])
  np.testing.assert_array_equal(members.sum(axis=0), 2)


def test_every_half_is_equally_likely(key):
  """4 examples have 6 halves; 600 draws are 100 of each, deviation 9."""
  members = np.asarray(membership.paired(key, num_models=1200, num_examples=4))[::2]
  counts = collections.Counter(tuple(np.flatnonzero(row)) for row in members)
  assert len(counts) == 6
  assert max(abs(count - 100) for count in counts.values()) < 45


def test_more_models_keep_the_first_ones(key):
  few = membership.paired(key, num_models=4, num_examples=30)
  many = membership.paired(key, num_models=10, num_examples=30)
  np.testing.assert_array_equal(few, many[:4])
  other = membership.paired(jax.random.key(1), num_models=4, num_examples=30)
  assert not np.array_equal(few, other)


@pytest.mark.parametrize("num_models", [0, 3, -2])
def test_models_come_in_pairs(key, num_models):
  with pytest.raises(ValueError, match=f"num_models is {num_models}; .* must be even"):
    membership.paired(key, num_models=num_models, num_examples=10)


def test_a_pool_has_two_examples_at_least(key):
  with pytest.raises(ValueError, match="num_examples is 1"):
    membership.paired(key, num_models=2, num_examples=1)


def test_random_halves_are_independent_of_one_another(key):
  members = np.asarray(membership.random_halves(key, num_models=300, num_examples=20))
  np.testing.assert_array_equal(members.sum(axis=1), 10)
  overlaps = (members[:-1] & members[1:]).sum(axis=1)
  assert abs(overlaps.mean() - 5) < 0.3  # the deviation of the mean is 0.07
  assert overlaps.std() > 0.5
  with pytest.raises(ValueError, match="num_models is 0"):
    membership.random_halves(key, num_models=0, num_examples=20)


def test_members_of_lists_the_indices_of_each_row(key):
  members = membership.paired(key, num_models=4, num_examples=12)
  indices = membership.members_of(members)
  assert indices.shape == (4, 6)
  assert indices.dtype == np.int32
  for row, listed in zip(np.asarray(members), indices, strict=True):
    np.testing.assert_array_equal(np.flatnonzero(row), listed)


def test_members_of_needs_one_number_of_members(key):
  members = membership.paired(key, num_models=2, num_examples=7)
  with pytest.raises(ValueError, match=r"with 3 and with 4 members; .* even number of examples"):
    membership.members_of(members)
  with pytest.raises(ValueError, match="no members in any model"):
    membership.members_of(np.zeros((2, 4), bool))
