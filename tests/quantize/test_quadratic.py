"""The quadratic form of AdaRound: the reference values, its solver, and the polish."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.models.units import Layer
from ptq_jax.quantize import adaround, grid, quadratic, reconstruct
from ptq_jax.quantize.layer import kernel_matrix, matrix_kernel
from ptq_jax.quantize.reconstruct import Problem, Schedule

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "adaround.npz")
LEVELS = {"1.58": 3, "2": 4, "4": 16}
QUICK = adaround.SECOND_MOMENT._replace(num_steps=50)


def conv(groups=1, stride=1):
  """A 3x3 layer of 4 to 8 channels on 8x8 images."""
  size = 8 // stride
  return Layer(
    "conv",
    "conv",
    (3, 3, 4 // groups, 8),
    (stride, stride),
    ((1, 1), (1, 1)),
    (1, 1),
    groups,
    (8, 8, 4),
    (size, size, 8),
  )


def matrices(layer, kernel, fitted):
  """A kernel and its grid as the second-moment form wants them."""
  scale, zero_point = (kernel_matrix(part, layer) for part in fitted[:2])
  return kernel_matrix(kernel, layer), grid.Grid(scale, zero_point, fitted.levels)


def random_case(layer, seed=0, levels=4):
  """Kernel, grid, inputs of the quantized network, outputs of the full-precision one, alpha."""
  rng = np.random.default_rng(seed)
  kernel = jnp.asarray(rng.normal(size=layer.kernel_shape), jnp.float32)
  inputs = jnp.asarray(np.maximum(rng.normal(0.3, 1, (6, *layer.input_shape)), 0), jnp.float32)
  outputs = jnp.asarray(rng.normal(size=(6, *layer.output_shape)), jnp.float32)
  exact = adaround.LayerRun(layer)({"conv": kernel}, {}, inputs)
  alpha = jnp.asarray(rng.normal(0, 3, layer.kernel_shape), jnp.float32)
  outputs = exact + 0.3 * outputs.reshape(exact.shape)
  return kernel, grid.fit(kernel, levels=levels), inputs, outputs, alpha


def small_problem(rows, columns, levels, seed=0):
  """Matrix weights, their grid, and moments of correlated inputs with a residual."""
  rng = np.random.default_rng(seed)
  x = np.maximum(rng.normal(0.5, 1, (40, rows)) @ rng.normal(size=(rows, rows)), 0) / rows
  r = 0.02 * rng.normal(size=(40, columns))
  weights = jnp.asarray(rng.normal(size=(1, rows, columns)), jnp.float32)
  scale, zero_point, _ = grid.fit(weights[0], levels=levels)
  moments = quadratic.Moments(
    *(jnp.asarray(a, jnp.float32) for a in ((x.T @ x / 40)[None], (x.T @ r / 40)[None])),
    jnp.float32((r**2).sum() / 40),
  )
  return weights, grid.Grid(scale[None], zero_point[None], levels), moments


POLISH = jax.jit(quadratic.polish, static_argnames="sweeps")
SOLVE = jax.jit(quadratic.solve, static_argnames=("schedule", "stop", "sweeps"))


@jax.jit
def error_of(codes, weights, fitted, moments):
  return quadratic.error(grid.dequantize(codes, fitted) - weights, moments)[0]


@pytest.mark.parametrize("layer", [conv(), conv(groups=2), conv(stride=2)], ids=["", "g", "s"])
def test_both_forms_have_one_objective(layer):
  kernel, fitted, inputs, outputs, alpha = random_case(layer)
  problem = Problem({"conv": kernel}, {"conv": fitted}, {}, inputs, outputs)

  @jax.jit
  def both(alpha):
    loss, gradient = reconstruct.loss(
      adaround.LayerRun(layer), problem, {"conv": alpha}, jnp.arange(6), weight=0.02, beta=6.0
    )
    weights, matrix_grid = matrices(layer, kernel, fitted)
    moments = quadratic.moments(inputs, outputs, kernel, layer)
    matrix = kernel_matrix(alpha, layer)
    found = quadratic.objective(matrix, weights, matrix_grid, moments, weight=0.02, beta=6.0)
    return loss, gradient, *found

  loss, gradient, value, slope = both(alpha)
  np.testing.assert_allclose(value, loss, rtol=1e-4)
  np.testing.assert_allclose(matrix_kernel(slope, layer), gradient["conv"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", LEVELS)
def test_reference_by_second_moments(bits):
  def read(name):
    return REFERENCE[f"b{bits}_{name}"]

  def to_kernel(array):
    return jnp.asarray(array.transpose(2, 3, 1, 0))

  layer, kernel = conv(), to_kernel(REFERENCE["w"])
  scale, zero_point = (jnp.asarray(read(name)).reshape(1, 1, 1, -1) for name in ("delta", "zero"))
  weights, matrix_grid = matrices(layer, kernel, grid.Grid(scale, zero_point, LEVELS[bits]))
  moments = quadratic.moments(
    *(jnp.asarray(read(name).transpose(0, 2, 3, 1)) for name in "xy"), kernel, layer
  )
  schedule = Schedule(num_steps=1000, learning_rate=1e-3, weight=0.01)
  alpha = kernel_matrix(to_kernel(read("alpha")), layer)
  objective = jax.jit(quadratic.objective)
  for step, total in zip(read("steps"), read("total_loss"), strict=True):
    weight, beta = reconstruct.rounding_term(int(step), schedule)
    value, gradient = objective(alpha, weights, matrix_grid, moments, weight=weight, beta=beta)
    np.testing.assert_allclose(value, total, rtol=1e-4)
    if step == 400:
      expected = kernel_matrix(to_kernel(read("grad_alpha_step400")), layer)
      np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_moments_of_batches_add_up():
  layer = conv()
  kernel, _, inputs, outputs, _ = random_case(layer)
  whole = quadratic.moments(inputs, outputs, kernel, layer)
  first = quadratic.moments(inputs[:2], outputs[:2], kernel, layer)
  rest = quadratic.moments(inputs[2:], outputs[2:], kernel, layer)
  mean = jax.tree.map(lambda a, b: a / 3 + b * 2 / 3, first, rest)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, mean)


@pytest.mark.parametrize("levels", [3, 16])
def test_polish_ends_where_no_single_turn_helps(levels):
  weights, fitted, moments = small_problem(37, 3, levels)
  codes = grid.codes(weights, fitted)
  polished = POLISH(codes, weights, fitted, moments, sweeps=50)
  best = error_of(polished, weights, fitted, moments)
  assert best < error_of(codes, weights, fitted, moments)
  floor = np.floor(weights / fitted.scale) + fitted.zero_point
  low, high = (np.clip(floor + up, 0, levels - 1).astype(int) for up in (0, 1))
  assert ((polished == low) | (polished == high)).all()
  turned = np.tile(polished, (polished.size, 1, 1, 1))  # each with one code turned
  for row, index in enumerate(np.ndindex(polished.shape)):
    turned[row][index] = low[index] + high[index] - turned[row][index]
  errors = jax.vmap(error_of, (0, None, None, None))(turned, weights, fitted, moments)
  assert (errors > best * (1 - 1e-5)).all()


def test_more_sweeps_never_raise_the_error():
  weights, fitted, moments = small_problem(37, 3, 4, seed=3)
  codes = grid.codes(weights, fitted)
  errors = [
    error_of(POLISH(codes, weights, fitted, moments, sweeps=n), weights, fitted, moments)
    for n in range(5)
  ]
  assert errors[0] == error_of(codes, weights, fitted, moments)
  assert errors[1] < errors[0]
  assert (np.diff(errors) <= 1e-6).all()


def test_solution_is_near_the_best_of_all_roundings():
  weights, fitted, moments = small_problem(9, 1, 4, seed=2)
  floor = np.floor(weights / fitted.scale) + fitted.zero_point
  choices = np.array([*itertools.product((0, 1), repeat=9)]).reshape(-1, 1, 9, 1)
  codes = np.clip(floor[None] + choices, 0, 3).astype(np.int32)
  best = jax.vmap(error_of, (0, None, None, None))(codes, weights, fitted, moments).min()
  solution = SOLVE(
    weights, fitted, moments, schedule=QUICK._replace(num_steps=200), stop="never", sweeps=10
  )
  assert best * (1 - 1e-5) <= solution.error <= 1.15 * best
  assert solution.error < 0.7 * solution.error_nearest


def test_never_above_nearest():
  weights, fitted, moments = small_problem(9, 2, 3)
  useless = Schedule(num_steps=1, learning_rate=50.0, weight=0.0, warmup=0.0)
  solution = SOLVE(weights, fitted, moments, schedule=useless, stop="never", sweeps=0)
  assert solution.error == solution.error_nearest
  np.testing.assert_array_equal(solution.codes, grid.codes(weights, fitted))


def test_plateau_ends_early_and_close_to_the_full_run():
  weights, fitted, moments = small_problem(30, 4, 16)
  run = functools.partial(SOLVE, weights, fitted, moments, sweeps=0)
  schedule = QUICK._replace(num_steps=400, weight=1.0)
  full, early = (run(schedule=schedule, stop=stop) for stop in ("never", "plateau"))
  assert full.steps == 400
  assert early.steps < 400
  assert early.error <= 1.1 * full.error
