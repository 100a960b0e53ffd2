"""Vision transformers for small images (arXiv 2010.11929), averaged over the patches at the end.

Pre-normalised blocks of attention and a two-layer perceptron, a learned position per patch, no
class token; the defaults have 0.2 M parameters.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ptq_jax.models import chain, conv


class PatchEmbedding(nn.Module):
  """One vector per patch of the image, plus one learned for its position."""

  width: int
  patch: int
  dtype: Any = None

  @nn.compact
  def __call__(self, images, train: bool = False):
    size = (self.patch, self.patch)
    x = nn.Conv(
      self.width,
      size,
      strides=size,
      padding="VALID",
      dtype=self.dtype,
      conv_general_dilated=conv.conv_general_dilated,
      name="patches",
    )(images)
    return with_positions(self, x.reshape(len(x), -1, self.width))


def with_positions(module, x):
  """A sequence [n, length, width] plus what a module has learned for each place."""
  shape = (1, *x.shape[1:])
  return x + module.param("position", nn.initializers.normal(0.02), shape).astype(x.dtype)


class TransformerBlock(nn.Module):
  """Attention and a perceptron, each beside a shortcut."""

  num_heads: int
  expansion: int = 4
  dropout: float = 0.0
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    width = x.shape[-1]
    y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
    y = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name="attention")(y)
    x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
    y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
    y = nn.gelu(nn.Dense(self.expansion * width, dtype=self.dtype, name="widen")(y))
    y = nn.Dense(width, dtype=self.dtype, name="narrow")(y)
    return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class MeanHead(nn.Module):
  """Normalisation, mean over the patches, then the classifier, in float32."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.LayerNorm(name="norm")(x.astype(jnp.float32))
    return nn.Dense(self.num_classes, name="classifier")(x.mean(axis=1))


class ViT(chain.Chain):
  """`depth` transformer blocks of `width` channels on patches of `patch` x `patch` pixels."""

  num_classes: int
  width: int = 64
  depth: int = 4
  patch: int = 4
  num_heads: int = 4
  dropout: float = 0.0
  dtype: Any = None

  @property
  def num_blocks(self) -> int:
    return self.depth

  def setup(self):
    self.stem = PatchEmbedding(self.width, self.patch, self.dtype)
    self.blocks = [
      TransformerBlock(self.num_heads, dropout=self.dropout, dtype=self.dtype)
      for _ in range(self.depth)
    ]
    self.head = MeanHead(self.num_classes)
