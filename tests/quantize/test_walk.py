"""The walk through a network: shared plans, chunks, memory, and the shape of results."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import adaround, grid, plan, walk
from tests import fresh

QUICK = {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 1}


class Three(nn.Module):
  """As many layers as have a first, a last and one between."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="stem")(images)).mean(axis=1)
    x = nn.relu(nn.Dense(8, name="middle")(x)).mean(axis=1)
    return nn.Dense(5, name="head")(x)


@pytest.fixture(scope="module")
def pair(untrained):
  """Two such models."""
  variables = fresh.stacked(Three(), untrained.images[0], num_models=2)
  return untrained._replace(model=Three(), variables=variables)


@pytest.fixture(scope="module")
def plans(pair):
  layers = units.layers(pair.model, *trees.take((pair.variables, pair.images), 0))
  return [
    plan.make(layers, levels=3),
    plan.make(layers, levels=3, last_layer_levels="full"),
    plan.make(layers, levels=16, first_layer_levels="full"),
  ]


def adarounded(ensemble, plans, **options):
  return adaround.quantize_stacked(
    ensemble.keys,
    ensemble.model,
    ensemble.variables,
    ensemble.images,
    plans=plans,
    **QUICK,
    **options,
  )


@pytest.fixture(scope="module")
def everything(pair, plans):
  return adarounded(pair, plans)


def assert_equal(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_results_do_not_depend_on_chunks(pair, plans, everything):
  variables, info = adarounded(pair, plans, memory_bytes=1)
  assert_equal(variables, everything[0])
  for record, expected in zip(info, everything[1], strict=True):
    assert_equal((record.steps, record.grids), (expected.steps, expected.grids))
    for field in ("error_before", "error_after"):
      np.testing.assert_allclose(getattr(record, field), getattr(expected, field), rtol=1e-5)


def test_plans_and_models_do_not_see_each_other(pair, plans, everything):
  one = pair._replace(
    keys=pair.keys[1:],
    variables=trees.take(pair.variables, slice(1, 2)),
    images=pair.images[1:],
  )
  variables, info = adarounded(one, plans[2:])
  assert_equal(variables, jax.tree.map(lambda leaf: leaf[2:, 1:], everything[0]))
  np.testing.assert_allclose(info[1].error_after, everything[1][1].error_after[2:, 1:], rtol=1e-5)


def test_plans_that_agree_share_the_work(pair, plans, monkeypatch):
  seen = []
  solve = adaround._solve

  def spy(layer, schedule, stop, sweeps, kernels, *rest):
    seen.append(len(kernels))
    return solve(layer, schedule, stop, sweeps, kernels, *rest)

  monkeypatch.setattr(adaround, "_solve", spy)
  adarounded(pair, plans)
  assert seen == [2, 4, 4]  # stem only at 3 levels; the head under one of two plans there


def test_full_precision_stays_and_records_say_so(pair, everything):
  variables, info = everything
  kernel = trees.get(variables, "params/stem/kernel")
  original = trees.get(pair.variables, "params/stem/kernel")
  np.testing.assert_array_equal(kernel[2], original)
  assert not np.array_equal(kernel[0], original)
  assert info[0].grids["stem"].levels.tolist() == [[3, 3], [3, 3], [0, 0]]
  assert info[2].grids["head"].levels.tolist() == [[3, 3], [0, 0], [16, 16]]
  np.testing.assert_array_equal(info[0].error_before[2], 0)
  np.testing.assert_array_equal(info[0].steps[2], 0)
  assert all(record.seconds.shape == (3, 2) for record in info)


def test_grids_of_the_records_hold_the_weights(everything):
  variables, info = everything
  for record in info:
    for path, grids in record.grids.items():
      kernels = np.asarray(trees.get(variables, f"params/{path}/kernel"))
      for p, m in np.ndindex(3, 2):
        fitted = jax.tree.map(lambda leaf, at=(p, m): jnp.asarray(leaf[at]), grids)
        if fitted.levels > 0:
          np.testing.assert_array_equal(grid.nearest(kernels[p, m], fitted), kernels[p, m])


def test_out_of_memory_halves_the_chunk_and_goes_on(pair, plans, everything, monkeypatch):
  solve = adaround.by_moments
  sizes = []

  def limited(site, layer, kernels, *rest, **options):
    sizes.append(len(site.models))
    if len(site.models) > 1:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return solve(site, layer, kernels, *rest, **options)

  monkeypatch.setattr(adaround, "by_moments", limited)
  with pytest.warns(UserWarning, match="out of memory with 6 pairs .* going on with 3"):
    variables, _ = adarounded(pair, plans)
  assert_equal(variables, everything[0])


def test_other_errors_and_single_pairs_are_not_retried(pair, plans, monkeypatch):
  def broken(*args, **options):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(adaround, "by_moments", broken)
  with (
    pytest.raises(jax.errors.JaxRuntimeError),
    pytest.warns(UserWarning, match="going on with 1"),
  ):
    adarounded(pair, plans[:1])


def test_a_leaf_without_entries_has_its_plans():
  assert walk._with_plans(2, {"a": jnp.zeros((6, 0, 3))})["a"].shape == (2, 3, 0, 3)


def test_stack_and_rows():
  parts = [{"a": jnp.full((2,), i), "b": jnp.float32(i)} for i in range(5)]
  stacked = walk.stack(parts)
  jax.tree.map(np.testing.assert_array_equal, stacked, trees.stack(parts))
  assert walk.rows(stacked, np.arange(5)) is stacked
  np.testing.assert_array_equal(walk.rows(stacked, np.array([3, 1]))["b"], [3, 1])
