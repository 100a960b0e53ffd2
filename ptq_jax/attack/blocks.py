"""Streaming over blocks of examples, and the checks that every attack with shadows shares.

A block holds all shadows and targets of some consecutive examples. All blocks have one size (the
last is padded), so an attack compiles once. Arrays are only ever sliced along examples, so that a
`numpy.memmap` larger than memory will do.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import Array, ArrayLike, Bool, Float, Int

BLOCK_ELEMENTS = {"cpu": 2**17, "other": 2**24}
"""Models x views x examples of one block: a megabyte of float64 on CPU, which its caches hold, and
enough to fill an accelerator, with temporaries of a few gigabytes."""


class Inputs(NamedTuple):
  """What an attack reads."""

  shadow_scores: Float[ArrayLike, "M E V"]
  shadow_members: Bool[np.ndarray, "M E"]
  target_scores: Float[ArrayLike, "T E V"]
  left_out: Int[np.ndarray, "T K"] | None  # shadows that each target's attacker does without
  size: int  # examples per block


class Block(NamedTuple):
  """B consecutive examples on the device."""

  shadow_scores: Array  # [M, B, V]
  shadow_members: Array  # bool[M, B]
  target_scores: Array  # [T, B, V]
  weights: Array  # float64[B], one for an example, zero for padding


def prepare(
  shadow_scores: ArrayLike,
  shadow_members: ArrayLike,
  target_scores: ArrayLike,
  *,
  left_out: ArrayLike | None = None,
  size: int | None = None,
) -> Inputs:
  """Checks shapes and `left_out`, and picks a block size.

  Raises:
    ValueError: if shapes disagree or are empty, `left_out` is not int[T, 1] or int[T, 2] of shadows
      (two together must be complements of each other), or `size` is not positive.
  """
  members = np.asarray(shadow_members).astype(bool)
  shapes = f"{np.shape(shadow_scores)}, {members.shape} and {np.shape(target_scores)}"
  if (
    shadow_scores.ndim != 3
    or target_scores.ndim != 3
    or members.shape != shadow_scores.shape[:2]
    or target_scores.shape[1:] != shadow_scores.shape[1:]
  ):
    raise ValueError(
      f"shadow scores, shadow members and target scores are {shapes}; they must be [M, E, V], "
      "[M, E] and [T, E, V] with the same examples and views."
    )
  if 0 in shadow_scores.shape or 0 in target_scores.shape:
    raise ValueError(f"shadow scores, members and target scores are {shapes}; none may be empty.")
  if size is not None and size < 1:
    raise ValueError(f"block_size is {size}; it must be at least 1 example.")
  if left_out is not None:
    left_out = _checked_left_out(np.asarray(left_out), members, len(target_scores))
  if size is None:
    num_models = max(len(members), len(target_scores))
    platform = "cpu" if jax.default_backend() == "cpu" else "other"
    size = max(64, BLOCK_ELEMENTS[platform] // (num_models * shadow_scores.shape[2]))
  return Inputs(shadow_scores, members, target_scores, left_out, min(size, members.shape[1]))


def stream(inputs: Inputs) -> Iterator[tuple[slice, Block]]:
  """The blocks in order, each with the slice of examples it holds; padding repeats the last one.

  Raises:
    ValueError: if a score is NaN or infinite.
  """
  num_examples = inputs.shadow_members.shape[1]
  for start in range(0, num_examples, inputs.size):
    index = slice(start, min(start + inputs.size, num_examples))
    parts = [np.asarray(array[:, index]) for array in inputs[:3]]
    for name, scores in (("shadow", parts[0]), ("target", parts[2])):
      if not np.isfinite(scores).all():
        raise ValueError(
          f"{name} scores are NaN or infinite among examples {start} to {index.stop - 1}; attacks "
          "with shadows need finite scores, as `confidence.logit_scaled` gives."
        )
    padding = inputs.size - (index.stop - start)
    weights = np.append(np.ones(index.stop - start), np.zeros(padding))
    if padding:
      parts = [np.concatenate([p, np.repeat(p[:, -1:], padding, 1)], 1) for p in parts]
    yield index, Block(*(jnp.asarray(part) for part in (*parts, weights)))


def check_counts(inputs: Inputs, *, sides: Sequence[str], needed: int, reason: str):
  """Every example needs some "in" or "out" shadows, whichever target is attacked.

  Raises:
    ValueError: names how many examples have too few, and the first.
  """
  for side in sides:
    counts = shadows_left(inputs.shadow_members, inputs.left_out, side=side)
    if counts.min() < needed:
      raise ValueError(
        f"{int((counts < needed).sum())} examples, the first number {int(np.argmin(counts))}, have "
        f"fewer than {needed} {side!r} shadows for some target, but {reason} needs {needed}; train "
        "more shadows or leave these examples out."
      )


def shadows_left(
  shadow_members: Bool[np.ndarray, "M E"], left_out: Int[np.ndarray, "T K"] | None, *, side: str
) -> Int[np.ndarray, "E"]:
  """Per example the fewest "in" or "out" shadows that the attacker on any target has."""
  chosen = shadow_members if side == "in" else ~shadow_members
  counts = chosen.sum(axis=0)
  if left_out is None:
    return counts
  return counts - np.max([chosen[shadows].sum(axis=0) for shadows in left_out], axis=0)


def _checked_left_out(left_out, members, num_targets):
  if left_out.ndim != 2 or len(left_out) != num_targets or left_out.shape[1] not in (1, 2):
    raise ValueError(f"left_out is {left_out.shape}; it must be [{num_targets} targets, 1 or 2].")
  if left_out.min() < 0 or left_out.max() >= len(members):
    raise ValueError(f"left_out names shadows outside [0, {len(members)}).")
  if left_out.shape[1] == 2 and (members[left_out[:, 0]] == members[left_out[:, 1]]).any():
    raise ValueError("two shadows left out together must have trained on complementary examples.")
  return left_out
