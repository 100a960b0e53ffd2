"""Baselines that do not model single examples: one threshold for all, or one per class.

HIGHER SCORE MEANS MEMBER.
"""

import numpy as np

from ptq_jax.attack import blocks
from ptq_jax.base import ArrayLike, Bool, Float, Int

NUM_EDGES = 256
"""Candidate thresholds of `class_threshold`: quantiles of the shadows' scores."""


def loss_threshold(target_scores: Float[ArrayLike, "E V"]) -> Float[np.ndarray, "E"]:
  """The target's own score, averaged over views: confident examples are called members.

  Needs no shadow. Any other growing function of the loss gives nearly the same attack.

  Args:
    target_scores: float[E, V]; infinite and NaN scores are passed on.
  Returns:
    float64[E] on the host.
  Reference: Yeom et al. 2018, arXiv:1709.01604.
  """
  return np.asarray(target_scores, np.float64).mean(axis=-1)


def class_threshold(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "E V"],
  labels: Int[ArrayLike, "E"],
) -> Float[np.ndarray, "E"]:
  """The target's score, averaged over views, less the best threshold of the example's class.

  The threshold of a class is that with the best balanced accuracy on all its examples in all
  shadows, among 256 quantiles of all scores. So positive means "member" to this attacker.

  Args:
    shadow_scores: float[M, E, V], finite.
    shadow_members: bool[M, E].
    target_scores: float[E, V].
    labels: int[E], true classes, non-negative.
  Returns:
    float64[E] on the host.
  Raises:
    ValueError: if shapes disagree, labels are missing, or a class has only "in" or only "out".
  Reference: Song and Mittal 2021, arXiv:2003.10595.
  """
  return attack_classes(shadow_scores, shadow_members, target_scores[None], labels)[0]


def attack_classes(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "T E V"],
  labels: Int[ArrayLike, "E"] | None,
  *,
  left_out: Int[ArrayLike, "T K"] | None = None,
) -> Float[np.ndarray, "T E"]:
  """`class_threshold` for many targets; `left_out` as in `lira.attack`.

  Shadows are counted into histograms once; leaving one out subtracts its own.
  """
  inputs = blocks.prepare(shadow_scores, shadow_members, target_scores, left_out=left_out)
  labels = _checked_labels(labels, inputs.shadow_members.shape[1])
  scores = np.stack([np.asarray(row, np.float64).mean(axis=-1) for row in shadow_scores])
  edges = np.unique(np.quantile(scores, np.linspace(0, 1, NUM_EDGES + 1)))
  counts = np.stack([_count(*row, labels, edges) for row in zip(scores, inputs[1], strict=True)])
  total = counts.sum(axis=0)
  results = []
  for t, row in enumerate(target_scores):
    rest = total if left_out is None else total - counts[inputs.left_out[t]].sum(axis=0)
    results.append(loss_threshold(row) - edges[_best_edges(rest)][labels])
  return np.stack(results)


def _count(scores, members, labels, edges):
  """int[2, C, K]: how many "out" and "in" scores of each class lie in [edge k, edge k + 1)."""
  num_classes, num_edges = labels.max() + 1, len(edges)
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
  if labels.shape != (num_examples,) or labels.min() < 0:
    raise ValueError(
      f"labels of shape {labels.shape} must be one non-negative class for each of "
      f"{num_examples} examples."
    )
  return labels.astype(np.int64)
