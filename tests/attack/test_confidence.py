"""Logit-scaled confidence against its definition, at the extremes, traced, and on bad labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.attack import confidence


def by_definition(logits, labels):
  scores = np.empty(logits.shape[:-1])
  for index in np.ndindex(scores.shape):
    row = logits[index].astype(np.float64)
    p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    label = np.broadcast_to(labels, scores.shape)[index]
    scores[index] = np.log(p[label] + 1e-45) - np.log(np.delete(p, label).sum() + 1e-45)
  return scores


@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
def test_matches_definition(scale):
  rng = np.random.default_rng(0)
  logits = (scale * rng.normal(size=(20, 3, 7))).astype(np.float32)
  labels = rng.integers(0, 7, size=(20, 1))
  expected = by_definition(logits, labels)
  on_host = confidence.logit_scaled(logits, labels)
  assert isinstance(on_host, np.ndarray)
  assert on_host.dtype == np.float64
  np.testing.assert_allclose(on_host, expected, rtol=1e-10, atol=1e-10)
  np.testing.assert_allclose(
    confidence.logit_scaled(jnp.asarray(logits), labels), expected, rtol=1e-5, atol=1e-5 * scale
  )


def test_certain_models_stay_finite_and_ordered():
  logits = np.array([[1e4, 0.0, 0.0], [40.0, 0.0, 0.0], [30.0, 0.0, 0.0], [-1e4, 0.0, 0.0]])
  for array in (logits, jnp.asarray(logits, jnp.float32)):
    scores = np.asarray(confidence.logit_scaled(array, np.zeros(4, int)))
    np.testing.assert_allclose(scores[[0, 3]], [103.616, -103.616], atol=1e-3)
    np.testing.assert_allclose(scores[1:3], [40 - np.log(2), 30 - np.log(2)], rtol=1e-5)


def test_vmap_jit_and_half_precision():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 3, size=5))
  plain = confidence.logit_scaled(logits, labels[None])
  mapped = jax.jit(jax.vmap(confidence.logit_scaled, in_axes=(0, None)))(logits, labels)
  np.testing.assert_allclose(mapped, plain, rtol=1e-5, atol=1e-6)
  half = confidence.logit_scaled(logits.astype(jnp.bfloat16), labels[None])
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, plain, atol=0.05)


def test_classes_may_be_permuted_and_logits_shifted():
  rng = np.random.default_rng(2)
  logits, labels = rng.normal(size=(9, 6)), rng.integers(0, 6, size=9)
  order = rng.permutation(6)
  moved = confidence.logit_scaled(logits[:, order] + 100, np.argsort(order)[labels])
  np.testing.assert_allclose(moved, confidence.logit_scaled(logits, labels), rtol=1e-10)


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (np.array([0, 1, 2, 3, -1]), r"labels lie in \[-1, 3\]"),
    (np.array([0, 1, 2, 3, 4]), r"labels lie in \[0, 4\]"),
    (np.zeros(4, int), "do not broadcast"),
    (np.zeros((2, 5), int), "do not broadcast"),
  ],
)
def test_bad_labels(labels, message):
  with pytest.raises(ValueError, match=message):
    confidence.logit_scaled(np.zeros((5, 4)), labels)


def test_one_class_is_no_classifier():
  with pytest.raises(ValueError, match="at least two classes"):
    confidence.logit_scaled(np.zeros((5, 1)), np.zeros(5, int))


def test_labels_out_of_range_are_refused_on_a_device_too():
  """Row 9: an error outside jit, NaN inside."""
  logits, labels = jnp.zeros((2, 3)), jnp.array([7, 1])
  with pytest.raises(ValueError, match=r"labels lie in \[1, 7\]; 3 classes"):
    confidence.logit_scaled(logits, labels)
  traced = np.asarray(jax.jit(confidence.logit_scaled)(logits, labels))
  assert np.isnan(traced[0])
  assert traced[1] == pytest.approx(-np.log(2))
  with pytest.raises(ValueError, match="labels are of type float"):
    confidence.logit_scaled(logits, jnp.array([1.5, 0.0]))


def test_lists_and_the_snippet_of_the_readme():
  """Row 17: logits [M, E, C] with labels [E], and lists, are scores [M, E]."""
  logits = np.random.default_rng(0).normal(size=(4, 5, 3))
  labels = np.array([0, 2, 1, 1, 0])
  scores = confidence.logit_scaled(logits, labels)
  np.testing.assert_allclose(scores, by_definition(logits, labels), rtol=1e-10)
  np.testing.assert_array_equal(confidence.logit_scaled(logits.tolist(), labels.tolist()), scores)


def test_gradient_is_that_of_the_definition():
  logits, labels = jnp.array([[1.0, 0.5, -0.3]]), jnp.array([1])
  slope = jax.grad(lambda x: confidence.logit_scaled(x, labels).sum())(logits)
  others = jax.nn.softmax(logits[0, jnp.array([0, 2])])
  np.testing.assert_allclose(slope[0], [-others[0], 1, -others[1]], rtol=1e-5)


def test_rescaling_undoes_a_shift_and_a_scale():
  rng = np.random.default_rng(1)
  shadows = rng.normal(size=(5, 2000, 2)) + np.arange(5)[:, None, None] / 10
  moved = confidence.rescale(0.4 * shadows[:2] - 3, shadows)
  quartiles = np.quantile(moved.reshape(2, -1), (0.25, 0.5, 0.75), axis=1)
  goal = np.quantile(shadows.reshape(5, -1), (0.25, 0.5, 0.75), axis=1).mean(axis=1)
  np.testing.assert_allclose(quartiles[1], goal[1])
  np.testing.assert_allclose(quartiles[2] - quartiles[0], goal[2] - goal[0])
  flat = confidence.rescale(np.full((1, 6), 7.0), shadows[:, :6, 0])
  np.testing.assert_allclose(flat, np.median(shadows[:, :6, 0], axis=1).mean())
