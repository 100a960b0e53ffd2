"""What goes into a layer and what comes out of it, for any Linen model, in bounded memory.

`calls` is a pure function of one model and one batch: inside jit, XLA removes whatever part of the
forward pass the asked-for layers do not need; vmap it over stacked models. `stream` runs it batch
by batch and hands on only what a function makes of each layer's input, so sums over the
calibration set (second moments, Hessians) never hold its activations.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, PyTree, Shaped, Variables
from ptq_jax.models import conv, parallel, units
from ptq_jax.models.units import Layer

COLLECTION = "captured"
"""Name of the Flax collection that carries layer inputs and outputs out of the forward pass."""

CPU_BATCH_BYTES = 2**26


class Call(NamedTuple):
  """One layer's call on a batch."""

  inputs: Float[Array, "n ..."]
  """[n, *spatial, channels] of a conv, [n, ..., features] of a dense layer."""
  outputs: Float[Array, "n ..."]
  """What the layer gave, its bias included."""


def calls(
  model: nn.Module,
  variables: Variables,
  images: Shaped[Array, "n ..."],
  paths: Sequence[str],
  *,
  unit: str = units.WHOLE_MODEL,
) -> dict[str, Call]:
  """Inputs and outputs of some layers in one forward pass of one model.

  Args:
    images: a batch; for a unit of a zoo model, a batch of that unit's inputs.
    paths: of the layers, all inside the unit.
  Returns:
    A `Call` per path, in the order of `paths`.
  Raises:
    KeyError: if a path names no layer that runs.
  """
  wanted = set(paths)

  def sow(next_function, args, kwargs, context):
    outputs = next_function(*args, **kwargs)
    path = trees.SEPARATOR.join(context.module.path)
    if context.method_name == "__call__" and path in wanted:
      context.module.sow(COLLECTION, "call", (args[0] if args else kwargs["inputs"], outputs))
    return outputs

  with nn.intercept_methods(sow):
    if unit == units.WHOLE_MODEL:
      _, sown = model.apply(variables, images, train=False, mutable=[COLLECTION])
    else:
      _, sown = model.apply(
        variables, images, unit, train=False, method="run_unit", mutable=[COLLECTION]
      )
  captured = sown.get(COLLECTION, {})
  return {path: Call(*trees.get(captured, f"{path}/call")[0]) for path in paths}


def stream(
  function: Callable[[Layer, Array], PyTree],
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "n ..."],
  layers: Sequence[Layer],
  *,
  batch_size: int | None = None,
) -> Iterator[dict[str, Any]]:
  """Per batch of images, `function(layer, inputs)` of every layer, computed in one forward pass.

  Compiled once per function, model, layers and batch shape: pass a module-level function.

  Args:
    function: pure, of a layer and its inputs [n, ...]; returns any pytree of arrays.
    variables: of one model.
    batch_size: images at once; None lets the patches of the largest layer fill `batch_bytes()`.
  Yields:
    dict from layer path to the function's result.
  """
  batch_size = batch_size or images_at_once(layers)
  for batch in batches(images, batch_size):
    yield _reduced_calls(function, Hashable(model), tuple(layers), variables, batch)


def batch_bytes() -> int:
  """What the patches of one batch may take, when nothing else is asked for.

  64 MiB on a CPU, to stay near its caches; elsewhere a 64th of the memory, to fill the chip.
  """
  if jax.default_backend() == "cpu":
    return CPU_BATCH_BYTES
  return max(CPU_BATCH_BYTES, parallel.device_memory_bytes() // 64)


def images_at_once(layers: Sequence[Layer], *, memory_bytes: int | None = None) -> int:
  """How many images may run at once so that the patches of the largest layer fit the bytes.

  Args:
    memory_bytes: None: `batch_bytes()`.
  """
  memory_bytes = batch_bytes() if memory_bytes is None else memory_bytes
  return max(1, memory_bytes // (4 * max(map(patch_size, layers))))


def patch_size(layer: Layer) -> int:
  """Entries of the patches of one image."""
  return layer.positions * math.prod(layer.kernel_shape[:-1]) * layer.feature_group_count


def batches(images: Shaped[ArrayLike, "n ..."], batch_size: int) -> Iterator[Array]:
  """Consecutive batches of nearly equal size, at most `batch_size`; at most two distinct sizes."""
  count = math.ceil(len(images) / batch_size)
  ends = [round(i * len(images) / count) for i in range(count + 1)]
  for start, end in itertools.pairwise(ends):
    yield jnp.asarray(images[start:end])


def patches(
  inputs: Float[Array, "n ..."], layer: Layer
) -> Float[Array, "groups positions window_inputs"]:
  """The rows that a layer multiplies with its kernel: `patches @ kernel_matrix` is its output.

  Args:
    inputs: of the layer, [n, *spatial, channels] or [n, ..., features].
  Returns:
    One matrix per feature group; rows run over images, then output pixels; columns in the order of
    the kernel's axes.
  """
  if layer.kind == "dense":
    return inputs.reshape(1, -1, inputs.shape[-1])
  pads = ((0, 0), *layer.padding, (0, 0))
  padded = jnp.pad(inputs, pads)
  window, groups = layer.kernel_shape[:-2], layer.feature_group_count
  extents = zip(padded.shape[1:-1], window, layer.kernel_dilation, layer.strides, strict=True)
  sizes = [(size - (k - 1) * d - 1) // s + 1 for size, k, d, s in extents]
  columns = []
  for offset in itertools.product(*(range(k) for k in window)):
    starts = [o * d for o, d in zip(offset, layer.kernel_dilation, strict=True)]
    cut = tuple(
      slice(start, start + (size - 1) * stride + 1, stride)
      for start, size, stride in zip(starts, sizes, layer.strides, strict=True)
    )
    columns.append(padded[(slice(None), *cut)].reshape(-1, groups, layer.kernel_shape[-2]))
  rows = jnp.stack(columns, axis=2)  # [positions, groups, window, inputs]
  return jnp.moveaxis(rows, 1, 0).reshape(groups, rows.shape[0], -1)


def kernel_matrix(
  kernel: Float[ArrayLike, "*window inputs outputs"], layer: Layer
) -> Float[Array, "groups window_inputs group_outputs"]:
  """A Flax kernel, or anything of its shape, as one matrix per feature group."""
  groups = layer.feature_group_count
  matrix = jnp.reshape(kernel, (-1, groups, layer.kernel_shape[-1] // groups))
  return jnp.moveaxis(matrix, 1, 0)


def matrix_kernel(
  matrix: Shaped[ArrayLike, "groups window_inputs group_outputs"], layer: Layer
) -> Shaped[Array, "*window inputs outputs"]:
  """Inverse of `kernel_matrix`."""
  return jnp.moveaxis(matrix, 0, 1).reshape(layer.kernel_shape)


def check(
  model: nn.Module, variables: Variables, images: Shaped[ArrayLike, "M n ..."]
) -> list[Layer]:
  """Layers of stacked models, once models and calibration images pass every check.

  Args:
    variables: stacked, leaves [M, ...].
    images: [M, n, ...], for each model its own.
  Raises:
    ValueError: no image; a model axis that differs; shapes that the model does not take; values
      that are not finite; layers that cannot be quantized (see `units.layers`).
  """
  num_models = trees.length(variables)
  if np.ndim(images) < 2 or np.shape(images)[0] != num_models:
    raise ValueError(
      f"calibration images must be [models, n, ...] with {num_models} models, as the variables; "
      f"got shape {np.shape(images)}."
    )
  if np.shape(images)[1] == 0:
    raise ValueError("the calibration set is empty; give at least one image per model.")
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)
  example = jax.ShapeDtypeStruct(np.shape(images)[1:], images.dtype)
  layers = units.layers(model, one, example)
  flat = trees.flatten(variables)
  images_finite, *leaves_finite = _finite([images, *flat.values()])
  if not images_finite:
    raise ValueError("calibration images hold NaN or infinite values.")
  for path, finite in zip(flat, leaves_finite, strict=True):
    if not finite:
      raise ValueError(f"{path!r} holds NaN or infinite values; was the model trained?")
  return layers


class Hashable:
  """A Linen module as a static argument of jit, even if its fields cannot be hashed."""

  def __init__(self, module: nn.Module):
    self.module = module

  def __hash__(self) -> int:
    return hash(type(self.module))

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Hashable):
      return NotImplemented
    if self.module is other.module:
      return True
    try:
      return bool(self.module == other.module)
    except ValueError:  # fields that are arrays have no single truth value
      return False


@functools.partial(conv.jit, static_argnums=(0, 1, 2))
def _reduced_calls(function, model, layers, variables, images):
  captured = calls(model.module, variables, images, [layer.path for layer in layers])
  return {layer.path: function(layer, captured[layer.path].inputs) for layer in layers}


@jax.jit
def _finite(arrays):
  return [jnp.isfinite(array).all() for array in arrays]
