"""Nearest rounding, and what all methods share that quantize every layer alone.

`each_layer` fits the grids, rounds, measures the layer's output error and lets a method try to do
better, for M models under P plans. Whatever does not depend on the plan (calibration inputs,
Hessians) is computed once per model, and levels that several plans have in common once.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, Keys, Shaped, Variables
from ptq_jax.quantize import capture, grid, hessian, plan, walk
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.layer import fit_grid, grid_matrix, kernel_matrix, matrix_kernel
from ptq_jax.quantize.plan import Plan, Progress, Record


class Job(NamedTuple):
  """One layer of M models at U numbers of levels; matrices as `layer.kernel_matrix` has them."""

  weights: Float[Array, "M groups D K"]
  """In full precision."""
  hessians: Float[Array, "M groups D D"]
  grids: Grid
  """Scale and zero point [U, M, groups, 1 or D, K], levels [U, 1, 1, 1, 1]."""
  nearest: Float[Array, "U M groups D K"]
  """The weights rounded to the grids."""


Solve = Callable[[Job], Float[Array, "U M groups D K"]]
"""A method: other weights on the same grids, with a smaller error if it can."""


def quantize_stacked(
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  grid_options: Mapping[str, Any] | None = None,
  memory_bytes: int | None = None,
  strict: bool = False,
  progress: Progress | None = None,
) -> tuple[Variables, list[Record]]:
  """Nearest rounding for M models under P plans.

  Args:
    keys: [M]; not used, nearest rounding is deterministic.
    variables: stacked, leaves [M, ...].
    images: each model's own calibration images.
    plans: levels per layer path, see `plan.make`.
    grid_options: for `grid.fit`; `group_size` may be by path pattern, see `plan.grid_options`.
    memory_bytes: what the Hessians behind the errors may take; None: see `walk`.
    strict: refuse a model with weights that stay in full precision.
    progress: called with (name, done, total) after every layer or unit, see `plan.Progress`.
  Returns:
    Variables [P, M, ...] of the same tree and dtypes otherwise, and one record per layer, and per
    weight that stays in full precision, with arrays [P, M].
  Raises:
    ValueError: unsuitable models or images (`capture.check`), plans (`plan.check`) or options.
  """
  del keys
  return each_layer(
    lambda job: job.nearest,
    model,
    variables,
    images,
    plans=plans,
    grid_options=grid_options,
    memory_bytes=memory_bytes,
    strict=strict,
    progress=progress,
  )


quantize_params = walk.for_one_model(quantize_stacked)


def each_layer(
  solve: Solve,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  grid_options: Mapping[str, Any] | None = None,
  memory_bytes: int | None = None,
  strict: bool = False,
  progress: Progress | None = None,
) -> tuple[Variables, list[Record]]:
  """Quantizes every layer alone, from the inputs it has in the full-precision network.

  Nearest rounding is kept for a model, plan and layer wherever `solve` does not beat it.
  Arguments, results and errors are those of `quantize_stacked`.
  """
  layers, kept = capture.check(model, variables, images, plans=plans, strict=strict)
  options = plan.grid_options(layers, plans, grid_options)
  budget = memory_bytes or walk.default_memory_bytes()
  kernels, records = {}, plan.Records()
  wanted = [layer for layer in layers if any(chosen[layer.path] is not None for chosen in plans)]
  found = hessian.of_layers(model, variables, images, wanted, memory_bytes=budget)
  start = time.perf_counter()
  for index, layer in enumerate(layers):
    levels = [chosen[layer.path] for chosen in plans]
    original = jnp.asarray(trees.get(variables, layer.kernel))
    hessians = next(found)[1] if layer in wanted else None
    kernels[layer.kernel], before, after, grids = _layer(
      solve, options[layer.path], layer, original, hessians, levels
    )
    end = time.perf_counter()
    seconds = np.full(after.shape, (end - start) / after.size)
    steps = np.zeros(after.shape, int)
    records.append(Record(layer.path, before, after, steps, seconds, {layer.path: grids}))
    start = end
    if progress:
      progress(layer.path, index + 1, len(layers))
  rest = {path: leaf for path, leaf in trees.flatten(variables).items() if path not in kernels}
  records += plan.kept_records(kept, num_plans=len(plans), num_models=len(images))
  return trees.replace(variables, kernels | _repeat(len(plans), rest)), records


def _layer(solve, options, layer, original, hessians, levels):
  """One layer at P numbers of levels: kernels, errors before and after, grids, all [P, M, ...]."""
  distinct = sorted({count for count in levels if count is not None})
  where = tuple(None if count is None else distinct.index(count) for count in levels)
  if distinct:
    given = tuple(sorted((options | {"two_levels": distinct[0] == grid.MIN_LEVELS}).items()))
    job, fitted, before = _round(layer.unnamed, given, original, hessians, np.array(distinct))
    kernels, *parts = _finish(layer.unnamed, where, original, job, solve(job), before, fitted)
  else:
    kernels, *parts = _by_plan(where, layer.grid_shape, original, (None,) * 5)
  before, after, scale, zero_point = jax.device_get(parts)
  counts = np.tile(np.array([[count or 0] for count in levels]), len(original))
  return kernels, before, after, Grid(scale, zero_point, counts)


@functools.partial(jax.jit, static_argnums=0)
def _repeat(count, tree):
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_plan(where, grid_shape, original, found):
  """What was found per number of levels [U, M, ...] for each plan; None: in full precision.

  Kernels, errors before and after, scales and zero points [P, M, ...].
  """
  none = jnp.zeros(len(original))
  zeros = jnp.zeros((len(original), *grid_shape))
  otherwise = original, none, none, zeros + 1, zeros
  return [
    jnp.stack([kept if u is None else part[u] for u in where])
    for part, kept in zip(found, otherwise, strict=True)
  ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round(layer, options, kernels, hessians, counts):
  """The job of one layer, its grids in the kernel's shape [U, M, ...], nearest's error [U, M]."""

  def fit(kernel, count):
    return fit_grid(kernel, layer, levels=count, **dict(options))

  fitted = jax.vmap(jax.vmap(fit, (0, None)), (None, 0))(kernels, counts)
  weights = jax.vmap(functools.partial(kernel_matrix, layer=layer))(kernels)
  weights = weights.astype(fitted.scale.dtype)
  grids = jax.vmap(jax.vmap(functools.partial(grid_matrix, layer=layer)))(fitted)
  grids = grids._replace(levels=counts.reshape(-1, 1, 1, 1, 1))
  rounded = grid.nearest(weights[None], grids)
  job = Job(weights, hessians, grids, rounded)
  return job, fitted, _errors(layer, kernels.dtype, job, rounded)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish(layer, where, original, job, found, before, fitted):
  """`_by_plan` of the found weights, or of nearest rounding where these are no better."""
  error = _errors(layer, original.dtype, job, found)
  better = (error < before)[:, :, None, None, None]
  best = jnp.where(better, found, job.nearest)
  reshape = functools.partial(matrix_kernel, layer=layer)
  kernels = jax.vmap(jax.vmap(reshape))(best).astype(original.dtype)
  found = kernels, before, jnp.minimum(error, before), fitted.scale, fitted.zero_point
  return _by_plan(where, fitted.scale.shape[2:], original, found)


def _errors(layer, dtype, job, found):
  """Output errors [U, M] of the layer with other weights, in the dtype that they are kept in."""
  error = functools.partial(hessian.output_error, layer=layer)
  change = grid.kept(found, dtype) - job.weights[None]
  return jax.vmap(jax.vmap(error), (0, None))(change, job.hessians)
