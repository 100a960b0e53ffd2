"""Mini-batches of one epoch as index arrays, for one model; vmap over models outside."""

import jax

from ptq_jax.base import Array, ArrayLike, Int, Key


def steps_per_epoch(num_members: int, *, batch_size: int) -> int:
  """Full batches in one pass over the members; the remainder is dropped.

  Raises:
    ValueError: if the batch size is not in 1 .. num_members.
  """
  if not 1 <= batch_size <= num_members:
    raise ValueError(
      f"batch_size is {batch_size}, but a model trains on {num_members} members; choose a batch "
      f"size from 1 to {num_members} or a larger pool."
    )
  return num_members // batch_size


def epoch_indices(
  key: Key, members: Int[ArrayLike, "n"], *, batch_size: int
) -> Int[Array, "steps batch"]:
  """A fresh shuffle of one model's members, cut into full batches.

  Args:
    key: the model's key folded with the epoch, `fold_in(model_key, epoch)`.
    members: indices into the pool, one row of `membership.members_of`.
    batch_size: examples per step.
  Returns:
    int[n // batch_size, batch_size], indices into the pool, none twice; the remainder is left out.
  Raises:
    ValueError: if the batch size is not in 1 .. n.
  """
  steps = steps_per_epoch(members.shape[0], batch_size=batch_size)
  shuffled = jax.random.permutation(key, members)
  return shuffled[: steps * batch_size].reshape(steps, batch_size)
