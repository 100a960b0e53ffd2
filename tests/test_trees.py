import jax
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


def test_take_of_arrays_on_the_host_and_of_traced_and_several_indices():
  stacked = trees.stack([jax.tree.map(lambda leaf, by=by: by * leaf, TREE) for by in (1, 2, 3)])
  second = 2 * np.ones(2)
  for index in (1, np.int64(1), jnp.int32(1), -2):
    np.testing.assert_array_equal(trees.take(stacked, index)["params"]["b"], second)
  traced = jax.jit(lambda index: trees.take(stacked, index)["params"]["b"])
  np.testing.assert_array_equal(traced(1), second)
  rows = trees.take(stacked, np.array([2, 1]))["params"]["b"]
  np.testing.assert_array_equal(rows, [3 * np.ones(2), second])
  kept = trees.take(stacked, np.array([False, True, False]))["params"]["b"]
  np.testing.assert_array_equal(kept, [second])
  on_host = trees.take(jax.device_get(stacked), 1)["params"]["b"]
  assert isinstance(on_host, np.ndarray)
  np.testing.assert_array_equal(on_host, second)


def test_length_refuses_unequal_leaves():
  with pytest.raises(ValueError, match=r"one length of the first axis, found \[2, 3\]"):
    trees.length({"a": jnp.ones(2), "b": jnp.ones(3)})
