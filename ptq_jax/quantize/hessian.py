"""The Hessian of a layer's output error, and its inverse for OBC.

The squared output error of a layer on n images is, up to a constant, 1/2 sum_rows dw H dw^T with
H = 2/n sum x x^T over the patches x of all images and output pixels. D = kh * kw * I counts the
inputs of one output, in the order of a Flax kernel [kh, kw, I, O] reshaped to [kh * kw * I, O].

Precision: products are taken in float32 at highest precision, batch by batch, and the batches are
added in float64; the inverse is computed in float64. On a TPU, which has no float64, all of it is
float32 and a singular Hessian is damped earlier.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, Shaped, Variables
from ptq_jax.models import units
from ptq_jax.models.units import Layer
from ptq_jax.quantize import capture
from ptq_jax.quantize.grid import check_finite
from ptq_jax.quantize.layer import patches

MAX_INFLATION = 2e4
"""Largest H_jj * (H^-1)_jj accepted without more damping. While OBC eliminates columns, entry j of
the inverse's diagonal falls from (H^-1)_jj to 1 / H_jj at the lowest, so this bounds what
float32 loses by cancellation: a part in 500."""

FIRST_DAMPING = 1e-4
"""Damping of a Hessian that is not invertible enough as it is; ten times more until it is."""


class Inverse(NamedTuple):
  """The damped inverse of a Hessian, as OBC starts from it."""

  matrix: Float[ArrayLike, "... D D"]
  """H^-1, symmetric positive definite. A dead column is coupled to nothing."""
  damping: Float[ArrayLike, "..."]
  """The damping that was needed, relative to each diagonal entry."""


def from_inputs(
  inputs: Float[ArrayLike, "n ..."],
  *,
  kernel_shape: Sequence[int],
  strides: int | Sequence[int] | None = None,
  padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
  kernel_dilation: int | Sequence[int] | None = None,
  feature_group_count: int = 1,
  memory_bytes: int | None = None,
) -> Float[Array, "D D"] | Float[Array, "groups D D"]:
  """2/n times the sum of x x^T over the patches x of n images.

  Args:
    inputs: what goes into the layer: [n, *spatial, I] of a convolution, [n, ..., I] of a dense one.
    kernel_shape: of the Flax kernel: [*window, I / groups, O], or [I, O].
    strides, padding, kernel_dilation: of the convolution, as `flax.linen.Conv` takes them; a dense
      layer ignores them.
    memory_bytes: what the patches of one batch may take; None: `capture.batch_bytes()`.
  Returns:
    [D, D], or one matrix per group, [groups, D, D], if the convolution is grouped. Accumulated in
    float64, rounded once to JAX's default float.
  Raises:
    ValueError: no image, inputs that do not fit the kernel, or values that are not finite.
  """
  inputs = jnp.asarray(inputs)
  if not len(inputs):
    raise ValueError("inputs hold no image; the Hessian needs at least one.")
  check_finite(inputs, "inputs")
  layer = _layer(inputs, kernel_shape, strides, padding, kernel_dilation, feature_group_count)
  batch_size = min(len(inputs), capture.images_at_once([layer], memory_bytes=memory_bytes))
  hessian = _from_batches(layer, batch_size, inputs)
  return hessian if feature_group_count > 1 else hessian[0]


def moments(layer: Layer, inputs: Shaped[Array, "n ..."]) -> Float[Array, "groups D D"]:
  """Sum of x x^T over the patches x of a batch, in float32 at least."""
  rows = patches(inputs, layer)
  rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
  return jnp.einsum("gpi,gpj->gij", rows, rows, precision=jax.lax.Precision.HIGHEST)


class Counted(NamedTuple):
  """Sums over some rows of a layer, and how many they are."""

  moments: Float[Array, "groups D D"]
  rows: Float[Array, ""]


def counted_moments(layer: Layer, inputs: Shaped[Array, "n ..."]) -> Counted:
  """`moments` and the number of rows; a function for `capture.stream`."""
  rows = jax.eval_shape(functools.partial(patches, layer=layer), inputs).shape[1]
  return Counted(moments(layer, inputs), jnp.asarray(rows, jnp.float32))


def of_layers(
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  layers: Sequence[Layer],
  *,
  memory_bytes: int,
) -> Iterator[tuple[Layer, Float[Array, "M groups D D"]]]:
  """Hessians of every layer of M models, from full-precision inputs, in execution order.

  Several layers share a forward pass, as many as their Hessians fit into `memory_bytes`.

  Args:
    variables: stacked, leaves [M, ...]; `images`: each model's own calibration images.
  """
  num_models = len(images)
  for some in _groups(layers, memory_bytes // (num_models * accumulator_dtype().itemsize)):
    sums = [
      _sums(model, trees.take(variables, index), trees.take(images, index), some)
      for index in range(num_models)
    ]
    for layer in some:
      parts = [one.pop(layer.path) for one in sums]
      yield layer, _stacked(parts, 2 * layer.positions)


def output_error(
  change: Float[ArrayLike, "groups D K"], hessian: Float[ArrayLike, "groups D D"], layer: Layer
) -> Float[Array, ""]:
  """Error of a layer's output: squared, summed over channels, mean over images and pixels.

  Args:
    change: quantized minus full-precision weights, `layer.kernel_matrix` of them.
  """
  precise = jax.lax.Precision.HIGHEST
  total = jnp.sum(change * jnp.matmul(hessian, change, precision=precise))
  return total / (2 * layer.positions)


def inverse(
  hessian: Float[ArrayLike, "*many D D"], *, damping: float | Float[ArrayLike, ""] = 0.0
) -> Inverse:
  """Inverse of a Hessian, or of each of many, damped as little as float32 elimination needs.

  Damping rule: every diagonal entry grows by the factor 1 + damping. If the result cannot be
  factored, or H_jj * (H^-1)_jj exceeds `MAX_INFLATION` for some j (a column that the others
  explain almost exactly), damping becomes 1e-4, then ten times more until neither is so.
  Dead columns (diagonal 0: inputs that were always 0) are decoupled and get the mean diagonal.

  Args:
    hessian: symmetric, positive semi-definite.
    damping: the first one to try, >= 0.
  Returns:
    Arrays in JAX's default float.
  """
  default = jnp.result_type(float)
  with jax.enable_x64(_has_float64()):
    return _inverse(default, jnp.ndim(hessian) - 2, hessian, damping)


def accumulator_dtype() -> np.dtype:
  """float64 where the platform has it, else float32."""
  return np.dtype(np.float64 if _has_float64() else np.float32)


def _has_float64() -> bool:
  return jax.default_backend() != "tpu"


def _groups(layers, max_entries) -> Iterator[list[Layer]]:
  """Runs of consecutive layers whose Hessians have at most `max_entries` together, or one layer."""
  group, entries = [], 0
  for layer in layers:
    size = layer.num_rows**2 * layer.feature_group_count
    if group and entries + size > max_entries:
      yield group
      group, entries = [], 0
    group, entries = [*group, layer], entries + size
  yield group


def _sums(model, variables, images, layers) -> dict[str, Counted]:
  """Sums of x x^T per layer path, over all images of one model; added up in float64."""
  default, total = jnp.result_type(float), None
  for part in capture.stream(counted_moments, model, variables, images, layers):
    with jax.enable_x64(_has_float64()):
      total = _wide(part) if total is None else _add(total, part)
  with jax.enable_x64(_has_float64()):
    return _narrow(default, total)


@jax.jit
def _stacked(parts, positions):
  """Hessians [M, groups, D, D] of the sums of each model."""
  return jnp.stack([part.moments * (positions / part.rows) for part in parts])


@functools.partial(jax.jit, static_argnums=0)
def _narrow(dtype, total):
  return jax.tree.map(lambda leaf: leaf.astype(dtype), total)


@jax.jit
def _wide(part):
  return jax.tree.map(lambda leaf: leaf.astype(accumulator_dtype()), part)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, part):
  return jax.tree.map(jnp.add, total, _wide(part))


def _layer(inputs, kernel_shape, strides, padding, kernel_dilation, groups) -> Layer:
  """The record of the layer that the arguments describe."""
  kernel_shape = tuple(int(size) for size in kernel_shape)
  channels = kernel_shape[-2] * groups if len(kernel_shape) > 1 else None
  dense = len(kernel_shape) == 2
  if inputs.shape[-1] != channels or (not dense and inputs.ndim != len(kernel_shape)):
    raise ValueError(
      f"inputs of shape {inputs.shape} do not fit a kernel of shape {kernel_shape} "
      f"with feature_group_count {groups}."
    )
  if dense:
    shapes = {"input_shape": inputs.shape[1:], "output_shape": (*inputs.shape[1:-1], 0)}
    return Layer("layer", "dense", kernel_shape, **shapes)
  window, spatial = kernel_shape[:-2], inputs.shape[1:-1]
  strides, dilation = (units.per_axis(value, len(window)) for value in (strides, kernel_dilation))
  extents = units.extents(window, dilation)
  pads = units.pads(padding, spatial, extents, strides)
  sizes = [
    (size + sum(pad) - extent) // stride + 1
    for size, pad, extent, stride in zip(spatial, pads, extents, strides, strict=True)
  ]
  if min(sizes) < 1:
    raise ValueError(
      f"inputs of shape {inputs.shape} are smaller than the window {window}; "
      f"padding {padding!r} leaves no output pixel."
    )
  return Layer(
    "layer",
    "conv",
    kernel_shape,
    strides,
    pads,
    dilation,
    groups,
    inputs.shape[1:],
    (*sizes, kernel_shape[-1]),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from_batches(layer, batch_size, inputs):
  """[groups, D, D] from batches of images, the last filled up with zeros, which add nothing."""
  num_images, num_batches = len(inputs), -(-len(inputs) // batch_size)
  filled = num_batches * batch_size - num_images
  padded = jnp.pad(inputs, ((0, filled), *((0, 0),) * (inputs.ndim - 1)))
  stacked = padded.reshape(num_batches, batch_size, *inputs.shape[1:])
  default, wide = jnp.result_type(float), accumulator_dtype()
  with jax.enable_x64(_has_float64()):
    shape = jax.eval_shape(functools.partial(moments, layer), stacked[0]).shape
    total, _ = jax.lax.scan(
      lambda total, batch: (total + moments(layer, batch).astype(wide), None),
      jnp.zeros(shape, wide),
      stacked,
    )
    return (total * (2 / num_images)).astype(default)


class _Search(NamedTuple):
  """Carry of the search for a damping that makes the Hessian invertible."""

  candidate: Array  # the damping to try next
  damping: Array  # the last one tried
  matrix: Array  # what it gave: the inverse of the Hessian of unit diagonal
  good: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _inverse(dtype, leading_axes, hessian, damping):
  invert = functools.partial(_invert, dtype, damping=damping)
  for _ in range(leading_axes):
    invert = jax.vmap(invert)
  return invert(hessian)


def _invert(dtype, hessian, damping):
  """Scales to a unit diagonal, which is then what damping adds to, and inverts; see `inverse`."""
  wide = accumulator_dtype()
  hessian = jnp.asarray(hessian).astype(wide)
  diagonal = jnp.diagonal(hessian)
  live = diagonal > 0
  mean = jnp.where(live.any(), jnp.sum(diagonal, where=live) / jnp.maximum(live.sum(), 1), 1)
  diagonal = jnp.where(live, diagonal, mean)
  root = jnp.sqrt(diagonal)
  identity = jnp.eye(len(diagonal), dtype=wide)
  unit = (hessian + hessian.T) / 2 / (root[:, None] * root[None, :])
  unit = jnp.where(identity == 0, unit, 1)

  def attempt(state):
    damping = state.candidate
    factor = jnp.linalg.cholesky(unit + damping * identity)
    half = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
    matrix = jnp.matmul(half.T, half, precision=jax.lax.Precision.HIGHEST)
    good = jnp.isfinite(matrix).all() & (jnp.diagonal(matrix).max() <= MAX_INFLATION)
    return _Search(jnp.maximum(damping * 10, FIRST_DAMPING), damping, matrix, good)

  damping = jnp.asarray(damping).astype(wide)
  state = jax.lax.while_loop(
    lambda state: ~state.good & (state.damping < 1e6),
    attempt,
    _Search(damping, damping, identity, jnp.zeros((), bool)),
  )
  matrix = jnp.where(state.good, state.matrix, identity) / (root[:, None] * root[None, :])
  return Inverse(matrix.astype(dtype), state.damping.astype(dtype))
