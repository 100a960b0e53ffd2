"""Pytrees: leaves by path, stacking models, slicing them out again."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import PyTree

SEPARATOR = "/"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves of nested mappings by path, in insertion order.

  >>> flatten({"params": {"stem": {"kernel": 1}, "head": {"bias": 2}}})
  {'params/stem/kernel': 1, 'params/head/bias': 2}
  """
  leaves = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      leaves |= {f"{name}{SEPARATOR}{path}": leaf for path, leaf in flatten(value).items()}
    else:
      leaves[name] = value
  return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`.

  >>> unflatten({'params/stem/kernel': 1, 'params/head/bias': 2})
  {'params': {'stem': {'kernel': 1}, 'head': {'bias': 2}}}
  """
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split(SEPARATOR)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def get(tree: Mapping[str, Any], path: str) -> Any:
  """The leaf or subtree at `path`.

  Raises:
    KeyError: names the part of the path that is missing and what stands there instead.
  """
  node: Any = tree
  for part in path.split(SEPARATOR):
    if not isinstance(node, Mapping) or part not in node:
      there = sorted(node) if isinstance(node, Mapping) else "a leaf"
      raise KeyError(f"no {part!r} on the path {path!r}; there is {there}.")
    node = node[part]
  return node


def replace(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
  """A copy of `tree` with the leaves at the given paths replaced.

  Raises:
    KeyError: if a path names no leaf of the tree.
  """
  flat = flatten(tree)
  unknown = sorted(set(leaves) - set(flat))
  if unknown:
    raise KeyError(f"the tree has no leaf {unknown[0]!r}; it has {sorted(flat)}.")
  return unflatten(flat | dict(leaves))


def stack(trees: Sequence[PyTree]) -> PyTree:
  """Stacks the leaves of equal trees along a new first axis, the model axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def concatenate(trees: Sequence[PyTree]) -> PyTree:
  """Joins stacked trees along their first axis."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def take(tree: PyTree, index) -> PyTree:
  """Indexes the first axis of every leaf: one model (an integer) or some (a slice or an array)."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def length(tree: PyTree) -> int:
  """Length of the first axis, the same for all leaves: the number of stacked models.

  Raises:
    ValueError: if the leaves disagree.
  """
  lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(tree)}
  if len(lengths) != 1:
    raise ValueError(f"stacked models need one length of the first axis, found {sorted(lengths)}.")
  return lengths.pop()


def num_bytes(tree: PyTree) -> int:
  """Bytes of all leaves, arrays or `jax.ShapeDtypeStruct`."""
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
