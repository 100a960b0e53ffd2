"""Small models with random weights, and convnets trained on real digits for a second."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from ptq_jax import trees
from ptq_jax.models import convnet
from tests import fresh


class Foreign(nn.Module):
  """Not of the zoo: a branch, a strided, a 1x1 and a dilated grouped convolution, a Dense."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.Conv(8, (3, 3), strides=2, name="down")(images)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    y = nn.Conv(12, (3, 3), feature_group_count=4, kernel_dilation=2, name="grouped")(x)
    z = nn.Conv(12, (1, 1), use_bias=False, name="pointwise")(x)
    x = nn.relu(y + z).mean(axis=(1, 2))
    return nn.Dense(5, name="classifier")(x)


class Ensemble(NamedTuple):
  """Stacked models with their data."""

  model: nn.Module
  variables: dict
  images: jax.Array  # calibration, [M, n, H, W, c]
  test_images: jax.Array
  test_labels: np.ndarray
  keys: jax.Array


@pytest.fixture(scope="session")
def foreign() -> Ensemble:
  """Two foreign models with random weights, and smooth images."""
  rng = np.random.default_rng(0)
  smooth = rng.normal(size=(2, 24, 9, 9, 3)).cumsum(axis=2).cumsum(axis=3)
  images = jnp.asarray(smooth / smooth.std(), jnp.float32)
  model = Foreign()
  shapes = jax.eval_shape(model.init, jax.random.key(0), images[0])

  def draw(leaf):
    return jnp.asarray(0.3 + 0.3 * rng.normal(size=(2, *leaf.shape)) ** 2, leaf.dtype)

  def signed(leaf):
    return jnp.asarray(rng.normal(0, 0.3, (2, *leaf.shape)), leaf.dtype)

  variables = {
    "params": jax.tree.map(signed, shapes["params"]),
    "batch_stats": jax.tree.map(draw, shapes["batch_stats"]),
  }
  keys = jax.random.split(jax.random.key(1), 2)
  return Ensemble(model, variables, images, images[0], np.zeros(24, int), keys)


@pytest.fixture(scope="session")
def untrained() -> Ensemble:
  """Two convnets of the zoo with random weights, and smooth images."""
  smooth = np.random.default_rng(0).normal(size=(2, 24, 8, 8, 1)).cumsum(axis=2).cumsum(axis=3)
  images = jnp.asarray(smooth / smooth.std(), jnp.float32)
  model = convnet.ConvNet(num_classes=10, width=8)
  variables = fresh.stacked(model, images[0], num_models=2)
  keys = jax.random.split(jax.random.key(0), 2)
  return Ensemble(model, variables, images, images[0], np.zeros(24, int), keys)


@pytest.fixture(scope="session")
def digits() -> Ensemble:
  """Two convnets trained on different halves of scikit-learn's digits."""
  data = load_digits()
  images = np.asarray((data.images / 16 - 0.3) / 0.37, np.float32)[..., None]
  labels = data.target.astype(np.int32)
  model = convnet.ConvNet(num_classes=10, width=8)
  order = np.random.default_rng(0).permutation(1400)
  halves = [order[:700], order[700:]]
  trained = [_train(model, images[half], labels[half], seed) for seed, half in enumerate(halves)]
  return Ensemble(
    model,
    trees.stack(trained),
    jnp.stack([jnp.asarray(images[half[:256]]) for half in halves]),
    jnp.asarray(images[1400:]),
    labels[1400:],
    jax.random.split(jax.random.key(0), 2),
  )


def _train(model, images, labels, seed, *, epochs=10, batch_size=50):
  """Variables after SGD with momentum and a cosine schedule."""
  variables = jax.jit(model.init)(jax.random.key(seed), images[:1])
  num_steps = epochs * len(images) // batch_size
  optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, num_steps), momentum=0.9)
  params, statistics = variables["params"], variables["batch_stats"]
  state = optimizer.init(params)
  rng = np.random.default_rng(seed)
  for _ in range(epochs):
    for batch in rng.permutation(len(images)).reshape(-1, batch_size):
      params, statistics, state = _step(
        model, num_steps, params, statistics, state, images[batch], labels[batch]
      )
  return {"params": params, "batch_stats": statistics}


OPTIMISED = {"xla_backend_optimization_level": 2}  # runs 280 times: longer than compiling it


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=OPTIMISED)
def _step(model, num_steps, params, statistics, state, images, labels):
  optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, num_steps), momentum=0.9)

  def loss(params):
    logits, updated = model.apply(
      {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated["batch_stats"]

  (_, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  updates, state = optimizer.update(gradient, state, params)
  return optax.apply_updates(params, updates), statistics, state
