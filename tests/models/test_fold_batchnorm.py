"""Folding keeps the function and the tree, wherever a BN follows a layer alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import fold_batchnorm, resnet

IMAGES = jnp.asarray(np.random.default_rng(7).normal(size=(3, 8, 8, 3)), jnp.float32)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), strides=2, use_bias=False, name="second")(x)
    return nn.BatchNorm(use_running_average=True, use_scale=False, name="no_scale")(x)


class Sequential(nn.Module):
  """BNs with and without scale and bias, after a Conv with bias, rematerialised, after a Dense."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    norm = {"use_running_average": not train}
    x = nn.Conv(6, (3, 3), name="first")(images)
    x = nn.relu(nn.BatchNorm(**norm, use_bias=False, epsilon=1e-2, name="no_bias")(x))
    x = nn.relu(nn.remat(Block)(name="block")(x))
    x = nn.Dense(5, name="third")(x.mean(axis=(1, 2)))
    return nn.BatchNorm(**norm, name="full")(x)


class Twin(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=True)(nn.Dense(2)(x))


class Awkward(nn.Module):
  """BNs that cannot be folded: the layer's output is used twice or changed, the axis differs, or
  there are two of both."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.Conv(6, (3, 3), name="used_twice")(images)
    x = nn.BatchNorm(use_running_average=True, name="beside_itself")(x) + x
    y = nn.relu(nn.Conv(6, (3, 3), name="activated")(x))
    y = nn.BatchNorm(use_running_average=True, name="after_relu")(y)
    z = nn.Conv(6, (3, 3), name="by_rows")(y)
    z = nn.BatchNorm(use_running_average=True, axis=1, name="of_rows")(z)
    twins = nn.vmap(Twin, {"params": 0, "batch_stats": 0}, {"params": True}, None, axis_size=2)
    return twins(name="twins")(z)


def random_variables(model, seed):
  """Variables with statistics and parameters that are no defaults."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)

  def draw(path, leaf):
    values = rng.normal(0.2, 0.4, leaf.shape).astype(leaf.dtype)
    return abs(values) + 0.1 if path[-1].key == "var" else values

  return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


@pytest.mark.parametrize("model", [Sequential(), resnet.resnet8(10, width=4)])
def test_same_function_and_tree_with_neutral_norms(model):
  variables = random_variables(model, 0)
  folded = fold_batchnorm.fold(model, variables, IMAGES)
  outputs = jax.jit(model.apply)
  after, before = (outputs(each, IMAGES) for each in (folded, variables))
  np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
  assert jax.tree.structure(folded) == jax.tree.structure(variables)
  for new, old in zip(jax.tree.leaves(folded), jax.tree.leaves(variables), strict=True):
    assert (new.shape, new.dtype) == (old.shape, old.dtype)
  pairs = fold_batchnorm.pairs(model, variables, IMAGES)
  assert len(pairs) == sum(path.endswith("/var") for path in trees.flatten(variables))
  for norm, epsilon in pairs.values():
    np.testing.assert_allclose(trees.get(folded, f"batch_stats/{norm}/var"), 1 - epsilon)
    if "scale" in trees.get(folded, f"params/{norm}"):
      np.testing.assert_array_equal(trees.get(folded, f"params/{norm}/scale"), 1.0)
    if "bias" in trees.get(folded, f"params/{norm}"):
      np.testing.assert_array_equal(trees.get(folded, f"batch_stats/{norm}/mean"), 0.0)


def test_pairs_are_found_by_data_flow():
  model = Sequential()
  pairs = fold_batchnorm.pairs(model, random_variables(model, 0), IMAGES)
  assert pairs == {
    "first": ("no_bias", 1e-2),
    "block/second": ("block/no_scale", 1e-5),
    "third": ("full", 1e-5),
  }


def test_what_cannot_be_folded_stays():
  model = Awkward()
  variables = random_variables(model, 2)
  assert fold_batchnorm.pairs(model, variables, IMAGES) == {}
  folded = fold_batchnorm.fold(model, variables, IMAGES)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, folded, variables))


def test_stacked_models_fold_under_vmap():
  model = Sequential()
  both = [random_variables(model, seed) for seed in (0, 5)]
  stacked = jax.vmap(lambda v: fold_batchnorm.fold(model, v, IMAGES))(trees.stack(both))
  single = fold_batchnorm.fold(model, both[1], IMAGES)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    trees.take(stacked, 1),
    single,
  )
