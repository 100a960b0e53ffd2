"""OBC (OBQ): weights are rounded one at a time, and those left make up for the error.

Frantar & Alistarh 2022, "Optimal Brain Compression", arXiv:2208.11580, section 5. Of a row w of
the weight matrix, the weight j with the smallest (q_j - w_j)^2 / [H^-1]_jj is rounded to q_j; the
rest moves by -(w_j - q_j) / [H^-1]_jj [H^-1]_:j; and H^-1 loses row and column j in one step of
Gaussian elimination. Weights off by more than half a step go first, the farthest before the others.

Rank-1 updates of a [D, D] inverse per row cost D^3 memory traffic. Here all rows start from one
shared inverse, and the elimination is blocked. Inside a block of B steps the inverse M is not
touched: with F [t, D] the scaled columns eliminated so far, column j of the current inverse is
M_:j - F^T F_:j. At the end of a block one matrix product makes M - F^T F. That is the same
arithmetic in another order. All blocks are one loop, in which finished columns are masked; they are
dropped once or twice on the way, between two such loops.
"""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, Int, Keys, Shaped, Variables
from ptq_jax.models import parallel
from ptq_jax.quantize import batchnorm as batchnorms
from ptq_jax.quantize import grid as grids
from ptq_jax.quantize import hessian as hessians
from ptq_jax.quantize import nearest, walk
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.nearest import Job
from ptq_jax.quantize.plan import Plan, Progress, Record

SINGLE_BLOCK = 96

MORE_STAGES = (4, 24)
"""From so many blocks on there is one stage more: finished columns are dropped once more, at the
price of another compiled loop."""

CPU_MEMORY_BYTES = 2**25
"""On a CPU the inverses of a chunk of rows should stay in the cache: 32 MiB."""

HIGHEST = jax.lax.Precision.HIGHEST


def quantize_stacked(
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  damping: float = 0.0,
  batchnorm: str = "members",
  batchnorm_images: Shaped[ArrayLike, "M b ..."] | None = None,
  block_size: int | None = None,
  grid_options: Mapping[str, Any] | None = None,
  memory_bytes: int | None = None,
  strict: bool = False,
  progress: Progress | None = None,
) -> tuple[Variables, list[Record]]:
  """OBC for M models under P plans at once.

  Args:
    keys: [M], one per model; used only where estimating BN statistics needs dropout.
    variables: stacked, leaves [M, ...].
    images: each model's own calibration images.
    plans: levels per layer path, see `plan.make`.
    damping: see `hessian.inverse`.
    batchnorm: "members" replaces the running statistics of the quantized networks by those of
      `batchnorm_images` (`batchnorm.estimate`), "none" keeps them. "all" does as "members" and says
      that the images are not members only, as in the paper's code: they must then be given.
    batchnorm_images: each model's own; None: the calibration images.
    block_size: see `quantize_matrix`.
    grid_options: for `grid.fit`; `group_size` may be by path pattern, see `plan.grid_options`.
    memory_bytes: what the Hessians, and what the rows eliminated at once, may take; None: a default
      for the platform each. Only a memory knob.
    strict: refuse a model with weights that stay in full precision.
    progress: called with (name, done, total) after every layer or unit, see `plan.Progress`.
  Returns:
    Variables [P, M, ...] of the same tree and dtypes otherwise, and one record per layer with
    arrays [P, M]. Where OBC ended above nearest rounding, that was kept.
  Raises:
    ValueError: unsuitable models or images (`capture.check`), plans (`plan.check`) or options.
  """
  if batchnorm not in ("members", "all", "none"):
    raise ValueError(f'batchnorm must be "members", "all" or "none", got {batchnorm!r}.')
  if batchnorm_images is None:
    if batchnorm == "all":
      raise ValueError('batchnorm="all" needs batchnorm_images, drawn from members and others.')
    batchnorm_images = images
  elif len(batchnorm_images) != len(images) or not np.shape(batchnorm_images)[1]:
    raise ValueError(
      f"batchnorm_images must be [{len(images)}, n >= 1, ...], one set per model; "
      f"got shape {np.shape(batchnorm_images)}."
    )
  quantized, records = nearest.each_layer(
    functools.partial(_solve, damping=damping, block_size=block_size, memory_bytes=memory_bytes),
    model,
    variables,
    images,
    plans=plans,
    grid_options=grid_options,
    memory_bytes=memory_bytes,
    strict=strict,
    progress=progress,
  )
  if batchnorm != "none":
    changed = [any(count is not None for count in chosen.values()) for chosen in plans]
    quantized = batchnorms.estimate_stacked(
      keys, model, quantized, batchnorm_images, changed=changed
    )
  return quantized, records


quantize_params = walk.for_one_model(quantize_stacked)


def quantize_matrix(
  weights: Float[ArrayLike, "rows D"],
  hessian: Float[ArrayLike, "square square"],
  grid: Grid,
  *,
  damping: float = 0.0,
  block_size: int | None = None,
  memory_bytes: int | None = None,
) -> Float[Array, "rows D"]:
  """Quantizes a matrix of weights by OBC; the result lies on the grid.

  Args:
    weights: one row per output, columns in the order of the Hessian.
    hessian: of the squared output error, 2/n sum x x^T; see `hessian.from_inputs`.
    grid: scale and zero point [rows, 1] (or [1, 1]), or [rows, D] where groups of columns have
      their own; levels a number, or an array [rows, 1].
    damping: see `hessian.inverse`, which adds what a singular Hessian needs on its own.
    block_size: columns per block, only a matter of speed; None: `default_block_size(D)`.
    memory_bytes: what the rows eliminated at once may take; None: `default_memory_bytes()`.
  Raises:
    ValueError: shapes that do not fit, or values that are not finite (unless traced).
  """
  rows, D = weights.shape
  if hessian.shape != (D, D):
    raise ValueError(
      f"hessian must be [{D}, {D}] for weights [{rows}, {D}], got {list(hessian.shape)}."
    )
  grids.check_finite(weights, "weights")
  grids.check_finite(hessian, "entries of the hessian")
  grids.check_levels(grid.levels)
  inverse = hessians.inverse(hessian, damping=damping)
  shared = jax.tree.map(lambda part: part[None], inverse)
  rowwise = Grid(*(jnp.broadcast_to(p, (rows, (1, *np.shape(p))[-1])) for p in grid))
  return quantize_rows(
    jnp.asarray(weights),
    shared,
    jnp.zeros(rows, jnp.int32),
    rowwise,
    block_size=block_size,
    memory_bytes=memory_bytes,
  )


def quantize_rows(
  weights: Float[Array, "rows D"],
  inverse: hessians.Inverse,
  owner: Int[Array, "rows"],
  grid: Grid,
  *,
  block_size: int | None = None,
  memory_bytes: int | None = None,
) -> Float[Array, "rows D"]:
  """OBC on rows that belong to several Hessians: of models, groups, and grids of any levels.

  Args:
    weights: rows of all of them together.
    inverse: parts with a leading axis [matrices, ...]; see `hessian.inverse`.
    owner: int[rows], which of the matrices a row belongs to.
    grid: parts [rows, 1] or [rows, D].
    block_size, memory_bytes: as in `quantize_matrix`.
  """
  rows, D = weights.shape
  block_size = min(D, block_size or default_block_size(D))
  budget = memory_bytes or default_memory_bytes()
  chunks = math.ceil(rows / rows_at_once(rows, D, weights.dtype, budget))
  return _quantize_rows(block_size, chunks, weights, inverse, owner, grid)


def _solve(job: Job, *, damping, block_size, memory_bytes) -> Array:
  """OBC on all rows of a layer: of M models, their groups, U numbers of levels."""
  each = (trees.take(job.hessians, number) for number in range(len(job.hessians)))
  inverses = [hessians.inverse(one, damping=damping) for one in each]
  inputs = _all_rows(job, inverses)
  found = _halving_memory(
    lambda budget: quantize_rows(*inputs, block_size=block_size, memory_bytes=budget),
    memory_bytes or default_memory_bytes(),
  )
  return _as_matrices(job.nearest.shape, found)


@jax.jit
def _all_rows(job, inverses):
  """Arguments of `quantize_rows` for a job; `inverses` per model [groups, D, D]."""
  num_levels, num_models, groups, D, K = job.nearest.shape
  weights = jnp.broadcast_to(job.weights, job.nearest.shape).swapaxes(3, 4).reshape(-1, D)
  owner = jnp.repeat(jnp.arange(num_models * groups, dtype=jnp.int32), K)

  def per_row(part):
    whole = jnp.broadcast_to(part, (num_levels, num_models, groups, part.shape[3], K))
    return whole.swapaxes(3, 4).reshape(-1, part.shape[3])

  grid = Grid(*map(per_row, job.grids))
  inverse = jax.tree.map(lambda *parts: jnp.concatenate(parts), *inverses)
  return weights, inverse, jnp.tile(owner, num_levels), grid


@functools.partial(jax.jit, static_argnums=0)
def _as_matrices(shape, rows):
  """Weights [U, M, groups, D, K], as `shape` says, of the rows of `_all_rows`."""
  *leading, D, K = shape
  return rows.reshape(*leading, K, D).swapaxes(-2, -1)


def _halving_memory(function, memory_bytes):
  """`function(memory_bytes)`; once more with half of it, with a warning, when memory runs out."""
  while True:
    try:
      return jax.block_until_ready(function(memory_bytes))
    except jax.errors.JaxRuntimeError as error:
      if not parallel.is_out_of_memory(error) or memory_bytes < 2**20:
        raise
      memory_bytes //= 2
      warnings.warn(
        f"out of memory in OBC; going on with rows that take {memory_bytes} bytes at once.",
        stacklevel=3,
      )


def default_memory_bytes() -> int:
  """Cache size on a CPU; a quarter of the memory of an accelerator."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return CPU_MEMORY_BYTES
  limit = (device.memory_stats() or {}).get("bytes_limit", 2**32)
  return limit // 4


def rows_at_once(rows: int, D: int, dtype: np.dtype, memory_bytes: int) -> int:
  """How many of the rows may be eliminated at once; at least one."""
  return max(1, min(rows, memory_bytes // bytes_per_row(D, dtype)))


def bytes_per_row(D: int, dtype: np.dtype) -> int:
  """About what one row takes at most: its inverse before and after dropping columns, a product."""
  return 3 * D * D * max(np.dtype(dtype).itemsize, 4)


def default_block_size(D: int) -> int:
  """Columns per block, so that a layer moves few bytes; up to `SINGLE_BLOCK` columns are one block.

  A step reads the factors of its block, B rows of D. The end of a block, one step in B, changes an
  inverse, D^2 numbers read and written, where a product is added in place (not on a CPU, which
  writes and reads it beside). That is least at B = sqrt(2 D), on a CPU at 2 sqrt(D).
  """
  if D <= SINGLE_BLOCK:
    return D
  best = math.sqrt((4 if jax.default_backend() == "cpu" else 2) * D)
  return math.ceil(D / round(D / best))


class _Stage(NamedTuple):
  """Blocks of one width, which are one compiled loop."""

  width: int  # columns left at its start
  num_blocks: int
  left: int  # columns left at its end


def _stages(D, block_size) -> list[_Stage]:
  """The blocks, cut where the finished columns are dropped."""
  num_blocks = math.ceil(D / block_size)
  count = 1 + sum(num_blocks >= least for least in MORE_STAGES)
  edges = [num_blocks * stage // count for stage in range(count + 1)]
  left = [max(0, D - edge * block_size) for edge in edges]
  return [_Stage(left[i], edges[i + 1] - edges[i], left[i + 1]) for i in range(count)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize_rows(block_size, chunks, weights, inverse, owner, grid):
  """Chunk by chunk; the last is filled up with copies of the last row."""
  rows, D = weights.shape
  size = math.ceil(rows / chunks)
  wide = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
  inverse, grid = jax.tree.map(lambda part: _as(part, wide.dtype), (inverse, grid))
  eliminate = functools.partial(_eliminate, block_size, inverse)
  inputs = (wide, owner, grid)
  if chunks == 1:
    result = eliminate(*inputs)
  else:
    fill = jnp.minimum(jnp.arange(chunks * size), rows - 1).reshape(chunks, size)
    chunked = jax.tree.map(lambda part: part[fill], inputs)
    result = jax.lax.map(lambda chunk: eliminate(*chunk), chunked).reshape(-1, D)[:rows]
  return grids.nearest(result, grid).astype(weights.dtype)


def _as(part, dtype):
  """A floating-point array in the dtype that is computed in; anything else as it is."""
  return part.astype(dtype) if jnp.issubdtype(part.dtype, jnp.floating) else part


class _Rows(NamedTuple):
  """Rows inside a block of B steps, t of them done by now."""

  weights: Array  # [rows, R], finished ones on the grid
  diagonal: Array  # [rows, R], of the current inverse
  finished: Array  # bool[rows, R]; the current inverse has nothing of use in these columns
  factors: Array  # [rows, B, R], the first t are set, the rest 0


def _eliminate(block_size, inverse, weights, owner, grid):
  """Quantizes all columns of some rows: [rows, D] -> [rows, D]."""
  result = weights
  rows, D = weights.shape
  columns = jnp.broadcast_to(jnp.arange(D, dtype=jnp.int32), (rows, D))  # where they come from
  diagonal = jax.vmap(jnp.diagonal)(inverse.matrix)[owner]
  if block_size >= D:
    state = weights, diagonal, jnp.zeros((rows, D), bool), inverse.matrix
    return _steps(D, owner, grid, *state).weights
  matrices, left_grid = inverse.matrix[owner], grid
  for stage in _stages(D, block_size):
    state = weights, diagonal, jnp.zeros((rows, stage.width), bool), matrices
    block = functools.partial(_block, block_size, left_grid)
    weights, diagonal, finished, matrices = jax.lax.fori_loop(0, stage.num_blocks, block, state)
    result = jnp.put_along_axis(result, columns, weights, axis=1, inplace=False)
    if not stage.left:
      return result
    keep = _first_true(~finished, stage.left)
    matrices = _take(_take(matrices, keep[:, :, None], 1), keep[:, None, :], 2)
    weights, diagonal, columns = (_take(part, keep, 1) for part in (weights, diagonal, columns))
    left_grid = Grid(*(p if p.shape[1] == 1 else _take(p, keep, 1) for p in left_grid))


def _block(block_size, grid, _, state):
  """Eliminates `block_size` columns of every row, or those that are left."""
  matrices = state[-1]
  end = _steps(block_size, jnp.arange(len(matrices)), grid, *state)
  product = jnp.einsum("rti,rtj->rij", end.factors, end.factors, precision=HIGHEST)
  return end.weights, end.diagonal, end.finished, matrices - product


def _steps(block_size, each, grid, weights, diagonal, finished, matrices):
  """The steps of one block, which leave the matrices as they are; row r reads that of each[r]."""
  factors = jnp.zeros((len(weights), block_size, weights.shape[1]), weights.dtype)
  step = functools.partial(_step, matrices, each, grid)
  return jax.lax.fori_loop(0, block_size, step, _Rows(weights, diagonal, finished, factors))


def _step(matrices, each, grid, t, state):
  """Rounds one weight of every row, moves the others, and adds a factor.

  Where all columns are finished nothing changes.
  """
  w, diagonal, finished, factors = state
  rounded = grids.nearest(w, grid)
  error = w - rounded
  squared = error * error
  outlier = squared > 0.25 * grid.scale * grid.scale
  score = jnp.where(outlier, -squared, squared / diagonal)
  j = _argmin(jnp.where(finished, jnp.inf, score))
  column = matrices.at[each, j].get(mode="promise_in_bounds")
  c = column - jnp.einsum(
    "rti,rt->ri", factors, _take(factors, j[:, None, None], 2)[:, :, 0], precision=HIGHEST
  )
  c = jnp.where(finished, 0, c)
  d = _take(c, j[:, None], 1)
  d = jnp.where(d == 0, 1, d)
  chosen = jnp.arange(w.shape[1])[None] == j[:, None]
  w = jnp.where(chosen, rounded, w - c * (_take(error, j[:, None], 1) / d))
  factor = c / jnp.sqrt(d)
  factors = jax.lax.dynamic_update_slice(factors, factor[:, None], (0, t, 0))
  return _Rows(w, diagonal - factor * factor, finished | chosen, factors)


def _argmin(score):
  """First smallest entry of each row; two plain reductions are faster than one of pairs."""
  smallest = jnp.min(score, axis=1, keepdims=True)
  positions = jnp.arange(score.shape[1], dtype=jnp.int32)[None]
  return jnp.min(jnp.where(score == smallest, positions, score.shape[1] - 1), axis=1)


def _first_true(mask, count):
  """Positions of the `count` true entries of each row, in order."""
  positions = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
  return jnp.sort(jnp.where(mask, positions, mask.shape[1]), axis=1)[:, :count]


def _take(array, indices, axis):
  """`take_along_axis` without the code for indices out of bounds, which there are none of."""
  return jnp.take_along_axis(array, indices, axis=axis, mode="promise_in_bounds")
