"""AdaRound: each weight goes up or down so that the layer's output changes least.

Layer by layer in execution order. A layer's inputs come from the network quantized so far, its
target is what the full-precision layer gave, before normalisation and activation. The rounding is
relaxed to h(alpha) in [0, 1] and pushed to 0 or 1 by a regulariser (`rounding`); equation numbers
are those of Nagel et al. 2020, arXiv:2004.10568.

Two forms of one objective. "mini_batch" is the paper's: stochastic steps on batches of images.
"second_moment" sums the images up once, into the quadratic objective that a layer without its
activation has, and takes full-batch steps on that (`quadratic`).
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Keys, Shaped, Variables
from ptq_jax.models import conv, units
from ptq_jax.models.call import Hashable
from ptq_jax.models.units import Layer
from ptq_jax.quantize import capture, grid, plan, quadratic, reconstruct, walk
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.layer import (
  apply,
  flat_outputs,
  grid_matrix,
  kernel_matrix,
  matrix_kernel,
  without_bias,
)
from ptq_jax.quantize.plan import Plan, Progress, Record
from ptq_jax.quantize.reconstruct import Schedule

MINI_BATCH = Schedule(num_steps=20_000, learning_rate=1e-3, weight=1e-3, batch_size=32)
"""The paper's schedule."""

SECOND_MOMENT = Schedule(num_steps=400, learning_rate=0.2, weight=0.01, decay_rates=(0.8, 0.9))
"""Found by measurement: hard-rounded, its error is no higher than that of `MINI_BATCH`. There is no
noise in the objective, so long memories in Adam only slow it down (BUILD_NOTES.md)."""

SWEEPS = 10
"""Most passes of `quadratic.polish` after the second-moment form."""

Form = Callable[..., tuple[Array, np.ndarray, np.ndarray, np.ndarray]]
"""Of (site, layer, kernels, grids, active): kernels, errors before and after, and steps of the
active branches."""


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
  sweeps: int = SWEEPS,
  grid_options: Mapping[str, Any] | None = None,
  memory_bytes: int | None = None,
  strict: bool = False,
  progress: Progress | None = None,
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
    sweeps: at most so many passes of `quadratic.polish` after the second-moment form; 0: none.
    grid_options: for `grid.fit`; `group_size` may be by path pattern, see `plan.grid_options`.
    memory_bytes: what the pairs of model and plan that run at once may take; None: half of the
      accelerator's free memory, 2 GiB on CPU. Only a memory knob.
    strict: refuse a model with weights that stay in full precision.
    progress: called with (name, done, total) after every layer or unit, see `plan.Progress`.
  Returns:
    Variables [P, M, ...] of the same tree and dtypes otherwise, and one record per layer, and per
    weight that stays in full precision, with arrays [P, M].
  Raises:
    ValueError: unsuitable models or images (`capture.check`), plans (`plan.check`) or options.
  """
  if form not in ("auto", "mini_batch", "second_moment"):
    raise ValueError(f'form must be "auto", "mini_batch" or "second_moment", got {form!r}.')
  reconstruct.check_stop(stop)
  layers, kept = capture.check(model, variables, images, plans=plans, strict=strict)
  fit_options = plan.grid_options(layers, plans, grid_options)
  num_images = np.shape(images)[1]
  forms = {
    layer.path: choose_form(layer, num_images, second_moment, mini_batch)
    if form == "auto" or not _has_batches(layer)
    else form
    for layer in layers
  }

  def method(site):
    outcomes = []
    for layer in site.unit.layers:
      if forms[layer.path] == "second_moment":
        solve = functools.partial(by_moments, schedule=second_moment, stop=stop, sweeps=sweeps)
      else:
        solve = functools.partial(by_mini_batches, schedule=mini_batch, stop=stop)
      site, outcome = quantize_layer(site, layer, solve, fit_options[layer.path])
      outcomes.append(outcome)
    return site, outcomes

  return walk.quantize_stacked(
    method,
    keys,
    model,
    variables,
    images,
    plans=plans,
    chain=units.chain(model, *capture.one_of(variables, images)),
    kept=kept,
    pair_bytes=_pair_bytes(layers, forms, num_images),
    memory_bytes=memory_bytes,
    progress=progress,
  )


quantize_params = walk.for_one_model(quantize_stacked)


def choose_form(
  layer: Layer, num_images: int, second_moment: Schedule, mini_batch: Schedule
) -> Literal["mini_batch", "second_moment"]:
  """The form that needs fewer multiplications for a layer.

  One that runs more than once, or not on images, has no mini-batches.
  """
  if not _has_batches(layer):
    return "second_moment"
  rows, columns = layer.num_rows, layer.num_columns
  in_rows = rows * layer.feature_group_count
  gather = num_images * layer.positions * in_rows * (rows + columns)
  full = gather + second_moment.num_steps * 2 * rows * rows * columns
  batch = min(mini_batch.batch_size, num_images) * layer.positions
  partial = mini_batch.num_steps * 2 * batch * rows * columns
  return "second_moment" if full <= partial else "mini_batch"


def _has_batches(layer: Layer) -> bool:
  return layer.by_image and not layer.also


def quantize_layer(
  site: walk.Site, layer: Layer, solve: Form, options: Mapping[str, Any]
) -> tuple[walk.Site, walk.Outcome]:
  """Quantizes one layer of every branch whose plans ask for it.

  Args:
    solve: `by_moments` or `by_mini_batches`, their options given.
    options: for `grid.fit`.
  """
  start = time.perf_counter()
  kernels, grids, levels = walk.fit_grids(site, layer, options)
  active = np.flatnonzero(levels)
  before, after, steps = (np.zeros(len(levels), dtype) for dtype in (float, float, int))
  if active.size:
    chosen, chosen_grids = walk.rows((kernels, grids), active)
    found, before[active], after[active], steps[active] = solve(
      site, layer, chosen, chosen_grids, active
    )
    site = walk.replace_kernels(site, layer, active, found)
  kept = {layer.path: grids._replace(levels=levels)}
  seconds = time.perf_counter() - start
  return site, walk.Outcome(layer.path, before, after, steps, kept, seconds)


def by_moments(
  site: walk.Site,
  layer: Layer,
  kernels: Array,
  grids: Grid,
  active: np.ndarray,
  *,
  schedule: Schedule = SECOND_MOMENT,
  stop: str,
  sweeps: int = SWEEPS,
) -> tuple[Array, np.ndarray, np.ndarray, np.ndarray]:
  """The second-moment form, a `Form`."""
  sums = walk.stack([_layer_moments(site, layer, int(index)) for index in active])
  found, solution = _solve(layer.unnamed, schedule, stop, sweeps, kernels, grids, sums)
  return found, *(np.asarray(part) for part in solution[1:])


def _layer_moments(site: walk.Site, layer: Layer, index: int) -> quadratic.Moments:
  """Moments of a layer on all images of one branch."""
  model_index = site.models[index]
  inputs, full_inputs = site.quantized_inputs[index], site.full_inputs[model_index]
  size = capture.images_at_once([layer])
  batches = (walk.unit_batches(x, site.unit, size) for x in (full_inputs, inputs))
  total = None
  for full_batch, batch in zip(*batches, strict=True):
    part = _batch_moments(
      Hashable(site.model),
      site.unit,
      layer,
      site.full[model_index],
      site.quantized[index],
      full_batch,
      batch,
      len(batch) / len(inputs),
    )
    total = part if total is None else _add(total, part)
  return total


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, part):
  return jax.tree.map(jnp.add, total, part)


@functools.partial(conv.jit, static_argnums=(0, 1, 2))
def _batch_moments(model, unit, layer, full, quantized, full_inputs, inputs, share):
  full_calls = capture.calls(model.module, full, full_inputs, [layer], unit=unit)[layer.path]
  calls = capture.calls(model.module, quantized, inputs, [layer], unit=unit)[layer.path]
  kernel, parts = trees.get(full, layer.kernel), []
  for geometry, one, wanted in zip(layer.geometries, calls, full_calls, strict=True):
    outputs = without_bias(full, geometry, wanted.outputs)
    found = quadratic.moments(one.inputs, outputs, kernel, geometry)
    parts.append((outputs.size, found))
  rows = sum(count for count, _ in parts)
  weighted = [
    jax.tree.map(lambda leaf, w=share * count / rows: leaf * w, found) for count, found in parts
  ]
  return functools.reduce(functools.partial(jax.tree.map, jnp.add), weighted)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solve(layer, schedule, stop, sweeps, kernels, grids, sums):
  """Rounded kernels [N, ...] and solutions of stacked layers."""

  def one(kernel, kernel_grid, layer_moments):
    solution = quadratic.solve(
      kernel_matrix(kernel.astype(kernel_grid.scale.dtype), layer),
      grid_matrix(kernel_grid, layer),
      layer_moments,
      schedule=schedule,
      stop=stop,
      sweeps=sweeps,
      kept_in=kernel.dtype,
    )
    codes = matrix_kernel(solution.codes, layer)
    return grid.dequantize(codes, kernel_grid), solution

  return jax.vmap(one)(kernels, grids, sums)


class LayerRun(NamedTuple):
  """One layer without its bias, as patches times a matrix: no convolution inside the loop.

  Outputs are [n, positions, channels].
  """

  layer: Layer

  def __call__(self, weights, variables, inputs):
    del variables
    outputs = apply(weights[self.layer.path], inputs, self.layer)
    return outputs.reshape(len(inputs), -1, self.layer.num_columns)


def by_mini_batches(
  site: walk.Site,
  layer: Layer,
  kernels: Array,
  grids: Grid,
  active: np.ndarray,
  *,
  schedule: Schedule,
  stop: str,
) -> tuple[Array, np.ndarray, np.ndarray, np.ndarray]:
  """The mini-batch form, a `Form`."""
  inputs, targets = [], []
  for index in active:
    model_index = site.models[index]
    full = site.full[model_index]
    x = _layer_calls(site, layer, site.quantized[index], site.quantized_inputs[index])
    y = _layer_calls(site, layer, full, site.full_inputs[model_index])
    inputs.append(x.inputs)
    rows = flat_outputs(without_bias(full, layer, y.outputs), layer)
    targets.append(rows.reshape(len(x.inputs), -1, layer.num_columns))
  run = LayerRun(layer.unnamed)
  name = run.layer.path
  problems = reconstruct.Problem(
    {name: kernels}, {name: grids}, {}, walk.stack(inputs), walk.stack(targets)
  )
  keys = walk.rows(site.keys, active)
  alphas, steps = reconstruct.minimize(run, problems, keys, schedule=schedule, stop=stop)
  at_once = capture.images_at_once([layer], memory_bytes=capture.batch_bytes() // len(active))
  kernels, before, after = reconstruct.finish(run, problems, alphas, batch_size=at_once)
  return kernels[name], before, after, steps


def _layer_calls(site, layer, variables, inputs) -> capture.Call:
  """Inputs and outputs of a layer that runs once, on all images of one model."""
  parts = [
    _layer_call(Hashable(site.model), site.unit, layer, variables, batch)
    for batch in walk.unit_batches(inputs, site.unit, capture.images_at_once([layer]))
  ]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@functools.partial(conv.jit, static_argnums=(0, 1, 2))
def _layer_call(model, unit, layer, variables, inputs):
  return capture.calls(model.module, variables, inputs, [layer], unit=unit)[layer.path][0]


def _pair_bytes(layers, forms, num_images) -> int:
  """What one pair takes at the layer that needs most: activations, moments, optimiser state."""

  def needed(layer):
    weights = math.prod(layer.kernel_shape)
    columns = layer.num_rows
    ends = num_images * (math.prod(layer.input_shape) + math.prod(layer.output_shape))
    if forms[layer.path] == "mini_batch":
      return 3 * ends + 10 * weights
    return 2 * ends + 3 * layer.feature_group_count * columns**2 + 10 * weights

  return 4 * max(needed(layer) for layer in layers)
