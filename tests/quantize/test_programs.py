"""What is compiled: equal layers share programs; what they take is what the drivers reckon with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.models.units import Layer
from ptq_jax.quantize import (
  adaround,
  hessian,
  nearest,
  obc,
  plan,
  quadratic,
  reconstruct,
  walk,
)
from ptq_jax.quantize.grid import Grid
from tests import fresh


class Alike(nn.Module):
  """Three equal layers, as the blocks of a ResNet are, and a classifier: two shapes."""

  @nn.compact
  def __call__(self, x):
    for index in range(3):
      x = nn.relu(nn.Dense(6, name=f"alike_{index}")(x))
    return nn.Dense(2, name="head")(x)


FEW = adaround.MINI_BATCH._replace(num_steps=2, batch_size=4)
CASES = {
  "nearest": (nearest, {}, [nearest._round, nearest._finish]),
  "obc": (obc, {}, [nearest._round, nearest._finish, obc._quantize_rows, obc._all_rows]),
  "adaround": (adaround, {"form": "second_moment"}, [walk._fit, adaround._solve]),
  "mini-batch": (
    adaround,
    {"form": "mini_batch", "mini_batch": FEW},
    [walk._fit, reconstruct._start, reconstruct._advance.jitted(), reconstruct._errors.jitted()],
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_layers_share_programs(name):
  method, options, programs = CASES[name]
  images = np.random.default_rng(0).normal(size=(1, 8, 6)).astype(np.float32)
  model = Alike()
  variables = fresh.stacked(model, images[0], num_models=1)
  layers = units.layers(model, trees.take(variables, 0), images[0])
  assert [layer.path for layer in layers] == ["alike_0", "alike_1", "alike_2", "head"]
  for program in programs:
    program.clear_cache()
  keys = jax.random.split(jax.random.key(0), 1)
  plans = [plan.make(layers, levels=4)]
  method.quantize_stacked(keys, model, variables, images, plans=plans, **options)
  assert [program._cache_size() for program in programs] == [2] * len(programs)


def test_only_what_is_not_quantized_is_copied_for_every_plan(monkeypatch):
  model, copied, repeat = Alike(), [], nearest._repeat
  images = np.random.default_rng(0).normal(size=(1, 8, 6)).astype(np.float32)
  variables = fresh.stacked(model, images[0], num_models=1)
  layers = units.layers(model, trees.take(variables, 0), images[0])
  monkeypatch.setattr(
    nearest, "_repeat", lambda count, tree: copied.append(tree) or repeat(count, tree)
  )
  plans = [plan.make(layers, levels=levels) for levels in (4, None)]
  found, _ = nearest.quantize_stacked(
    jax.random.split(jax.random.key(0), 1), model, variables, images, plans=plans
  )
  assert sorted(*copied) == [f"params/{layer.path}/bias" for layer in layers]
  assert {leaf.shape[:2] for leaf in jax.tree.leaves(found)} == {(2, 1)}


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def whole(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_rows_of_obc_take_what_is_reckoned():
  """A block in the middle of a layer: the current inverses, a product, the factors."""
  rows, D = 8, 256
  grid = Grid(floats(rows, 1), floats(rows, 1), whole(rows, 1))
  inverse = hessian.Inverse(floats(1, D, D), floats(1))
  program = obc._quantize_rows.lower(
    obc.default_block_size(D), 1, floats(rows, D), inverse, whole(rows), grid
  )
  taken = program.compile().memory_analysis().temp_size_in_bytes
  assert rows * 4 * D * D < taken < rows * obc.bytes_per_row(D, np.dtype(np.float32))


def test_pairs_of_adaround_take_what_is_reckoned():
  layer = Layer("layer", "dense", (256, 16), input_shape=(256,), output_shape=(16,))
  pairs, (D, K) = 3, layer.kernel_shape
  grid = Grid(floats(pairs, 1, K), floats(pairs, 1, K), whole(pairs))
  moments = quadratic.Moments(floats(pairs, 1, D, D), floats(pairs, 1, D, K), floats(pairs))
  program = adaround._solve.lower(
    layer, adaround.SECOND_MOMENT, "plateau", 10, floats(pairs, D, K), grid, moments
  )
  memory = program.compile().memory_analysis()
  taken = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  reckoned = adaround._pair_bytes([layer], {layer.path: "second_moment"}, num_images=0)
  assert pairs * 4 * D * D < taken < pairs * reckoned
