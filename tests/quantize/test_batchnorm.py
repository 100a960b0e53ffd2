"""Batch-normalisation statistics: exact for what the network sees, whatever the momentum."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.quantize import batchnorm


class Normalised(nn.Module):
  """Two dense layers, each normalised, with dropout between them."""

  momentum: float = 0.9
  rate: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    for name in ("first", "second"):
      x = nn.Dense(5, name=name)(x)
      x = nn.BatchNorm(not train, momentum=self.momentum, name=f"{name}_bn")(x)
      x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
    return x


@pytest.fixture
def images():
  return jax.random.normal(jax.random.key(1), (60, 4)) * 3 + 1


@pytest.fixture
def variables(images):
  return jax.jit(Normalised().init)(jax.random.key(0), images)


def normalise(x, scale=1.0):
  return np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0)


def expected(variables, images):
  """Statistics layer after layer, in NumPy."""
  statistics, x = {}, np.asarray(images, np.float64)
  for name in ("first", "second"):
    dense = variables["params"][name]
    x = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
    statistics |= {f"{name}_bn/mean": x.mean(0), f"{name}_bn/var": x.var(0)}
    x = normalise(x)
  return statistics


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_one_batch_is_exact(key, variables, images, momentum):
  found = batchnorm.estimate(key, Normalised(momentum), variables, images)
  jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])
  statistics = expected(variables, images)
  for path, leaf in trees.flatten(found["batch_stats"]).items():
    np.testing.assert_allclose(leaf, statistics[path], rtol=1e-3, atol=1e-3)


def test_batches_are_pooled(key, variables, images):
  """Exact for the first layer, whose inputs do not depend on how the images are cut."""
  images = images + jnp.arange(60.0)[:, None]  # batches that differ much
  found = batchnorm.estimate(key, Normalised(), variables, images, batch_size=25)
  statistics = expected(variables, images)
  for part in ("mean", "var"):
    leaf = found["batch_stats"]["first_bn"][part]
    np.testing.assert_allclose(leaf, statistics[f"first_bn/{part}"], rtol=2e-3, atol=1e-3)


def test_evaluation_mode_then_sees_normalised_activations(key, variables, images):
  found = batchnorm.estimate(key, Normalised(), variables, images)
  training, _ = Normalised().apply(variables, images, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(Normalised().apply(found, images), training, atol=1e-3)


def test_momentum_of_one_keeps_and_dropout_runs(key, variables, images):
  kept = batchnorm.estimate(key, Normalised(1.0), variables, images)
  np.testing.assert_array_equal(kept["batch_stats"]["first_bn"]["mean"], np.zeros(5))
  found = batchnorm.estimate(key, Normalised(rate=0.5), variables, images)
  assert np.isfinite(found["batch_stats"]["second_bn"]["var"]).all()


class Circular(nn.Module):
  """Its second normalisation sees the running statistics of the first, in training too."""

  @nn.compact
  def __call__(self, x, train):
    first = nn.BatchNorm(not train, name="first")(nn.Conv(3, (3, 3))(x))
    if not self.is_initializing():
      x = x - self.variables["batch_stats"]["first"]["mean"]
    second = nn.BatchNorm(not train, name="second")(nn.Conv(3, (3, 3))(x))
    return (first + second).mean(axis=(1, 2))


def test_statistics_that_depend_on_others_stay_and_are_named(key):
  with jax.numpy_rank_promotion("allow"):
    images = jax.random.normal(jax.random.key(1), (20, 4, 4, 3)) + 2
    variables = Circular().init(key, images, False)
    with pytest.warns(UserWarning, match="what 'second' normalises is not finite, or depends"):
      after = batchnorm.estimate(key, Circular(), variables, images)
  first, second = (after["batch_stats"][name] for name in ("first", "second"))
  assert np.isfinite(first["mean"]).all()
  assert np.abs(first["mean"]).max() > 0.1
  assert (second["mean"] == 0).all()
  assert (second["var"] == 1).all()


def test_without_statistics_nothing_happens(key, images):
  variables = nn.Dense(2).init(key, images)
  assert batchnorm.estimate(key, nn.Dense(2), variables, images) is variables


def test_statistics_of_others_stay_and_are_named(key, images):
  class Own(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      mean = self.variable("batch_stats", "average", jnp.zeros, x.shape[-1:])
      if train:
        mean.value = x.mean(axis=0)
      return nn.BatchNorm(not train, name="norm")(x - jnp.broadcast_to(mean.value, x.shape))

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(2, name="dense")(Own(name="own")(x, train))

  variables = Model().init(key, images)
  with pytest.warns(UserWarning, match="the statistics of 'own' are not those of an nn.BatchNorm"):
    found = batchnorm.estimate(key, Model(), variables, images)
  statistics = found["batch_stats"]["own"]
  np.testing.assert_array_equal(statistics["average"], np.zeros(4))
  assert np.abs(statistics["norm"]["var"] - 1).min() > 0.1


def test_stacked_changes_only_the_plans_asked_for(variables, images):
  keys = jax.random.split(jax.random.key(0))
  stacked = trees.stack([trees.stack([variables] * 2)] * 2)
  both = jnp.stack([images, images + 1])
  found = batchnorm.estimate_stacked(keys, Normalised(), stacked, both, changed=[False, True])
  mean = found["batch_stats"]["first_bn"]["mean"]
  np.testing.assert_array_equal(mean[0], np.zeros((2, 5)))
  for m in range(2):
    alone = batchnorm.estimate(keys[m], Normalised(), variables, both[m])
    np.testing.assert_allclose(mean[1, m], alone["batch_stats"]["first_bn"]["mean"], rtol=1e-5)
