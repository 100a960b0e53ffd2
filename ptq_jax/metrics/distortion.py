"""How far a quantized array is from the original: what quantizers minimise and reports print."""

import jax.numpy as jnp

from ptq_jax.base import Array, ArrayLike, Float, Shaped


def squared_error(
  original: Shaped[ArrayLike, "*shape"], approximation: Shaped[ArrayLike, "*shape"]
) -> Float[Array, ""]:
  """Sum of squared differences over all elements."""
  return jnp.sum(jnp.square(jnp.asarray(original) - jnp.asarray(approximation)))


def mean_squared_error(
  original: Shaped[ArrayLike, "*shape"], approximation: Shaped[ArrayLike, "*shape"]
) -> Float[Array, ""]:
  """Mean of squared differences over all elements."""
  return jnp.mean(jnp.square(jnp.asarray(original) - jnp.asarray(approximation)))


def relative_error(
  original: Shaped[ArrayLike, "*shape"], approximation: Shaped[ArrayLike, "*shape"]
) -> Float[Array, ""]:
  """Sum of squared differences over the sum of squares of the original.

  0 is exact; 1 is as bad as all zeros. For an original of all zeros: 0 if the approximation is all
  zeros too, else infinity.
  """
  error = squared_error(original, approximation)
  power = jnp.sum(jnp.square(jnp.asarray(original)))
  ratio = error / jnp.where(power > 0, power, 1)
  return jnp.where(power > 0, ratio, jnp.where(error > 0, jnp.inf, 0.0))


def sqnr(
  original: Shaped[ArrayLike, "*shape"], approximation: Shaped[ArrayLike, "*shape"]
) -> Float[Array, ""]:
  """Signal to quantization-noise ratio in decibel, -10 log10(relative_error); infinite if exact."""
  return -10 * jnp.log10(relative_error(original, approximation))


def max_error(
  original: Shaped[ArrayLike, "*shape"], approximation: Shaped[ArrayLike, "*shape"]
) -> Float[Array, ""]:
  """Largest absolute difference."""
  return jnp.max(jnp.abs(jnp.asarray(original) - jnp.asarray(approximation)))


def agreement(
  original: Float[ArrayLike, "*batch C"], approximation: Float[ArrayLike, "*batch C"]
) -> Float[Array, ""]:
  """Share of rows of logits with the same top class."""
  return jnp.mean(jnp.argmax(original, axis=-1) == jnp.argmax(approximation, axis=-1))
