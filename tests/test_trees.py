import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees

TREE = {"params": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(2)}}


def test_flatten_and_unflatten_are_inverse():
  flat = trees.flatten(TREE)
  assert list(flat) == ["params/a/kernel", "params/b"]
  assert trees.unflatten(flat) == TREE


def test_get_names_what_is_missing():
  np.testing.assert_array_equal(trees.get(TREE, "params/b"), np.ones(2))
  with pytest.raises(KeyError, match=r"no 'c' on the path 'params/c'; there is \['a', 'b'\]"):
    trees.get(TREE, "params/c")


def test_replace_changes_only_what_is_named():
  changed = trees.replace(TREE, {"params/b": jnp.zeros(2)})
  np.testing.assert_array_equal(changed["params"]["b"], np.zeros(2))
  assert changed["params"]["a"]["kernel"] is TREE["params"]["a"]["kernel"]
  np.testing.assert_array_equal(TREE["params"]["b"], np.ones(2))
  with pytest.raises(KeyError, match="no leaf 'params/c'"):
    trees.replace(TREE, {"params/c": jnp.zeros(2)})


def test_stack_take_and_concatenate_are_consistent():
  stacked = trees.stack([TREE, TREE, TREE])
  assert trees.length(stacked) == 3
  np.testing.assert_array_equal(trees.take(stacked, 1)["params"]["b"], np.ones(2))
  assert trees.length(trees.concatenate([stacked, stacked])) == 6
  assert trees.num_bytes(stacked) == 3 * (6 + 2) * 4


def test_length_refuses_unequal_leaves():
  with pytest.raises(ValueError, match=r"one length of the first axis, found \[2, 3\]"):
    trees.length({"a": jnp.ones(2), "b": jnp.ones(3)})
