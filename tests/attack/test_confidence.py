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
