"""Training of one model, as pure functions; `shadows` runs them for many models at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ptq_jax.base import Array, Float, Int, Key, Shaped, Variables
from ptq_jax.data import augment, batches, inputs
from ptq_jax.models import call
from ptq_jax.train import loss


class Recipe(NamedTuple):
  """What one training is made of, besides its data and key. Hashable: a static argument of jit."""

  model: nn.Module
  optimizer: optax.GradientTransformation
  augmentation: Callable[[Key, Any], Any]  # of a key and one image
  mean: tuple[float, ...]  # per channel, of pixels in 0 .. 1; or per feature; none for tokens
  std: tuple[float, ...]
  batch_size: int
  label_smoothing: float = 0.0
  lowering: str | None = None  # of convolutions of models at once, see `models.conv.lowered_as`
  dtype: str = "uint8"  # of the pool: images; float32 for vectors, int32 for tokens


class State(NamedTuple):
  """The loop carry of one training."""

  variables: Variables
  optimizer: Any  # optax state
  step: Int[Array, ""]  # updates done


class Metrics(NamedTuple):
  """Means over the steps of a dispatch."""

  loss: Float[Array, "*models"]  # nats
  accuracy: Float[Array, "*models"]  # on augmented training batches


class ModelKeys(NamedTuple):
  """The streams of randomness of one model."""

  init: Key
  shuffle: Key  # folded with the epoch
  augment: Key  # folded with the step
  forward: Key  # dropout and the like; folded with the step


def keys(model_key: Key) -> ModelKeys:
  """Streams of one model from its key, `fold_in(key, model_id)`."""
  return ModelKeys(*(jax.random.fold_in(model_key, stream) for stream in range(4)))


def init(model_key: Key, recipe: Recipe, *, image_shape: tuple[int, ...]) -> State:
  """Fresh parameters and optimizer state of one model for images [H, W, c], vectors or tokens."""
  images = jnp.zeros((1, *image_shape), inputs.fed_dtype(recipe.dtype))
  variables = call.init(recipe.model, keys(model_key).init, images)
  return State(variables, recipe.optimizer.init(variables["params"]), jnp.int32(0))


def epoch_indices(
  model_key: Key, members: Int[Array, "n"], epoch: Int[Array, ""] | int, *, batch_size: int
) -> Int[Array, "steps batch"]:
  """The batches of one epoch of one model; see `data.batches.epoch_indices`."""
  key = jax.random.fold_in(keys(model_key).shuffle, epoch)
  return batches.epoch_indices(key, members, batch_size=batch_size)


def step(
  recipe: Recipe,
  state: State,
  model_key: Key,
  images: Shaped[Array, "batch ..."],
  labels: Int[Array, "batch"],
) -> tuple[State, Metrics]:
  """One update of one model: augment, normalise, forward, backward, SGD."""
  key = jax.random.fold_in(keys(model_key).augment, state.step)
  augmented = jax.vmap(recipe.augmentation)(jax.random.split(key, len(images)), images)
  pixels = augment.normalise(augmented, jnp.array(recipe.mean), jnp.array(recipe.std))
  params = state.variables["params"]
  statistics = {name: tree for name, tree in state.variables.items() if name != "params"}

  noise = call.rngs(jax.random.fold_in(keys(model_key).forward, state.step))

  def objective(params):
    whole = {"params": params, **statistics}
    logits, updates = call.apply(
      recipe.model, whole, pixels, train=True, mutable=list(statistics), rngs=noise
    )
    value = loss.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    return value, (updates, loss.accuracy(logits, labels))

  (value, (statistics, accuracy)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
  update, optimizer = recipe.optimizer.update(gradient, state.optimizer, params)
  params = optax.apply_updates(params, update)
  return State({"params": params, **statistics}, optimizer, state.step + 1), Metrics(
    value, accuracy
  )


def run(
  recipe: Recipe,
  state: State,
  model_key: Key,
  images: Shaped[Array, "E entries"],
  labels: Int[Array, "E"],
  indices: Int[Array, "steps batch"],
  *,
  image_shape: tuple[int, ...],
) -> tuple[State, Metrics]:
  """Many updates of one model as one scan; `indices` picks the batches from the pool.

  The pool comes with one row per image: a TPU pads the last axes of an array to its tiles, so it
  would copy 50 000 images [32, 32, 3] into .6 GB of another layout before it gathers from them
  (BUILD_NOTES.md).
  """

  def body(state, index):
    batch = images[index].reshape(len(index), *image_shape)
    return step(recipe, state, model_key, batch, labels[index])

  if len(indices) == 1:  # even a loop of one step keeps XLA:CPU from its fast convolutions
    return body(state, indices[0])
  state, metrics = jax.lax.scan(body, state, indices)
  return state, jax.tree.map(jnp.mean, metrics)


def fit(
  model_key: Key,
  recipe: Recipe,
  images: Shaped[Array, "E ..."],
  labels: Int[Array, "E"],
  members: Int[Array, "n"],
  *,
  epochs: int,
) -> tuple[Variables, Metrics]:
  """Trains one model on its members: the loop that `shadows` batches, for one model and in one jit.

  Args:
    model_key: `fold_in(key, model_id)`.
    recipe: model, optimizer, augmentation, batch size.
    images: the pool, of the recipe's dtype.
    labels: of the pool, in 0 .. C - 1.
    members: positions in the pool.
    epochs: passes over the members.
  Returns:
    Trained variables and the metrics of each epoch, [epochs].
  """
  shape = images.shape[1:]
  state, images = init(model_key, recipe, image_shape=shape), images.reshape(len(images), -1)

  def body(state, epoch):
    indices = epoch_indices(model_key, members, epoch, batch_size=recipe.batch_size)
    return run(recipe, state, model_key, images, labels, indices, image_shape=shape)

  state, metrics = jax.lax.scan(body, state, jnp.arange(epochs))
  return state.variables, metrics
