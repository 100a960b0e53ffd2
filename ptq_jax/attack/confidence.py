"""The score that the attacks read: the logit-scaled confidence in the true class."""

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import ArrayLike, Float, Nested, Shaped, as_scores, is_traced, on_device

LOG_FLOOR = np.log(1e-45)
"""Added inside both logarithms by the public code: scores lie within 103.7 of zero."""


def logit_scaled(
  logits: Shaped[ArrayLike, "*batch C"] | Nested, labels: Shaped[ArrayLike, "..."] | Nested | int
) -> Float[ArrayLike, "*batch"]:
  """Log of the true class's probability minus the log of all the others' together.

  For softmax probabilities p: log(p_y + 1e-45) - log(sum_{c != y} p_c + 1e-45). The others are
  summed, not taken from 1 - p_y, and everything stays in logarithms, so a confident model keeps its
  digits. The result is close to normal over models, which is what LiRA assumes.

  A JAX array is computed where it lies, in float32 (float64 if it is float64), and may be traced.
  NumPy arrays and lists are computed on the host in float64 and give a NumPy array.

  Args:
    logits: float[..., C], at least two classes.
    labels: int, the true classes in [0, C), broadcastable to `logits.shape[:-1]`: for logits
      [E, V, C] give labels[:, None].
  Returns:
    [...], natural-log units; higher means more confident, which speaks for a member.
  Raises:
    ValueError: if there are fewer than two classes, or labels do not fit, are no integers, or lie
      outside [0, C). Where labels are traced the scores of those outside are NaN instead.
  Reference: Carlini et al. 2022, arXiv:2112.03570.
  """
  logits, labels = as_scores(logits, name="logits"), as_scores(labels, name="labels")
  _check(logits, labels)
  if on_device(logits, labels):
    return _log_odds(jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32)), labels)
  with jax.enable_x64(True):
    return np.asarray(_log_odds(jnp.asarray(logits, jnp.float64), jnp.asarray(labels)))


def rescale(
  scores: Shaped[ArrayLike, "N E *V"], like: Shaped[ArrayLike, "M E *V"]
) -> Float[np.ndarray, "N E *V"]:
  """Scores of each model shifted and scaled to the median and spread of other models.

  Quantizing moves and narrows all scores of a model alike. An attacker who knows only
  full-precision shadows undoes that: over the pool, half of it members, the target's scores get the
  median and the range between quartiles that its shadows have on average. Membership is not used.

  Args:
    scores: float[N, E, V] (or [N, E]), of the models to move.
    like: float[M, E, V] (or [M, E]), of the shadows on the same examples.
  Returns:
    float64[N, E, V] on the host; a model whose scores have no spread is only shifted.
  """
  quartiles = [
    np.stack([np.quantile(np.asarray(row, np.float64), (0.25, 0.5, 0.75)) for row in rows])
    for rows in (scores, like)
  ]
  low, middle, high = quartiles[0].T
  spread, goal = high - low, float(np.mean(quartiles[1][:, 2] - quartiles[1][:, 0]))
  scale = np.where(spread > 0, goal / np.where(spread > 0, spread, 1), 1)
  center = float(np.mean(quartiles[1][:, 1]))
  shape = (-1, *(1,) * (np.ndim(scores) - 1))
  moved = np.asarray(scores, np.float64) - middle.reshape(shape)
  return moved * scale.reshape(shape) + center


def _log_odds(logits, labels):
  labels = jnp.broadcast_to(labels, logits.shape[:-1])
  is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  log_all = jax.nn.logsumexp(logits, axis=-1)
  log_label = jax.nn.logsumexp(logits, axis=-1, where=is_label) - log_all
  log_others = jax.nn.logsumexp(logits, axis=-1, where=~is_label) - log_all
  floor = jnp.asarray(LOG_FLOOR, logits.dtype)
  odds = jnp.logaddexp(log_label, floor) - jnp.logaddexp(log_others, floor)
  return jnp.where(is_label.any(axis=-1), odds, jnp.nan)


def _check(logits, labels):
  num_classes = logits.shape[-1] if logits.ndim else 0
  if num_classes < 2:
    raise ValueError(f"logits need at least two classes on the last axis, found {num_classes}.")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels are of type {labels.dtype}; they must be integers.")
  try:
    fits = np.broadcast_shapes(logits.shape[:-1], labels.shape) == logits.shape[:-1]
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      f"labels of shape {labels.shape} do not broadcast to {logits.shape[:-1]}, the shape of the "
      "logits without classes; for logits [E, V, C] give labels[:, None]."
    )
  if labels.size and not is_traced(labels):
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
      raise ValueError(f"labels lie in [{low}, {high}]; {num_classes} classes allow [0, C).")
