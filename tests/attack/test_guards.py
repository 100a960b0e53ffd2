"""Guard rails speak when they should, and only then."""

import numpy as np
import pytest

from ptq_jax.attack import guards


def test_accuracy_margin():
  shadows = np.array([0.9, 0.92])
  assert guards.accuracy_mismatch(shadows, np.array([0.895, 0.9])) is None
  message = guards.accuracy_mismatch(shadows, np.array([0.80]))
  assert "91.0%" in message
  assert "80.0%" in message
  assert guards.accuracy_mismatch(shadows, np.array([0.80]), margin=0.2) is None


def test_rates_that_cannot_be_resolved():
  assert guards.too_few_non_members(1000, [0.01, 0.001]) is None
  message = guards.too_few_non_members(999, [0.01, 0.001])
  assert "999 non-members" in message
  assert "0.100%" in message
  assert "1000 non-members would do" in message
  assert "finds 0.100% of members" in message
  assert "lower bound" not in message
  assert guards.few_false_positives(10, fpr=0.01) is None
  assert "rests on 9 false" in guards.few_false_positives(9, fpr=0.01)


def test_shadow_count():
  guards.check_shadow_count(4, expected=4)
  with pytest.raises(ValueError, match="scores of 3 shadows, but 4 are configured"):
    guards.check_shadow_count(3, expected=4)


def test_auditable_examples():
  members = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
  np.testing.assert_array_equal(guards.auditable(members), [False, True, False])
  np.testing.assert_array_equal(guards.auditable(members, needed=1), [True, True, True])
  assert not guards.auditable(members, left_out=1).any()


def test_copies_in_the_pool_are_told_where_they_may_decide():
  """CIFAR-100 has 14 pairs among 50 000: .03 % of the non-members."""
  assert guards.copies(14, 50_000, [0.01]) is None
  assert guards.copies(0, 50_000, [1e-5]) is None
  message = guards.copies(14, 50_000, [0.01, 0.001])
  assert "14 pairs of exact copies" in message
  assert "0.03% of the non-members" in message


def test_copies_in_the_test_split_count_from_a_hundredth_on():
  assert guards.copies_in_test(9, 1000) is None
  assert guards.copies_in_test(0, 1) is None
  assert guards.copies_in_test(10, 1000).startswith("10 pairs of exact copies lie one in the pool")
