"""Threshold baselines: the mean score, and the best threshold of each class."""

import numpy as np
import pytest

from ptq_jax.attack import threshold

M, E, V = 4, 60, 2


@pytest.fixture(scope="module")
def scores():
  rng = np.random.default_rng(0)
  members = rng.random((M, E)) < 0.5
  labels = np.arange(E) % 3
  shadows = rng.normal(size=(M, E, V)) + members[..., None] + 3 * labels[None, :, None]
  return shadows, members, labels


def best_threshold(scores, members, edges):
  advantage = [(scores[members] >= t).mean() - (scores[~members] >= t).mean() for t in edges]
  return edges[int(np.argmax(advantage))]


def test_loss_threshold_is_the_mean_over_views():
  scores = np.array([[1.0, 3.0], [np.inf, 0.0], [-2.0, -4.0]], np.float32)
  result = threshold.loss_threshold(scores)
  assert result.dtype == np.float64
  np.testing.assert_array_equal(result, [2.0, np.inf, -3.0])


def test_class_threshold_matches_a_search(scores):
  shadows, members, labels = scores
  target = shadows[0] + 0.2
  means = shadows.mean(axis=-1)
  edges = np.unique(np.quantile(means, np.linspace(0, 1, threshold.NUM_EDGES + 1)))
  chosen = [
    best_threshold(means[:, labels == c].ravel(), members[:, labels == c].ravel(), edges)
    for c in range(3)
  ]
  expected = target.mean(axis=-1) - np.array(chosen)[labels]
  np.testing.assert_allclose(threshold.class_threshold(shadows, members, target, labels), expected)


def test_leaving_out_subtracts_a_shadow(scores):
  shadows, members, labels = scores
  left_out = np.arange(M)[:, None]
  result = threshold.attack_classes(shadows, members, shadows, labels, left_out=left_out)
  means = shadows.mean(axis=-1)
  edges = np.unique(np.quantile(means, np.linspace(0, 1, threshold.NUM_EDGES + 1)))
  for t in range(M):
    keep = np.arange(M) != t
    for c in range(3):
      chosen = np.ix_(keep, labels == c)
      best = best_threshold(means[chosen].ravel(), members[chosen].ravel(), edges)
      np.testing.assert_allclose(result[t, labels == c], means[t, labels == c] - best)


def test_classes_with_one_side_or_no_labels_are_refused(scores):
  shadows, members, labels = scores
  one_sided = members.copy()
  one_sided[:, labels == 1] = True
  with pytest.raises(ValueError, match="class 1 has only members or only non-members"):
    threshold.class_threshold(shadows, one_sided, shadows[0], labels)
  with pytest.raises(ValueError, match="labels are missing"):
    threshold.attack_classes(shadows, members, shadows, None)
  with pytest.raises(ValueError, match="non-negative class"):
    threshold.class_threshold(shadows, members, shadows[0], labels - 1)


def test_absent_classes_do_not_matter(scores):
  shadows, members, labels = scores
  plain = threshold.class_threshold(shadows, members, shadows[0], labels)
  gaps = threshold.class_threshold(shadows, members, shadows[0], labels * 2 + 1)
  np.testing.assert_array_equal(gaps, plain)
