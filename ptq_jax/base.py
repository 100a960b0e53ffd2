"""Array aliases and the names of dimensions, the same in every module.

M models, E examples, V views (augmented queries), C classes. The letters stand in jaxtyping shape
strings: `Float[ArrayLike, "M E V"]`. Stacked models have the model axis first.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jaxtyping
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

Array = jax.Array
"""An array on a device."""

ArrayLike = jax.Array | np.ndarray
"""What our functions take: NumPy on the host or JAX on a device."""

Key = PRNGKeyArray
"""A new-style random key, `jax.random.key(seed)`."""

Keys = jaxtyping.Key[Array, "M"]
"""One random key per model."""

PyTree = Any
"""Nested containers of arrays."""

Variables = Mapping[str, Any]
"""Flax variables, `{"params": ..., "batch_stats": ...}`, of one model or stacked."""

__all__ = [
  "Array",
  "ArrayLike",
  "Bool",
  "Float",
  "Int",
  "Key",
  "Keys",
  "PyTree",
  "Shaped",
  "UInt8",
  "Variables",
]
