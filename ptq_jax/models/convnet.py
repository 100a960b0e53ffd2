"""A plain convolutional network for small images (handwritten digits)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ptq_jax.models import chain, conv, norm


class ConvBlock(nn.Module):
  """Convolution 3x3, batch normalisation, ReLU."""

  features: int
  stride: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = conv.square(self.features, 3, self.stride, dtype=self.dtype, name="conv")(x)
    x = norm.BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(x)
    return nn.relu(x)


class PoolHead(nn.Module):
  """Mean over the pixels, then the classifier, in float32."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return conv.dense(self.num_classes, x.shape[-1], name="classifier")(x)


class ConvNet(chain.Chain):
  """`num_convolutions` of them; each after the first halves the image and doubles the width."""

  num_classes: int
  width: int = 16
  num_convolutions: int = 3
  dtype: Any = None

  def setup(self):
    self.stem = ConvBlock(self.width, dtype=self.dtype)
    self.blocks = [
      ConvBlock(self.width * 2**i, stride=2, dtype=self.dtype)
      for i in range(1, self.num_convolutions)
    ]
    self.head = PoolHead(self.num_classes)

  @property
  def num_blocks(self) -> int:
    return self.num_convolutions - 1
