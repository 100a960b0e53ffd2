"""The contract of the quantizers for parameters of every dtype, with and without 64 bit."""

import contextlib
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import call, units
from ptq_jax.quantize import METHODS, adaround, brecq, grid, pack
from tests import fresh

QUICK = {
  "nearest": {},
  "adaround": {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 2},
  "adaround, batches": {
    "form": "mini_batch",
    "mini_batch": adaround.MINI_BATCH._replace(num_steps=10, batch_size=4),
  },
  "brecq": {"schedule": brecq.SCHEDULE._replace(num_steps=10, batch_size=4)},
  "brecq, fisher": {
    "schedule": brecq.SCHEDULE._replace(num_steps=10, batch_size=4),
    "loss": "fisher",
    "labels": np.arange(8) % 3,
  },
  "obc": {},
}


class Net(nn.Module):
  """A convolution, a normalisation and a dense layer with parameters of a dtype."""

  dtype: object

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.Conv(4, (3, 3), strides=2, param_dtype=self.dtype, name="conv")(images)
    x = nn.BatchNorm(use_running_average=not train, param_dtype=self.dtype, name="norm")(x)
    return nn.Dense(3, param_dtype=self.dtype, name="head")(nn.relu(x).mean(axis=(1, 2)))


def case(dtype):
  """A model, its variables and images, in a dtype."""
  rng = np.random.default_rng(0)
  wide = jnp.promote_types(dtype, jnp.float32)
  images = jnp.asarray(rng.normal(size=(8, 6, 6, 2)), wide)
  variables = fresh.variables(Net(dtype), images)
  return Net(dtype), variables, images


DTYPES = {  # and whether JAX computes in 64 bit
  "float16": (jnp.float16, False),
  "bfloat16": (jnp.bfloat16, False),
  "float32 among 64 bit": (jnp.float32, True),
  "float64": (jnp.float64, True),
}


@pytest.mark.parametrize(
  ("how", "name"),
  [
    ("nearest", "bfloat16"),
    *itertools.product(("adaround", "brecq", "obc"), ("float16", "float64")),
    ("adaround, batches", "bfloat16"),
    ("brecq, fisher", "float32 among 64 bit"),
  ],
)
def test_any_dtype_comes_back_on_its_grid_and_from_its_file(how, name, tmp_path):
  dtype, x64 = DTYPES[name]
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    model, variables, images = case(dtype)
    method = METHODS[how.split(",")[0]]
    result, info = method.quantize_params(
      jax.random.key(1), model, variables, images, levels=3, **QUICK[how]
    )
    for path, leaf in trees.flatten(variables).items():
      assert trees.get(result, path).dtype == leaf.dtype, path
    for layer in units.layers(model, variables, images):
      kernel = np.asarray(trees.get(result, layer.kernel), np.float64)
      columns = kernel.reshape(-1, layer.num_columns).T
      assert max(len(np.unique(column)) for column in columns) <= 3
    assert all(record.error_after <= record.error_before for record in info)
    grids = {path: one for record in info for path, one in record.grids.items()}
    pack.save(tmp_path / "packed.npz", pack.pack(result, grids))
    loaded = pack.unpack(pack.load(tmp_path / "packed.npz"))
    jax.tree.map(np.testing.assert_array_equal, loaded, result)
    apply = jax.jit(functools.partial(call.apply, model))
    np.testing.assert_array_equal(apply(loaded, images), apply(result, images))


@pytest.mark.parametrize("how", ["nearest", "obc", "adaround", "adaround, batches", "brecq"])
def test_errors_are_those_of_the_weights_that_come_back(how):
  """At 256 levels bfloat16 loses as much as rounding to the grid; before, that was not counted."""
  model = nn.Sequential([nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.float32)])
  images = np.asarray(np.random.default_rng(1).normal(size=(8, 12)), np.float32)
  variables = fresh.variables(model, jnp.asarray(images))
  result, (record,) = METHODS[how.split(",")[0]].quantize_params(
    jax.random.key(1), model, variables, images, levels=256, **QUICK[how]
  )
  change = (
    np.asarray(tree["params"]["layers_0"]["kernel"], np.float64) for tree in (result, variables)
  )
  outputs = images.astype(np.float64) @ np.subtract(*change)
  np.testing.assert_allclose(record.error_after, (outputs**2).sum(axis=-1).mean(), rtol=1e-4)


def test_64_bit_are_more_than_32():
  with jax.enable_x64(True):
    model, variables, images = case(jnp.float64)
    result, info = METHODS["nearest"].quantize_params(
      jax.random.key(1), model, variables, images, levels=16
    )
    scale = info[0].grids["conv"].scale
    assert scale.dtype == np.float64
    kernel = trees.get(result, "params/conv/kernel")
    steps = np.asarray(kernel) / scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-12)


CODES = {2: jnp.float32, 3: jnp.bfloat16, 4: jnp.float16, 5: jnp.float32, 16: jnp.bfloat16,
         200: jnp.float32, 256: jnp.float16}  # fmt: skip


@pytest.mark.parametrize("levels", CODES)
@pytest.mark.parametrize("end", ["low", "high", "any"])
def test_codes_of_all_grids_survive_a_file(levels, end, tmp_path):
  """Zero points at either end, odd sizes, every code: what comes back is the same bit by bit."""
  rng = np.random.default_rng(levels)
  for number in range(5):
    shape = (*rng.integers(1, 4, 2), int(rng.integers(1, 9)), int(rng.integers(1, 5)))
    scale = np.exp(rng.normal(0, 6, (1, 1, 1, shape[-1]))).astype(np.float32)
    zero = {"low": 0, "high": levels - 1}.get(end, rng.integers(0, levels, scale.shape))
    fitted = grid.Grid(scale, np.broadcast_to(zero, scale.shape).astype(np.float32), levels)
    codes = rng.integers(0, levels, shape)
    kernel = grid.dequantize(codes, fitted).astype(CODES[levels])
    if not np.isfinite(np.asarray(kernel, np.float32)).all():
      continue
    variables = {"params": {"layer": {"kernel": kernel, "bias": jnp.ones(shape[-1])}}}
    path = tmp_path / f"{number}.npz"
    pack.save(path, pack.pack(variables, {"layer": fitted}))
    loaded = pack.load(path)
    found = pack.unpack(loaded)["params"]["layer"]["kernel"]
    assert found.dtype == kernel.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(kernel, np.float32))
    packed = loaded.kernels["params/layer/kernel"]
    assert len(packed.codes) == pack.num_code_bytes(kernel.size, levels=levels)


def test_two_levels_keep_their_zero_point_between_codes(tmp_path):
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
  fitted = grid.fit(weights, levels=2)
  variables = {"params": {"layer": {"kernel": grid.nearest(weights, fitted)}}}
  pack.save(tmp_path / "two.npz", pack.pack(variables, {"layer": fitted}))
  found = pack.unpack(pack.load(tmp_path / "two.npz"))
  jax.tree.map(np.testing.assert_array_equal, found, variables)
