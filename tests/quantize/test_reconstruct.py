"""The loop shared by AdaRound and BRECQ: reference values, and what it promises."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models.units import Layer
from ptq_jax.quantize import grid, reconstruct, rounding
from ptq_jax.quantize.adaround import LayerRun
from ptq_jax.quantize.reconstruct import Problem, Schedule

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "adaround.npz")
LEVELS = {"1.58": 3, "2": 4, "4": 16}
PATH = "conv"
LAYER = Layer(PATH, "conv", (3, 3, 4, 8), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, (8, 8, 4), (8, 8, 8))
SCHEDULE = Schedule(
  num_steps=400, learning_rate=0.2, weight=0.01, batch_size=8, decay_rates=(0.8, 0.9)
)


def to_flax(array):
  """A PyTorch kernel or batch of images in Flax's layout."""
  return jnp.asarray(
    array.transpose(2, 3, 1, 0) if array.shape[2] == 3 else array.transpose(0, 2, 3, 1)
  )


def reference_problem(bits):
  """The layer of the reference file, and a function that reads its arrays."""

  def read(name):
    return REFERENCE[f"b{bits}_{name}"]

  scale, zero_point = (jnp.asarray(read(name)).reshape(1, 1, 1, -1) for name in ("delta", "zero"))
  fitted = grid.Grid(scale, zero_point, jnp.int32(LEVELS[bits]))
  weights = to_flax(REFERENCE["w"])
  inputs, outputs = to_flax(read("x")), to_flax(read("y"))
  targets = outputs.reshape(len(outputs), -1, outputs.shape[-1])
  return Problem({PATH: weights}, {PATH: fitted}, {}, inputs, targets), read


def stacked_problems():
  """The same layer at 3 and at 16 levels."""
  return trees.stack([reference_problem(bits)[0] for bits in ("1.58", "4")])


@functools.cache
def learned(num_steps=SCHEDULE.num_steps, stop="never", steps_per_call=50):
  """Alphas and steps of the stacked problems."""
  return reconstruct.minimize(
    LayerRun(LAYER),
    stacked_problems(),
    jax.random.split(jax.random.key(0), 2),
    schedule=SCHEDULE._replace(num_steps=num_steps),
    stop=stop,
    steps_per_call=steps_per_call,
  )


@pytest.mark.parametrize("bits", LEVELS)
def test_reference_losses_and_gradient(bits):
  problem, read = reference_problem(bits)
  alphas = {PATH: to_flax(read("alpha"))}
  schedule = Schedule(num_steps=1000, learning_rate=1e-3, weight=0.01)
  everything = jnp.arange(len(problem.inputs))
  run = jax.jit(functools.partial(reconstruct.loss, LayerRun(LAYER)))
  for step, total, error in zip(read("steps"), read("total_loss"), read("rec_loss"), strict=True):
    weight, beta = reconstruct.rounding_term(int(step), schedule)
    value, gradient = run(problem, alphas, everything, weight=weight, beta=beta)
    np.testing.assert_allclose(value, total, rtol=1e-4)
    without, _ = run(problem, alphas, everything, weight=0.0, beta=beta)
    np.testing.assert_allclose(without, error, rtol=1e-4)
    if step == 400:
      expected = to_flax(read("grad_alpha_step400"))
      np.testing.assert_allclose(gradient[PATH], expected, rtol=1e-3, atol=1e-5)


def test_learned_rounding_beats_nearest_rounding():
  problems = stacked_problems()
  alphas, steps = learned()
  kernels, before, after = reconstruct.finish(LayerRun(LAYER), problems, alphas, batch_size=9)
  assert steps.tolist() == [400, 400]
  assert (after < before * [1, 0.8]).all()

  @jax.jit
  @jax.vmap
  def error(kernels, inputs, targets):
    return reconstruct.output_error(LayerRun(LAYER)(kernels, {}, inputs), targets)

  direct = error(kernels, problems.inputs, problems.targets)
  np.testing.assert_allclose(after, direct, rtol=1e-4)


def test_where_learning_fails_nearest_rounding_stays():
  problems = stacked_problems()
  alphas = jax.tree.map(lambda alpha: alpha * np.reshape([-1.0, 1], (2, 1, 1, 1, 1)), learned()[0])
  kernels, before, after = reconstruct.finish(LayerRun(LAYER), problems, alphas, batch_size=32)
  near = jax.vmap(grid.nearest)(problems.weights[PATH], problems.grids[PATH])
  assert after[0] == before[0]
  assert after[1] < before[1]
  np.testing.assert_array_equal(kernels[PATH][0], near[0])
  assert not np.array_equal(kernels[PATH][1], near[1])


def test_one_by_one_and_step_by_step_give_the_same():
  alphas, _ = learned(num_steps=20)
  single, _ = learned(num_steps=20, steps_per_call=1)
  np.testing.assert_allclose(single[PATH], alphas[PATH], rtol=1e-4, atol=1e-4)
  problems, keys = stacked_problems(), jax.random.split(jax.random.key(0), 2)
  alone, _ = reconstruct.minimize(
    LayerRun(LAYER),
    trees.take(problems, slice(1, 2)),
    keys[1:],
    schedule=SCHEDULE._replace(num_steps=20),
    stop="never",
  )
  np.testing.assert_allclose(alone[PATH][0], alphas[PATH][1], rtol=1e-4, atol=1e-4)


def test_plateau_stops_once_all_weights_have_decided():
  alphas, steps = learned(stop="plateau")
  full, all_steps = learned()
  assert all_steps.tolist() == [400, 400]
  assert (steps < 400).any()
  stopped = int(steps.argmin())
  h = rounding.soft(alphas[PATH][stopped])
  assert jnp.mean((h > 1e-4) & (h < 1 - 1e-4)) <= reconstruct.UNDECIDED
  flipped = (alphas[PATH][stopped] >= 0) != (full[PATH][stopped] >= 0)
  assert jnp.mean(flipped) <= 2 * reconstruct.UNDECIDED


def test_rounding_term_follows_the_schedule():
  schedule = Schedule(num_steps=10, learning_rate=0.1, weight=0.5, warmup=0.4, beta_end=4.0)
  weights, betas = zip(*(reconstruct.rounding_term(i, schedule) for i in range(1, 11)), strict=True)
  np.testing.assert_allclose(weights, [0] * 3 + [0.5] * 7)
  np.testing.assert_allclose(betas[3], 20)
  np.testing.assert_allclose(betas[6], 12)
  np.testing.assert_allclose(betas[9], 4)


def test_draw_repeats_no_image_and_reaches_all():
  keys = jax.random.split(jax.random.key(3), 500)
  drawn = np.asarray(jax.vmap(lambda k: reconstruct.draw(k, num_images=50, batch_size=16))(keys))
  assert all(len(set(row)) == 16 for row in drawn.tolist())
  counts = np.bincount(drawn.ravel(), minlength=50)
  assert len(counts) == 50
  assert counts.min() > 0.6 * counts.mean()
  few = reconstruct.draw(keys[0], num_images=5, batch_size=16)
  np.testing.assert_array_equal(sorted(few), range(5))


def test_importance_weighs_squared_errors():
  outputs, targets = jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))
  assert reconstruct.output_error(outputs, targets) == 4
  assert reconstruct.output_error(outputs, targets, jnp.full((2, 3, 4), 0.5)) == 2


def test_unknown_stop():
  with pytest.raises(ValueError, match='stop must be "plateau" or "never", got'):
    reconstruct.check_stop("soon")
