"""Wide residual networks for small images (Zagoruyko & Komodakis 2016, arXiv:1605.07146).

Blocks are pre-activated: normalisation and ReLU come before each convolution, and the sum of a
block is left as it is. `wide_resnet28_10` has 36.5 M parameters, `wide_resnet28_2` 1.47 M. Without
dropout, and initialised like the rest of the zoo.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ptq_jax.models import chain, conv, norm


class Stem(nn.Module):
  """A 3x3 convolution alone: the first block normalises what it gets."""

  features: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    return conv.square(self.features, 3, dtype=self.dtype, name="conv")(x)


class NormRelu(nn.Module):
  """Batch normalisation and ReLU."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = norm.BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(x)
    return nn.relu(x)


class PreActivationBlock(nn.Module):
  """Two 3x3 convolutions, each behind normalisation and ReLU, beside a shortcut.

  Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
  """

  features: int
  stride: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    y = NormRelu(self.dtype, name="norm1")(x, train)
    if self.stride != 1 or x.shape[-1] != self.features:
      x = conv.square(self.features, 1, self.stride, dtype=self.dtype, name="shortcut")(y)
    y = conv.square(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(y)
    y = NormRelu(self.dtype, name="norm2")(y, train)
    y = conv.square(self.features, 3, dtype=self.dtype, name="conv2")(y)
    return x + y


class Head(nn.Module):
  """The last normalisation and ReLU, mean over the pixels, classifier in float32."""

  num_classes: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = NormRelu(self.dtype, name="norm")(x, train)
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return conv.dense(self.num_classes, x.shape[-1], name="classifier")(x)


class WideResNet(chain.Chain):
  """Three stages; their widths are `widen_factor` times `width`, twice and four times that.

  depth: 6 n + 4 layers, n blocks in each stage.
  width: of the stem.
  """

  num_classes: int
  depth: int = 28
  widen_factor: int = 2
  width: int = 16
  dtype: Any = None

  def __post_init__(self):
    if self.depth < 10 or (self.depth - 4) % 6:
      raise ValueError(
        f"model.depth is {self.depth}; a wide ResNet has 6 n + 4 layers: 10, 16, 22, 28, ..."
      )
    super().__post_init__()

  @property
  def num_blocks(self) -> int:
    return (self.depth - 4) // 2

  def setup(self):
    self.stem = Stem(self.width, self.dtype)
    self.blocks = [
      PreActivationBlock(
        self.widen_factor * self.width * 2**stage, 2 if stage > 0 and i == 0 else 1, self.dtype
      )
      for stage in range(3)
      for i in range(self.num_blocks // 3)
    ]
    self.head = Head(self.num_classes, self.dtype)


def wide_resnet28_2(num_classes: int, dtype=None) -> WideResNet:
  """WRN-28-2."""
  return WideResNet(num_classes, 28, 2, dtype=dtype)


def wide_resnet28_10(num_classes: int, dtype=None) -> WideResNet:
  """WRN-28-10."""
  return WideResNet(num_classes, 28, 10, dtype=dtype)
