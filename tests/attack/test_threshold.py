"""Threshold baselines: the mean score, and the best threshold of each class."""

import jax
import jax.numpy as jnp
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


def test_on_device_jit_is_eager_is_the_host(scores):
  """Row 13's siblings: traced, eager and host thresholds agree, and vmap is a loop over targets."""
  shadows, members, labels = scores
  device = [jnp.asarray(array, jnp.float32) for array in (shadows, shadows[:2] + 0.2)]
  mean = threshold.loss_threshold(device[1][0])
  assert isinstance(mean, jax.Array)
  np.testing.assert_allclose(mean, threshold.loss_threshold(shadows[0] + 0.2), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(threshold.loss_threshold)(device[1][0]), mean, rtol=1e-6)

  def attack(target):
    return threshold.class_threshold(device[0], members, target, labels)

  eager = [attack(target) for target in device[1]]
  expected = threshold.attack_classes(shadows, members, shadows[:2] + 0.2, labels)
  np.testing.assert_allclose(eager, expected, atol=1e-5)
  np.testing.assert_allclose(jax.vmap(attack)(device[1]), eager, atol=1e-6)
  traced = jax.jit(threshold.class_threshold, static_argnames="num_classes")(
    device[0], jnp.asarray(members), device[1][0], jnp.asarray(labels), num_classes=3
  )
  np.testing.assert_allclose(traced, eager[0], atol=1e-6)


def test_labels_may_be_any_numbers_and_take_no_room(scores):
  """Row 12: a class numbered 1e9 is a class, not a table of a thousand million rows."""
  shadows, members, labels = scores
  plain = threshold.class_threshold(shadows, members, shadows[0], labels)
  far = np.where(labels == 2, 10**9, labels)
  np.testing.assert_array_equal(threshold.class_threshold(shadows, members, shadows[0], far), plain)
  with pytest.raises(ValueError, match="type float64 must be one non-negative class"):
    threshold.class_threshold(shadows, members, shadows[0], labels + 0.5)


def test_leaving_out_by_example_subtracts_these_scores(scores):
  shadows, members, labels = scores
  left_out = np.stack([members.argmax(axis=0), (~members).argmax(axis=0)])[None]
  left_out = np.where(members.any(axis=0) & (~members).any(axis=0), left_out, 0)
  result = threshold.attack_classes(shadows, members, shadows[:1], labels, left_out=left_out)
  keep = np.ones_like(members)
  np.put_along_axis(keep, left_out[0], False, axis=0)
  means = shadows.mean(axis=-1)
  edges = np.unique(np.quantile(means, np.linspace(0, 1, threshold.NUM_EDGES + 1)))
  for c in range(3):
    chosen = keep & (labels == c)
    best = best_threshold(means[chosen], members[chosen], edges)
    np.testing.assert_allclose(result[0, labels == c], means[0, labels == c] - best)
