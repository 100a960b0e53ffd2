"""Exposure per example: averages, ranking, overlap of exposed sets."""

import numpy as np
import pytest

from ptq_jax.attack import exposure


def test_averages_match_a_loop():
  rng = np.random.default_rng(0)
  scores, members = rng.normal(size=(5, 12)), rng.random((5, 12)) < 0.5
  members[:, 0], members[:, 1] = True, False
  result = exposure.per_example(scores, members)
  for e in range(12):
    for value, inside in ((result.when_member[e], True), (result.when_non_member[e], False)):
      chosen = scores[members[:, e] == inside, e]
      if len(chosen):
        assert value == pytest.approx(chosen.mean())
      else:
        assert np.isnan(value)
  np.testing.assert_array_equal(result.times_member, members.sum(axis=0))
  order = exposure.ranking(result)
  assert set(order[-2:]) == {0, 1}  # always or never a member
  assert (np.diff(result.gap[order[:-2]]) <= 0).all()


def test_an_easy_example_is_not_an_exposed_one():
  """A global threshold gives easy examples high scores as members and as others alike."""
  members = np.array([[True, True, False], [False, False, True]])
  scores = np.array([[90.0, 3.0, 0.0], [90.0, 1.0, 1.0]])
  assert exposure.ranking(exposure.per_example(scores, members)).tolist() == [1, 2, 0]


def test_overlap_of_known_sets():
  def exposed(values):
    members = np.array([[True] * len(values), [False] * len(values)])
    return exposure.per_example(np.array([values, [0.0] * len(values)]), members)

  rising, falling = exposed([0.0, 1.0, 2.0, 3.0, 4.0]), exposed([4.0, 3.0, 2.0, 1.0, 0.0])
  assert exposure.jaccard(rising, rising, top=2) == 1.0
  assert exposure.jaccard(rising, falling, top=2) == 0.0
  assert exposure.jaccard(rising, falling, top=3) == pytest.approx(1 / 5)
  assert exposure.jaccard(rising, falling, top=5) == 1.0
  for top in (0, 6):
    with pytest.raises(ValueError, match=f"top is {top}"):
      exposure.jaccard(rising, falling, top=top)


def test_comparison_tells_change_from_noise(key):
  rng = np.random.default_rng(0)
  members = rng.random((12, 300)) < 0.5
  noise, other_noise = rng.normal(size=(2, 12, 300))
  signal, other_signal = 20 * rng.normal(size=(2, 1, 300))
  options = {"top": 30, "num_resamples": 40}
  chance = 30 / (600 - 30)

  def compared(scores, reference):
    return exposure.compare(key, scores, reference, members, **options)

  same = compared(other_noise + signal * members, noise + signal * members)
  assert same["jaccard"]["value"] > 0.8
  changed = compared(noise + other_signal * members, noise + signal * members)
  assert changed["jaccard"]["value"] == pytest.approx(chance, abs=0.06)
  assert changed["jaccard"]["high"] < same["jaccard"]["low"]
  assert compared(noise, noise)["jaccard"]["value"] == 1.0
  assert (same["top"], same["num_examples"]) == (30, 300)
  alone = exposure.compare(key, noise[:1], noise[:1], members[:1], top=30)
  assert alone["jaccard"]["value"] is None


def test_scores_must_be_finite():
  members = np.ones((2, 3), bool)
  for bad in (np.nan, np.inf):
    with pytest.raises(ValueError, match="NaN or infinite"):
      exposure.per_example(np.full((2, 3), bad), members)
