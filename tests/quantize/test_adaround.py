"""AdaRound: which form a layer gets, and what both do to a network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.models.units import Layer
from ptq_jax.quantize import adaround, plan
from ptq_jax.quantize.reconstruct import Schedule
from tests import fresh

QUICK = adaround.SECOND_MOMENT._replace(num_steps=50)


def test_the_cheaper_form_is_chosen():
  early = Layer("", "conv", (3, 3, 64, 64), output_shape=(32, 32, 64))
  late = Layer("", "conv", (3, 3, 512, 512), output_shape=(2, 2, 512))
  many, few = adaround.MINI_BATCH, adaround.MINI_BATCH._replace(num_steps=500, batch_size=8)
  choose = functools.partial(adaround.choose_form, num_images=1024)
  assert choose(early, second_moment=QUICK, mini_batch=many) == "second_moment"
  assert choose(late, second_moment=QUICK, mini_batch=many) == "second_moment"
  assert choose(late, second_moment=QUICK._replace(num_steps=400), mini_batch=few) == "mini_batch"


def test_mini_batches_improve_every_layer_of_a_foreign_model(foreign):
  layers = units.layers(foreign.model, *trees.take((foreign.variables, foreign.images), 0))
  _, info = adaround.quantize_stacked(
    foreign.keys,
    foreign.model,
    foreign.variables,
    foreign.images,
    plans=[plan.make(layers, levels=3)],
    form="mini_batch",
    mini_batch=Schedule(100, 0.2, 0.01, batch_size=8, decay_rates=(0.8, 0.9)),
  )
  assert [record.name for record in info] == [layer.path for layer in layers]
  assert all((record.error_after < record.error_before).all() for record in info)


@pytest.mark.parametrize(
  ("options", "message"),
  [({"form": "quick"}, 'form must be "auto"'), ({"stop": "soon"}, 'stop must be "plateau"')],
)
def test_unknown_options(foreign, options, message):
  layers = units.layers(foreign.model, *trees.take((foreign.variables, foreign.images), 0))
  with pytest.raises(ValueError, match=message):
    adaround.quantize_stacked(
      foreign.keys,
      foreign.model,
      foreign.variables,
      foreign.images,
      plans=[plan.make(layers, levels=3)],
      **options,
    )


class Perceptron(nn.Module):
  """Two layers of equal shape."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.Dense(6, name="first")(x))
    return nn.Dense(6, name="second")(x)


@pytest.fixture(scope="module")
def perceptron():
  inputs = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 40, 6)), jnp.float32)
  model = Perceptron()
  return model, fresh.stacked(model, inputs[0], num_models=1), inputs


def quantize(perceptron, plans):
  return adaround.quantize_stacked(
    jax.random.split(jax.random.key(0), 1), *perceptron, plans=plans, second_moment=QUICK
  )


def test_targets_come_from_the_full_precision_network(perceptron):
  """Behind a coarse layer, inputs that are off are part of the error."""
  fine, coarse = {"first": 16, "second": 16}, {"first": 2, "second": 16}
  quantized, info = quantize(perceptron, [fine, coarse])
  before = info[1].error_before[:, 0]
  assert before[1] > 2 * before[0]
  model, variables, inputs = perceptron
  apply = jax.jit(model.apply)
  target = apply(trees.take(variables, 0), inputs[0])
  for p in (0, 1):
    outputs = apply(jax.tree.map(lambda leaf, p=p: leaf[p, 0], quantized), inputs[0])
    error = np.mean(np.sum(np.square(outputs - target), axis=-1))
    np.testing.assert_allclose(info[1].error_after[p, 0], error, rtol=1e-3)


def test_layers_of_equal_shape_share_a_compilation(perceptron):
  adaround._solve.clear_cache()
  quantize(perceptron, [{"first": 3, "second": 5}])
  assert adaround._solve._cache_size() == 1
  quantize(perceptron, [{"first": 16, "second": 4}])
  assert adaround._solve._cache_size() == 1
