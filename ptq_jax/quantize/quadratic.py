"""AdaRound of one weight matrix, given only second moments of its inputs.

A layer's objective has no activation inside and so is quadratic in the weights: with rows x of the
quantized network's patches, r = y - x W what the full-precision output y lacks, and E the change of
the weights W,

  sum |x E - r|^2 = <E, G E> - 2 <E, C> + sum |r|^2,   G = sum x^T x,   C = sum x^T r.

A step on the whole calibration set costs two matrix products whatever the number of images, and
single roundings can be turned at the price of a row (`polish`). Matrices are those of
`layer.kernel_matrix`: one per feature group, [groups, D, K]. Nothing here sees a model.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ptq_jax.base import Array, Float, Int, Shaped
from ptq_jax.models.units import Layer
from ptq_jax.quantize import grid, reconstruct, rounding
from ptq_jax.quantize.grid import Grid, in_steps
from ptq_jax.quantize.layer import kernel_matrix, output_rows, patches
from ptq_jax.quantize.reconstruct import Schedule

POLISH_BLOCK = 32  # coordinates between two updates of the whole gradient
CHECK_EVERY = 25  # steps between two looks at whether all weights have decided


class Moments(NamedTuple):
  """The quadratic objective of one layer; sums over images and pixels divided by their number."""

  gram: Float[Array, "*M groups D D"]
  """G: mean of x^T x over rows x of the quantized network's patches."""
  cross: Float[Array, "*M groups D K"]
  """C: mean of x^T r, r what the full-precision output has over the quantized inputs' output."""
  power: Float[Array, "*M"]
  """Mean of |r|^2: the error when the weights do not change."""


class Solution(NamedTuple):
  """Rounded weights of one layer."""

  codes: Int[Array, "*M groups D K"]
  error_nearest: Float[Array, "*M"]
  error: Float[Array, "*M"]
  """Never above `error_nearest`: nearest rounding is kept where it is better."""
  steps: Int[Array, "*M"]
  """Gradient steps taken."""


class _State(NamedTuple):
  """Carry of the second-moment loop."""

  alpha: Array
  optimizer: optax.OptState
  step: Array


def moments(
  inputs: Shaped[Array, "n ..."],
  outputs: Float[Array, "n ..."],
  kernel: Float[Array, "..."],
  layer: Layer,
) -> Moments:
  """The quadratic objective of one layer from a batch of the calibration set.

  Args:
    inputs: of the layer in the network quantized so far.
    outputs: of the layer in full precision, without its bias.
    kernel: in full precision.
  Returns:
    Moments of this batch; the mean over batches, weighted by their images, is that of the set.
  """
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  rows = patches(inputs, layer).astype(wide)
  matrix = kernel_matrix(kernel.astype(wide), layer)
  multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  rest = output_rows(outputs, layer).astype(wide) - multiply("gpd,gdk->gpk", rows, matrix)
  num_rows = rows.shape[1]
  return Moments(
    multiply("gpd,gpe->gde", rows, rows) / num_rows,
    multiply("gpd,gpk->gdk", rows, rest) / num_rows,
    jnp.sum(rest**2) / num_rows,
  )


def error(
  change: Float[Array, "groups D K"],
  moments: Moments,
  *,
  precision: jax.lax.Precision | None = jax.lax.Precision.HIGHEST,
) -> tuple[Float[Array, ""], Float[Array, "groups D K"]]:
  """The layer's output error, sum over channels and mean over images and pixels, and its gradient.

  Args:
    change: E, what the weights have over the full-precision ones.
    precision: of the product; None, the platform's default, will do for a gradient.
  """
  product = jnp.einsum("gde,gek->gdk", moments.gram, change, precision=precision)
  value = jnp.sum(change * (product - 2 * moments.cross)) + moments.power
  return value, 2 * (product - moments.cross)


def objective(
  alpha: Float[Array, "groups D K"],
  weights: Float[Array, "groups D K"],
  grid: Grid,
  moments: Moments,
  *,
  weight: float | Float[Array, ""],
  beta: float | Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, "groups D K"]]:
  """Equation 25 on the whole calibration set, and its gradient with respect to alpha."""

  def rounded(alpha):
    term = weight * rounding.regularizer(alpha, beta=beta)
    return rounding.soft_weights(weights, alpha, grid), term

  (soft, term), pull = jax.vjp(rounded, alpha)
  value, slope = error(soft - weights, moments, precision=None)
  return value + term, pull((slope, jnp.ones_like(term)))[0]


def learn(
  weights: Float[Array, "groups D K"],
  grid: Grid,
  moments: Moments,
  *,
  schedule: Schedule,
  stop: str,
) -> tuple[Float[Array, "groups D K"], Int[Array, ""]]:
  """Minimises `objective` over alpha by Adam; one layer of one model, vmap for more.

  Returns:
    alpha, and the number of steps.
  """
  optimizer = schedule.optimizer()
  check_every = math.gcd(schedule.num_steps, CHECK_EVERY)

  def step(_, state):
    weight, beta = reconstruct.rounding_term(state.step + 1, schedule)
    _, gradient = objective(state.alpha, weights, grid, moments, weight=weight, beta=beta)
    updates, memory = optimizer.update(gradient, state.optimizer)
    return _State(optax.apply_updates(state.alpha, updates), memory, state.step + 1)

  def unfinished(state):
    running = state.step < schedule.num_steps
    return running if stop == "never" else running & ~reconstruct.decided(state.alpha)

  alpha = rounding.initial_alpha(weights, grid)
  start = _State(alpha, optimizer.init(alpha), jnp.zeros((), jnp.int32))
  end = jax.lax.while_loop(
    unfinished, lambda state: jax.lax.fori_loop(0, check_every, step, state), start
  )
  return end.alpha, end.step


def polish(
  codes: Int[Array, "groups D K"],
  weights: Float[Array, "groups D K"],
  grid: Grid,
  moments: Moments,
  *,
  sweeps: int,
) -> Int[Array, "groups D K"]:
  """Turns single roundings, up to down or back, wherever that lowers the error.

  Cyclic coordinate descent over the rows of the kernel matrix (all output channels at once: they
  do not interact) until a sweep turns nothing or `sweeps` are done. The error never rises. Within
  a block of rows only the block's gradient is kept current; the rest follows as one product.
  """
  steps, first = in_steps(weights, grid)
  floor = jnp.floor(steps) + first
  low, high = (jnp.clip(steps, 0, grid.levels - 1) for steps in (floor, floor + 1))
  jump = (high - low) * grid.scale
  rounded = codes.astype(weights.dtype)
  change = (rounded - grid.zero_point) * grid.scale - weights
  up = _descend(rounded > low, jump, change, moments, sweeps)
  return jnp.where(up, high, low).astype(codes.dtype)


def _descend(up, jump, change, moments, sweeps):
  """Coordinate descent over blocks of rows; returns which weights end up rounded up."""
  groups, rows, columns = up.shape
  block = min(POLISH_BLOCK, rows)
  extra = -rows % block
  gram = jnp.pad(moments.gram, ((0, 0), (0, extra), (0, extra)))
  up, jump, change, cross = (
    jnp.pad(part, ((0, 0), (0, extra), (0, 0))) for part in (up, jump, change, moments.cross)
  )
  multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

  def turn(i, carry):
    up, slope, moved, jump, gram = carry
    step = jnp.where(up[:, i], -jump[:, i], jump[:, i])
    curvature = gram[:, i, i, None] * step**2
    helps = 2 * step * slope[:, i] + curvature < -1e-5 * curvature  # by more than rounding noise
    step = jnp.where(helps, step, 0)
    slope = slope + gram[:, :, i, None] * step[:, None]
    return up.at[:, i].set(up[:, i] ^ (step != 0)), slope, moved.at[:, i].set(step), jump, gram

  def visit(b, carry):
    up, change, slope = carry
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=b * block, slice_size=block)
    band = cut(gram, axis=1)
    inner = (cut(up, axis=1), cut(slope, axis=1), jnp.zeros((groups, block, columns), change.dtype))
    turned, _, moved, _, _ = jax.lax.fori_loop(
      0, block, turn, (*inner, cut(jump, axis=1), cut(band, axis=2))
    )
    place = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=b * block, axis=1)
    return (
      place(up, turned),
      place(change, cut(change, axis=1) + moved),
      slope + multiply("gbd,gbk->gdk", band, moved),
    )

  def sweep(carry):
    up, change, count, _ = carry
    slope = multiply("gde,gek->gdk", gram, change) - cross
    end, change, _ = jax.lax.fori_loop(0, up.shape[1] // block, visit, (up, change, slope))
    return end, change, count + 1, jnp.any(end != up)

  start = (up, change, jnp.zeros((), jnp.int32), jnp.ones((), bool))
  up, *_ = jax.lax.while_loop(lambda c: c[3] & (c[2] < sweeps), sweep, start)
  return up[:, :rows]


def solve(
  weights: Float[Array, "groups D K"],
  matrix_grid: Grid,
  moments: Moments,
  *,
  schedule: Schedule,
  stop: str,
  sweeps: int,
  kept_in: np.dtype | None = None,
) -> Solution:
  """Rounds one layer by its moments: `learn`, round, `polish`, or nearest if that is better.

  Args:
    weights: `layer.kernel_matrix` of the kernel.
    matrix_grid: scale and zero point [groups, 1 or D, K].
    kept_in: dtype of the quantized weights, in which errors are measured; None: as `weights`.
  """
  alpha, steps = learn(weights, matrix_grid, moments, schedule=schedule, stop=stop)
  codes = rounding.hard_codes(weights, alpha, matrix_grid)
  if sweeps:
    codes = polish(codes, weights, matrix_grid, moments, sweeps=sweeps)
  nearest = grid.codes(weights, matrix_grid)
  learned_error, nearest_error = (
    error(grid.kept(grid.dequantize(c, matrix_grid), kept_in or weights.dtype) - weights, moments)[
      0
    ]
    for c in (codes, nearest)
  )
  better = learned_error <= nearest_error
  return Solution(
    jnp.where(better, codes, nearest),
    nearest_error,
    jnp.where(better, learned_error, nearest_error),
    steps,
  )
