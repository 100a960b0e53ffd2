"""Several releases of one model at once: what does publishing two versions of it cost?

A release is one version of the target, say full precision or a bit width. For each example and view
the scores of all R releases of a shadow are one vector, described by a multivariate normal: a mean
of its own on each side, and a covariance that all examples share on each side, over the degrees of
freedom. `joint_ratio` is the likelihood ratio of the target's vector. One release is `lira.online`
with the mean for its center and the pooled variance. HIGHER SCORE MEANS MEMBER.

Reference: LiRA, arXiv:2112.03570, section IV, with several queries as one vector; that several
compressed versions expose more: arXiv:2507.16872.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.attack import blocks
from ptq_jax.base import Array, ArrayLike, Bool, Float, Int, Shaped, as_members


def joint_ratio(
  shadow_scores: Float[Array, "R M E V"],
  shadow_members: Bool[Array, "M E"],
  target_scores: Float[Array, "R E V"],
  *,
  used: Bool[Array, "M E"] | None = None,
) -> Float[Array, "E"]:
  """Log-likelihood ratio of one target's scores in all releases, averaged over views.

  Plain `jax.numpy` in the type of the scores; nothing is checked.

  Args:
    shadow_scores: scores of every shadow in every release.
    shadow_members: who trained on what.
    target_scores: the target's scores in the same releases.
    used: which shadows the attacker has for each example; None means all.
  Returns:
    [E]; NaN where a side has no shadow, everywhere if a side has no degree of freedom.
  """
  used = jnp.ones_like(shadow_members) if used is None else used
  ratio = 0.0
  for sign, side in ((1, shadow_members & used), (-1, ~shadow_members & used)):
    ratio = ratio + sign * _log_density(shadow_scores, side, target_scores)
  return ratio.mean(axis=-1)


def _log_density(scores, side, targets):
  """log N(target; mean of the side, covariance of all examples), without the constant: [E, V]."""
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  weight, scores = side.astype(dtype)[None, ..., None], scores.astype(dtype)
  count = weight.sum(axis=1)
  mean = (weight * scores).sum(axis=1) / count
  rest = weight * (scores - mean[:, None])
  freedom = (jnp.maximum(side.sum(axis=0) - 1, 0)).sum() * scores.shape[-1]
  covariance = jnp.einsum("rmev,smev->rs", rest, rest, precision="highest") / freedom
  covariance += 1e-9 * jnp.diag(jnp.diag(covariance))  # two releases may be one and the same
  root = jnp.linalg.cholesky(covariance)
  offset = (targets.astype(dtype) - mean).reshape(len(mean), -1)
  white = jax.scipy.linalg.solve_triangular(root, offset, lower=True)
  distance = jnp.square(white).sum(axis=0).reshape(mean.shape[1:])
  return -distance / 2 - jnp.log(jnp.diag(root)).sum()


def attack(
  shadow_scores: Shaped[ArrayLike, "R M E V"],
  shadow_members: Shaped[ArrayLike, "M E"],
  target_scores: Shaped[ArrayLike, "R T E V"],
  *,
  left_out: Int[ArrayLike, "T K *E"] | None = None,
) -> Float[np.ndarray, "T E"]:
  """`joint_ratio` for many targets in float64 on the host; `left_out` as in `lira.attack`.

  Raises:
    ValueError: if shapes disagree, a score is not finite, an example lacks shadows on a side, or no
      example has two of them.
  """
  shadows, targets = np.asarray(shadow_scores), np.asarray(target_scores)
  members = np.asarray(as_members(shadow_members, name="shadow_members"))
  if len(shadows) != len(targets) or shadows.ndim != 4 or targets.ndim != 4:
    raise ValueError(
      f"shadow and target scores are {shadows.shape} and {targets.shape}; they must be of the same "
      "releases, [R, M, E, V] and [R, T, E, V]."
    )
  inputs = blocks.prepare(shadows[0], members, targets[0], left_out=left_out)
  for name, array in (("shadow", shadows), ("target", targets)):
    if not np.isfinite(array).all():
      raise ValueError(f"{name} scores are NaN or infinite; attacks with shadows need finite ones.")
  blocks.check_counts(inputs, sides=("in", "out"), needed=1, reason="a joint ratio")
  rows = []
  with jax.enable_x64(True):
    ratio = jax.jit(joint_ratio)
    device = jnp.asarray(shadows, jnp.float64), jnp.asarray(members)
    for t in range(targets.shape[1]):
      used = np.ones_like(members)
      if left_out is not None and inputs.left_out.ndim == 2:
        used[inputs.left_out[t]] = False
      elif left_out is not None:
        np.put_along_axis(used, inputs.left_out[t], False, axis=0)
      for side, name in ((members & used, "in"), (~members & used, "out")):
        if side.sum(axis=0).max() < 2:
          raise ValueError(f"{name!r} shadows have fewer than one degree of freedom; train more.")
      rows.append(np.asarray(ratio(*device, jnp.asarray(targets[:, t], jnp.float64), used=used)))
  return np.stack(rows)
