"""ResNets for small images: 3x3 stem of stride 1, no max-pooling (arXiv 1512.03385).

`resnet18` with width 64 is the model of arXiv 2512.15335 (11.2 M parameters); `resnet8` and
`resnet20` are He et al.'s CIFAR networks of three stages, with projection shortcuts.
"""

from typing import Any

import flax.linen as nn

from ptq_jax.models import chain, conv, norm
from ptq_jax.models.convnet import ConvBlock, PoolHead


class ConvNorm(nn.Module):
  """A convolution and its batch normalisation: the projection of a shortcut."""

  features: int
  size: int
  stride: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = conv.square(self.features, self.size, self.stride, dtype=self.dtype, name="conv")(x)
    return norm.BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(x)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions beside a shortcut, ReLU after the sum."""

  features: int
  stride: int = 1
  dtype: Any = None
  expansion = 1

  @nn.compact
  def __call__(self, x, train: bool = False):
    y = ConvNorm(self.features, 3, self.stride, self.dtype, name="conv1")(x, train)
    y = ConvNorm(self.features, 3, 1, self.dtype, name="conv2")(nn.relu(y), train)
    return nn.relu(y + shortcut(self, x, self.features, train))


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions beside a shortcut; four times as wide outside as inside."""

  features: int
  stride: int = 1
  dtype: Any = None
  expansion = 4

  @nn.compact
  def __call__(self, x, train: bool = False):
    y = ConvNorm(self.features, 1, 1, self.dtype, name="conv1")(x, train)
    y = ConvNorm(self.features, 3, self.stride, self.dtype, name="conv2")(nn.relu(y), train)
    y = ConvNorm(4 * self.features, 1, 1, self.dtype, name="conv3")(nn.relu(y), train)
    return nn.relu(y + shortcut(self, x, 4 * self.features, train))


def shortcut(block, x, features, train):
  """The block's input, projected by a 1x1 convolution when its shape changes."""
  if block.stride == 1 and x.shape[-1] == features:
    return x
  return ConvNorm(features, 1, block.stride, block.dtype, name="shortcut")(x, train)


class ResNet(chain.Chain):
  """Stages of residual blocks; each after the first halves the image and doubles the width."""

  num_classes: int
  stages: tuple[int, ...] = (2, 2, 2, 2)
  width: int = 64
  block: type[nn.Module] = BasicBlock
  dtype: Any = None

  @property
  def num_blocks(self) -> int:
    return sum(self.stages)

  def setup(self):
    self.stem = ConvBlock(self.width, dtype=self.dtype)
    self.blocks = [
      self.block(self.width * 2**stage, 2 if stage > 0 and i == 0 else 1, self.dtype)
      for stage, length in enumerate(self.stages)
      for i in range(length)
    ]
    self.head = PoolHead(self.num_classes)


def resnet8(num_classes: int, width: int = 16, dtype=None) -> ResNet:
  """Three stages of one block."""
  return ResNet(num_classes, (1, 1, 1), width, dtype=dtype)


def resnet20(num_classes: int, width: int = 16, dtype=None) -> ResNet:
  """Three stages of three blocks."""
  return ResNet(num_classes, (3, 3, 3), width, dtype=dtype)


def resnet18(num_classes: int, width: int = 64, dtype=None) -> ResNet:
  """The paper's model."""
  return ResNet(num_classes, (2, 2, 2, 2), width, dtype=dtype)


def resnet34(num_classes: int, width: int = 64, dtype=None) -> ResNet:
  """Four stages of 3, 4, 6 and 3 blocks."""
  return ResNet(num_classes, (3, 4, 6, 3), width, dtype=dtype)


def resnet50(num_classes: int, width: int = 64, dtype=None) -> ResNet:
  """Four stages of 3, 4, 6 and 3 bottlenecks."""
  return ResNet(num_classes, (3, 4, 6, 3), width, Bottleneck, dtype=dtype)
