"""BRECQ: the roundings of a whole block are learned together, so that the block's output stays.

Li et al. 2021, arXiv:2102.05426. Batch normalisation is folded into the convolutions first. Unit by
unit (`models.units.chain`: what a zoo model names, or submodules of any other), with shortcut and
activation inside the unit; its inputs come from the network quantized so far, its targets are the
full-precision outputs on full-precision inputs. All layers of a unit are learned jointly by the
loop in `reconstruct`. Activations stay in full precision.

A unit that is one layer with nothing after it (the classifier of a ResNet) is a layer as AdaRound
sees it: its objective is quadratic, and the second-moment form of `adaround` solves it better than
steps on mini-batches.
"""

import functools
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Keys, Shaped, Variables
from ptq_jax.models import call, conv, fold_batchnorm
from ptq_jax.models import units as cut
from ptq_jax.models.call import Hashable
from ptq_jax.models.units import Unit
from ptq_jax.quantize import adaround, capture, plan, reconstruct, walk
from ptq_jax.quantize.layer import apply, patch_size
from ptq_jax.quantize.plan import Plan, Progress, Record
from ptq_jax.quantize.reconstruct import Problem, Schedule

SCHEDULE = Schedule(num_steps=400, learning_rate=0.2, weight=0.1, decay_rates=(0.8, 0.9))
"""Found by measurement (BUILD_NOTES.md)."""

PAPER = Schedule(num_steps=20_000, learning_rate=1e-3, weight=0.01)
"""The paper's schedule."""

LAYER_BY_LAYER = (
  "BRECQ finds no block of several layers in this model, so it learns roundings layer by layer, as "
  "AdaRound does; blocks are submodules that hold several, and `units` (in an audit "
  "quantize.brecq.units) names them."
)

BRANCHES_AT_ONCE = 8  # of a block with convolutions, in one compiled loop


def quantize_stacked(
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  units: Sequence[str] | None = None,
  loss: str = "mse",
  labels: Shaped[ArrayLike, "M ..."] | None = None,
  form: str = "auto",
  stop: str = "plateau",
  schedule: Schedule = SCHEDULE,
  grid_options: Mapping[str, Any] | None = None,
  memory_bytes: int | None = None,
  strict: bool = False,
  progress: Progress | None = None,
) -> tuple[Variables, list[Record]]:
  """BRECQ for M models under P plans at once.

  Args:
    keys: [M], one per model; a model's result does not depend on its neighbours.
    model: any Linen model, see `models.call`.
    variables: stacked, leaves [M, ...].
    images: each model's own calibration images.
    plans: levels per layer path, see `plan.make`.
    units: patterns of module paths that are the units, see `models.units.chain`; None: those that
      the model names, otherwise the children of the top module, or the model as a whole.
    loss: "mse" weighs all outputs of a unit alike; "fisher" by the squared gradient of the
      full-precision network's cross-entropy with respect to them (section 3.3), scaled to mean 1.
    labels: of the images, for "fisher", integers in [0, classes); None: drawn from the network's
      own prediction.
    form: "mini_batch", the paper's, steps on batches of images in every unit; "auto" takes
      AdaRound's second-moment form where a unit allows it, the loss is "mse" and AdaRound would.
    stop, schedule: of `reconstruct.minimize`.
    grid_options, memory_bytes, strict, progress: as in `adaround.quantize_stacked`.
  Returns:
    Variables [P, M, ...] of the same tree and dtypes otherwise, with batch normalisation folded
    (`fold_batchnorm.fold`), and one record per unit, and per weight that stays in full precision,
    with arrays [P, M].
  Raises:
    ValueError: unsuitable models or images (`capture.check`), plans (`plan.check`) or options.
  """
  if loss not in ("mse", "fisher"):
    raise ValueError(f'loss must be "mse" or "fisher", got {loss!r}.')
  if form not in ("auto", "mini_batch"):
    raise ValueError(f'form must be "auto" or "mini_batch", got {form!r}.')
  reconstruct.check_stop(stop)
  layers, kept = capture.check(model, variables, images, plans=plans, strict=strict)
  fit_options = plan.grid_options(layers, plans, grid_options)
  images = jnp.asarray(images)
  if labels is not None:
    labels = _checked_labels(labels, model, variables, images)
  folded = fold_batchnorm.fold_stacked(model, variables, images)
  options = _Options(loss, labels, form, schedule, stop, fit_options)
  chain = cut.chain(model, *capture.one_of(folded, images), units=units)
  if cut.layer_by_layer(chain):
    warnings.warn(LAYER_BY_LAYER, stacklevel=3)
  return walk.quantize_stacked(
    functools.partial(_quantize_unit, options=options),
    keys,
    model,
    folded,
    images,
    plans=plans,
    chain=chain,
    kept=kept,
    pair_bytes=_pair_bytes(chain, images.shape[1], schedule.batch_size),
    memory_bytes=memory_bytes,
    progress=progress,
  )


quantize_params = walk.for_one_model(quantize_stacked)


def _checked_labels(labels, model, variables, images) -> Array:
  """Labels [M, n], once they are known to be classes of these images."""
  labels = jnp.asarray(labels)
  logits = jax.eval_shape(functools.partial(call.apply, model), *capture.one_of(variables, images))
  if labels.shape != images.shape[:2] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers, one for each of {images.shape[1]} images of {len(images)} models; "
      f"got {labels.dtype} of shape {labels.shape}."
    )
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= logits.shape[-1]:
    raise ValueError(
      f"labels must be in [0, {logits.shape[-1]}), the classes of the model; got {low} to {high}."
    )
  return labels


class _Options(NamedTuple):
  """Arguments of `quantize_stacked` that every unit needs."""

  loss: str
  labels: Array | None
  form: str
  schedule: Schedule
  stop: str
  grid_options: dict[str, dict[str, Any]]  # by layer path


class UnitRun(NamedTuple):
  """A unit as a function of its kernels, variables and inputs. Hashable.

  lowering: "native" leaves convolutions to the model; "patches" makes each a matrix product, which
  a compiled loop on CPU runs many times faster than a convolution.
  """

  model: Hashable
  unit: Unit
  lowering: Literal["native", "patches"]

  def __call__(self, weights, variables, inputs):
    places = {layer.path: layer.kernel for layer in self.unit.layers}
    kernels = {places[path]: kernel for path, kernel in weights.items()}
    old = {path: trees.get(variables, path).dtype for path in kernels}
    replaced = trees.replace(variables, {p: kernels[p].astype(old[p]) for p in kernels})
    by_patches = None if self.lowering == "native" else _convolve_by_patches(self.unit)
    return cut.run(self.model.module, replaced, inputs, self.unit, by_patches)


def _convolve_by_patches(unit):
  """Interceptor that runs the unit's Conv layers as patches times a matrix."""
  layers = {layer.path: layer for layer in unit.layers if layer.kind == "conv" and not layer.also}

  def intercept(next_function, args, kwargs, context):
    layer = layers.get(trees.join(context.module.path))
    if context.method_name != "__call__" or layer is None:
      return next_function(*args, **kwargs)
    inputs = args[0] if args else kwargs["inputs"]
    parameters = jax.tree.map(jnp.asarray, nn.meta.unbox(context.module.variables["params"]))
    window = len(layer.kernel_shape) - 2
    outputs = apply(parameters["kernel"], inputs, layer)
    outputs = outputs.reshape(*inputs.shape[: -1 - window], *layer.output_shape[-1 - window :])
    bias = parameters.get("bias")
    return outputs if bias is None else outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))

  return intercept


def _quantize_unit(site: walk.Site, *, options: _Options) -> tuple[walk.Site, list[walk.Outcome]]:
  """Learns the roundings of one unit for every branch whose plans quantize anything in it."""
  if not site.unit.layers:
    return site, []
  if _is_quadratic(site, options):
    site, outcome = adaround.quantize_layer(
      site,
      site.unit.layers[0],
      functools.partial(adaround.by_moments, stop=options.stop),
      options.grid_options[site.unit.layers[0].path],
    )
    return site, [outcome._replace(name=site.unit.name)]
  start = time.perf_counter()
  fitted = {
    layer: walk.fit_grids(site, layer, options.grid_options[layer.path])
    for layer in site.unit.layers
  }
  num = len(site.models)
  before, after, steps = (np.zeros(num, dtype) for dtype in (float, float, int))
  lowering, at_once, steps_per_call = _execution(site.unit, jax.default_backend())
  run = UnitRun(Hashable(site.model), site.unit, lowering)
  for paths, active in _groups(site, fitted, at_once):
    problems = _problems(site, fitted, paths, active, options)
    alphas, steps[active] = reconstruct.minimize(
      run,
      problems,
      walk.rows(site.keys, active),
      schedule=options.schedule,
      stop=options.stop,
      steps_per_call=steps_per_call,
    )
    memory_bytes = capture.batch_bytes() // len(active)
    kernels, before[active], after[active] = reconstruct.finish(
      run,
      problems,
      alphas,
      batch_size=capture.images_at_once(site.unit.layers, memory_bytes=memory_bytes),
    )
    for layer in paths:
      site = walk.replace_kernels(site, layer, active, kernels[layer.path])
  grids = {
    layer.path: grids._replace(levels=levels) for layer, (_, grids, levels) in fitted.items()
  }
  seconds = time.perf_counter() - start
  return site, [walk.Outcome(site.unit.name, before, after, steps, grids, seconds)]


def _is_quadratic(site: walk.Site, options: _Options) -> bool:
  """Whether a unit is left to AdaRound's second-moment form."""
  if options.form != "auto" or options.loss != "mse" or len(site.unit.layers) > 1:
    return False
  inputs = site.quantized_inputs[0]
  chosen = adaround.choose_form(
    site.unit.layers[0], len(inputs), adaround.SECOND_MOMENT, adaround.MINI_BATCH
  )
  return chosen == "second_moment" and _is_layer(site.model, site.unit, site.quantized[0], inputs)


def _is_layer(model: nn.Module, unit: Unit, variables: Variables, inputs: Array) -> bool:
  """Whether a unit gives what its only layer gives, with nothing done to it after."""
  given, same = [], []

  def observe(next_function, args, kwargs, context):
    outputs = next_function(*args, **kwargs)
    if trees.join(context.module.path) == unit.layers[0].path:
      given.append(outputs)
    return outputs

  def run(variables, inputs):
    outputs = cut.run(model, variables, inputs, unit, observe)
    same.append(outputs is given[-1])
    return outputs

  jax.eval_shape(run, variables, inputs)
  return same[-1]


def _execution(unit: Unit, backend: str) -> tuple[str, int | None, int]:
  """How a unit's loop runs: lowering, branches at once (None: all), steps per dispatch.

  Products alone run stacked, many steps per dispatch. A block of several convolutions runs as it
  is: on CPU one branch and one step at a time, because convolutions are slow in XLA's loops there;
  elsewhere a few branches at once, because the convolution unrolls over them and each costs
  compile time.
  """
  if not any(layer.kind == "conv" for layer in unit.layers):
    return "native", None, reconstruct.STEPS_PER_CALL
  if len(unit.layers) == 1 and backend == "cpu":
    return "patches", None, reconstruct.STEPS_PER_CALL
  if backend == "cpu":
    return "native", 1, 1
  return "native", BRANCHES_AT_ONCE, reconstruct.STEPS_PER_CALL


def _groups(site, fitted, at_once):
  """Branches of a site by which of the unit's layers they quantize: (layers, positions)."""
  groups: dict[tuple, list[int]] = {}
  for index in range(len(site.models)):
    chosen = tuple(layer for layer, (_, _, levels) in fitted.items() if levels[index] > 0)
    if chosen:
      groups.setdefault(chosen, []).append(index)
  for layers, active in groups.items():
    size = at_once or len(active)
    for start in range(0, len(active), size):
      yield layers, np.array(active[start : start + size])


def _problems(site: walk.Site, fitted, layers, active, options: _Options) -> Problem:
  """Stacked problems of the active branches, which all quantize the same layers."""
  models = sorted({site.models[index] for index in active})
  targets = {
    m: walk.run_unit(site.model, site.unit, site.full[m], site.full_inputs[m]) for m in models
  }
  importance = None
  if options.loss == "fisher":
    weights = {m: _importance(site, m, options.labels) for m in models}
    importance = walk.stack([weights[site.models[index]] for index in active])
  return Problem(
    weights={layer.path: walk.rows(fitted[layer][0], active) for layer in layers},
    grids={layer.path: walk.rows(fitted[layer][1], active) for layer in layers},
    variables=walk.stack([_of_unit(site.quantized[index], site.unit) for index in active]),
    inputs=walk.stack([site.quantized_inputs[index] for index in active]),
    targets=walk.stack([targets[site.models[index]] for index in active]),
    importance=importance,
  )


def _of_unit(variables: Variables, unit: Unit) -> dict:
  """The part of the variables that one unit uses."""
  if unit.name == cut.WHOLE_MODEL:
    return variables
  inside = {
    path: leaf
    for path, leaf in trees.flatten(variables).items()
    if f"{path}/".startswith(f"{trees.names(path)[0]}/{unit.name}/")
  }
  return trees.unflatten(inside)


def _importance(site: walk.Site, model_index: int, labels) -> Array:
  """Squared gradients of the cross-entropy with respect to a unit's outputs, mean 1."""
  rest = ()
  if site.unit.images is None and site.unit.name:
    names = list(site.model.units())
    rest = tuple(names[names.index(site.unit.name) + 1 :])
  variables = site.full[model_index]
  outputs = walk.run_unit(site.model, site.unit, variables, site.full_inputs[model_index])
  key = site.keys[list(site.models).index(model_index)]
  own = None if labels is None else jnp.asarray(labels)[model_index]
  squares, parts = [], len(outputs) // site.num_images
  for index in capture.batches(
    np.arange(site.num_images), capture.images_at_once(site.unit.layers)
  ):
    chosen = None if own is None else own[index]
    some = outputs[int(index[0]) * parts : (int(index[-1]) + 1) * parts]
    images = None if site.unit.images is None else site.images[model_index][index]
    squares.append(
      _squared_gradient(
        Hashable(site.model), site.unit, rest, variables, some, images, chosen, key, index
      )
    )
  joined = jnp.concatenate(squares)
  return joined / jnp.maximum(jnp.mean(joined), jnp.finfo(joined.dtype).tiny)


@functools.partial(conv.jit, static_argnums=(0, 1, 2))
def _squared_gradient(model, unit, rest, variables, outputs, images, labels, key, index):
  """Per image, the squared gradient of its cross-entropy with respect to a unit's outputs."""

  def cross_entropy(outputs, labels):
    logits = outputs
    if images is not None:
      logits = cut.logits_from(model.module, variables, outputs, images, unit)
    for name in rest:
      logits = cut.run(model.module, variables, logits, name)
    if labels is None:
      draw = jax.vmap(lambda i, row: jax.random.categorical(jax.random.fold_in(key, i), row))
      labels = jax.lax.stop_gradient(draw(index, logits))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
    return -jnp.sum(chosen)

  return jax.grad(cross_entropy)(outputs, labels) ** 2


def _pair_bytes(chain: Sequence[Unit], num_images: int, batch_size: int) -> int:
  """What one pair takes at the unit that needs most: inputs, targets, optimiser state, patches."""

  def needed(unit):
    first, last = unit.layers[0], unit.layers[-1]
    ends = math.prod(first.input_shape) + 2 * math.prod(last.output_shape)
    state = 10 * sum(math.prod(layer.kernel_shape) for layer in unit.layers)
    step = min(batch_size, num_images) * sum(map(patch_size, unit.layers))
    return 2 * num_images * ends + 2 * state + 3 * step

  return 4 * max(needed(unit) for unit in chain if unit.layers)
