"""Affine grids: where quantized weights may stand, one scale and zero point per output channel.

A code `c` in {0, ..., levels - 1} stands for the weight `(c - zero_point) * scale`. The unit is the
number of levels, so 1.58 bits (3 levels) is no special case. Rounding is half to even throughout.
Two levels are: with 0 as one of them all weights of one sign would be lost, so they stand on both
sides of the weights' mean, and the zero point is between two whole numbers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import Array, ArrayLike, Float, Int, Shaped

SEARCH_STEPS = 80
"""Shrink factors 1.00, 0.99, ..., 0.21 of the search "mse"."""

MIN_LEVELS, MAX_LEVELS = 2, 256

THRESHOLDS, LLOYD_STEPS = 16, 6
"""Of the search for two levels."""

_MIN_SPREAD = 2.0**-12  # a narrower channel, relative to its magnitude, counts as constant


class Grid(NamedTuple):
  """A pytree, so that it crosses jit and vmap; its parts broadcast against the weights."""

  scale: Float[ArrayLike, "..."]
  """Distance of neighbouring levels, in the unit of the weights; > 0."""
  zero_point: Float[ArrayLike, "..."]
  """The code that stands for weight 0, a whole number unless there are two levels. Outside
  [0, levels) if 0 is off the grid."""
  levels: int | Int[ArrayLike, "..."]
  """Number of levels, 2 to 256. An array lets several counts share one compilation under vmap."""


def fit(
  weights: Float[ArrayLike, "*shape channels"],
  *,
  levels: int | Int[ArrayLike, ""],
  symmetric: bool = False,
  search: str = "mse",
  norm: float = 2.4,
  include_zero: bool = True,
  two_levels: bool = True,
  group_size: int | None = None,
) -> Grid:
  """One grid per output channel, the last axis of a Flax kernel.

  Asymmetric: the range [min, max] of a channel is cut into levels - 1 equal steps and shifted so
  that 0 falls on a whole number. Symmetric: the range is [-max|w|, max|w|] and the zero point
  `levels // 2`, so 0 is a level for odd and even counts (3 levels are {-s, 0, s}; 4 are
  {-2s, -s, 0, s}). Two levels are the pair with the least squared error (symmetric: +-mean|w|), or
  with the search "minmax" the ends of the range.

  The search works on weights scaled by a power of two to about 1, so that weights of 1e-20 or 1e16
  get the same codes as weights of 1.

  Args:
    weights: a kernel in Flax layout. float16 and bfloat16 are fitted in float32.
    levels: 2 to 256.
    search: "minmax" takes the range as it is; "mse" shrinks it by the 80 factors 1.00 ... 0.21 and
      keeps, per channel, the first that minimises the mean of |error| ** norm.
    norm: exponent of the search "mse".
    include_zero: widen the range to contain 0 (asymmetric grids; symmetric ones always do).
    two_levels: whether traced levels may be 2. If not, the search for two levels is not compiled,
      which is half of the work.
    group_size: one grid per so many neighbouring inputs of an output, in the order of the flattened
      kernel, as int4 formats have it; it divides their number. None: one for all.
  Returns:
    Grid of scale and zero point [1, ..., 1, channels], with groups of the shape of the weights, the
    same number throughout a group. A channel of zeros gets a grid that holds 0;
    a constant channel, which has no range of its own, gets the one that includes 0.
  Raises:
    ValueError: levels outside 2..256, an unknown search, a group size that does not divide the
      inputs, or weights that are not finite (unless traced: values under jit and vmap cannot be
      looked at).
  References: Nagel et al. 2020, arXiv:2004.10568 (section 5, MSE range); the public code of BRECQ
    (include_zero=False) and of OBC (include_zero=True).
  """
  check_levels(levels)
  if search not in ("mse", "minmax"):
    raise ValueError(f'search must be "mse" or "minmax", got {search!r}.')
  check_finite(weights, "weights")
  steps = SEARCH_STEPS if search == "mse" else 1
  if group_size is not None:
    shape = jnp.shape(weights)
    rows = int(np.prod(shape[:-1]))
    check_group_size(group_size, rows)
    parts = jnp.reshape(weights, (rows // group_size, group_size, shape[-1])).swapaxes(0, 1)
    options = {"symmetric": symmetric, "search": search, "norm": norm, "two_levels": two_levels}
    columns = jnp.reshape(parts, (group_size, -1))
    fitted = fit(columns, levels=levels, include_zero=include_zero, **options)
    scale, zero_point = (
      jnp.repeat(part.reshape(-1, shape[-1]), group_size, axis=0).reshape(shape)
      for part in fitted[:2]
    )
    return Grid(scale, zero_point, levels)
  pairs = two_levels if is_traced(levels) else bool(np.any(np.asarray(levels) == MIN_LEVELS))
  scale, zero_point = _fit(weights, levels, norm, symmetric, include_zero, steps, pairs)
  return Grid(scale, zero_point, levels)


@jax.jit
def codes(weights: Float[ArrayLike, "..."], grid: Grid) -> Int[Array, "..."]:
  """Codes int32 in [0, levels) of the nearest levels. Exact on weights that `dequantize` made."""
  offset, first = in_steps(weights, grid)
  return jnp.clip(jnp.round(offset) + first, 0, grid.levels - 1).astype(jnp.int32)


def in_steps(
  weights: Float[ArrayLike, "..."], grid: Grid
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Weights in steps of the grid, whole numbers at its levels, and the code that 0 stands for.

  Rounding the steps, up, down or to the nearest, and adding that code gives the code of a weight.
  """
  first = jnp.round(grid.zero_point)
  return weights / grid.scale + (grid.zero_point - first), first


@jax.jit
def dequantize(codes: Int[ArrayLike, "..."], grid: Grid) -> Float[Array, "..."]:
  """Weights of the codes, `(codes - zero_point) * scale`, in the dtype of the scale."""
  scale = jnp.asarray(grid.scale)
  return (jnp.asarray(codes).astype(scale.dtype) - grid.zero_point) * scale


def kept(weights: Float[Array, "..."], dtype: np.dtype) -> Float[Array, "..."]:
  """What remains of weights that are kept in a dtype, such as bfloat16; in their own dtype."""
  return weights.astype(dtype).astype(weights.dtype)


@jax.jit
def nearest(weights: Float[ArrayLike, "..."], grid: Grid) -> Float[Array, "..."]:
  """Every weight at its nearest level."""
  return dequantize(codes(weights, grid), grid)


def error(
  weights: Float[ArrayLike, "*shape channels"], grid: Grid, *, norm: float = 2.4
) -> Float[Array, " channels"]:
  """Mean of |nearest level - weight| ** norm per output channel: the search "mse" minimises it."""
  distance = jnp.abs(nearest(weights, grid) - weights)
  return jnp.mean(distance**norm, axis=tuple(range(jnp.ndim(weights) - 1)))


def check_levels(levels: Any) -> None:
  """Raises ValueError unless `levels` are whole numbers in 2..256. Traced values pass."""
  if is_traced(levels):
    return
  values = np.asarray(levels)
  number = values.dtype.kind in "iuf"
  if not number or not ((values % 1 == 0) & (values >= MIN_LEVELS) & (values <= MAX_LEVELS)).all():
    raise ValueError(
      f"levels must be a whole number from {MIN_LEVELS} to {MAX_LEVELS}, got {levels!r}."
    )


def check_group_size(group_size: Any, num_inputs: int, name: str = "the weights") -> None:
  """Raises ValueError unless `group_size` is a whole number that divides the inputs."""
  whole = isinstance(group_size, int | np.integer) and not isinstance(group_size, bool)
  if not whole or group_size < 1 or num_inputs % group_size:
    raise ValueError(
      f"group_size is {group_size!r}, which does not divide the {num_inputs} inputs of an output "
      f"of {name}; take one that does, or another for that layer: sizes may go by path pattern."
    )


def check_finite(values: Shaped[ArrayLike, "..."], name: str) -> None:
  """Raises ValueError if an array holds NaN or infinite values. Traced values pass."""
  finite = is_traced(values) or jnp.isfinite(values).all()
  if not is_traced(finite) and not bool(finite):  # traced under jit, even of a constant
    raise ValueError(f"{name} hold NaN or infinite values; they must be finite.")


def is_traced(value: object) -> bool:
  """Whether a value is abstract (under jit, vmap or grad), so that it cannot be checked."""
  return isinstance(value, jax.core.Tracer)


@functools.partial(jax.jit, static_argnames=("norm", "symmetric", "include_zero", "steps", "pairs"))
def _fit(weights, levels, norm, symmetric, include_zero, steps, pairs):
  """Scale and zero point, each [1, ..., 1, channels], after `steps` shrink factors."""
  weights = jnp.asarray(weights)
  weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
  axes = tuple(range(weights.ndim - 1))
  _, exponent = jnp.frexp(jnp.max(jnp.abs(weights), axis=axes, keepdims=True))
  weights = jnp.ldexp(weights, -exponent)
  low, high = _ranges(weights, symmetric, include_zero)

  def grid_at(factor):
    scale = factor * (high - low) / (levels - 1)
    zero = jnp.full_like(scale, levels // 2) if symmetric else jnp.round(-factor * low / scale)
    return Grid(scale, zero, levels)

  def step(best, factor):
    candidate = grid_at(factor)
    loss = error(weights, candidate, norm=norm).reshape(low.shape)
    better = loss < best[0]
    parts = (loss, candidate.scale, candidate.zero_point)
    return tuple(jnp.where(better, new, old) for new, old in zip(parts, best, strict=True)), None

  scale, zero_point = grid_at(1.0)[:2]
  if steps > 1:
    factors = jnp.asarray(1 - np.arange(steps) / 100, weights.dtype)
    start = (jnp.full_like(low, jnp.inf), scale, zero_point)
    (_, scale, zero_point), _ = jax.lax.scan(step, start, factors)
  if pairs:
    if steps > 1:
      lower, upper = _two_levels(weights, symmetric)
    else:
      lower, upper = (
        (low, high)
        if symmetric
        else (end(weights, axis=axes, keepdims=True) for end in (jnp.min, jnp.max))
      )
    distance = upper - lower
    pair = (levels == MIN_LEVELS) & (distance > _MIN_SPREAD * jnp.abs(upper))
    pair &= jnp.any(weights != 0, axis=axes, keepdims=True)
    scale = jnp.where(pair, distance, scale)
    zero_point = jnp.where(pair, 0 - lower / jnp.where(pair, distance, 1), zero_point)
  return jnp.ldexp(scale, exponent), zero_point


def _two_levels(weights, symmetric):
  """The two weights per channel with the least squared error: the best of some thresholds between
  them, then Lloyd's iteration."""
  axes = tuple(range(weights.ndim - 1))
  average = functools.partial(jnp.mean, axis=axes, keepdims=True)
  if symmetric:
    upper = average(jnp.abs(weights))
    return -upper, upper
  smallest, largest = (end(weights, axis=axes, keepdims=True) for end in (jnp.min, jnp.max))

  def ends(threshold):
    above = weights > threshold
    return average(weights, where=~above), average(weights, where=above)

  def spread(threshold):
    """How far apart the two are, weighted: what the error lacks to that of one level."""
    lower, upper = ends(threshold)
    share = average(weights > threshold)
    return jnp.where(share > 0, share * (1 - share) * (upper - lower) ** 2, 0)

  def try_one(best, part):
    threshold = smallest + part * (largest - smallest)
    value = spread(threshold)
    return tuple(jnp.where(value > best[0], new, old) for new, old in
                 zip((value, threshold), best, strict=True)), None  # fmt: skip

  def improve(_, threshold):
    lower, upper = ends(threshold)
    return jnp.where(jnp.isfinite(upper), (lower + upper) / 2, threshold)

  parts = jnp.asarray(np.arange(THRESHOLDS) / THRESHOLDS, weights.dtype)
  (_, threshold), _ = jax.lax.scan(try_one, (jnp.zeros_like(smallest), smallest), parts)
  lower, upper = ends(jax.lax.fori_loop(0, LLOYD_STEPS, improve, threshold))
  return lower, jnp.where(jnp.isfinite(upper), upper, lower)


def _ranges(weights, symmetric, include_zero):
  """Lower and upper ends of the channels' ranges, each [1, ..., 1, channels]."""
  axes = tuple(range(weights.ndim - 1))
  low, high = (ends(weights, axis=axes, keepdims=True) for ends in (jnp.min, jnp.max))
  if symmetric:
    high = jnp.maximum(jnp.abs(low), jnp.abs(high))
    low = -high
  else:
    magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
    widen = include_zero | (high - low < _MIN_SPREAD * magnitude)
    low, high = (
      jnp.where(widen, jnp.minimum(low, 0), low),
      jnp.where(widen, jnp.maximum(high, 0), high),
    )
  empty = high == low  # a channel of zeros
  return jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)
