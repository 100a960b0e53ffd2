"""What is compiled: equal layers share their programs, whatever they are called."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from ptq_jax.models import units
from ptq_jax.quantize import adaround, nearest, obc, plan, reconstruct, walk
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
  "nearest": (nearest, {}, [nearest._round, nearest._keep_better]),
  "obc": (obc, {}, [nearest._round, nearest._keep_better, obc._quantize_rows, obc._all_rows]),
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
  layers = units.layers(model, jax.tree.map(lambda leaf: leaf[0], variables), images[0])
  assert [layer.path for layer in layers] == ["alike_0", "alike_1", "alike_2", "head"]
  for program in programs:
    program.clear_cache()
  keys = jax.random.split(jax.random.key(0), 1)
  plans = [plan.make(layers, levels=4)]
  method.quantize_stacked(keys, model, variables, images, plans=plans, **options)
  assert [program._cache_size() for program in programs] == [2] * len(programs)
