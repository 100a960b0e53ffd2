"""Pytrees: leaves by path, stacking models, slicing them out again.

A path is a string of names joined by "/". A name that holds "/" or "~" itself is written with "~1"
and "~0" in their place (RFC 6901), so that every tree of mappings has paths of its own. Parameters
in a Flax box (`nn.with_partitioning`) count as the arrays that they hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from ptq_jax.base import PyTree

SEPARATOR = "/"


def join(names: Sequence[Any]) -> str:
  """The path of some names.

  >>> join(["params", "Dense_0/kernel", "scale"])
  'params/Dense_0~1kernel/scale'
  """
  return SEPARATOR.join(str(name).replace("~", "~0").replace(SEPARATOR, "~1") for name in names)


def names(path: str) -> list[str]:
  """Inverse of `join`."""
  return [part.replace("~1", SEPARATOR).replace("~0", "~") for part in path.split(SEPARATOR)]


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
  """Leaves of nested mappings by path, in the order of JAX; whatever is no mapping is a leaf.

  >>> flatten({"params": {"stem": {"kernel": 1}, "head": {"bias": 2}}})
  {'params/head/bias': 2, 'params/stem/kernel': 1}
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
  return {_path(keys): leaf for keys, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts of leaves by path.

  >>> unflatten({'params/stem/kernel': 1, 'params/head/bias': 2})
  {'params': {'stem': {'kernel': 1}, 'head': {'bias': 2}}}
  """
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = names(path)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def empty(tree: Mapping[Any, Any]) -> list[str]:
  """Paths of the mappings without any entry, which `flatten` cannot tell.

  >>> empty({"params": {"kernel": 1}, "batch_stats": {}})
  ['batch_stats']
  """
  nodes, _ = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda node: _is_leaf(node) or not node
  )
  return [_path(keys) for keys, node in nodes if isinstance(node, Mapping)]


def get(tree: Mapping[str, Any], path: str) -> Any:
  """The leaf or subtree at `path`.

  Raises:
    KeyError: names the part of the path that is missing and what stands there instead.
  """
  node: Any = tree
  for part in names(path):
    if not isinstance(node, Mapping) or part not in node:
      there = sorted(node) if isinstance(node, Mapping) else "a leaf"
      raise KeyError(f"no {part!r} on the path {path!r}; there is {there}.")
    node = node[part]
  return node.unbox() if isinstance(node, meta.AxisMetadata) else node


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  """A copy of `tree`, of the very same structure, with the leaves at the given paths replaced.

  Raises:
    KeyError: if a path names no leaf of the tree.
  """
  found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
  paths = [_path(keys) for keys, _ in found]
  unknown = sorted(set(leaves) - set(paths))
  if unknown:
    raise KeyError(f"the tree has no leaf {unknown[0]!r}; it has {sorted(paths)}.")
  return structure.unflatten(
    [leaves.get(path, leaf) for path, (_, leaf) in zip(paths, found, strict=True)]
  )


def stack(trees: Sequence[PyTree]) -> PyTree:
  """Stacks the leaves of equal trees along a new first axis, the model axis."""
  return _stack(list(trees))


def concatenate(trees: Sequence[PyTree]) -> PyTree:
  """Joins stacked trees along their first axis."""
  return _concatenate(list(trees))


def take(tree: PyTree, index) -> PyTree:
  """Indexes the first axis of every leaf: one model (an integer) or some (a slice or integers).

  All leaves of a tree on a device are taken by one program.
  """
  on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
  if on_device and not isinstance(index, slice) and _is_whole(index):
    return _take(tree, index)
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


def _is_whole(index) -> bool:
  """Whether an index is made of integers; it may be traced."""
  dtype = index.dtype if hasattr(index, "dtype") else np.asarray(index).dtype
  return dtype.kind in "iu"


@jax.jit
def _stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _concatenate(trees):
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


@jax.jit
def _take(tree, index):
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _is_leaf(node) -> bool:
  return not isinstance(node, Mapping | meta.AxisMetadata)


def _path(keys) -> str:
  """A JAX key path as a string; the inside of a box has no name of its own."""
  return join([key.key for key in keys if isinstance(key, jax.tree_util.DictKey)])
