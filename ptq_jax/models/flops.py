"""What one image costs: multiply-adds of the convolutions and dense layers of any Linen model.

Normalisation, activations, pooling and the optimiser are not counted: they are below 1 % of the
arithmetic of these networks. A multiply-add is two floating-point operations (FLOPs).
"""

import functools

import flax.linen as nn
import jax
import numpy as np

from ptq_jax.models import call, units
from ptq_jax.models.units import Layer

PER_MULTIPLY_ADD = 2

TRAINING_FACTOR = 3
"""A training step is a forward pass, the gradient of the activations and that of the weights."""


def of_layer(layer: Layer) -> int:
  """Multiply-adds of one layer for one image: each weight once per output pixel."""
  if layer.kind == "embed":
    return 0
  return layer.num_rows * layer.num_columns * layer.positions


def multiply_adds(
  model: nn.Module, *, image_shape: tuple[int, ...], dtype: np.dtype | str = "float32"
) -> int:
  """Multiply-adds of a forward pass of one image; nothing is computed.

  Args:
    model: any Linen model, see `models.call`.
    image_shape: of one image, [H, W, c], or of what else the model takes.
    dtype: of that: integers for token ids.
  Raises:
    ValueError: a shape that does not fit the model, or layers that cannot be counted; see
      `units.layers`.
  """
  return _multiply_adds(call.Hashable(model), tuple(image_shape), np.dtype(dtype))


@functools.lru_cache(maxsize=64)
def _multiply_adds(hashable, image_shape, dtype):
  model, images = hashable.module, jax.ShapeDtypeStruct((1, *image_shape), dtype)
  variables = jax.eval_shape(functools.partial(call.init, model), jax.random.key(0), images)
  return sum(map(of_layer, units.layers(model, variables, images)))


def forward(model: nn.Module, **options) -> int:
  """FLOPs of a forward pass of one image; arguments and errors as `multiply_adds`."""
  return PER_MULTIPLY_ADD * multiply_adds(model, **options)


def training(model: nn.Module, **options) -> int:
  """FLOPs of training on one image once; arguments and errors as `multiply_adds`."""
  return TRAINING_FACTOR * forward(model, **options)
