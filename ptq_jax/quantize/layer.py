"""One layer as a matrix product: rows of its inputs times a matrix of its kernel, plus a bias.

Everything that quantizers need to know of a layer of any kind stands here. Rows and matrices have a
leading axis of feature groups: [groups, positions, D] times [groups, D, K], D inputs of an output,
K outputs of a group.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, Shaped, Variables
from ptq_jax.models.units import Layer
from ptq_jax.quantize import grid
from ptq_jax.quantize.grid import Grid


def patch_size(layer: Layer) -> int:
  """Entries of the patches of one image."""
  return max(1, layer.positions) * layer.num_rows * layer.feature_group_count


def patches(
  inputs: Shaped[Array, "n ..."], layer: Layer
) -> Float[Array, "groups positions window_inputs"]:
  """The rows that a layer multiplies with its kernel: `patches @ kernel_matrix` is its output.

  Args:
    inputs: of the layer, [n, *spatial, channels] or [n, ..., features]; of an embedding, integers.
    layer: with the geometry of this call.
  Returns:
    One matrix per feature group; rows run over images, then output pixels; columns in the order of
    the kernel's axes.
  """
  if layer.kind == "embed":
    return jax.nn.one_hot(inputs.reshape(1, -1), layer.num_rows)
  if layer.kind == "dense":
    last = range(-len(layer.contracted), 0)
    return jnp.moveaxis(inputs, layer.contracted, last).reshape(1, -1, layer.num_rows)
  window, groups = layer.kernel_shape[:-2], layer.feature_group_count
  padded = _padded(inputs.reshape(-1, *inputs.shape[-1 - len(window) :]), layer)
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


def _padded(images, layer):
  """Images [n, *spatial, channels] with what a convolution puts around and between their pixels."""
  if layer.padding_mode != "zeros":
    return jnp.pad(images, ((0, 0), *layer.padding, (0, 0)), mode=layer.padding_mode)
  gaps = layer.input_dilation or (1,) * len(layer.padding)
  config = [(*pads, gap - 1) for pads, gap in zip(layer.padding, gaps, strict=True)]
  return jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def apply(
  kernel: Float[Array, "..."], inputs: Shaped[Array, "n ..."], layer: Layer
) -> Float[Array, "positions outputs"]:
  """What a layer gives without its bias, as one matrix product and no convolution."""
  matrix = kernel_matrix(kernel, layer)
  product = jnp.einsum("gpd,gdk->pgk", patches(inputs, layer), matrix)
  return product.reshape(-1, layer.num_columns)


def flat_outputs(outputs: Float[Array, "n ..."], layer: Layer) -> Float[Array, "positions outputs"]:
  """What a layer gave, in the order of `apply`."""
  moved = jnp.moveaxis(outputs, layer.output_axes, range(-len(layer.output_axes), 0))
  return moved.reshape(-1, layer.num_columns)


def output_rows(
  outputs: Float[Array, "n ..."], layer: Layer
) -> Float[Array, "groups positions group_outputs"]:
  """What a layer gave, in the order of `patches @ kernel_matrix`."""
  groups = layer.feature_group_count
  return jnp.moveaxis(flat_outputs(outputs, layer).reshape(-1, groups, _columns(layer)), 1, 0)


def without_bias(
  variables: Variables, layer: Layer, outputs: Float[Array, "n ..."]
) -> Float[Array, "n ..."]:
  """What a layer gave before its bias was added."""
  bias = trees.get(variables, f"params/{layer.path}").get("bias")
  if bias is None:
    return outputs
  shape = [1] * outputs.ndim
  for axis in layer.output_axes:
    shape[axis] = outputs.shape[axis]
  return outputs - nn.meta.unbox(bias).reshape(shape)


def kernel_matrix(
  kernel: Shaped[ArrayLike, "..."], layer: Layer
) -> Shaped[Array, "groups window_inputs group_outputs"]:
  """A Flax kernel, or anything of its shape, as one matrix per feature group.

  Parts of a grid have one number per output channel: [groups, 1, group_outputs].
  """
  moved = jnp.transpose(kernel, layer.axes)
  matrix = jnp.reshape(moved, (-1, layer.feature_group_count, _columns(layer)))
  return jnp.moveaxis(matrix, 1, 0)


def matrix_kernel(
  matrix: Shaped[ArrayLike, "groups window_inputs group_outputs"], layer: Layer
) -> Shaped[Array, "..."]:
  """Inverse of `kernel_matrix`, of parts of a grid too."""
  whole = layer.kernel_shape if matrix.shape[1] == layer.num_rows else layer.grid_shape
  moved = jnp.moveaxis(matrix, 0, 1).reshape([whole[axis] for axis in layer.axes])
  return jnp.transpose(moved, np.argsort(layer.axes))


def grid_matrix(kernel_grid: Grid, layer: Layer) -> Grid:
  """A grid of a kernel's shape, for its `kernel_matrix`; levels are left as they are."""
  scale, zero_point = (kernel_matrix(part, layer) for part in kernel_grid[:2])
  return Grid(scale, zero_point, kernel_grid.levels)


def fit_grid(kernel: Shaped[ArrayLike, "..."], layer: Layer, **options) -> Grid:
  """`grid.fit` of a kernel, per output channel or group, broadcastable against the kernel."""
  plain = layer.axes == tuple(range(kernel.ndim)) and len(layer.outputs) == 1
  if plain:
    return grid.fit(kernel, **options)
  columns = jnp.transpose(kernel, layer.axes).reshape(layer.num_rows, layer.num_columns)
  fitted = grid.fit(columns, **options)
  whole = layer.grid_shape if len(fitted.scale) == 1 else layer.kernel_shape
  shape = [whole[axis] for axis in layer.axes]
  scale, zero_point = (
    jnp.transpose(part.reshape(shape), np.argsort(layer.axes)) for part in fitted[:2]
  )
  return Grid(scale, zero_point, fitted.levels)


def _columns(layer) -> int:
  return layer.num_columns // layer.feature_group_count
