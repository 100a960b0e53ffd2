"""Who trains on what: `bool[M, E]`, drawn so that every model has one static number of members."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import Array, ArrayLike, Bool, Int, Key


def paired(key: Key, *, num_models: int, num_examples: int) -> Bool[Array, "M E"]:
  """Random halves in complementary pairs: every example is a member of exactly M / 2 models.

  Model 2k gets a random half of the pool and model 2k + 1 the complement. A pair depends on `key`
  and k alone: more models later leave the first ones as they were.

  Args:
    key: consumed once.
    num_models: M, even.
    num_examples: E, the pool size. When it is odd, even rows have E // 2 members and odd rows one
      more.
  Returns:
    bool[M, E], true for members.
  Raises:
    ValueError: for an odd or non-positive number of models, or fewer than two examples.
  """
  if num_models < 2 or num_models % 2:
    raise ValueError(
      f"num_models is {num_models}; models come in complementary pairs, so it must be even and at "
      f"least 2, for example {max(2, num_models + num_models % 2)}."
    )
  halves = random_halves(key, num_models=num_models // 2, num_examples=num_examples)
  return _with_complements(halves)


def random_halves(key: Key, *, num_models: int, num_examples: int) -> Bool[Array, "M E"]:
  """Independent random halves of the pool: E // 2 members each. For dedicated targets.

  Row m depends on `key` and m alone.

  Raises:
    ValueError: for no models, or fewer than two examples.
  """
  if num_models < 1:
    raise ValueError(f"num_models is {num_models}; it must be at least 1.")
  if num_examples < 2:
    raise ValueError(f"num_examples is {num_examples}; half of a pool needs at least 2 examples.")
  return _halves(key, num_models, num_examples)


def members_of(membership: Bool[ArrayLike, "M E"]) -> Int[np.ndarray, "M members"]:
  """Indices of each model's members in ascending order, int32, the same number for every model.

  Runs on the host: the number of members becomes a static shape.

  Raises:
    ValueError: if the models have different numbers of members, or none.
  """
  membership = np.asarray(membership)
  counts = membership.sum(axis=1)
  if counts.min() != counts.max():
    raise ValueError(
      f"membership has models with {counts.min()} and with {counts.max()} members; stacked models "
      "need one number for all, so use a pool with an even number of examples (drop one)."
    )
  if counts[0] == 0:
    raise ValueError("membership has no members in any model; there is nothing to train on.")
  return np.nonzero(membership)[1].reshape(len(membership), -1).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _halves(key, num_models, num_examples):
  smaller_half = jnp.arange(num_examples) < num_examples // 2

  def half(model):
    return jax.random.permutation(jax.random.fold_in(key, model), smaller_half)

  return jax.vmap(half)(jnp.arange(num_models))


@jax.jit
def _with_complements(halves):
  return jnp.stack([halves, ~halves], axis=1).reshape(-1, halves.shape[1])
