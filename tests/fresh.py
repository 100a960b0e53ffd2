"""Variables of a model without running its initialisation, each draw of which would be compiled."""

import jax
import numpy as np


def variables(model, *inputs, seed=0, **options):
  """Random numbers in the shapes that `model.init` gives; scales and variances are near 1."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda *given: model.init(jax.random.key(0), *given, **options), *inputs)

  def draw(path, leaf):
    if path[-1].key in ("scale", "var"):
      values = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      values = rng.normal(0, 0.3, leaf.shape)
    return jax.numpy.asarray(np.asarray(values, leaf.dtype))

  return jax.tree_util.tree_map_with_path(draw, shapes)


def stacked(model, *inputs, num_models):
  """Variables of several models, leaves [M, ...]."""
  each = [variables(model, *inputs, seed=seed) for seed in range(num_models)]
  return jax.tree.map(lambda *leaves: jax.numpy.asarray(np.stack(leaves)), *each)
