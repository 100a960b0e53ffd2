"""Array aliases and the names of dimensions, the same in every module.

M models, E examples, V views (augmented queries), C classes. The letters stand in jaxtyping shape
strings: `Float[ArrayLike, "M E V"]`. Stacked models have the model axis first.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

Array = jax.Array
"""An array on a device."""

ArrayLike = jax.Array | np.ndarray
"""What our functions take: NumPy on the host or JAX on a device."""

Nested = Sequence[Any]
"""Lists of numbers, or of such lists: whatever NumPy can make an array of."""

Key = PRNGKeyArray
"""A new-style random key, `jax.random.key(seed)`."""

Keys = jaxtyping.Key[Array, "M"]
"""One random key per model."""

PyTree = Any
"""Nested containers of arrays."""

Variables = Mapping[str, Any]
"""Flax variables, `{"params": ..., "batch_stats": ...}`, of one model or stacked."""


def on_device(*arrays) -> bool:
  """Whether some of these are JAX arrays, traced or not: then work stays on their device."""
  return any(isinstance(array, jax.Array) for array in arrays)


def is_traced(*arrays) -> bool:
  """Whether the values of some of these are unknown, inside `jit`, `vmap` or `grad`."""
  return any(isinstance(array, jax.core.Tracer) for array in arrays)


def as_scores(scores, *, name: str = "scores"):
  """An array of real numbers as it lies, on the host or on a device; flags become 0 and 1.

  Raises:
    ValueError: if it holds text, objects or complex numbers, or lists of different lengths.
  """
  try:
    scores = scores if isinstance(scores, jax.Array) else np.asarray(scores)
  except ValueError as error:
    raise ValueError(f"{name} are not one array: {error}") from None
  if scores.dtype == bool:
    return scores.astype(np.uint8)
  if not jnp.issubdtype(scores.dtype, jnp.integer) and not jnp.issubdtype(
    scores.dtype, jnp.floating
  ):
    raise ValueError(f"{name} are of type {scores.dtype}; they must be real numbers.")
  return scores.astype(np.float32) if scores.dtype.kind == "V" else scores


def as_members(members, *, name: str = "members"):
  """Membership as bool, on the host or on a device: True or 1 for a member, False or 0 for others.

  Raises:
    ValueError: if a value is anything else (-1, NaN, text), or if the values are traced and their
      type is not bool, for they cannot be looked at then.
  """
  try:
    members = members if isinstance(members, jax.Array) else np.asarray(members)
  except ValueError as error:
    raise ValueError(f"{name} are not one array: {error}") from None
  if members.dtype == bool:
    return members
  numbers = members.dtype.kind in "iuf"
  if is_traced(members) or not numbers:
    where = "inside jit they" if numbers else "they"
    raise ValueError(f"{name} are of type {members.dtype}; {where} must be bool.")
  wrong = (members != 0) & (members != 1)
  if bool(wrong.any()):
    value = np.asarray(members[wrong]).ravel()[0]
    raise ValueError(f"{name} hold {value!s}; they must be bool, or 0 and 1.")
  return members.astype(bool)


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters with which a spreadsheet takes a cell of text for a formula."""


def csv_cell(value: Any) -> Any:
  """A cell of CSV: text that a spreadsheet would run is quoted with an apostrophe.

  >>> csv_cell("=cmd|x"), csv_cell("-1.5"), csv_cell(-1.5)
  ("'=cmd|x", '-1.5', -1.5)
  """
  if not isinstance(value, str) or not value.startswith(FORMULA):
    return value
  with contextlib.suppress(ValueError):
    float(value)
    return value
  return f"'{value}"


__all__ = [
  "Array",
  "ArrayLike",
  "Bool",
  "Float",
  "Int",
  "Key",
  "Keys",
  "Nested",
  "PyTree",
  "Shaped",
  "UInt8",
  "Variables",
  "as_members",
  "as_scores",
  "csv_cell",
  "is_traced",
  "on_device",
]
