"""A plain perceptron for vectors of numbers (tabular data), or for the pixels of an image."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ptq_jax.models import chain, conv


class Layer(nn.Module):
  """Dense layer and ReLU; whatever axes an example has are one."""

  width: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = x.reshape(len(x), -1)
    return nn.relu(conv.dense(self.width, x.shape[-1], dtype=self.dtype, name="dense")(x))


class Head(nn.Module):
  """The classifier, in float32."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = x.astype(jnp.float32)
    return conv.dense(self.num_classes, x.shape[-1], name="classifier")(x)


class MLP(chain.Chain):
  """A hidden layer of each of these widths, then the classifier."""

  num_classes: int
  hidden: tuple[int, ...]
  dtype: Any = None

  def setup(self):
    first, *others = self.hidden
    self.stem = Layer(first, self.dtype)
    self.blocks = [Layer(width, self.dtype) for width in others]
    self.head = Head(self.num_classes)

  @property
  def num_blocks(self) -> int:
    return len(self.hidden) - 1


def mlp(num_classes: int, hidden: int | Sequence = (256, 128), dtype: Any = None) -> MLP:
  """Hidden layers of these widths.

  Raises:
    ValueError: if there is none, or a width is no positive whole number.
  """
  hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
  if not hidden or not all(isinstance(width, int) and width >= 1 for width in hidden):
    raise ValueError(f"hidden is {hidden}; give the width of each hidden layer, as in (256, 128).")
  return MLP(num_classes, hidden, dtype)
