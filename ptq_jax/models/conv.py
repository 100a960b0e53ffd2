"""A convolution that knows how to be batched over models.

`jax.vmap` turns a convolution with one kernel per model into a grouped convolution, whose backward
pass is slow on every platform (jax issue 13800). `conv_general_dilated` here is written for one
model and computes what `jax.lax.conv_general_dilated` computes; under `jax.vmap` each of its three
parts (forward, gradient of the images, gradient of the kernel) picks its own lowering:

* one kernel for all models: the models join the batch;
* one batch of images for all models: the kernels join the output channels;
* both differ: "unrolled" (one convolution per model), "patches" (batched matrix products over
  extracted patches) or "grouped" (what JAX does by itself), see `choose_lowering`.

A convolution that has groups itself is made of products on a CPU (`_in_groups`).

`adopter` gives it to the `nn.Conv` of any Flax model; `models.call` does so.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import tracers
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata

from ptq_jax.base import Array, Float

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
ONE_AXIS = ("NWC", "WIO", "NWC")

LOWERINGS = ("unrolled", "patches", "grouped")
"""What a convolution can become when images and kernels both differ between models."""


class Geometry(NamedTuple):
  """What defines a two-dimensional convolution besides its arrays; hashable."""

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  dilation: tuple[int, int]  # of the kernel
  groups: int
  precision: Any
  lowering: str | None  # None: that of `lowered_as`, or the one that `choose_lowering` picks


def conv_general_dilated(
  lhs: Float[Array, "n *size I"],
  rhs: Float[Array, "*window J O"],
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count=1,
  precision=None,
  *,
  lowering: str | None = None,
) -> Float[Array, "n *out O"]:
  """Drop-in for `jax.lax.conv_general_dilated` on NHWC images and HWIO kernels, or NWC and WIO.

  Differs only in how it is batched; reverse-mode differentiable once.

  Args:
    lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
      feature_group_count, precision: as `jax.lax.conv_general_dilated`.
    lowering: one of `LOWERINGS` under vmap; None: chosen by shape and platform.
  Raises:
    ValueError: for other layouts, a dilated input, or an unknown lowering.
  """
  _require_known(lowering)
  numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  known = ONE_AXIS if lhs.ndim == 3 else DIMENSION_NUMBERS
  if numbers != jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, known):
    raise ValueError(f"dimension_numbers must be {known}, got {dimension_numbers}.")
  if lhs.ndim == 3:
    images, kernel = lhs[:, None], rhs[None]
    padding = padding if isinstance(padding, str) else ((0, 0), *padding)
    dilations = ((1, *each) if each else None for each in (lhs_dilation, rhs_dilation))
    options = {"feature_group_count": feature_group_count, "precision": precision}
    options |= {"dimension_numbers": DIMENSION_NUMBERS, "lowering": lowering}
    found = conv_general_dilated(
      images, kernel, (1, *window_strides), padding, *dilations, **options
    )
    return found[:, 0]
  if lhs_dilation is not None and any(d != 1 for d in lhs_dilation):
    raise ValueError(
      f"lhs_dilation must be 1, got {lhs_dilation}; use jax.lax for transposed ones."
    )
  dilation = tuple(rhs_dilation or (1, 1))
  if isinstance(padding, str):
    window = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], dilation, strict=True)]
    padding = jax.lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
  padding = tuple((int(low), int(high)) for low, high in padding)
  geometry = Geometry(
    tuple(window_strides), padding, dilation, feature_group_count, precision, lowering
  )
  return _conv(geometry, lhs, rhs)


def adopter() -> Callable:
  """An interceptor (`flax.linen.intercept_methods`) that makes plain `nn.Conv` modules use it.

  Those are of one or two axes, with inputs that are not dilated and no convolution of their own,
  and run where this was called: a model that takes derivatives itself keeps JAX's, which has more.
  """
  trace = tracers.current_trace()

  def adopt(next_function, args, kwargs, context):
    module = context.module
    plain = (
      context.method_name == "__call__"
      and isinstance(module, nn.Conv)
      and np.size(module.kernel_size) in (1, 2)
      and np.all(np.asarray(module.input_dilation or 1) == 1)
      and module.conv_general_dilated in (None, jax.lax.conv_general_dilated)
      and module.conv_general_dilated_cls is None
      and tracers.current_trace() == trace
    )
    if not plain:
      return next_function(*args, **kwargs)
    before = module.conv_general_dilated
    object.__setattr__(module, "conv_general_dilated", conv_general_dilated)  # modules are frozen
    try:
      return next_function(*args, **kwargs)
    finally:
      object.__setattr__(module, "conv_general_dilated", before)

  return adopt


_lowering = contextvars.ContextVar("lowering", default=None)


@contextlib.contextmanager
def lowered_as(lowering: str | None) -> Iterator[None]:
  """Inside, convolutions traced under vmap become this one of `LOWERINGS`; None: as they would.

  Where a function was jitted before, its old program runs: give the jit the lowering as a static
  argument, as `train.shadows` does.

  Raises:
    ValueError: for an unknown lowering.
  """
  _require_known(lowering)
  token = _lowering.set(lowering)
  try:
    yield
  finally:
    _lowering.reset(token)


def _require_known(lowering):
  if lowering not in (None, *LOWERINGS):
    raise ValueError(f"lowering is {lowering!r}; choose one of {', '.join(LOWERINGS)}.")


def choose_lowering(*, platform: str, num_models: int, flop: int, groups: int) -> str:
  """Which lowering a convolution gets when images and kernels both differ between models.

  Args:
    platform: `jax.default_backend()`.
    num_models: how many models are batched.
    flop: of one model, 2 * kernel entries * output pixels of the batch.
    groups: of the convolution itself.
  Returns:
    One of `LOWERINGS`. On a CPU measured (`launch/bench.py conv`, BUILD_NOTES.md): unrolled wins,
    but for the smallest, where patches also compile sooner. Elsewhere read from compiled programs
    (`launch/bench.py compile`, BUILD_NOTES.md), bytes moved in a step of ResNet-8 of width 16, four
    models, with one model alone as 1: on an H100 unrolled .92, grouped 1.4, patches 2.5, and alike
    at width 64; on a TPU the stacking and slicing of unrolled doubles the bytes, patches move five
    times as much, and grouped half. How fast the chip is at each only `bench device` can tell;
    train.lowering="measure" asks for it in a training.
  """
  if num_models == 1:
    return "unrolled"
  if platform == "cpu":
    return "unrolled" if flop > 2e7 else "patches"
  return "grouped" if platform == "tpu" and groups == 1 else "unrolled"


EIGEN = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
"""Leaves convolutions and products on a CPU to Eigen, which is 1.3 to 2.3 times as fast as YNNPACK,
XLA's choice in JAX 0.10 (BUILD_NOTES.md)."""


@functools.cache
def compiler_options() -> dict[str, str] | None:
  """What `jax.jit` should tell XLA about a program that spends its time in convolutions.

  `EIGEN` on a CPU; None elsewhere, and where XLA does not know the option.
  """
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda x: x, compiler_options=EIGEN).lower(jnp.zeros(())).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return EIGEN


def jit(function: Callable, **options) -> Callable:
  """`jax.jit` with `compiler_options()`, which are asked for at the first call, not at import.

  `jitted()` of the result is what `jax.jit` made. Not for use inside another jit.
  """

  @functools.cache
  def jitted():
    return jax.jit(function, compiler_options=compiler_options(), **options)

  @functools.wraps(function)
  def call(*args, **kwargs):
    return jitted()(*args, **kwargs)

  call.jitted = jitted
  return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(geometry, images, kernel):
  return _forward(geometry)(images, kernel)


def _conv_fwd(geometry, images, kernel):
  return _conv(geometry, images, kernel), (images, kernel)


def _conv_bwd(geometry, residuals, cotangent):
  images, kernel = residuals
  image_gradient = _image_gradient(geometry, images.shape[1:3])(cotangent, kernel)
  kernel_gradient = _kernel_gradient(geometry, kernel.shape[:2])(images, cotangent)
  return image_gradient, kernel_gradient


_conv.defvjp(_conv_fwd, _conv_bwd)


def _plain(geometry, images, kernel):
  """The convolution of one model, as XLA does it."""
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    geometry.strides,
    geometry.padding,
    rhs_dilation=geometry.dilation,
    dimension_numbers=DIMENSION_NUMBERS,
    feature_group_count=geometry.groups,
    precision=geometry.precision,
  )


def _windows(geometry, kernel_size, images):
  """What each of the kh * kw entries of a kernel is multiplied with, [n, h, w, I] each."""
  whole, padding = (0, 0, 0), [(*pads, 0) for pads in geometry.padding]  # may be negative
  padded = jax.lax.pad(images, jnp.zeros((), images.dtype), [whole, *padding, whole])
  size = _output_size(geometry, kernel_size, images.shape[1:3])

  def window(offset, axis):
    start = offset * geometry.dilation[axis]
    stride = geometry.strides[axis]
    return slice(start, start + (size[axis] - 1) * stride + 1, stride)

  rows, columns = (range(k) for k in kernel_size)
  return [padded[:, window(i, 0), window(j, 1)] for i in rows for j in columns]


def _patches(geometry, kernel_size, images):
  """[n, h, w, kh * kw * I], in the order of a kernel flattened to [kh * kw * I, O]."""
  return jnp.concatenate(_windows(geometry, kernel_size, images), axis=-1)


def _in_groups(geometry, images, kernel):
  """A convolution that has groups, as products alone; a depthwise one is a sum of shifted images.

  On a CPU XLA's own take 12 to 68 times as long, forward and backward (`launch/bench.py conv`,
  BUILD_NOTES.md): all of a depthwise one, and with larger groups the gradient of the kernel.
  """
  *size, depth, features = kernel.shape
  windows, groups = _windows(geometry, size, images), geometry.groups
  kernels = kernel.reshape(len(windows), depth, groups, -1)
  if depth > 1:
    stacked = jnp.stack(windows, axis=-2)
    stacked = stacked.reshape(*stacked.shape[:-1], groups, depth)
    out = _product(geometry, "nhwtgd,tdgo->nhwgo", stacked, kernels)
  else:
    wide = jnp.promote_types(images.dtype, jnp.float32)  # half precision is summed up in float32
    pairs = zip(windows, kernels[:, :, None, None].astype(wide), strict=True)
    out = sum(window[..., None].astype(wide) * each for window, each in pairs)
  return out.reshape(*out.shape[:3], features).astype(images.dtype)


LARGEST_WINDOW = 64
"""Entries of a kernel for which `_in_groups` takes the place of XLA's convolution; it compiles a
product for each."""


def _lacks_fast(geometry, kernel_size):
  """Whether XLA has no fast gradient of the kernel here, nor anything fast if it is depthwise."""
  small = math.prod(kernel_size) <= LARGEST_WINDOW
  return geometry.groups > 1 and small and jax.default_backend() == "cpu"


def _apart(function):
  """The function as one that XLA:CPU fuses with nothing of what its arguments are made of.

  Else it repeats all elementwise work since the last convolution for every entry of the kernel.
  """
  jitted = jax.jit(function)

  def call(*arrays):
    with set_xla_metadata(inlineable="false"):
      return jitted(*arrays)

  return call


def _output_size(geometry, kernel_size, image_size):
  """Height and width of the output."""
  return tuple(
    max((length + sum(pads) - (window - 1) * dilation - 1) // stride + 1, 0)
    for length, pads, window, dilation, stride in zip(
      image_size, geometry.padding, kernel_size, geometry.dilation, geometry.strides, strict=True
    )
  )


@functools.cache
def _forward(geometry):
  def flop(images, kernel):
    pixels = math.prod(_output_size(geometry, kernel.shape[:2], images.shape[1:3]))
    return 2 * kernel.size * len(images) * pixels

  in_groups = _apart(functools.partial(_in_groups, geometry))

  def one(images, kernel):
    if kernel.shape[2] == 1 and _lacks_fast(geometry, kernel.shape[:2]):
      return in_groups(images, kernel)
    return _plain(geometry, images, kernel)

  def by_patches(images, kernel):
    if geometry.groups > 1:
      return _in_groups(geometry, images, kernel)
    patches = _patches(geometry, kernel.shape[:2], images)
    return _product(geometry, "nhwd,do->nhwo", patches, kernel.reshape(-1, kernel.shape[-1]))

  def shared_images(function, images, kernels):
    """Kernels join the output channels; groups, if any, stay outermost."""
    num_models, kh, kw, depth, features = kernels.shape
    each = features // geometry.groups
    grouped = kernels.reshape(num_models, kh, kw, depth, geometry.groups, each)
    merged = jnp.moveaxis(grouped, 0, -2).reshape(kh, kw, depth, num_models * features)
    out = function(images, merged)
    out = out.reshape(*out.shape[:-1], geometry.groups, num_models, each)
    return jnp.moveaxis(out, -2, 0).reshape(num_models, *out.shape[:-3], features)

  return _batched(
    geometry, one, by_patches, flop, shared_first=shared_images, shared_second=_join_batch
  )


@functools.cache
def _image_gradient(geometry, image_size):
  def shape(cotangent, kernel):
    depth = kernel.shape[2] * geometry.groups
    return jax.ShapeDtypeStruct((cotangent.shape[0], *image_size, depth), cotangent.dtype)

  def transposed(convolution, cotangent, kernel):
    images = shape(cotangent, kernel)
    return jax.linear_transpose(lambda x: convolution(geometry, x, kernel), images)(cotangent)[0]

  in_groups = _apart(functools.partial(transposed, _in_groups))

  def one(cotangent, kernel):
    if kernel.shape[2] == 1 and _lacks_fast(geometry, kernel.shape[:2]):
      return in_groups(cotangent, kernel)
    return transposed(_plain, cotangent, kernel)

  def by_patches(cotangent, kernel):
    if geometry.groups > 1:
      return transposed(_in_groups, cotangent, kernel)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    patches = _product(geometry, "nhwo,do->nhwd", cotangent, matrix)
    gather = functools.partial(_patches, geometry, kernel.shape[:2])
    return jax.linear_transpose(gather, shape(cotangent, kernel))(patches)[0]

  def flop(cotangent, kernel):
    return 2 * kernel.size * math.prod(cotangent.shape[:-1])

  return _batched(geometry, one, by_patches, flop, shared_second=_join_batch)


@functools.cache
def _kernel_gradient(geometry, kernel_size):
  def transposed(convolution, images, cotangent):
    shape = (*kernel_size, images.shape[-1] // geometry.groups, cotangent.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, images.dtype)
    return jax.linear_transpose(lambda k: convolution(geometry, images, k), kernel)(cotangent)[0]

  in_groups = _apart(functools.partial(transposed, _in_groups))

  def one(images, cotangent):
    if _lacks_fast(geometry, kernel_size):
      return in_groups(images, cotangent)
    return transposed(_plain, _materialised(images), cotangent)

  def by_patches(images, cotangent):
    if geometry.groups > 1:
      return transposed(_in_groups, images, cotangent)
    patches = _patches(geometry, kernel_size, images)
    matrix = _product(geometry, "nhwd,nhwo->do", patches, cotangent)
    return matrix.reshape(*kernel_size, -1, cotangent.shape[-1])

  def flop(images, cotangent):
    depth = images.shape[-1] // geometry.groups
    return 2 * math.prod(kernel_size) * depth * cotangent.size

  return _batched(geometry, one, by_patches, flop)


def _materialised(images):
  """The images with batch and channels swapped in memory, as the kernel's gradient wants them.

  Left alone, XLA:CPU fuses that transposition with what went before, in strides that defeat the
  cache: a third of a training step.
  """
  if jax.default_backend() != "cpu":
    return images
  return jnp.transpose(_swap_batch_and_channels(images), (3, 1, 2, 0))


@_apart
def _swap_batch_and_channels(images):
  return jnp.transpose(images, (3, 1, 2, 0))


def _product(geometry, subscripts, first, second):
  return jnp.einsum(subscripts, first, second, precision=geometry.precision)


def _join_batch(function, images, kernel):
  """One kernel for all models: they join the batch."""
  num_models, n = images.shape[:2]
  out = function(images.reshape(num_models * n, *images.shape[2:]), kernel)
  return out.reshape(num_models, n, *out.shape[1:])


def _batched(geometry, one, by_patches, flop, *, shared_first=None, shared_second=None):
  """`one` with a rule of its own for `jax.vmap`; nested vmaps apply the rule again."""
  function = custom_vmap(one)

  @function.def_vmap
  def rule(axis_size, in_batched, first, second):
    first_batched, second_batched = in_batched
    if first_batched and not second_batched and shared_second is not None:
      return shared_second(function, first, second), True
    if second_batched and not first_batched and shared_first is not None:
      return shared_first(function, first, second), True
    axes = (0 if first_batched else None, 0 if second_batched else None)
    pairs = [
      (first[m] if first_batched else first, second[m] if second_batched else second)
      for m in range(axis_size)
    ]
    lowering = (
      geometry.lowering
      or _lowering.get()
      or choose_lowering(
        platform=jax.default_backend(),
        num_models=axis_size,
        flop=flop(*pairs[0]),
        groups=geometry.groups,
      )
    )
    if lowering == "unrolled":
      return jnp.stack([function(*pair) for pair in pairs]), True
    return jax.vmap(by_patches if lowering == "patches" else one, axes)(first, second), True

  return function


def uniform_bias(fan_in: int):
  """PyTorch's default initialiser of a bias: uniform in +-1 / sqrt(fan_in)."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default initialiser of a kernel: uniform in +-1 / sqrt(fan_in)."""


def square(features: int, size: int, stride: int = 1, **options) -> nn.Conv:
  """A `size` x `size` convolution without bias; with stride 1 it keeps the image size."""
  padding = (size // 2, (size - 1) // 2)
  return nn.Conv(
    features,
    (size, size),
    (stride, stride),
    (padding, padding),
    use_bias=False,
    kernel_init=kernel_init,
    conv_general_dilated=conv_general_dilated,
    **options,
  )


def dense(features: int, fan_in: int, **options) -> nn.Dense:
  """Flax's dense layer with PyTorch's default initialisation."""
  return nn.Dense(features, kernel_init=kernel_init, bias_init=uniform_bias(fan_in), **options)
