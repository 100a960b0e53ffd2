"""Nearest rounding of whole models: on the grid, per model and plan, with true output errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import capture, grid, nearest, plan
from tests import fresh


class Grouped(nn.Module):
  """A grouped convolution with a bias, and a classifier."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (2, 3), strides=(1, 2), feature_group_count=2, name="conv")(x)
    return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def models():
  """Two of them, their images, and plans: all layers at 3 levels, the head in full precision."""
  model = Grouped()
  images = jax.random.normal(jax.random.key(1), (2, 9, 5, 6, 4))
  variables = fresh.stacked(model, images[0], num_models=len(images))
  layers = units.layers(model, trees.take(variables, 0), images[0])
  plans = [plan.make(layers, levels=3), plan.make(layers, levels=8, last_layer_levels="full")]
  return model, variables, images, plans


def run(models, **options):
  model, variables, images, plans = models
  keys = jax.random.split(jax.random.key(2))
  return nearest.quantize_stacked(keys, model, variables, images, plans=plans, **options)


def test_kernels_are_the_nearest_and_nothing_else_changes(models):
  _, variables, _, plans = models
  quantized, records = run(models)
  assert jax.tree.structure(quantized) == jax.tree.structure(dict(variables))
  grids = {record.name: record.grids[record.name] for record in records}
  for path, leaf in trees.flatten(quantized).items():
    original, layer = trees.get(variables, path), path.split("/")[1]
    for p, chosen in enumerate(plans):
      for m in range(2):
        expected = original[m]
        if path.endswith("/kernel"):
          assert grids[layer].levels[p, m] == (chosen[layer] or 0)
          if chosen[layer]:
            fitted = grid.fit(expected, levels=chosen[layer])
            np.testing.assert_allclose(grids[layer].scale[p, m], fitted.scale, rtol=1e-6)
            expected = grid.nearest(expected, fitted)
        np.testing.assert_allclose(leaf[p, m], expected, rtol=1e-6, atol=1e-7)


def test_errors_are_distances_of_the_layers_outputs(models):
  model, variables, images, plans = models
  quantized, records = run(models)
  layers = units.layers(model, *trees.take((variables, images), 0))
  calls = jax.jit(lambda one, x: capture.calls(model, one, x, layers))
  for p, chosen in enumerate(plans):
    for m in range(2):
      full, rounded = (
        trees.take(variables, m),
        jax.tree.map(lambda leaf, i=(p, m): leaf[i], quantized),
      )
      before = calls(full, images[m])
      for record in records:
        mixed = trees.replace(
          full, {f"params/{record.name}/kernel": rounded["params"][record.name]["kernel"]}
        )
        change = calls(mixed, images[m])[record.name][0].outputs - before[record.name][0].outputs
        expected = jnp.square(change).sum(-1).mean() if chosen[record.name] else 0
        np.testing.assert_allclose(record.error_after[p, m], expected, rtol=1e-4, atol=1e-10)
        np.testing.assert_allclose(record.error_before[p, m], record.error_after[p, m], rtol=1e-5)
        assert record.steps[p, m] == 0


def test_one_model_is_a_slice_of_many(models):
  model, variables, images, _ = models
  together, records = run(models)
  alone, infos = nearest.quantize_params(
    jax.random.key(3), model, trees.take(variables, 1), images[1], levels=3
  )
  for path, leaf in trees.flatten(alone).items():
    np.testing.assert_allclose(trees.get(together, path)[0, 1], leaf, rtol=1e-6, atol=1e-7)
  for record, info in zip(records, infos, strict=True):
    assert np.ndim(info.error_after) == 0
    np.testing.assert_allclose(record.error_after[0, 1], info.error_after, rtol=1e-5)


def test_grid_options_reach_the_grid(models):
  _, records = run(models, grid_options={"symmetric": True, "search": "minmax"})
  kernels = models[1]["params"]["conv"]["kernel"]
  found = records[0].grids["conv"]
  np.testing.assert_array_equal(found.zero_point[0], np.ones((2, 1, 1, 1, 6)))
  largest = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
  np.testing.assert_allclose(found.scale[0], largest, rtol=1e-6)


def test_a_method_that_does_worse_is_not_used(models):
  model, variables, images, plans = models
  quantized, records = nearest.each_layer(
    lambda job: job.nearest + job.grids.scale, model, variables, images, plans=plans
  )
  jax.tree.map(np.testing.assert_array_equal, quantized, run(models)[0])
  for record in records:
    np.testing.assert_array_equal(record.error_after, record.error_before)


def test_dtype_stays(models):
  model, variables, images, _ = models
  half = jax.tree.map(lambda leaf: leaf[0].astype(jnp.bfloat16), dict(variables))
  quantized, (conv, _) = nearest.quantize_params(
    jax.random.key(0), model, half, images[0], levels=4
  )
  kernel, fitted = quantized["params"]["conv"]["kernel"], conv.grids["conv"]
  assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == jnp.bfloat16, quantized))
  assert fitted.scale.dtype == np.float32
  codes = grid.codes(kernel, grid.Grid(fitted.scale, fitted.zero_point, 4))
  exact = grid.dequantize(codes, grid.Grid(fitted.scale, fitted.zero_point, 4))
  np.testing.assert_array_equal(kernel, exact.astype(jnp.bfloat16))


def test_bad_input(models):
  model, variables, images, plans = models
  keys = jax.random.split(jax.random.key(0))
  with pytest.raises(ValueError, match="calibration set is empty"):
    nearest.quantize_stacked(keys, model, variables, images[:, :0], plans=plans)
  with pytest.raises(ValueError, match="plan and layers differ at 'head'"):
    nearest.quantize_stacked(keys, model, variables, images, plans=[{"conv": 3}])
  with pytest.raises(ValueError, match="NaN or infinite"):
    nearest.quantize_stacked(keys, model, variables, images * jnp.nan, plans=plans)
