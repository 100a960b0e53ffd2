"""Walks a network unit by unit, quantizing many (plan, model) pairs side by side.

AdaRound and BRECQ share the walk: the inputs of a unit come from the network as quantized so far,
its targets from the full-precision network. Activations are carried from unit to unit, so each
unit runs (and is compiled) alone; a model that names no units is one unit, fed with images.

Forward passes run pair by pair through one compiled function of one model, which keeps a pair's
numbers free of its neighbours; optimisation loops run stacked.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Key, Shaped, Variables
from ptq_jax.models import units
from ptq_jax.models.units import Layer, Unit
from ptq_jax.quantize import capture, grid
from ptq_jax.quantize.capture import Hashable
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.plan import Plan, Record


class Pair(NamedTuple):
  """One model under one plan."""

  plan: int
  model: int


class Site(NamedTuple):
  """Where a chunk of pairs stands in the network: everything a method needs for one unit."""

  model: nn.Module
  unit: Unit
  pairs: Sequence[Pair]
  plans: Sequence[Plan]
  keys: Sequence[Key]
  """Per pair, the key of its model folded with the index of the unit."""
  full: Mapping[int, Variables]
  """Full-precision variables per model index."""
  full_inputs: Mapping[int, Array]
  """Unit inputs of the full-precision network per model index."""
  quantized: list[Variables]
  """Variables quantized so far, per pair; methods replace kernels here."""
  quantized_inputs: Sequence[Array]
  """Unit inputs of the network quantized so far, per pair."""


class Outcome(NamedTuple):
  """What a method did to one unit or layer of a chunk: arrays over its pairs."""

  name: str
  error_before: np.ndarray
  error_after: np.ndarray
  steps: np.ndarray
  grids: Mapping[str, Grid]
  """Per layer path, leading axis the pairs; levels 0 where the layer stays in full precision."""
  seconds: float
  """Of the whole chunk."""


Method = Callable[[Site], list[Outcome]]
"""Quantizes the layers of one unit for all pairs of a site, in place."""


def quantize_stacked(
  method: Method,
  keys: Sequence[Key],
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  pair_bytes: int,
  memory_bytes: int | None = None,
) -> tuple[Variables, list[Record]]:
  """Runs `method` over all units for M models under P plans, some pairs at a time.

  Args:
    variables: stacked [M, ...]. `images`: [M, n, ...].
    pair_bytes: what one pair takes in memory at its largest unit.
    memory_bytes: what a chunk of pairs may take; None: `default_memory_bytes()`. When memory runs
      out all the same, the chunk is halved, with a warning.
  Returns:
    Variables [P, M, ...] and one record per outcome, arrays [P, M].
  """
  chain = units.chain(model, *_one(variables, images))
  pairs = [Pair(p, m) for m in range(trees.length(variables)) for p in range(len(plans))]
  budget = default_memory_bytes() if memory_bytes is None else memory_bytes
  size = int(np.clip(budget // pair_bytes, 1, len(pairs)))
  results: list[Variables] = []
  outcomes: list[list[Outcome]] = []
  while len(results) < len(pairs):
    chunk = pairs[len(results) : len(results) + _even(len(pairs) - len(results), size)]
    try:
      done, notes = _run_chunk(method, keys, model, variables, images, plans, chain, chunk)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error) or len(chunk) == 1:
        raise
      size = len(chunk) // 2
      warnings.warn(
        f"out of memory with {len(chunk)} pairs of plan and model at once; going on with {size}.",
        stacklevel=3,
      )
      continue
    results += done
    outcomes.append(notes)
  return _by_plan(results, plans), _records(outcomes, plans)


def default_memory_bytes() -> int:
  """Half of what the accelerator has free, or 2 GiB where the backend does not say (CPU)."""
  stats = jax.local_devices()[0].memory_stats()
  if not stats or "bytes_limit" not in stats:
    return 2**31
  return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2


def activation_bytes(chain_: Sequence[Unit], num_images: int) -> int:
  """Bytes of the largest unit's inputs and outputs, full precision and quantized, of one pair."""
  largest = max(
    int(np.prod(layer.input_shape)) + int(np.prod(layer.output_shape))
    for unit in chain_
    for layer in unit.layers
  )
  return 2 * 4 * num_images * largest


def fit_grids(
  site: Site, layer: Layer, options: Mapping[str, Any]
) -> tuple[Array, Grid, np.ndarray]:
  """Full-precision kernels, their grids and their levels, stacked over the pairs of a site.

  Pairs that keep the layer in full precision have levels 0 in the last result, and a placeholder
  grid.
  """
  kernels = jnp.stack([trees.get(site.full[pair.model], layer.kernel) for pair in site.pairs])
  levels = np.array([site.plans[pair.plan][layer.path] or 0 for pair in site.pairs], np.int32)
  fit = jax.vmap(lambda kernel, count: grid.fit(kernel, levels=count, **options))
  return kernels, fit(kernels, jnp.asarray(np.where(levels > 0, levels, 256))), levels


def replace_kernels(site: Site, layer: Layer, active: Sequence[int], kernels: Array) -> None:
  """Writes the kernels [active, ...] into the quantized variables of the pairs at `active`."""
  for index, kernel in zip(active, kernels, strict=True):
    old = trees.get(site.quantized[index], layer.kernel)
    site.quantized[index] = trees.replace(
      site.quantized[index], {layer.kernel: kernel.astype(old.dtype)}
    )


def one_model(variables: Variables, records: Sequence[Record]) -> tuple[Variables, list[Record]]:
  """The results of one model under one plan without their axes [P, M] = [1, 1]."""

  def first(tree):
    return jax.tree.map(lambda leaf: leaf[0, 0], tree)

  return first(variables), [Record(record.name, *first(record[1:])) for record in records]


def _one(variables, images):
  """Shapes of one model and its images."""
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)
  return one, jax.ShapeDtypeStruct(np.shape(images)[1:], images.dtype)


def _even(remaining: int, size: int) -> int:
  """The next chunk's size when the rest is cut into chunks of nearly equal size."""
  return -(-remaining // -(-remaining // size))


def _run_chunk(method, keys, model, variables, images, plans, chain, chunk):
  """Quantized variables per pair of the chunk, and the outcomes of its units."""
  models = sorted({pair.model for pair in chunk})
  full = {m: trees.take(variables, m) for m in models}
  full_inputs = {m: jnp.asarray(images[m]) for m in models}
  quantized = [full[pair.model] for pair in chunk]
  inputs = [full_inputs[pair.model] for pair in chunk]
  outcomes = []
  for index, unit in enumerate(chain):
    unit_keys = [jax.random.fold_in(keys[pair.model], index) for pair in chunk]
    site = Site(model, unit, chunk, plans, unit_keys, full, full_inputs, quantized, inputs)
    outcomes += method(site)
    if index + 1 < len(chain):
      full_inputs = {m: run_unit(model, unit, full[m], full_inputs[m]) for m in models}
      inputs = [run_unit(model, unit, v, x) for v, x in zip(quantized, inputs, strict=True)]
  return quantized, outcomes


def run_unit(model: nn.Module, unit: Unit, variables: Variables, inputs: Array) -> Array:
  """A unit's outputs on all images, in batches."""
  size = capture.images_at_once(unit.layers) if unit.layers else len(inputs)
  outputs = [
    _run_unit(Hashable(model), unit.name, variables, batch)
    for batch in capture.batches(inputs, size)
  ]
  return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_unit(model, name, variables, inputs):
  return units.run(model.module, variables, inputs, name)


def _by_plan(results: Sequence[Variables], plans) -> Variables:
  """Results in order of models, then plans, as one tree with axes [P, M]."""
  num_plans = len(plans)
  return trees.stack([trees.stack(results[p::num_plans]) for p in range(num_plans)])


def _records(outcomes: Sequence[Sequence[Outcome]], plans) -> list[Record]:
  """Joins the chunks of each unit and gives the arrays their axes [P, M]."""

  def arrange(leaf):
    return np.swapaxes(np.reshape(leaf, (-1, len(plans), *np.shape(leaf)[1:])), 0, 1)

  records = []
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
