"""Training losses and accuracy of a batch of one model."""

import jax.numpy as jnp
import optax

from ptq_jax.base import Array, ArrayLike, Float, Int


def cross_entropy(
  logits: Float[ArrayLike, "n C"],
  labels: Int[ArrayLike, "n"],
  *,
  label_smoothing: float = 0.0,
) -> Float[Array, ""]:
  """Mean cross-entropy in nats, in float32 whatever the dtype of the logits.

  Args:
    logits: of one batch.
    labels: in 0 .. C - 1.
    label_smoothing: probability mass spread evenly over all classes.
  """
  logits = jnp.asarray(logits, jnp.float32)
  num_classes = logits.shape[-1]
  targets = jnp.asarray(labels)[:, None] == jnp.arange(num_classes)[None]
  targets = (1 - label_smoothing) * targets + label_smoothing / num_classes
  return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def accuracy(logits: Float[ArrayLike, "n C"], labels: Int[ArrayLike, "n"]) -> Float[Array, ""]:
  """Share of examples whose largest logit is their label's."""
  return jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
