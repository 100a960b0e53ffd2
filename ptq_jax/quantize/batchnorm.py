"""Running statistics of batch normalisation, estimated anew for a network whose weights changed."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import ArrayLike, Key, Keys, Shaped, Variables
from ptq_jax.models import conv
from ptq_jax.quantize import capture
from ptq_jax.quantize.capture import Hashable

BATCH_SIZE = 512
"""Images at once, each batch normalised by its own statistics."""


def estimate(
  key: Key,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "n ..."],
  *,
  batch_size: int = BATCH_SIZE,
) -> Variables:
  """One model with the running means and variances that some images give.

  The model runs in training mode, in batches nearly equal in size and at most `batch_size`; the
  batches' means and mean squares are averaged. The momentum of a layer does not matter. Variables
  without "batch_stats" come back as they are.

  Args:
    key: for dropout, should the model have some.
    variables: of one model that runs as `model.apply(variables, images, train=True)`.
  Returns:
    Variables of the same tree and dtypes.
  """
  if not variables.get("batch_stats"):
    return variables
  total = None
  for index, batch in enumerate(capture.batches(images, batch_size)):
    moments = _batch_moments(Hashable(model), jax.random.fold_in(key, index), variables, batch)
    weight = len(batch) / len(images)
    part = jax.tree.map(functools.partial(jnp.multiply, weight), moments)
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return {**variables, "batch_stats": _centered(total, variables["batch_stats"])}


def estimate_stacked(
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  changed: Sequence[bool],
) -> Variables:
  """`estimate` for variables [P, M, ...], plan by plan, where the plan has changed the weights."""
  plans = [trees.take(variables, index) for index in range(len(changed))]
  for index in np.flatnonzero(changed):
    models = [
      estimate(key, model, trees.take(plans[index], m), images[m]) for m, key in enumerate(keys)
    ]
    plans[index] = trees.stack(models)
  return trees.stack(plans)


@functools.partial(conv.jit, static_argnums=0)
def _batch_moments(model, key, variables, images):
  """Means, and mean squares in place of variances, of a batch, in the tree of "batch_stats".

  Running statistics r become m r + (1 - m) b for those of the batch b, so one update of zeros and
  one of ones tell both m and b, whatever the momentum.
  """

  def updated(value):
    stats = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), variables["batch_stats"])
    _, new = model.module.apply(
      {**variables, "batch_stats": stats},
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    return new["batch_stats"]

  def of_batch(from_zeros, from_ones, running):
    momentum = from_ones - from_zeros
    return jnp.where(momentum < 1, from_zeros / (1 - momentum), running)

  batch = jax.tree.map(of_batch, updated(0.0), updated(1.0), variables["batch_stats"])
  leaves = trees.flatten(batch)
  squares = {path: leaf + leaves[mean] ** 2 for path, mean, leaf in _variances(leaves)}
  return trees.unflatten(leaves | squares)


def _centered(moments, like):
  """Means and variances from means and mean squares, in the dtypes of `like`."""
  leaves = trees.flatten(moments)
  centered = {path: jnp.maximum(leaf - leaves[m] ** 2, 0) for path, m, leaf in _variances(leaves)}
  tree = trees.unflatten(leaves | centered)
  return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, dict(like))


def _variances(leaves):
  """(path of a variance, path of its mean, the variance) of every pair in the statistics."""
  for path, leaf in leaves.items():
    *parents, name = path.split(trees.SEPARATOR)
    mean = trees.SEPARATOR.join([*parents, "mean"])
    if name == "var" and mean in leaves:
      yield path, mean, leaf
