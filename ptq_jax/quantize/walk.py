"""Walks a network unit by unit, quantizing many (plan, model) pairs side by side.

AdaRound and BRECQ share the walk: the inputs of a unit come from the network as quantized so far,
its targets from the full-precision network. Activations are carried from unit to unit, so each
unit runs (and is compiled) alone; a model that names no units is one unit, fed with images.

Plans that agree on all layers so far share the work: a sweep over the last layer quantizes the
rest once. What is worked on is therefore a branch, one model under all plans that agree so far.

Forward passes run branch by branch through one compiled function of one model, which keeps a
branch's numbers free of its neighbours; optimisation loops run stacked.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Int, Key, Keys, PyTree, Shaped, Variables
from ptq_jax.models import conv, from_nnx, parallel, units
from ptq_jax.models.call import Hashable
from ptq_jax.models.from_nnx import Model
from ptq_jax.models.units import Kept, Layer, Unit
from ptq_jax.quantize import capture, grid, plan
from ptq_jax.quantize import options as option_values
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.layer import fit_grid
from ptq_jax.quantize.plan import Levels, Plan, Progress, Record, Records

PER_MODEL = ("labels", "batchnorm_images")
"""Options of methods that have a model axis."""


class Pair(NamedTuple):
  """One model under one plan, by their positions."""

  plan: int
  model: int


class Branch(NamedTuple):
  """One model under all plans that agree up to some unit."""

  pairs: tuple[int, ...]
  """Positions of its pairs in the chunk."""
  model: int
  variables: Variables
  """Quantized so far."""
  inputs: Array
  """Of the next unit, in the network quantized so far."""


class Site(NamedTuple):
  """Where a chunk of N branches stands in the network: all a method needs for one unit."""

  model: nn.Module
  unit: Unit
  levels: Mapping[str, np.ndarray]
  """Per path of the unit's layers, int [N]; 0: full precision."""
  keys: Keys
  """[N], the key of the branch's model folded with the index of the unit."""
  models: Sequence[int]
  """Per branch, its model."""
  full: Mapping[int, Variables]
  """Full-precision variables per model."""
  full_inputs: Mapping[int, Array]
  """Unit inputs of the full-precision network per model."""
  quantized: Sequence[Variables]
  """Variables quantized so far, per branch."""
  quantized_inputs: Sequence[Array]
  """Unit inputs of the network quantized so far, per branch."""
  images: Mapping[int, Array] | None = None
  """Calibration images per model, which a unit that is a submodule needs beside its inputs."""

  @property
  def num_images(self) -> int:
    """Of one model."""
    return len(self.quantized_inputs[0]) // self.unit.parts


class Outcome(NamedTuple):
  """What a method did to one unit or layer: arrays over the branches of a site, or over pairs."""

  name: str
  error_before: np.ndarray
  error_after: np.ndarray
  steps: np.ndarray
  grids: Mapping[str, Grid]
  """Per layer path, leading axis likewise; levels 0 where the layer stays in full precision."""
  seconds: float
  """Of the whole chunk."""


Method = Callable[[Site], tuple[Site, list[Outcome]]]
"""The site once the layers of its unit are quantized for all branches, see `replace_kernels`."""


def quantize_stacked(
  method: Method,
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  chain: Sequence[Unit],
  kept: Sequence[Kept],
  pair_bytes: int,
  memory_bytes: int | None = None,
  progress: Progress | None = None,
) -> tuple[Variables, list[Record]]:
  """Runs `method` over all units for M models under P plans, some pairs at a time.

  Args:
    variables: stacked [M, ...]. `images`: [M, n, ...].
    chain: units of the model, see `units.chain`.
    kept: weights that stay in full precision, for their records.
    pair_bytes: what one pair takes in memory at its largest unit.
    memory_bytes: what a chunk of pairs may take; None: `default_memory_bytes()`. When memory runs
      out all the same, the chunk is halved, with a warning.
    progress: called after every unit of a chunk; counts units times pairs.
  Returns:
    Variables [P, M, ...] and one record per outcome, arrays [P, M].
  """
  pairs = [Pair(p, m) for m in range(trees.length(variables)) for p in range(len(plans))]
  budget = default_memory_bytes() if memory_bytes is None else memory_bytes
  size = int(np.clip(budget // pair_bytes, 1, len(pairs)))
  results: list[Variables] = []
  outcomes: list[list[Outcome]] = []
  while len(results) < len(pairs):
    chunk = pairs[len(results) : len(results) + _even(len(pairs) - len(results), size)]
    tell = _telling(progress, chain, len(results), len(chunk), len(pairs))
    try:
      done, notes = _run_chunk(method, keys, model, variables, images, plans, chain, chunk, tell)
    except jax.errors.JaxRuntimeError as error:
      if not parallel.is_out_of_memory(error) or len(chunk) == 1:
        raise
      size = len(chunk) // 2
      warnings.warn(
        f"out of memory with {len(chunk)} pairs of plan and model at once; going on with {size}.",
        stacklevel=3,
      )
      continue
    results += done
    outcomes.append(notes)
  records = _records(outcomes, plans)
  records += plan.kept_records(kept, num_plans=len(plans), num_models=len(images))
  return _by_plan(results, plans), records


def default_memory_bytes() -> int:
  """Half of what the accelerator has free, or 2 GiB where the backend does not say (CPU)."""
  stats = jax.local_devices()[0].memory_stats()
  if not stats or "bytes_limit" not in stats:
    return 2**31
  return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2


def fit_grids(
  site: Site, layer: Layer, options: Mapping[str, Any]
) -> tuple[Array, Grid, np.ndarray]:
  """Full-precision kernels, their grids and their levels, stacked over the branches of a site.

  Branches that keep the layer in full precision have levels 0 in the last result, and a
  placeholder grid.
  """
  kernels = stack([trees.get(site.full[m], layer.kernel) for m in site.models])
  levels = site.levels[layer.path]
  counts = np.where(levels > 0, levels, 256)
  given = options | {"two_levels": bool((counts == grid.MIN_LEVELS).any())}
  return kernels, _fit(layer.unnamed, tuple(sorted(given.items())), kernels, counts), levels


def replace_kernels(
  site: Site, layer: Layer, active: Int[np.ndarray, " active"], kernels: Array
) -> Site:
  """The site with kernels [active, ...] in the quantized variables of the branches at `active`."""
  quantized = list(site.quantized)
  for row, index in enumerate(active):
    old = trees.get(quantized[index], layer.kernel)
    kernel = _row(kernels, row).astype(old.dtype)
    quantized[index] = trees.replace(quantized[index], {layer.kernel: kernel})
  return site._replace(quantized=quantized)


def stack(parts: Sequence[PyTree]) -> PyTree:
  """`trees.stack` for many parts: no program has them all as arguments."""
  buffer = _begin(len(parts), parts[0])
  for index, part in enumerate(parts[1:], start=1):
    buffer = _put(buffer, part, index)
  return buffer


def rows(tree: PyTree, active: np.ndarray) -> PyTree:
  """Rows of stacked leaves; the leaves themselves where all rows are asked for."""
  if len(active) == trees.length(tree):
    return tree
  return trees.take(tree, active)


def for_one_model(quantize_stacked: Callable[..., Any]) -> Callable[..., Any]:
  """A method's `quantize_params`, from its `quantize_stacked`."""

  def quantize_params(
    key: Key,
    model: Model,
    variables: Variables,
    images: Shaped[ArrayLike, "n ..."],
    *,
    levels: Levels | Mapping[str, Levels],
    last_layer_levels: int | Literal["full"] | None = None,
    **options,
  ) -> tuple[Variables, list[Record]]:
    """Quantizes one model by this module's method, see `quantize_stacked`.

    Args:
      variables: of a Linen model, see `models.call`; the state of an nnx one, which comes back.
      images: calibration images, as the model takes them.
      levels: 2 to 256 for all layers, None for full precision, or by pattern (`plan.resolve`).
      last_layer_levels: of the classifier, when they differ; "full" for full precision.
      **options: of `quantize_stacked`; those in `PER_MODEL` without the model axis.
    Returns:
      Variables of the same tree and dtypes, and one record per layer or unit, with scalars, which
      print as a table.
    Raises:
      ValueError: see `quantize_stacked`.
    """
    _require_kinds(key, model, variables, images)
    package, _, method = quantize_stacked.__module__.rpartition(".")
    if package == __package__:  # options of another's method are its own matter
      option_values.check(method, options)
    if isinstance(model, nnx.Module):
      state, model, variables = variables, from_nnx.adapt(model), from_nnx.variables_of(variables)
    elif "params" in variables:
      state = None
    else:
      raise ValueError(
        f'variables have no collection "params" but {list(variables)}; give what model.init gives, '
        'as in {"params": params}.'
      )
    stacked, images = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (variables, images))
    for name in PER_MODEL:
      if options.get(name) is not None and not (name == "labels" and np.ndim(options[name]) == 2):
        options[name] = jnp.asarray(options[name])[None]
    layers = units.layers(model, *capture.one_of(stacked, images))
    chosen = plan.resolve(layers, levels, last_layer_levels)
    found, records = quantize_stacked(key[None], model, stacked, images, plans=[chosen], **options)

    def first(tree):
      return trees.take(trees.take(tree, 0), 0)

    quantized = first(found) if state is None else from_nnx.state_with(state, first(found))
    return quantized, Records(Record(each.name, *first(each[1:])) for each in records)

  quantize_params.__module__ = quantize_stacked.__module__
  return quantize_params


def _require_kinds(key, model, variables, images) -> None:
  """Raises ValueError for an argument of `quantize_params` that is something else."""
  kinds = {
    "key": (key, jax.Array, "one of jax.random.key"),
    "model": (model, Model, "a flax.linen.Module or flax.nnx.Module that is made already"),
    "variables": (variables, Mapping, "what model.init gives, or the state of an nnx model"),
    "images": (images, jax.Array | np.ndarray, "an array of calibration images"),
  }
  for name, (given, kind, wanted) in kinds.items():
    if not isinstance(given, kind):
      raise ValueError(f"{name} is of the type {type(given).__name__}; give {wanted}.")


def _even(remaining: int, size: int) -> int:
  """The next chunk's size when the rest is cut into chunks of nearly equal size."""
  return -(-remaining // -(-remaining // size))


def _telling(progress, chain, finished, size, num_pairs) -> Callable[[int], None]:
  """Tells `progress` that a unit, by its index, is done for a chunk of pairs."""

  def tell(index):
    if progress:
      done = finished * len(chain) + size * (index + 1)
      progress(chain[index].name or "model", done, num_pairs * len(chain))

  return tell


def _run_chunk(method, keys, model, variables, images, plans, chain, chunk, tell):
  """Quantized variables per pair of the chunk, and the outcomes of its units over the pairs."""
  full = {m: trees.take(variables, m) for m in sorted({pair.model for pair in chunk})}
  start = {m: jnp.asarray(images[m]) for m in full}
  full_inputs = start
  branches = [
    Branch(tuple(i for i, pair in enumerate(chunk) if pair.model == m), m, full[m], start[m])
    for m in full
  ]
  outcomes = []
  for index, unit in enumerate(chain):
    branches = [part for branch in branches for part in _split(branch, unit, chunk, plans)]
    models = [branch.model for branch in branches]
    if unit.images is not None:  # a submodule: what it gets is found by a pass from the images
      full_inputs = {m: unit_inputs(model, unit, full[m], start[m]) for m in full}
      branches = [
        b._replace(inputs=unit_inputs(model, unit, b.variables, start[b.model])) for b in branches
      ]
    site = Site(
      model,
      unit,
      {layer.path: _levels(layer, branches, chunk, plans) for layer in unit.layers},
      _unit_keys(keys, np.array(models), index),
      models,
      full,
      full_inputs,
      [branch.variables for branch in branches],
      [branch.inputs for branch in branches],
      start,
    )
    site, found = method(site)
    outcomes += [_per_pair(outcome, branches) for outcome in found]
    branches = [b._replace(variables=v) for b, v in zip(branches, site.quantized, strict=True)]
    if unit.images is None and index + 1 < len(chain):
      full_inputs = {m: run_unit(model, unit, full[m], x) for m, x in full_inputs.items()}
      branches = [b._replace(inputs=run_unit(model, unit, b.variables, b.inputs)) for b in branches]
    tell(index)
  by_pair = {pair: branch.variables for branch in branches for pair in branch.pairs}
  return [by_pair[i] for i in range(len(chunk))], outcomes


def _split(branch, unit, chunk, plans) -> list[Branch]:
  """The branch cut where its plans differ on the unit's layers."""
  groups: dict[tuple, list[int]] = {}
  for i in branch.pairs:
    chosen = tuple(plans[chunk[i].plan][layer.path] for layer in unit.layers)
    groups.setdefault(chosen, []).append(i)
  return [branch._replace(pairs=tuple(pairs)) for pairs in groups.values()]


def _levels(layer, branches, chunk, plans) -> np.ndarray:
  """Levels of a layer per branch, 0 for full precision."""
  chosen = [plans[chunk[branch.pairs[0]].plan][layer.path] for branch in branches]
  return np.array([levels or 0 for levels in chosen], np.int32)


def _per_pair(outcome, branches) -> Outcome:
  """An outcome over branches as one over the pairs of the chunk."""
  owner = {pair: row for row, branch in enumerate(branches) for pair in branch.pairs}
  order = np.array([owner[i] for i in range(len(owner))])
  spread = jax.tree.map(lambda leaf: np.asarray(leaf)[order], outcome[1:-1])
  return Outcome(outcome.name, *spread, outcome.seconds)


def run_unit(model: nn.Module, unit: Unit, variables: Variables, inputs: Array) -> Array:
  """A unit's outputs on all images, in batches."""
  size = capture.images_at_once(unit.layers) if unit.layers else len(inputs)
  outputs = [
    _run_unit(Hashable(model), unit, variables, batch) for batch in unit_batches(inputs, unit, size)
  ]
  return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def unit_inputs(model: nn.Module, unit: Unit, variables: Variables, images: Array) -> Array:
  """What a submodule gets on all images, in batches."""
  size = capture.images_at_once(unit.layers) if unit.layers else len(images)
  parts = [
    _unit_inputs(Hashable(model), unit, variables, batch) for batch in capture.batches(images, size)
  ]
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def unit_batches(inputs: Array, unit: Unit, num_images: int) -> Iterator[Array]:
  """Batches of a unit's inputs, of whole images, at most `num_images` of them."""
  for start, end in capture.edges(len(inputs) // unit.parts, num_images):
    start, end = start * unit.parts, end * unit.parts
    yield inputs if end - start == len(inputs) else inputs[start:end]


@functools.partial(conv.jit, static_argnums=(0, 1))
def _run_unit(model, unit, variables, inputs):
  return units.run(model.module, variables, inputs, unit)


@functools.partial(conv.jit, static_argnums=(0, 1))
def _unit_inputs(model, unit, variables, images):
  return units.inputs_of(model.module, variables, images, unit)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(layer, options, kernels, counts):
  fit = functools.partial(fit_grid, layer=layer, **dict(options))
  return jax.vmap(lambda kernel, count: fit(kernel, levels=count))(kernels, counts)


@jax.jit
def _unit_keys(keys, models, index):
  return jax.vmap(jax.random.fold_in, (0, None))(keys[models], index)


@functools.partial(jax.jit, static_argnums=0)
def _begin(length, part):
  """Room for parts, where the first one lies, which it holds already."""
  return jax.tree.map(
    lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype).at[0].set(leaf), part
  )


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer, part, index):
  put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
  return jax.tree.map(put, buffer, part)


@jax.jit
def _row(stacked, index):
  return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _by_plan(results: Sequence[Variables], plans) -> Variables:
  """Results in order of models, then plans, as one tree with axes [P, M]."""
  num_plans = len(plans)
  num_models = len(results) // num_plans
  ordered = stack([results[m * num_plans + p] for p in range(num_plans) for m in range(num_models)])
  return _with_plans(num_plans, ordered)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_plans(num_plans, ordered):
  return jax.tree.map(
    lambda leaf: leaf.reshape(num_plans, len(leaf) // num_plans, *leaf.shape[1:]), ordered
  )


def _records(outcomes: Sequence[Sequence[Outcome]], plans) -> list[Record]:
  """Joins the chunks of each unit and gives the arrays their axes [P, M]."""

  def arrange(leaf):
    return np.swapaxes(np.reshape(leaf, (-1, len(plans), *np.shape(leaf)[1:])), 0, 1)

  records = Records()
  for parts in zip(*outcomes, strict=True):
    counts = [len(part.steps) for part in parts]
    seconds = [np.full(n, part.seconds / n) for n, part in zip(counts, parts, strict=True)]
    columns = [
      (part.error_before, part.error_after, part.steps, share, part.grids)
      for part, share in zip(parts, seconds, strict=True)
    ]
    joined = jax.tree.map(lambda *leaves: arrange(np.concatenate(leaves)), *columns)
    records.append(Record(parts[0].name, *joined))
  return records
