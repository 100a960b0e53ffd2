"""Forward passes of stacked models over a data set, reduced batch by batch on the device.

Logits of all models are too big to keep (64 models x 2 views x 100 000 examples x 200 classes are
10 GB), so each batch of logits is reduced at once by a function that the caller passes in: to the
score of an attack, or to correct or not.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import ArrayLike, Int, Shaped, UInt8, Variables
from ptq_jax.models import conv, parallel

Prepare = Callable[[jax.Array, jax.Array], jax.Array]
"""(images uint8 [n, H, W, c], their positions int [n]) -> pixels float [V, n, H, W, c]."""

Reduce = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits [M, V, n, C], labels [M, V, n]) -> [M, V, n, ...]."""


def predictor(
  model: nn.Module, *, prepare: Prepare, reduce: Reduce
) -> Callable[..., Shaped[np.ndarray, "M E V *rest"]]:
  """A function that runs stacked models over data; make it once, it compiles once per batch shape.

  Args:
    model: `model.apply(variables, pixels)` gives logits; runs in evaluation mode.
    prepare: makes the pixels of V views from bytes, the same for all models.
    reduce: what to keep of the logits.
  Returns:
    `predict(variables, images, labels, *, batch_size)`.
  """

  @functools.partial(conv.jit, static_argnums=0)
  def batch(mesh, *arguments):
    return parallel.sharded(some_models, in_axes=(0, None, None, None), mesh=mesh)(*arguments)

  def some_models(variables, images, labels, positions):
    pixels = prepare(images, positions)
    views, n = pixels.shape[:2]
    flat = pixels.reshape(views * n, *pixels.shape[2:])
    logits = jax.vmap(lambda one: model.apply(one, flat))(variables)
    logits = logits.reshape(len(logits), views, n, -1)
    reduced = reduce(logits, jnp.broadcast_to(labels, logits.shape[:-1]))
    return jnp.swapaxes(reduced, 1, 2)

  def predict(
    variables: Variables,
    images: UInt8[ArrayLike, "E H W c"],
    labels: Int[ArrayLike, "E"],
    *,
    batch_size: int,
  ) -> Shaped[np.ndarray, "M E V *rest"]:
    """Reduced outputs of M stacked models for E examples, on the host.

    The models are shared among the devices of this process, see `parallel.mesh_for`.

    Raises:
      ValueError: for a batch size below 1.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    num_examples = len(labels)
    batch_size = min(batch_size, num_examples)
    mesh = parallel.mesh_for(trees.length(variables))
    variables = parallel.place(variables, mesh)
    images, labels = (parallel.place(array, mesh, shared=True) for array in (images, labels))
    shares = parallel.shares(
      model,
      mesh,
      num_models=trees.length(variables),
      batch_shape=(batch_size, *images.shape[1:]),
    )
    rows = []
    for share in shares:
      some = variables if len(shares) == 1 else trees.take(variables, share)
      parts = []
      for start in range(0, num_examples, batch_size):
        # The last batch starts earlier instead of being smaller: one shape, one compilation.
        first = min(start, num_examples - batch_size)
        positions = jnp.arange(first, first + batch_size)
        part = batch(mesh, some, images[positions], labels[positions], positions)
        parts.append(part[:, start - first :])
      rows.append(np.concatenate([np.asarray(part) for part in parts], axis=1))
    return np.concatenate(rows)

  return predict


def is_correct(logits, labels):
  """A `Reduce`: whether the largest logit is the label's, float32 0 or 1."""
  return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
