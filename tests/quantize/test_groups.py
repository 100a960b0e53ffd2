"""Grids per group of inputs: against layers cut by hand, through every method, and packed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import METHODS, adaround, brecq, grid, obc, pack, plan
from tests import fresh


def rng(seed=0):
  return np.random.default_rng(seed)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"search": "minmax"}])
def test_a_grid_of_groups_is_that_of_each_group(options):
  kernel = rng().normal(size=(2, 2, 6, 5)).astype(np.float32)
  whole = grid.fit(kernel, levels=4, group_size=8, **options)
  assert whole.scale.shape == whole.zero_point.shape == kernel.shape
  for first in range(0, 24, 8):
    rows = slice(first, first + 8)
    part = grid.fit(kernel.reshape(24, 5)[rows], levels=4, **options)
    for found, expected in zip(whole[:2], part[:2], strict=True):
      expected = np.broadcast_to(expected, (8, 5))
      np.testing.assert_array_equal(np.asarray(found).reshape(24, 5)[rows], expected)


@pytest.mark.parametrize("size", [5, 0, -2, 48])
def test_groups_divide_the_inputs(size):
  with pytest.raises(ValueError, match=f"group_size is {size}, which does not divide the 24 inp"):
    grid.fit(np.ones((24, 3)), levels=4, group_size=size)


def test_obc_with_groups_equals_plain_updates():
  """The paper's loop in float64, every weight on the grid of its group; 3 blocks, 2 stages."""
  rows, D = 3, 24
  inputs = np.maximum(rng().normal(size=(96, D)) @ rng(1).normal(size=(D, D)) / 5 + 0.2, 0)
  hessian = 2 * inputs.T @ inputs / 96
  weights = rng(2).normal(0, 0.1, (rows, D)).astype(np.float32)
  fitted = grid.fit(weights.T, levels=4, group_size=6)
  fitted = grid.Grid(fitted.scale.T, fitted.zero_point.T, 4)
  found = obc.quantize_matrix(weights, hessian, fitted, block_size=5)
  for w, s, z, row in zip(weights, *map(np.asarray, fitted[:2]), np.asarray(found), strict=True):
    w, inverse, left = w.astype(float), np.linalg.inv(hessian), np.ones(D, bool)
    for _ in range(D):
      rounded = (np.clip(np.round(w / s) + z, 0, 3) - z) * s
      squared = np.where(left, (w - rounded) ** 2, 0)
      far = squared > 0.25 * s * s
      score = np.where(left, squared / np.diagonal(inverse), np.inf)
      j = np.where(far, squared, 0).argmax() if far.any() else score.argmin()
      column = np.where(left, inverse[j], 0)
      w = w - column * (w[j] - rounded[j]) / column[j]
      w[j], left[j] = rounded[j], False
      inverse = inverse - np.outer(column, column) / column[j]
      np.fill_diagonal(inverse, np.where(left, np.diagonal(inverse), 1))
    np.testing.assert_allclose(row, w, rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
  """A convolution in two groups, a product over two axes, and a classifier."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (2, 2), strides=2, feature_group_count=2, name="conv")(x))
    x = nn.relu(nn.DenseGeneral((2, 4), axis=(-2, -1), name="general")(x.mean(1)))
    return nn.Dense(2, name="head")(x.reshape(len(x), -1))


FEW = {
  "nearest": {},
  "obc": {},
  "adaround": {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 1},
  "brecq": {
    "form": "mini_batch",
    "schedule": brecq.SCHEDULE._replace(num_steps=1, batch_size=4),
  },
}

SIZES = {"head": None, "gen*": 4, "*": 2}


@pytest.mark.parametrize("name", FEW)
def test_every_method_keeps_to_the_grids_of_groups(name, tmp_path):
  model, images = Mixed(), rng().normal(size=(1, 12, 4, 4, 4)).astype(np.float32)
  variables = fresh.stacked(model, images[0], num_models=1)
  layers = units.layers(model, trees.take(variables, 0), images[0])
  plans = [plan.make(layers, levels=4, last_layer_levels="full"), plan.make(layers, levels=3)]
  keys, options = jax.random.split(jax.random.key(0), 1), FEW[name]
  quantized, records = METHODS[name].quantize_stacked(
    keys, model, variables, images, plans=plans, grid_options={"group_size": SIZES}, **options
  )
  grids = pack.grids_of(records)
  for layer in layers:
    kernel = np.asarray(trees.get(quantized, layer.kernel))
    grouped = layer.path != "head"
    assert grids[layer.path].scale.shape == (kernel.shape if grouped else (2, 1, 1, 2))
    assert not np.array_equal(kernel[1, 0], trees.get(variables, layer.kernel)[0])
  for p in range(2):
    one = trees.take(quantized, p)
    pack.save(
      tmp_path / "model.npz",
      one,
      [
        record._replace(grids={path: trees.take(each, p) for path, each in record.grids.items()})
        for record in records
      ],
    )
    packed = pack.load(tmp_path / "model.npz")
    jax.tree.map(np.testing.assert_array_equal, pack.unpack(packed), jax.device_get(one))
    counts = {path: kernel.scale.size for path, kernel in packed.kernels.items()}
    assert [counts[f"params/{name}/kernel"] for name in ("conv", "general")] == [16, 16]
    if p == 1:
      assert counts["params/head/kernel"] == 2
      size = pack.size(packed)
      assert size.grids == 5 * (16 + 16 + 2)  # float32 and a byte each
      assert size.bits_per_weight == 8 * (size.grids + 7 + 13 + 4) / (32 + 64 + 16)
  with pytest.raises(ValueError, match="does not divide the 8 inputs of an output of layer 'conv'"):
    METHODS[name].quantize_stacked(
      keys, model, variables, images, plans=plans, grid_options={"group_size": 3}, **options
    )


def test_smaller_groups_are_closer():
  kernel = jnp.asarray(rng().normal(size=(64, 3)) * np.repeat([0.1, 1], 32)[:, None], jnp.float32)
  errors = [
    float(jnp.sum((grid.nearest(kernel, grid.fit(kernel, levels=4, group_size=g)) - kernel) ** 2))
    for g in (None, 32, 8)
  ]
  assert errors[0] > errors[1] > errors[2]
