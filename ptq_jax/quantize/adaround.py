"""AdaRound: each weight goes up or down so that the layer's output changes least.

Layer by layer in execution order. A layer's inputs come from the network quantized so far, its
target is what the full-precision layer gave, before normalisation and activation. The rounding is
relaxed to h(alpha) in [0, 1] and pushed to 0 or 1 by a regulariser (`rounding`); equation numbers
are those of Nagel et al. 2020, arXiv:2004.10568.

Two forms of one objective. "mini_batch" is the paper's: stochastic steps on batches of images.
"second_moment" uses that the objective has no activation inside and so is quadratic in the
weights: with rows x of the quantized network's patches, r = y - x W what the full-precision output
y lacks, and E the change of the weights W,

  sum |x E - r|^2 = <E, G E> - 2 <E, C> + sum |r|^2,   G = sum x^T x,   C = sum x^T r,

so a full-batch step costs two matrix products whatever the number of images. The objective in
that form is also cheap to improve one weight at a time: `polish` ends the second-moment form.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, Int, Key, Keys, Shaped, Variables
from ptq_jax.models.units import Layer
from ptq_jax.quantize import capture, grid, plan, reconstruct, rounding, walk
from ptq_jax.quantize.capture import Hashable
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.plan import Levels, Plan, Record
from ptq_jax.quantize.reconstruct import Schedule

MINI_BATCH = Schedule(num_steps=20_000, learning_rate=1e-3, weight=1e-3, batch_size=32)
"""The paper's schedule."""

SECOND_MOMENT = Schedule(num_steps=400, learning_rate=0.2, weight=0.01, decay_rates=(0.8, 0.9))
"""Found by measurement: hard-rounded, its error is no higher than that of `MINI_BATCH`. There is no
noise in the objective, so long memories in Adam only slow it down (BUILD_NOTES.md)."""

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


def quantize_params(
  key: Key,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "n ..."],
  *,
  levels: Levels | Mapping[str, Levels],
  last_layer_levels: int | Literal["full"] | None = None,
  **options,
) -> tuple[Variables, list[Record]]:
  """AdaRound for one model.

  Args:
    variables: of a Linen model that runs as `model.apply(variables, images, train=False)`.
    images: calibration images, as the model takes them.
    levels: 2 to 256 for all layers, None for full precision, or a plan (`plan.make`).
    last_layer_levels: of the classifier, when they differ; "full" for full precision.
    **options: of `quantize_stacked`.
  Returns:
    Variables of the same tree and dtypes, and one record per layer, with scalars.
  Raises:
    ValueError: see `quantize_stacked`.
  """
  stacked, images = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (variables, images))
  layers = capture.check(model, stacked, images)
  chosen = plan.resolve(layers, levels, last_layer_levels)
  results = quantize_stacked(key[None], model, stacked, images, plans=[chosen], **options)
  return walk.one_model(*results)


def quantize_stacked(
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  form: str = "auto",
  stop: str = "plateau",
  second_moment: Schedule = SECOND_MOMENT,
  mini_batch: Schedule = MINI_BATCH,
  sweeps: int = 10,
  grid_options: Mapping[str, Any] | None = None,
  memory_bytes: int | None = None,
) -> tuple[Variables, list[Record]]:
  """AdaRound for M models under P plans at once.

  Args:
    keys: [M], one per model; a model's result does not depend on its neighbours.
    variables: stacked, leaves [M, ...].
    images: each model's own calibration images.
    plans: levels per layer path, see `plan.make`.
    form: see the module's text; "auto" takes the cheaper one, layer by layer.
    stop: "plateau" ends a loop once (nearly) every weight has decided, so that its loss changes no
      more; "never" runs all steps.
    second_moment, mini_batch: schedules of the two forms.
    sweeps: at most so many passes of `polish` after the second-moment form; 0: none.
    grid_options: for `grid.fit`.
    memory_bytes: what the pairs of model and plan that run at once may take; None: half of the
      accelerator's free memory, 2 GiB on CPU. Only a memory knob.
  Returns:
    Variables [P, M, ...] of the same tree and dtypes otherwise, and one record per layer with
    arrays [P, M].
  Raises:
    ValueError: unsuitable models or images (`capture.check`), plans (`plan.check`) or options.
  """
  if form not in ("auto", "mini_batch", "second_moment"):
    raise ValueError(f'form must be "auto", "mini_batch" or "second_moment", got {form!r}.')
  reconstruct.check_stop(stop)
  layers = capture.check(model, variables, images)
  for chosen in plans:
    plan.check(chosen, layers)
  num_images = np.shape(images)[1]
  forms = {
    layer.path: choose_form(layer, num_images, second_moment, mini_batch)
    if form == "auto"
    else form
    for layer in layers
  }
  fit_options = dict(grid_options or {})

  def method(site):
    outcomes = []
    for layer in site.unit.layers:
      if forms[layer.path] == "second_moment":
        solve = functools.partial(_by_moments, schedule=second_moment, stop=stop, sweeps=sweeps)
      else:
        solve = functools.partial(_by_mini_batches, schedule=mini_batch, stop=stop)
      outcomes.append(_quantize_layer(site, layer, solve, fit_options))
    return outcomes

  return walk.quantize_stacked(
    method,
    keys,
    model,
    variables,
    images,
    plans=plans,
    pair_bytes=_pair_bytes(layers, forms, num_images),
    memory_bytes=memory_bytes,
  )


def choose_form(
  layer: Layer, num_images: int, second_moment: Schedule, mini_batch: Schedule
) -> Literal["mini_batch", "second_moment"]:
  """The form that needs fewer multiplications for a layer."""
  rows, columns = math.prod(layer.kernel_shape[:-1]), layer.kernel_shape[-1]
  in_rows = rows * layer.feature_group_count
  gather = num_images * layer.positions * in_rows * (rows + columns)
  full = gather + second_moment.num_steps * 2 * rows * rows * columns
  batch = min(mini_batch.batch_size, num_images) * layer.positions
  partial = mini_batch.num_steps * 2 * batch * rows * columns
  return "second_moment" if full <= partial else "mini_batch"


def moments(
  inputs: Float[Array, "n ..."],
  outputs: Float[Array, "n ..."],
  kernel: Float[Array, "*window inputs outputs"],
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
  rows = capture.patches(inputs.astype(jnp.float32), layer)
  targets = outputs.astype(jnp.float32).reshape(rows.shape[1], rows.shape[0], -1)
  matrix = capture.kernel_matrix(kernel.astype(jnp.float32), layer)
  multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  rest = jnp.moveaxis(targets, 1, 0) - multiply("gpd,gdk->gpk", rows, matrix)
  num_rows = rows.shape[1]
  return Moments(
    multiply("gpd,gpe->gde", rows, rows) / num_rows,
    multiply("gpd,gpk->gdk", rows, rest) / num_rows,
    jnp.sum(rest**2) / num_rows,
  )


def error(
  change: Float[Array, "groups D K"], moments: Moments
) -> tuple[Float[Array, ""], Float[Array, "groups D K"]]:
  """The layer's output error, sum over channels and mean over images and pixels, and its gradient.

  Args:
    change: E, what the weights have over the full-precision ones, as matrices per group.
  """
  product = jnp.einsum("gde,gek->gdk", moments.gram, change)
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
  relaxed = reconstruct.relax(weights, alpha, grid, weight=weight, beta=beta)
  value, gradient = error(relaxed.weights - weights, moments)
  return value + relaxed.term, relaxed.gradient(gradient)


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
  floor = jnp.floor(weights / grid.scale) + grid.zero_point
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
    step = jnp.where(2 * step * slope[:, i] + curvature < -1e-5 * curvature, step, 0)
    slope = slope + gram[:, :, i, None] * step[:, None]
    return up.at[:, i].set(up[:, i] ^ (step != 0)), slope, moved.at[:, i].set(step), jump, gram

  def visit(b, carry):
    up, change, slope = carry
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=b * block, slice_size=block)
    band = cut(gram, axis=1)
    inner = (cut(up, axis=1), cut(slope, axis=1), jnp.zeros((groups, block, columns)))
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


def _quantize_layer(site: walk.Site, layer: Layer, solve, options) -> walk.Outcome:
  """Quantizes one layer of every branch whose plans ask for it."""
  start = time.perf_counter()
  kernels, grids, levels = walk.fit_grids(site, layer, options)
  active = np.flatnonzero(levels)
  before, after, steps = (np.zeros(len(levels), dtype) for dtype in (float, float, int))
  if active.size:
    chosen, chosen_grids = walk.rows((kernels, grids), active)
    found, before[active], after[active], steps[active] = solve(
      site, layer, chosen, chosen_grids, active
    )
    walk.replace_kernels(site, layer, active, found)
  kept = {layer.path: grids._replace(levels=levels)}
  return walk.Outcome(layer.path, before, after, steps, kept, time.perf_counter() - start)


def _by_moments(site, layer, kernels, grids, active, *, schedule, stop, sweeps):
  """The second-moment form: kernels, errors before and after, steps, of the active branches."""
  sums = walk.stack([_layer_moments(site, layer, int(index)) for index in active])
  shape = dataclasses.replace(layer, path="")  # layers of equal shape share a compilation
  found, solution = _solve(shape, schedule, stop, sweeps, kernels, grids, sums)
  return found, *(np.asarray(part) for part in solution[1:])


def _layer_moments(site: walk.Site, layer: Layer, index: int) -> Moments:
  """Moments of a layer on all images of one branch."""
  model_index = site.models[index]
  inputs, full_inputs = site.quantized_inputs[index], site.full_inputs[model_index]
  num_images = len(inputs)
  total = None
  for batch in capture.batches(np.arange(num_images), capture.images_at_once([layer])):
    part = _batch_moments(
      Hashable(site.model),
      site.unit.name,
      layer,
      site.full[model_index],
      site.quantized[index],
      full_inputs[batch],
      inputs[batch],
      len(batch) / num_images,
    )
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_moments(model, unit, layer, full, quantized, full_inputs, inputs, share):
  full_call = capture.calls(model.module, full, full_inputs, [layer.path], unit=unit)[layer.path]
  call = capture.calls(model.module, quantized, inputs, [layer.path], unit=unit)[layer.path]
  targets = _without_bias(full, layer, full_call.outputs)
  result = moments(call.inputs, targets, trees.get(full, layer.kernel), layer)
  return jax.tree.map(lambda leaf: leaf * share, result)


def _without_bias(variables, layer, outputs):
  """A layer's outputs before its bias was added."""
  parameters = trees.get(variables, f"params/{layer.path}")
  if "bias" not in parameters:
    return outputs
  bias = jnp.expand_dims(parameters["bias"], tuple(range(outputs.ndim - 1)))
  return outputs - bias


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solve(layer, schedule, stop, sweeps, kernels, grids, sums):
  """Rounded kernels [N, ...] and solutions of stacked layers."""

  def one(kernel, kernel_grid, layer_moments):
    weights = capture.kernel_matrix(kernel.astype(jnp.float32), layer)
    matrix_grid = _matrix_grid(kernel_grid, layer)
    solution = solve(
      weights, matrix_grid, layer_moments, schedule=schedule, stop=stop, sweeps=sweeps
    )
    codes = capture.matrix_kernel(solution.codes, layer)
    return grid.dequantize(codes, kernel_grid), solution

  return jax.vmap(one)(kernels, grids, sums)


def solve(
  weights: Float[Array, "groups D K"],
  matrix_grid: Grid,
  moments: Moments,
  *,
  schedule: Schedule,
  stop: str,
  sweeps: int,
) -> Solution:
  """Rounds one layer by its moments: `learn`, round, `polish`, or nearest if that is better.

  Args:
    weights: `capture.kernel_matrix` of the kernel.
    matrix_grid: scale and zero point [groups, 1, K].
  """
  alpha, steps = learn(weights, matrix_grid, moments, schedule=schedule, stop=stop)
  codes = rounding.hard_codes(weights, alpha, matrix_grid)
  if sweeps:
    codes = polish(codes, weights, matrix_grid, moments, sweeps=sweeps)
  nearest = grid.codes(weights, matrix_grid)
  learned_error, nearest_error = (
    error(grid.dequantize(c, matrix_grid) - weights, moments)[0] for c in (codes, nearest)
  )
  better = learned_error <= nearest_error
  return Solution(
    jnp.where(better, codes, nearest),
    nearest_error,
    jnp.where(better, learned_error, nearest_error),
    steps,
  )


def _matrix_grid(kernel_grid: Grid, layer: Layer) -> Grid:
  """A kernel's grid with scale and zero point as [groups, 1, outputs / groups]."""
  shape = (layer.feature_group_count, 1, -1)
  return Grid(
    jnp.reshape(kernel_grid.scale, shape),
    jnp.reshape(kernel_grid.zero_point, shape),
    kernel_grid.levels,
  )


class LayerRun(NamedTuple):
  """One layer without its bias, as patches times a matrix: no convolution inside the loop."""

  layer: Layer

  def __call__(self, weights, variables, inputs):
    del variables
    matrix = capture.kernel_matrix(weights[self.layer.path], self.layer)
    product = jnp.einsum("gpd,gdk->pgk", capture.patches(inputs, self.layer), matrix)
    return product.reshape(*inputs.shape[:1], *self.layer.output_shape)


def _by_mini_batches(site, layer, kernels, grids, active, *, schedule, stop):
  """The mini-batch form: kernels, errors before and after, steps, of the active branches."""
  inputs, targets = [], []
  for index in active:
    model_index = site.models[index]
    full, name = site.full[model_index], site.unit.name
    x = _layer_calls(site.model, name, layer, site.quantized[index], site.quantized_inputs[index])
    y = _layer_calls(site.model, name, layer, full, site.full_inputs[model_index])
    inputs.append(x.inputs)
    targets.append(_without_bias(full, layer, y.outputs))
  problems = reconstruct.Problem(
    {layer.path: kernels}, {layer.path: grids}, {}, walk.stack(inputs), walk.stack(targets)
  )
  keys = walk.rows(site.keys, active)
  run = LayerRun(layer)
  alphas, steps = reconstruct.minimize(run, problems, keys, schedule=schedule, stop=stop)
  kernels, before, after = reconstruct.finish(
    run, problems, alphas, batch_size=capture.images_at_once([layer])
  )
  return kernels[layer.path], before, after, steps


def _layer_calls(model, unit, layer, variables, inputs) -> capture.Call:
  """Inputs and outputs of a layer on all images of one model."""
  parts = [
    _layer_call(Hashable(model), unit, layer.path, variables, batch)
    for batch in capture.batches(inputs, capture.images_at_once([layer]))
  ]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer_call(model, unit, path, variables, inputs):
  return capture.calls(model.module, variables, inputs, [path], unit=unit)[path]


def _pair_bytes(layers, forms, num_images) -> int:
  """What one pair takes at the layer that needs most: activations, moments, optimiser state."""

  def needed(layer):
    weights = math.prod(layer.kernel_shape)
    columns = math.prod(layer.kernel_shape[:-1])
    ends = num_images * (math.prod(layer.input_shape) + math.prod(layer.output_shape))
    if forms[layer.path] == "mini_batch":
      return 3 * ends + 10 * weights
    return 2 * ends + 3 * layer.feature_group_count * columns**2 + 10 * weights

  return 4 * max(needed(layer) for layer in layers)
