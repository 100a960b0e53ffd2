"""Forward passes of stacked models over a data set, reduced batch by batch on the device.

Logits of all models are too big to keep (64 models x 2 views x 100 000 examples x 200 classes are
10 GB), so each batch of logits is reduced at once by a function that the caller passes in: to the
score of an attack, or to correct or not.

The last unit of a model that names its units is a program of its own, so models that differ in
nothing else (the precision of the last layer) share the rest of the forward pass, and a model's
numbers do not depend on who shares it.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import ArrayLike, Int, Shaped, Variables
from ptq_jax.models import conv, parallel, units

Prepare = Callable[[jax.Array, jax.Array], jax.Array]
"""(images [n, ...] as they are kept, such as uint8, their positions int [n]) -> [V, n, ...] as the
model takes them, such as float."""

Reduce = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits [M, V, n, C], labels [M, V, n]) -> [M, V, n, ...]."""


class Predictor:
  """Runs stacked models over data; make it once, it compiles once per batch shape.

  Args:
    model: `model.apply(variables, pixels)` gives logits; runs in evaluation mode.
    prepare: makes the pixels of V views from bytes, the same for all models.
    reduce: what to keep of the logits.
  """

  def __init__(self, model: nn.Module, *, prepare: Prepare, reduce: Reduce):
    self._model, self._prepare = model, prepare
    *before, last = model.units() if units.has_units(model) else [units.WHOLE_MODEL]
    axis = 0 if before else None  # without units before the last, all models share the pixels

    def features(variables, images, positions):
      pixels = prepare(images, positions)

      def of_one(variables):
        x = pixels.reshape(-1, *pixels.shape[2:])
        for name in before:
          x = units.run(model, variables, x, name)
        return x.reshape(*pixels.shape[:2], *x.shape[1:])

      return jax.vmap(of_one)(variables) if before else pixels

    def reduced(variables, features, labels):
      def of_one(variables, x):
        logits = units.run(model, variables, x.reshape(-1, *x.shape[2:]), last)
        return logits.reshape(*x.shape[:2], -1)

      logits = jax.vmap(of_one, (0, axis))(variables, features)
      kept = reduce(logits, jnp.broadcast_to(labels, logits.shape[:-1]))
      return jnp.swapaxes(kept, 1, 2)

    @functools.partial(conv.jit, static_argnums=0)
    def run_body(mesh, *arguments):
      used = mesh if before else None
      return parallel.sharded(features, in_axes=(0, None, None), mesh=used)(*arguments)

    @functools.partial(conv.jit, static_argnums=0)
    def run_head(mesh, *arguments):
      return parallel.sharded(reduced, in_axes=(0, axis, None), mesh=mesh)(*arguments)

    self._run_body, self._run_head = run_body, run_head
    self._most_together = sys.maxsize

  def __call__(
    self,
    variables: Variables,
    images: Shaped[ArrayLike, "E ..."],
    labels: Int[ArrayLike, "E"],
    *,
    batch_size: int,
  ) -> Shaped[np.ndarray, "M E V *rest"]:
    """Reduced outputs of M stacked models for E examples, on the host.

    The models are shared among the devices of this process, see `parallel.mesh_for`, and run some
    at a time, big ones one by one, see `parallel.together`. When memory runs out, half as many run
    at once from there on, also in later calls, with a warning.

    Raises:
      ValueError: for a batch size below 1.
      jax.errors.JaxRuntimeError: when one model at a time takes too much memory; take a smaller
        batch.
    """
    body, head = units.split(self._model, variables)
    return self.with_heads(body, [head], images, labels, batch_size=batch_size)[0]

  def with_heads(
    self,
    body: Variables,
    heads: Sequence[Variables],
    images: Shaped[ArrayLike, "E ..."],
    labels: Int[ArrayLike, "E"],
    *,
    batch_size: int,
  ) -> list[Shaped[np.ndarray, "M E V *rest"]]:
    """The same for stacked models that differ in their last unit only: the rest runs once.

    Args:
      body, heads: variables [M, ...], see `units.split`.
    Returns:
      Per head, what a call with body and head together gives, bit by bit.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    num_examples, num_models = len(labels), trees.length(heads[0])
    batch_size = min(batch_size, num_examples)
    mesh = parallel.mesh_for(num_models)
    images, labels = (parallel.place(array, mesh, shared=True) for array in (images, labels))
    devices = mesh.size if mesh else 1
    batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), images.dtype)
    positions = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    fed = jax.eval_shape(self._prepare, batch, positions)
    together = parallel.together(
      self._model,
      num_models=num_models,
      batch_shape=(batch_size, *fed.shape[2:]),
      dtype=fed.dtype,
      devices=devices,
    )
    rows, done = [[] for _ in heads], 0
    while done < num_models:
      together = min(together, self._most_together)
      share = slice(done, min(done + together * devices, num_models))
      at_least = together * devices if num_models > together * devices else 0
      some = (body, list(heads))
      some = some if share == slice(0, num_models) else trees.take(some, share)
      try:
        found = self._of_share(mesh, some, at_least, images, labels, batch_size)
      except jax.errors.JaxRuntimeError as error:
        if not parallel.is_out_of_memory(error) or together == 1:
          raise
        self._most_together = together // 2
        warnings.warn(
          f"out of memory with {together} models at once on a device; going on with "
          f"{together // 2}. Their numbers may differ in the last digits from those of {together}.",
          stacklevel=3,
        )
        continue
      for row, scores in zip(rows, found, strict=True):
        row.append(scores[: share.stop - share.start])
      done = share.stop
    return [np.concatenate(row) for row in rows]

  def _of_share(self, mesh, some, at_least, images, labels, batch_size) -> list[np.ndarray]:
    """Per head, what some of the models give for all examples."""
    num_examples = len(labels)
    body, heads = parallel.place(some, mesh, at_least=at_least)
    parts = [[] for _ in heads]
    for start in range(0, num_examples, batch_size):
      # The last batch starts earlier instead of being smaller: one shape, one compilation.
      first = min(start, num_examples - batch_size)
      positions = np.arange(first, first + batch_size, dtype=np.int32)
      some_images, some_labels = trees.take((images, labels), positions)
      features = self._run_body(mesh, body, some_images, positions)
      for head, kept in zip(heads, parts, strict=True):
        kept.append((self._run_head(mesh, head, features, some_labels), start - first))
    return [
      np.concatenate([np.asarray(part)[:, skip:] for part, skip in kept], axis=1) for kept in parts
    ]


def is_correct(logits, labels):
  """A `Reduce`: whether the largest logit is the label's, float32 0 or 1."""
  return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
