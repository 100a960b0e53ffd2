import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.models import norm


@pytest.fixture(scope="module")
def setup():
  x = 2.0 + 3.0 * jax.random.normal(jax.random.key(0), (4, 5, 5, 3)) * jnp.array(
    [[[[1.0, 0.1, 5.0]]]]
  )
  ours, flax = norm.BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
  variables = flax.init(jax.random.key(1), x, use_running_average=True)
  variables = jax.tree.map(lambda leaf: leaf + jnp.arange(3) / 3, variables)
  return ours, flax, variables, x


def test_variables_are_those_of_flax(setup):
  ours, _, variables, x = setup
  found = ours.init(jax.random.key(1), x, use_running_average=False)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables)
  np.testing.assert_array_equal(found["batch_stats"]["mean"], 0)  # an example moves no statistics
  np.testing.assert_array_equal(found["batch_stats"]["var"], 1)


@pytest.mark.parametrize("running", [True, False])
def test_outputs_and_statistics_are_those_of_flax(setup, running):
  ours, flax, variables, x = setup
  results = [
    module.apply(variables, x, use_running_average=running, mutable=["batch_stats"])
    for module in (ours, flax)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_gradients_are_those_of_flax(setup):
  ours, flax, variables, x = setup
  weights = jax.random.normal(jax.random.key(2), x.shape)

  def loss(module, params, x):
    whole = {**variables, "params": params}
    out, _ = module.apply(whole, x, use_running_average=False, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(out) * weights)

  found, expected = (
    jax.jit(jax.grad(functools.partial(loss, module), (0, 1)))(variables["params"], x)
    for module in (ours, flax)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_half_precision_goes_in_and_out_but_statistics_stay_single(setup):
  ours, _, variables, x = setup
  half = norm.BatchNorm(dtype=jnp.bfloat16)

  def run(module, x):
    return module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

  (found, updated), (expected, _) = run(half, x.astype(jnp.bfloat16)), run(ours, x)
  assert found.dtype == jnp.bfloat16
  assert updated["batch_stats"]["var"].dtype == jnp.float32
  np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.1)


def test_a_constant_channel_stays_finite():
  module, x = norm.BatchNorm(), jnp.full((2, 3, 3, 2), 7.0)
  variables = module.init(jax.random.key(0), x, use_running_average=True)
  out, _ = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
  np.testing.assert_allclose(out, 0, atol=1e-2)


def test_other_options_of_flax_are_honoured_or_refused(setup):
  _, _, variables, x = setup
  bare = {"batch_stats": variables["batch_stats"]}
  options = {"use_scale": False, "use_bias": False, "epsilon": 0.1}
  found, expected = (
    module(**options).apply(bare, x, use_running_average=True)
    for module in (norm.BatchNorm, nn.BatchNorm)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  for options in ({"axis": 1}, {"axis_name": "devices"}):
    with pytest.raises(ValueError, match="no axis but the last"):
      norm.BatchNorm(**options).apply(variables, x, use_running_average=True)
