"""AdaRound's rounding variable: each weight goes down or up, decided by a continuous `alpha`.

Equation numbers are those of Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training
Quantization", arXiv:2004.10568.
"""

import jax
import jax.numpy as jnp

from ptq_jax.base import Array, ArrayLike, Float, Int
from ptq_jax.quantize.grid import Grid, dequantize, in_steps

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the sigmoid, so that it reaches 0 and 1 at finite alpha."""


def initial_alpha(weights: Float[ArrayLike, "..."], grid: Grid) -> Float[Array, "..."]:
  """The alpha at which the soft weights are the full-precision ones (where the grid reaches them).

  Inverts equation 23 at the part of weights / scale after the floor.
  """
  steps, _ = in_steps(weights, grid)
  rest = steps - jnp.floor(steps)
  return -jnp.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def soft(alpha: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
  """h(alpha) in [0, 1], how far a weight goes up: the rectified sigmoid of equation 23."""
  return _clamp(jax.nn.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 1)


def soft_weights(
  weights: Float[ArrayLike, "..."], alpha: Float[ArrayLike, "..."], grid: Grid
) -> Float[Array, "..."]:
  """scale * (clip(floor(weights / scale) + h(alpha))), clipped to the grid: equation 22."""
  steps, first = in_steps(weights, grid)
  steps = jnp.floor(steps) + first + soft(alpha)
  return (_clamp(steps, grid.levels - 1) - grid.zero_point) * grid.scale


def hard_codes(
  weights: Float[ArrayLike, "..."], alpha: Float[ArrayLike, "..."], grid: Grid
) -> Int[Array, "..."]:
  """Codes int32 in [0, levels) after the decision: up where alpha >= 0, where h >= 1/2."""
  steps, first = in_steps(weights, grid)
  steps = jnp.floor(steps) + (alpha >= 0) + first
  return jnp.clip(steps, 0, grid.levels - 1).astype(jnp.int32)


def hard_weights(
  weights: Float[ArrayLike, "..."], alpha: Float[ArrayLike, "..."], grid: Grid
) -> Float[Array, "..."]:
  """The weights of `hard_codes`, on the grid."""
  return dequantize(hard_codes(weights, alpha, grid), grid)


def regularizer(
  alpha: Float[ArrayLike, "..."], *, beta: float | Float[ArrayLike, ""]
) -> Float[Array, ""]:
  """Sum of 1 - |2 h(alpha) - 1| ** beta, equation 24: 0 once every weight has decided."""
  size = jnp.abs(2 * soft(alpha) - 1)
  size = jnp.where(size > 1e-30, size, 1e-30)
  # As an exponential the power shares it with its derivative; as `**` each would take its own.
  return jnp.sum(1 - jnp.exp(beta * jnp.log(size)))


def _clamp(values, top):
  """Values cut to [0, top]. The slope of `jnp.clip` halves itself at the ends, by divisions."""
  top = jnp.broadcast_to(jnp.asarray(top, values.dtype), values.shape)
  return jax.lax.clamp(jnp.zeros_like(values), values, top)


def beta(
  step: int | Int[ArrayLike, "..."],
  *,
  num_steps: int,
  warmup: float = 0.2,
  start: float = 20.0,
  end: float = 2.0,
) -> Float[Array, "..."]:
  """Exponent of the regularizer at a step: `start` during the warm-up, then linear down to `end`.

  Args:
    step: counted from 1; the step `num_steps` is the last and gets `end`.
    warmup: share of the steps that hold `start` (and leave the rounding term out: see `in_warmup`).
  """
  first = warmup * num_steps
  progress = (jnp.asarray(step) - first) / max(num_steps - first, 1)
  return start + (end - start) * jnp.clip(progress, 0.0, 1.0)


def in_warmup(step: int | Int[ArrayLike, "..."], *, num_steps: int, warmup: float = 0.2) -> Array:
  """Whether a step, counted from 1, is too early for the rounding term."""
  return jnp.asarray(step) < warmup * num_steps
