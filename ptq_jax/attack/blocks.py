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

from ptq_jax.base import Array, ArrayLike, Bool, Int, Nested, Shaped, as_members, as_scores

BLOCK_ELEMENTS = {"cpu": 2**17, "other": 2**24}
"""Models x views x examples of one block: a megabyte of float64 on CPU, which its caches hold, and
enough to fill an accelerator, with temporaries of a few gigabytes."""


class Inputs(NamedTuple):
  """What an attack reads."""

  shadow_scores: Shaped[ArrayLike, "M E V"]
  shadow_members: Bool[np.ndarray, "M E"]
  target_scores: Shaped[ArrayLike, "T E V"]
  left_out: Int[np.ndarray, "T K *E"] | None  # shadows that each target's attacker does without
  size: int  # examples per block


class Block(NamedTuple):
  """B consecutive examples on the device."""

  shadow_scores: Array  # [M, B, V]
  shadow_members: Array  # bool[M, B]
  target_scores: Array  # [T, B, V]
  weights: Array  # [B], one for an example, zero for padding; its type is that of all sums
  left_out: Array | None = None  # int[T, K], or int[T, K, B] where it differs by example


def prepare(
  shadow_scores: Shaped[ArrayLike, "..."] | Nested,
  shadow_members: Shaped[ArrayLike, "..."] | Nested,
  target_scores: Shaped[ArrayLike, "..."] | Nested,
  *,
  left_out: ArrayLike | None = None,
  size: int | None = None,
) -> Inputs:
  """Checks shapes, membership and `left_out`, and picks a block size.

  Scores without views, [M, E] and [T, E], are taken as of one view.

  Raises:
    ValueError: if shapes disagree or are empty, members are not 0 and 1, `left_out` is not int[T,
      1 or 2] or int[T, 1 or 2, E] of shadows (two together must be on different sides), or `size`
      is not positive.
  """
  shadow_scores, target_scores = with_views(shadow_scores, target_scores)
  members = np.asarray(as_members(shadow_members, name="shadow_members"))
  check_shapes(shadow_scores, members, target_scores)
  if size is not None and size < 1:
    raise ValueError(f"block_size is {size}; it must be at least 1 example.")
  if left_out is not None:
    left_out = _checked_left_out(np.asarray(left_out), members, len(target_scores))
  if size is None:
    num_models = max(len(members), len(target_scores))
    platform = "cpu" if jax.default_backend() == "cpu" else "other"
    size = max(64, BLOCK_ELEMENTS[platform] // (num_models * shadow_scores.shape[2]))
  return Inputs(shadow_scores, members, target_scores, left_out, min(size, members.shape[1]))


def with_views(shadow_scores, target_scores):
  """Scores with a last axis of views: scores [M, E] and [T, E] are of one view."""
  shadows, targets = as_scores(shadow_scores, name="shadow_scores"), as_scores(
    target_scores, name="target_scores"
  )  # fmt: skip
  if shadows.ndim == targets.ndim == 2:
    return shadows[..., None], targets[..., None]
  return shadows, targets


def check_shapes(shadow_scores, shadow_members, target_scores):
  """
  Raises:
    ValueError: if these are not [M, E, V], [M, E] and [T, E, V], or one is empty.
  """
  shapes = f"{shadow_scores.shape}, {shadow_members.shape} and {target_scores.shape}"
  if (
    shadow_scores.ndim != 3
    or target_scores.ndim != 3
    or shadow_members.shape != shadow_scores.shape[:2]
    or target_scores.shape[1:] != shadow_scores.shape[1:]
  ):
    raise ValueError(
      f"shadow scores, shadow members and target scores are {shapes}; they must be [M, E, V], "
      "[M, E] and [T, E, V] with the same examples and views."
    )
  if 0 in shadow_scores.shape or 0 in target_scores.shape:
    raise ValueError(f"shadow scores, members and target scores are {shapes}; none may be empty.")


def stream(inputs: Inputs) -> Iterator[tuple[slice, Block]]:
  """The blocks in order, each with the slice of examples it holds; padding repeats the last one.

  Raises:
    ValueError: if a score is NaN or infinite.
  """
  num_examples = inputs.shadow_members.shape[1]
  for start in range(0, num_examples, inputs.size):
    index = slice(start, min(start + inputs.size, num_examples))
    parts = [np.asarray(array[:, index]) for array in inputs[:3]]
    for i, name in ((0, "shadow"), (2, "target")):
      parts[i] = parts[i].astype(np.result_type(parts[i].dtype, np.float32), copy=False)
      if not np.isfinite(parts[i]).all():
        raise ValueError(
          f"{name} scores are NaN or infinite among examples {start} to {index.stop - 1}; attacks "
          "with shadows need finite scores, as `confidence.logit_scaled` gives."
        )
    padding = inputs.size - (index.stop - start)
    weights = np.append(np.ones(index.stop - start), np.zeros(padding))
    left_out = inputs.left_out
    if left_out is not None and left_out.ndim == 3:
      left_out = np.pad(left_out[..., index], ((0, 0), (0, 0), (0, padding)), mode="edge")
    if padding:
      parts = [np.concatenate([p, np.repeat(p[:, -1:], padding, 1)], 1) for p in parts]
    yield index, jax.device_put(Block(*parts, weights, left_out))


def check_counts(inputs: Inputs, *, sides: Sequence[str], needed: int, reason: str):
  """Every example needs some "in" or "out" shadows, whichever target is attacked.

  Raises:
    ValueError: names how many examples have too few, and the first.
  """
  for side in sides:
    counts = shadows_left(inputs.shadow_members, inputs.left_out, side=side)
    check_enough(counts, side, needed, reason)


def check_enough(counts: Int[np.ndarray, "E"], side: str, needed: int, reason: str):
  """
  Raises:
    ValueError: names how many examples have too few shadows of a side, and the first.
  """
  if counts.min() < needed:
    raise ValueError(
      f"{int((counts < needed).sum())} examples, the first number "
      f"{int(np.argmax(counts < needed))}, have fewer than {needed} {side!r} shadows for some "
      f"target, but {reason} needs {needed}; train more shadows or leave these examples out."
    )


def shadows_left(
  shadow_members: Bool[np.ndarray, "M E"], left_out: Int[np.ndarray, "T K *E"] | None, *, side: str
) -> Int[np.ndarray, "E"]:
  """Per example the fewest "in" or "out" shadows that the attacker on any target has."""
  chosen = shadow_members if side == "in" else ~shadow_members
  counts = chosen.sum(axis=0)
  if left_out is None:
    return counts
  return counts - np.max([rows_of(chosen, shadows).sum(axis=0) for shadows in left_out], axis=0)


def rows_of(array, shadows):
  """The rows [K, ...] of some shadows, given once or for each example: int[K] or int[K, E]."""
  if shadows.ndim == 1:
    return array[shadows]
  shadows = shadows.reshape(*shadows.shape, *(1,) * (array.ndim - 2))
  library = jnp if isinstance(array, jax.Array) else np
  return library.take_along_axis(array, shadows, axis=0)


def _checked_left_out(left_out, members, num_targets):
  shape, num_examples = left_out.shape, members.shape[1]
  fits = shape[:1] == (num_targets,) and len(shape) in (2, 3) and shape[1] in (1, 2)
  if not fits or shape[2:] not in ((), (num_examples,)) or left_out.dtype.kind not in "iu":
    raise ValueError(
      f"left_out is {left_out.dtype}{list(shape)}; it must be integers [{num_targets} targets, 1 "
      f"or 2], or [{num_targets}, 1 or 2, {num_examples} examples]."
    )
  if left_out.min() < 0 or left_out.max() >= len(members):
    raise ValueError(f"left_out names shadows outside [0, {len(members)}).")
  if shape[1] == 2:
    for shadows in left_out:
      one, other = rows_of(members, shadows)
      if ((one == other) & (shadows[0] != shadows[1])).any():
        raise ValueError(
          "two shadows left out together must be one that trained on an example and one that did "
          "not: complementary, if they are the same for all examples."
        )
  return left_out
