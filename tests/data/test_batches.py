import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.data import batches

MEMBERS = np.arange(3, 73, 3, dtype=np.int32)  # 24 of them


def test_an_epoch_visits_every_member_once(key):
  indices = np.asarray(batches.epoch_indices(key, MEMBERS, batch_size=6))
  assert indices.shape == (4, 6)
  assert indices.dtype == np.int32
  np.testing.assert_array_equal(np.sort(indices.ravel()), MEMBERS)
  assert not np.array_equal(indices.ravel(), MEMBERS)


def test_the_remainder_is_dropped_and_differs_from_epoch_to_epoch(key):
  left_out = set()
  for epoch in range(30):
    epoch_key = jax.random.fold_in(key, epoch)
    indices = np.asarray(batches.epoch_indices(epoch_key, MEMBERS, batch_size=7))
    assert indices.shape == (3, 7)
    assert len(set(indices.ravel().tolist())) == 21
    left_out |= set(MEMBERS.tolist()) - set(indices.ravel().tolist())
  assert len(left_out) > 20  # 90 drawn from 24


def test_vmap_over_models_equals_one_model_at_a_time(key):
  keys = jax.random.split(key, 3)
  members = jnp.stack([MEMBERS, MEMBERS + 1, MEMBERS[::-1]])
  together = jax.jit(
    jax.vmap(lambda key, members: batches.epoch_indices(key, members, batch_size=5))
  )(keys, members)
  for one_key, row, expected in zip(keys, members, together, strict=True):
    np.testing.assert_array_equal(batches.epoch_indices(one_key, row, batch_size=5), expected)


@pytest.mark.parametrize("batch_size", [0, 25])
def test_a_batch_fits_into_the_members(key, batch_size):
  with pytest.raises(ValueError, match=f"batch_size is {batch_size}, .* trains on 24 members"):
    batches.epoch_indices(key, MEMBERS, batch_size=batch_size)


def test_steps_per_epoch():
  assert batches.steps_per_epoch(749, batch_size=64) == 11
