"""AdaRound's pieces against the reference values and their own claims."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.quantize import grid, rounding

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "adaround.npz")
LEVELS = {"1.58": 3, "2": 4, "4": 16}
NUM_STEPS, WEIGHT = 1000, 0.01


def flax_kernel(weights):
  return weights.transpose(2, 3, 1, 0)


def case(bits):
  """Weights, their grid, and a function that reads a reference array."""

  def read(name):
    return REFERENCE[f"b{bits}_{name}"]

  parts = [read(name).reshape(1, 1, 1, -1) for name in ("delta", "zero")]
  return flax_kernel(REFERENCE["w"]), grid.Grid(*parts, LEVELS[bits]), read


def reconstruction_loss(alpha, weights, fitted, read):
  """Sum over channels, mean over images and pixels, of the squared output error."""
  images, target = (read(name).transpose(0, 2, 3, 1) for name in "xy")
  output = jax.lax.conv_general_dilated(
    images,
    rounding.soft_weights(weights, alpha, fitted),
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision="highest",
  )
  return jnp.square(output - target).sum(-1).mean()


def total_loss(alpha, step, weights, fitted, read):
  beta = rounding.beta(step, num_steps=NUM_STEPS)
  term = WEIGHT * rounding.regularizer(alpha, beta=beta)
  term = jnp.where(rounding.in_warmup(step, num_steps=NUM_STEPS), 0, term)
  return reconstruction_loss(alpha, weights, fitted, read) + term


@pytest.mark.parametrize("bits", LEVELS)
def test_reference_weights(bits):
  weights, fitted, read = case(bits)
  alpha = flax_kernel(read("alpha"))
  near = {"rtol": 2e-5, "atol": 2e-6}
  np.testing.assert_allclose(
    rounding.initial_alpha(weights, fitted), flax_kernel(read("alpha0")), rtol=1e-3, atol=1e-4
  )
  np.testing.assert_allclose(rounding.soft(alpha), flax_kernel(read("h")), **near)
  np.testing.assert_allclose(
    rounding.soft_weights(weights, alpha, fitted), flax_kernel(read("soft_w")), **near
  )
  np.testing.assert_allclose(
    rounding.hard_weights(weights, alpha, fitted), flax_kernel(read("hard_w")), **near
  )


@pytest.mark.parametrize("bits", LEVELS)
def test_reference_losses(bits):
  weights, fitted, read = case(bits)
  alpha, steps = flax_kernel(read("alpha")), read("steps")
  np.testing.assert_allclose(rounding.beta(steps, num_steps=NUM_STEPS), read("beta"), rtol=1e-6)
  losses = [reconstruction_loss(alpha, weights, fitted, read)] * len(steps)
  np.testing.assert_allclose(losses, read("rec_loss"), rtol=1e-5)
  losses = [total_loss(alpha, step, weights, fitted, read) for step in steps.tolist()]
  np.testing.assert_allclose(losses, read("total_loss"), rtol=1e-5)


@pytest.mark.parametrize("bits", LEVELS)
def test_reference_gradient(bits):
  weights, fitted, read = case(bits)
  gradient = jax.grad(total_loss)(
    jnp.asarray(flax_kernel(read("alpha"))), 400, weights, fitted, read
  )
  np.testing.assert_allclose(
    gradient, flax_kernel(read("grad_alpha_step400")), rtol=1e-4, atol=1e-6
  )


def test_initial_alpha_is_the_full_precision_weight():
  weights = np.random.default_rng(0).normal(0, 0.1, (5, 7)).astype(np.float32)
  fitted = grid.fit(weights, levels=16, search="minmax")
  alpha = rounding.initial_alpha(weights, fitted)
  steps = weights / fitted.scale + fitted.zero_point
  inside = (steps >= 0) & (steps <= 15)
  assert inside.mean() >= 0.7
  soft = rounding.soft_weights(weights, alpha, fitted)
  np.testing.assert_allclose(soft[inside], weights[inside], atol=1e-6)


def test_hard_is_the_limit_of_soft_and_stands_on_the_grid():
  rng = np.random.default_rng(0)
  weights = rng.normal(0, 0.1, (5, 7)).astype(np.float32)
  alpha = rng.normal(0, 1, weights.shape).astype(np.float32)
  fitted = grid.fit(weights, levels=3)
  hard = rounding.hard_weights(weights, alpha, fitted)
  np.testing.assert_array_equal(grid.nearest(hard, fitted), hard)
  np.testing.assert_allclose(rounding.soft_weights(weights, alpha * 1e6, fitted), hard, atol=1e-7)
  assert float(rounding.regularizer(alpha * 1e6, beta=20.0)) == 0
  assert float(rounding.regularizer(alpha * 0, beta=2.0)) == weights.size


def test_beta_schedule():
  steps = np.array([1, 20, 60, 100, 200])
  expected = [20.0, 20.0, 11.0, 2.0, 2.0]
  np.testing.assert_allclose(rounding.beta(steps, num_steps=100), expected, rtol=1e-6)
  assert rounding.beta(1, num_steps=1, warmup=0.0) == 2
  warm = rounding.in_warmup(steps, num_steps=100)
  np.testing.assert_array_equal(warm, [True, False, False, False, False])


@pytest.mark.parametrize("levels", [3, 16])
def test_slopes_are_those_of_the_equations(levels):
  values = np.random.default_rng(0).normal(size=(3, 30, 4)).astype(np.float32)
  weights, alpha, direction = map(jnp.asarray, values)
  fitted = grid.fit(weights, levels=levels)

  def ours(alpha):
    term = 0.3 * rounding.regularizer(alpha, beta=5.5)
    return jnp.sum(direction * rounding.soft_weights(weights, alpha, fitted)) + term

  def naive(alpha):
    h = jnp.clip(1.2 / (1 + jnp.exp(-alpha)) - 0.1, 0, 1)
    steps = jnp.floor(weights / fitted.scale) + h + fitted.zero_point
    soft = (jnp.clip(steps, 0, levels - 1) - fitted.zero_point) * fitted.scale
    return jnp.sum(direction * soft) + 0.3 * jnp.sum(1 - jnp.abs(2 * h - 1) ** 5.5)

  for found, expected in zip(
    *(jax.value_and_grad(f)(4 * alpha) for f in (ours, naive)), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  middle = jax.grad(lambda a: rounding.regularizer(a, beta=2.0))(jnp.zeros(1))
  assert np.isfinite(middle).all()  # h = 1/2, where the power is that of 0
