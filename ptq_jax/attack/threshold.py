"""Baselines that do not model single examples: one threshold for all, or one per class.

HIGHER SCORE MEANS MEMBER. JAX arrays stay on their device and in their type (at least float32),
under `jax.jit` and `jax.vmap` too; NumPy arrays and lists are computed in float64 on the host.
"""

import jax.numpy as jnp
import numpy as np

from ptq_jax.attack import blocks
from ptq_jax.base import (
  ArrayLike,
  Float,
  Int,
  Nested,
  Shaped,
  as_members,
  as_scores,
  is_traced,
  on_device,
)

NUM_EDGES = 256
"""Candidate thresholds of `class_threshold`: quantiles of the shadows' scores."""


def loss_threshold(
  target_scores: Shaped[ArrayLike, "*T E V"] | Nested,
) -> Float[ArrayLike, "*T E"]:
  """The target's own score, averaged over views: confident examples are called members.

  Needs no shadow. Any other growing function of the loss gives nearly the same attack.

  Args:
    target_scores: float[E, V], or of T targets; infinite and NaN scores are passed on.
  Returns:
    [E]: float64 on the host, or on the device of a JAX array in its type.
  Raises:
    ValueError: if the scores have no axis of views.
  Reference: Yeom et al. 2018, arXiv:1709.01604.
  """
  scores = as_scores(target_scores, name="target_scores")
  if scores.ndim < 2:
    raise ValueError(f"target_scores are {scores.shape}; they must be [E, V], V views.")
  if on_device(scores):
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32)).mean(axis=-1)
  return np.asarray(scores, np.float64).mean(axis=-1)


def class_threshold(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "E *V"] | Nested,
  labels: Shaped[ArrayLike, "E"] | Nested,
  *,
  num_classes: int | None = None,
) -> Float[ArrayLike, "E"]:
  """The target's score, averaged over views, less the best threshold of the example's class.

  The threshold of a class is that with the best balanced accuracy on all its examples in all
  shadows, among 256 quantiles of all scores. So positive means "member" to this attacker.

  Args:
    shadow_scores: float[M, E, V], finite.
    shadow_members: bool[M, E].
    target_scores: float[E, V].
    labels: int[E], true classes, non-negative; any numbers, where they are known.
    num_classes: C; only needed where labels are traced.
  Returns:
    [E], float64 on the host, or on the device of JAX arrays in their type.
  Raises:
    ValueError: if shapes disagree, labels are missing or no classes, or a class has only "in" or
      only "out". Where values are traced the scores of such a class are NaN instead.
  Reference: Song and Mittal 2021, arXiv:2003.10595.
  """
  if not on_device(shadow_scores, shadow_members, target_scores, labels):
    return attack_classes(shadow_scores, shadow_members, np.asarray(target_scores)[None], labels)[0]
  members = jnp.asarray(as_members(shadow_members, name="shadow_members"))
  shadows, targets = blocks.with_views(shadow_scores, jnp.asarray(target_scores)[None])
  blocks.check_shapes(shadows, members, targets)
  labels = jnp.asarray(labels)
  if not is_traced(labels):
    labels = jnp.asarray(_checked_labels(labels, members.shape[1]))
    num_classes = int(labels.max()) + 1
  elif num_classes is None:
    raise ValueError("labels are traced, so num_classes must be given.")
  result = _on_device(*map(jnp.asarray, (shadows, members, targets[0], labels)), num_classes)
  if not is_traced(shadows, members, targets, labels) and bool(jnp.isnan(result).any()):
    raise ValueError(
      "scores are NaN, or a class has only members or only non-members among the shadows; its "
      "threshold needs both."
    )
  return result


def _on_device(shadows, members, target, labels, num_classes):
  """`class_threshold` in `jax.numpy`; edges that are equal count as one."""
  dtype = jnp.promote_types(jnp.promote_types(shadows.dtype, target.dtype), jnp.float32)
  scores = shadows.astype(dtype).mean(axis=-1)
  edges = jnp.quantile(scores, jnp.linspace(0, 1, NUM_EDGES + 1, dtype=dtype))
  bins = jnp.searchsorted(edges, scores, side="right") - 1
  bins = jnp.clip(bins, 0, NUM_EDGES)  # the last edge may be rounded below the largest score
  classes = jnp.broadcast_to(labels, members.shape)
  counts = jnp.zeros((2, num_classes, NUM_EDGES + 1), jnp.int32)
  counts = counts.at[members.astype(jnp.int32), classes, bins].add(1)
  accepted = jnp.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]
  rates = accepted / accepted[..., :1].astype(dtype)
  cut = edges[jnp.argmax(rates[1] - rates[0], axis=-1)]
  cut = jnp.where(jnp.isnan(rates).any(axis=(0, 2)), jnp.nan, cut)
  inside = (labels >= 0) & (labels < num_classes)
  own = target.astype(dtype).mean(axis=-1) - cut[jnp.clip(labels, 0, num_classes - 1)]
  return jnp.where(inside, own, jnp.nan)


def attack_classes(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "T E *V"] | Nested,
  labels: Shaped[ArrayLike, "E"] | Nested | None,
  *,
  left_out: Int[ArrayLike, "T K *E"] | None = None,
) -> Float[np.ndarray, "T E"]:
  """`class_threshold` for many targets; `left_out` as in `lira.attack`.

  Shadows are counted into histograms once; leaving one out subtracts its own.
  """
  inputs = blocks.prepare(shadow_scores, shadow_members, target_scores, left_out=left_out)
  labels = _checked_labels(labels, inputs.shadow_members.shape[1])
  scores = np.stack([loss_threshold(np.asarray(row)) for row in inputs.shadow_scores])
  if not np.isfinite(scores).all():
    raise ValueError("shadow scores are NaN or infinite; a threshold per class needs finite ones.")
  edges = np.unique(np.quantile(scores, np.linspace(0, 1, NUM_EDGES + 1)))
  rows = zip(scores, inputs.shadow_members, strict=True)
  counts = np.stack([_count(*row, labels, edges, labels.max() + 1) for row in rows])
  total = counts.sum(axis=0)
  results = []
  for t, row in enumerate(inputs.target_scores):
    rest = total
    if left_out is not None:
      gone = inputs.left_out[t]
      if gone.ndim == 1:
        rest = total - counts[gone].sum(axis=0)
      else:
        kept = np.ones(scores.shape, bool)
        np.put_along_axis(kept, gone, False, axis=0)
        classes = np.broadcast_to(labels, scores.shape)[kept]
        rest = _count(scores[kept], inputs.shadow_members[kept], classes, edges, labels.max() + 1)
    results.append(loss_threshold(np.asarray(row)) - edges[_best_edges(rest)][labels])
  return np.stack(results)


def _count(scores, members, labels, edges, num_classes):
  """int[2, C, K]: how many "out" and "in" scores of each class lie in [edge k, edge k + 1)."""
  num_edges = len(edges)
  bins = np.searchsorted(edges, scores, side="right") - 1
  flat = (members * num_classes + labels) * num_edges + bins
  return np.bincount(flat, minlength=2 * num_classes * num_edges).reshape(2, -1, num_edges)


def _best_edges(counts):
  """int[C]: for each class the edge with the largest TPR - FPR, accepting scores at or above it."""
  accepted = counts[..., ::-1].cumsum(axis=-1)[..., ::-1]
  total = accepted[..., :1]
  present = (counts.sum(axis=(0, 2)) > 0)[:, None]
  if (present & (total == 0)).any():
    where = int(np.argmax((present & (total == 0)).any(axis=(0, 2))))
    raise ValueError(
      f"class {where} has only members or only non-members among the shadows; its threshold needs "
      "both."
    )
  rates = accepted / np.maximum(total, 1)
  return np.argmax(rates[1] - rates[0], axis=-1)


def _checked_labels(labels, num_examples):
  if labels is None:
    raise ValueError("labels are missing; a threshold per class needs the true classes, int[E].")
  labels = np.asarray(labels)
  if labels.shape != (num_examples,) or labels.dtype.kind not in "iu" or labels.min() < 0:
    raise ValueError(
      f"labels of shape {labels.shape} and type {labels.dtype} must be one non-negative class for "
      f"each of {num_examples} examples."
    )
  return np.unique(labels, return_inverse=True)[1].astype(np.int64)
