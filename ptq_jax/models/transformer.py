"""A small transformer encoder for token ids, averaged over the tokens: the blocks of `vit`.

Every sequence has the same length. What fills up a shorter one is a token like any other: nothing
is masked.
"""

from typing import Any

import flax.linen as nn

from ptq_jax.models import chain, vit


class TokenEmbedding(nn.Module):
  """One vector per token, plus one learned for its position."""

  vocabulary: int
  width: int
  dtype: Any = None

  @nn.compact
  def __call__(self, tokens, train: bool = False):
    x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="tokens")(tokens)
    return vit.with_positions(self, x)


class Transformer(chain.Chain):
  """`depth` transformer blocks of `width` channels on tokens from 0 to `vocabulary` - 1."""

  num_classes: int
  vocabulary: int
  width: int = 64
  depth: int = 2
  num_heads: int = 4
  dropout: float = 0.0
  dtype: Any = None

  @property
  def num_blocks(self) -> int:
    return self.depth

  def setup(self):
    self.stem = TokenEmbedding(self.vocabulary, self.width, self.dtype)
    self.blocks = [
      vit.TransformerBlock(self.num_heads, dropout=self.dropout, dtype=self.dtype)
      for _ in range(self.depth)
    ]
    self.head = vit.MeanHead(self.num_classes)
