"""The score that the attacks read: the logit-scaled confidence in the true class."""

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import ArrayLike, Float, Int

LOG_FLOOR = np.log(1e-45)
"""Added inside both logarithms by the public code: scores lie within 103.7 of zero."""


def logit_scaled(
  logits: Float[ArrayLike, "*batch C"], labels: Int[ArrayLike, "..."]
) -> Float[ArrayLike, "*batch"]:
  """Log of the true class's probability minus the log of all the others' together.

  For softmax probabilities p: log(p_y + 1e-45) - log(sum_{c != y} p_c + 1e-45). The others are
  summed, not taken from 1 - p_y, and everything stays in logarithms, so a confident model keeps its
  digits. The result is close to normal over models, which is what LiRA assumes.

  A JAX array is computed where it lies, in float32 (float64 if it is float64), and may be traced.
  A NumPy array is computed on the host in float64 and gives a NumPy array.

  Args:
    logits: float[..., C], at least two classes.
    labels: int, the true classes in [0, C), broadcastable to `logits.shape[:-1]`: for logits
      [E, V, C] give labels[:, None].
  Returns:
    [...], natural-log units; higher means more confident, which speaks for a member.
  Raises:
    ValueError: if there are fewer than two classes, or labels do not fit or lie outside [0, C).
  Reference: Carlini et al. 2022, arXiv:2112.03570.
  """
  _check(logits, labels)
  if isinstance(logits, np.ndarray):
    with jax.enable_x64(True):
      return np.asarray(_log_odds(jnp.asarray(logits, jnp.float64), jnp.asarray(labels)))
  return _log_odds(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), labels)


def _log_odds(logits, labels):
  labels = jnp.broadcast_to(labels, logits.shape[:-1])
  is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  log_all = jax.nn.logsumexp(logits, axis=-1)
  log_label = jax.nn.logsumexp(logits, axis=-1, where=is_label) - log_all
  log_others = jax.nn.logsumexp(logits, axis=-1, where=~is_label) - log_all
  floor = jnp.asarray(LOG_FLOOR, logits.dtype)
  return jnp.logaddexp(log_label, floor) - jnp.logaddexp(log_others, floor)


def _check(logits, labels):
  num_classes = logits.shape[-1]
  if num_classes < 2:
    raise ValueError(f"logits need at least two classes on the last axis, found {num_classes}.")
  try:
    fits = np.broadcast_shapes(logits.shape[:-1], labels.shape) == logits.shape[:-1]
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      f"labels of shape {labels.shape} do not broadcast to {logits.shape[:-1]}, the shape of the "
      "logits without classes; for logits [E, V, C] give labels[:, None]."
    )
  if isinstance(labels, np.ndarray) and labels.size:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
      raise ValueError(f"labels lie in [{low}, {high}]; {num_classes} classes allow [0, C).")
