"""Training of many models at once: `fit` vmapped over the models of a chunk.

A chunk's models train in lockstep. Every model draws from its own key and its own members, so the
result does not depend on who shares its chunk.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Int, Key, Keys, Shaped
from ptq_jax.data import inputs
from ptq_jax.models import conv, parallel
from ptq_jax.train import fit


class Dispatch(NamedTuple):
  """A chunk after some updates."""

  step: int  # updates done, from the beginning
  rounds: tuple[
    fit.State, ...
  ]  # of the models of each round, see `parallel.rounds`, on the devices
  metrics: fit.Metrics  # [M], means over these updates; on the device, reading them waits for it
  num_models: int

  def states(self) -> fit.State:
    """The states of all models, stacked."""
    states = self.rounds[0] if len(self.rounds) == 1 else trees.concatenate(self.rounds)
    return _first(states, self.num_models)

  def on_host(self) -> fit.State:
    """The same as NumPy arrays, without gathering them on a device."""
    parts = jax.device_get(self.rounds)
    states = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return _first(states, self.num_models)


class Epoch(NamedTuple):
  """A chunk after an epoch."""

  epoch: int  # epochs done, from 1
  states: fit.State  # stacked, model axis first
  metrics: fit.Metrics  # [M], means over the epoch; on the device, reading them waits for it


def model_keys(key: Key, model_ids: Int[Array, "M"]) -> Keys:
  """One key per model, `fold_in(key, model_id)`: the same whatever chunk the model is in."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(model_ids))


def init(keys: Keys, recipe: fit.Recipe, *, image_shape: tuple[int, ...]) -> fit.State:
  """Fresh states of a chunk, stacked."""
  options = None
  if jax.default_backend() == "cpu":  # drawing numbers takes 20 times as long to compile otherwise
    options = {"xla_backend_optimization_level": 0}
  run = jax.jit(_init, static_argnames=("recipe", "image_shape"), compiler_options=options)
  return run(keys, recipe=recipe, image_shape=image_shape)


def _init(keys, recipe, image_shape):
  one = functools.partial(fit.init, recipe=recipe, image_shape=image_shape)
  return jax.vmap(one)(keys)


MOST_STEPS = 50
"""Of a dispatch on an accelerator: between dispatches a stop can be taken."""


def dispatches(
  states: fit.State,
  keys: Keys,
  recipe: fit.Recipe,
  images: Shaped[ArrayLike, "E ..."],
  labels: Int[ArrayLike, "E"],
  members: Int[ArrayLike, "M n"],
  *,
  first: int,
  last: int,
  steps_per_dispatch: int | None = None,
  together: int | None = None,
  mesh: Mesh | None = None,
) -> Iterator[Dispatch]:
  """Trains a chunk, some updates per iteration; donates the states: do not use them again.

  The models that share a program are `together` on each device, whatever the number of devices and
  of models: with the same number the same models come out, on a CPU bit by bit. With another one
  they differ by rounding, which training amplifies (see BUILD_NOTES.md).

  Args:
    states: of `init`, or of the update from which to go on; on the host or a device.
    keys: [M], of `model_keys`.
    recipe: shared by all models.
    images: the pool, on the device once.
    labels: of the pool.
    members: [M, n], positions in the pool.
    first: updates done before; need not be at the end of an epoch.
    last: updates done at the end.
    steps_per_dispatch: updates per call of the device. None: up to `MOST_STEPS`, but one on a CPU,
      where XLA runs a convolution inside a loop without threads.
    together: models of one program on one device; None: see `models_together`.
    mesh: devices that share the models, see `models.parallel`; None: one device.
  """
  num_models, steps = len(keys), members.shape[1] // recipe.batch_size
  if together is None:
    together = models_together(recipe, num_models, image_shape=images.shape[1:], mesh=mesh)
  spread = parallel.rounds(num_models, together=together, mesh=mesh)
  size = together * (mesh.size if mesh else 1)
  place = functools.partial(parallel.place, mesh=mesh, at_least=size if len(spread) > 1 else 0)
  parts = [place(trees.take(states, part)) for part in spread]
  of_round = [place((keys[part], jnp.asarray(members[part]))) for part in spread]
  image_shape, rows = images.shape[1:], images.reshape(len(images), -1)
  pool = [parallel.place(array, mesh, shared=True) for array in (rows, labels)]
  dispatch = steps_per_dispatch or (1 if jax.default_backend() == "cpu" else _even_part(steps))
  step, epoch = first, None
  while step < last:
    if epoch != step // steps:
      epoch = step // steps
      indices = [_indices(*each, epoch, batch_size=recipe.batch_size) for each in of_round]
    start, stop = step % steps, min(step % steps + dispatch, steps, step % steps + last - step)
    found = [
      _run(recipe, mesh, image_shape, part, keys_, *pool, index[:, start:stop])
      for part, (keys_, _), index in zip(parts, of_round, indices, strict=True)
    ]
    parts = [states for states, _ in found]
    metrics = [metrics for _, metrics in found]
    metrics = metrics[0] if len(metrics) == 1 else trees.concatenate(metrics)
    step += stop - start
    yield Dispatch(step, tuple(parts), _first(metrics, num_models), num_models)


def epochs(
  states: fit.State,
  keys: Keys,
  recipe: fit.Recipe,
  images: Shaped[ArrayLike, "E ..."],
  labels: Int[ArrayLike, "E"],
  members: Int[ArrayLike, "M n"],
  *,
  first: int,
  last: int,
  **options,
) -> Iterator[Epoch]:
  """Trains a chunk, one epoch per iteration; donates the states: do not use them again.

  Args:
    states, keys, recipe, images, labels, members: as in `dispatches`.
    first: epochs done before.
    last: epochs done at the end.
    **options: of `dispatches`.
  """
  steps = members.shape[1] // recipe.batch_size
  parts, weights, before = [], [], first * steps
  for done in dispatches(
    states, keys, recipe, images, labels, members, first=before, last=last * steps, **options
  ):
    parts.append(done.metrics)
    weights.append(done.step - before)
    before = done.step
    if done.step % steps == 0:
      yield Epoch(done.step // steps, done.states(), mean(parts, weights))
      parts, weights = [], []


def models_together(
  recipe: fit.Recipe, num_models: int, *, image_shape: tuple[int, ...], mesh: Mesh | None = None
) -> int:
  """How many models should share a program on a device, see `parallel.together`."""
  return parallel.together(
    recipe.model,
    num_models=num_models,
    batch_shape=(recipe.batch_size, *image_shape),
    dtype=inputs.fed_dtype(recipe.dtype),
    devices=mesh.size if mesh else 1,
  )


def _even_part(steps):
  """The largest number of steps up to `MOST_STEPS` that divides an epoch, if it is not tiny."""
  even = max(n for n in range(1, min(steps, MOST_STEPS) + 1) if steps % n == 0)
  return even if even * 4 > min(steps, MOST_STEPS) else min(steps, MOST_STEPS)


def _first(tree, count):
  """The first models; the tree itself where these are all."""
  return tree if trees.length(tree) == count else trees.take(tree, slice(count))


MEASURED_STEPS = 4
"""Of training that are timed at least, twice."""

WORTH_MORE = 1.05
"""So many times as fast as fewer models together must a lowering be, that still more are tried."""


def training_rates(
  keys: Keys,
  recipe: fit.Recipe,
  images: Shaped[ArrayLike, "E ..."],
  labels: Int[ArrayLike, "E"],
  members: Int[ArrayLike, "M n"],
  *,
  together: Sequence[int],
  lowerings: Sequence[str] = conv.LOWERINGS,
) -> dict[tuple[int, str], float]:
  """Images per second of all models by how many share a program and how convolutions are lowered.

  What is fastest alone need not be so between the other layers of a network; this times real steps
  of training on all local devices, in the programs that training runs, after compiling them. A
  lowering that gains nothing from company is not tried with more models; a pair that does not fit
  into memory gets 0. One model alone has no "grouped" beside "unrolled": it is the same.

  Args:
    keys, recipe, images, labels, members: as in `dispatches`; the recipe's lowering is not used.
    together: models of one program on one device, ascending.
    lowerings: of `conv.LOWERINGS`.
  """
  rates: dict[tuple[int, str], float] = {}
  left = list(lowerings)
  for count in together:
    before = max(rates.values(), default=0.0)
    for lowering in left:
      if count > 1 or lowering != "grouped" or "unrolled" not in left:
        tried = recipe._replace(lowering=lowering)
        rates[count, lowering] = _rate(keys, tried, images, labels, members, together=count)
    if count > 1:
      left = [each for each in left if rates[count, each] >= WORTH_MORE * before]
  return rates


def _rate(keys, recipe, images, labels, members, *, together):
  """Images per second of useful work, from the models of one round; 0 if they do not fit."""
  num_models = len(keys)
  mesh = parallel.mesh_for(-(-num_models // together))
  rounds = parallel.rounds(num_models, together=together, mesh=mesh)
  keys, members = keys[rounds[0]], members[rounds[0]]
  speeds: list[float] = []  # updates per second
  options = {"together": together, "mesh": mesh}
  options |= {"first": 0, "last": 3 * (MOST_STEPS + MEASURED_STEPS)}
  try:
    states = init(keys, recipe, image_shape=images.shape[1:])
    mark, before = time.perf_counter(), 0
    for done in dispatches(states, keys, recipe, images, labels, members, **options):
      if done.step - before >= MEASURED_STEPS:
        jax.block_until_ready((done.rounds, done.metrics))
        now = time.perf_counter()
        speeds.append((done.step - before) / (now - mark))
        mark, before = now, done.step
      if len(speeds) == 3:  # the first compiles
        break
  except jax.errors.JaxRuntimeError as error:
    if not parallel.is_out_of_memory(error):
      raise
    return 0.0
  return max(speeds[1:]) * recipe.batch_size * num_models / len(rounds)


def largest_chunk(
  recipe: fit.Recipe,
  *,
  num_examples: int,
  num_members: int,
  image_shape: tuple[int, ...],
  memory_bytes: int,
  at_most: int,
) -> int:
  """How many models can train at once in so much memory, by what the compiler says it needs.

  Compiles one step of one model and of two, and takes memory to grow linearly from there.

  Args:
    recipe: of all models.
    num_examples: E, the pool, which is on the device in the recipe's dtype.
    num_members: of each model.
    image_shape: of one image.
    memory_bytes: of one device.
    at_most: the answer is between 1 and this.
  """
  one, two = (
    _step_bytes(recipe, models, num_examples, num_members, image_shape) for models in (1, 2)
  )
  more = max(two - one, 1)
  return int(min(max((memory_bytes - one) // more + 1, 1), at_most))


def _step_bytes(recipe, num_models, num_examples, num_members, image_shape):
  """Bytes of arguments, results and scratch memory of one step of a chunk."""
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_models))
  one = functools.partial(fit.init, recipe=recipe, image_shape=image_shape)
  states = jax.eval_shape(jax.vmap(one), keys)
  images = jax.ShapeDtypeStruct((num_examples, math.prod(image_shape)), recipe.dtype)
  labels = jax.ShapeDtypeStruct((num_examples,), jnp.int32)
  steps = 1 if jax.default_backend() == "cpu" else num_members // recipe.batch_size
  indices = jax.ShapeDtypeStruct((num_models, steps, recipe.batch_size), jnp.int32)
  traced = _run.jitted().lower(recipe, None, image_shape, states, keys, images, labels, indices)
  needs = traced.compile().memory_analysis()
  both = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
  return both + needs.temp_size_in_bytes  # donated states are arguments and results at once


@functools.partial(jax.jit, static_argnames="batch_size")
def _indices(keys, members, epoch, *, batch_size):
  one = functools.partial(fit.epoch_indices, batch_size=batch_size)
  return jax.vmap(one, in_axes=(0, 0, None))(keys, members, epoch)


@functools.partial(conv.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _run(recipe, mesh, image_shape, states, keys, images, labels, indices):
  run = functools.partial(fit.run, recipe, image_shape=image_shape)
  batched = parallel.over_models(run, in_axes=(0, 0, None, None, 0), mesh=mesh)
  with conv.lowered_as(recipe.lowering):
    return batched(states, keys, images, labels, indices)


def mean(parts: Sequence[fit.Metrics], weights: Sequence[int]) -> fit.Metrics:
  """Means over several dispatches from the means and the updates of each."""
  weights = jnp.array(weights, jnp.float32)
  return jax.tree.map(lambda *each: weights @ jnp.stack(each) / weights.sum(), *parts)
