"""RMIA against loops; its relation to the probability ratio; populations; bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.attack import rmia
from ptq_jax.metrics import roc
from tests.attack import naive

M, E, V = 6, 23, 2


@pytest.fixture(scope="module")
def scores():
  rng = np.random.default_rng(0)
  members = rng.random((M, E)) < 0.5
  members[:2], members[2:4] = True, False
  shadows = rng.normal(size=(M, E, V)) + 2 * rng.normal(size=(1, E, 1)) + members[..., None]
  return shadows.astype(np.float32), members


@pytest.mark.parametrize("side", ["online", "offline"])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_matches_loops(scores, side, gamma):
  shadows, members = scores
  target = shadows[1] + np.float32(0.5)
  options = {"side": side, "gamma": gamma, "offline_a": 0.2}
  expected = naive.rmia(shadows, members, target, population=(shadows, members, target), **options)
  np.testing.assert_allclose(rmia.score(shadows, members, target, **options), expected, atol=1e-12)


@pytest.mark.parametrize("side", ["online", "offline"])
def test_population_that_nobody_trained_on(scores, side):
  shadows, members = scores
  rng = np.random.default_rng(1)
  others = rng.normal(size=(M + 1, 17, V)).astype(np.float32)
  target = shadows[0] - np.float32(0.5)
  population = (others[:M], np.zeros((M, 17), bool), others[M])
  options = {"side": side, "gamma": 1.5, "offline_a": 0.4}
  expected = naive.rmia(shadows, members, target, population=population, **options)
  given = rmia.Population(others[:M], others[M:])
  result = rmia.score(shadows, members, target, population=given, **options)
  np.testing.assert_allclose(result, expected, atol=1e-12)
  assert len(np.unique(expected)) > 5


@pytest.mark.parametrize("side", ["online", "offline"])
def test_leaving_out_is_attacking_without(scores, side):
  shadows, members = scores
  left_out = np.array([[1], [4]])
  targets = shadows[left_out[:, 0]]
  result = rmia.attack(shadows, members, targets, side=side, left_out=left_out, block_size=8)
  for t, shadow in enumerate(left_out[:, 0]):
    keep = np.arange(M) != shadow
    expected = rmia.score(shadows[keep], members[keep], targets[t], side=side)
    np.testing.assert_allclose(result[t], expected, atol=1e-12)


def test_one_view_ranks_by_the_ratio_alone(scores):
  """Whatever gamma and population, within one target only p(x | target) / p(x) counts."""
  shadows, members = scores
  shadows, target = shadows[..., :1], shadows[0, :, :1] + np.float32(0.3)
  p = 1 / (1 + np.exp(-shadows[..., 0].astype(np.float64)))
  inside, outside = [
    (p * m).sum(axis=0) / m.sum(axis=0) for m in (members.astype(float), 1.0 - members)
  ]
  ratio = (1 / (1 + np.exp(-target[:, 0].astype(np.float64)))) / ((inside + outside) / 2)
  order = np.argsort(ratio)
  for gamma in (0.5, 1.0, 2.0):
    result = rmia.score(shadows, members, target, gamma=gamma)
    assert (np.diff(result[order]) >= 0).all()
  result = rmia.score(shadows, members, target, gamma=1.0)
  np.testing.assert_allclose(result[order], (np.arange(E) + 1) / E)


def test_members_of_overfitted_models_are_found():
  rng = np.random.default_rng(2)
  members = rng.random((16, 2000)) < 0.5
  members[:2] = [[True], [False]]
  shadows = (rng.normal(size=(16, 2000, 1)) + 2 * rng.normal(size=(1, 2000, 1))) + members[
    ..., None
  ]
  inside = rng.random(2000) < 0.5
  target = rng.normal(size=(2000, 1)) + inside[:, None]
  for side in ("online", "offline"):
    assert roc.auc(rmia.score(shadows, members, target, side=side), inside) > 0.55


def test_tuning_picks_the_best_of_the_candidates():
  rng = np.random.default_rng(3)
  half = rng.random((4, 300)) < 0.5
  members = np.concatenate([half, ~half])
  shadows = 2 * rng.normal(size=(1, 300, 1)) + rng.normal(size=(8, 300, 1)) + members[..., None]
  left_out = np.arange(8)[:, None]
  candidates = (0.0, 0.5, 1.0)
  areas = []
  for a in candidates:
    options = {"side": "offline", "offline_a": a, "left_out": left_out}
    rows = rmia.attack(shadows, members, shadows, **options)
    areas.append(np.mean([roc.auc(*pair) for pair in zip(rows, members, strict=True)]))
  tuned = rmia.tune_offline_a(shadows, members, left_out=left_out, candidates=candidates)
  assert tuned == candidates[int(np.argmax(areas))]
  assert np.ptp(areas) > 0.001


def test_bad_input_is_named(scores):
  shadows, members = scores
  wrong = (ValueError, TypeError)
  with pytest.raises(ValueError, match="gamma is 0"):
    rmia.score(shadows, members, shadows[0], gamma=0.0)
  with pytest.raises(ValueError, match=r"offline_a 1\.5"):
    rmia.score(shadows, members, shadows[0], offline_a=1.5)
  with pytest.raises(wrong, match="side"):
    rmia.score(shadows, members, shadows[0], side="both")
  with pytest.raises(ValueError, match="have fewer than 1 'in' shadows"):
    rmia.score(shadows[2:4], members[2:4], shadows[0])
  with pytest.raises(ValueError, match="the population's scores are"):
    rmia.score(shadows, members, shadows[0], population=rmia.Population(shadows[:3], shadows[:1]))


@pytest.mark.parametrize("side", ["online", "offline"])
def test_scores_far_from_zero_keep_their_ranks(side):
  """Row 10: at -800 every p is 0; the exact ratio is not, and ranks by it."""
  shadows = np.full((4, 3, 1), -800.0)
  members = np.array([[True] * 3] * 2 + [[False] * 3] * 2)
  target = np.array([[-800.0], [-900.0], [-800.0]])
  result = rmia.score(shadows, members, target, side=side, gamma=1.0, offline_a=1.0)
  np.testing.assert_allclose(result, [1, 1 / 3, 1])  # as good as all, as itself, as all
  left_out = np.arange(4)[:, None]
  rows = rmia.attack(shadows, members, np.stack([target] * 4), side=side, gamma=1.0,
                     offline_a=1.0, left_out=left_out)  # fmt: skip
  np.testing.assert_allclose(rows, [result] * 4)
  inside = np.array([True, False, False])
  assert roc.auc(result, inside) == 0.75  # wins against -900, ties with -800


@pytest.mark.parametrize("side", ["online", "offline"])
def test_on_device_jit_is_eager_is_the_host(scores, side):
  shadows, members = scores
  targets = shadows[:2] + np.float32(0.5)
  device = [jnp.asarray(array) for array in (shadows, members, targets)]
  function = functools.partial(rmia.score, side=side)
  eager = [function(*device[:2], target) for target in device[2]]
  assert all(isinstance(row, jax.Array) and row.dtype == jnp.float32 for row in eager)
  np.testing.assert_allclose(eager, [function(shadows, members, t) for t in targets], atol=1e-6)
  np.testing.assert_allclose(jax.jit(function)(*device[:2], device[2][0]), eager[0], atol=1e-6)
  mapped = jax.vmap(function, in_axes=(None, None, 0))(*device)
  np.testing.assert_allclose(mapped, eager, atol=1e-6)
  lists = [array.tolist() for array in (shadows, members, targets[0])]
  np.testing.assert_array_equal(function(*lists), function(shadows, members, targets[0]))


def test_population_on_a_device(scores):
  shadows, members = scores
  others = np.random.default_rng(1).normal(size=(M + 1, 17, V)).astype(np.float32)
  expected = rmia.score(
    shadows, members, shadows[0] - 1, population=rmia.Population(others[:M], others[M:])
  )
  given = rmia.Population(*map(jnp.asarray, (others[:M], others[M:])))
  device = [jnp.asarray(array) for array in (shadows, members, shadows[0] - 1)]
  np.testing.assert_allclose(rmia.score(*device, population=given), expected, atol=1e-6)


def test_left_out_may_differ_by_example(scores):
  shadows, members = scores
  left_out = np.stack([np.where(members[2], 2, 0), np.where(members[2], 4, 3)])[None]
  left_out = np.where(members[left_out[0, 0], np.arange(E)] != members[left_out[0, 1],
                      np.arange(E)], left_out, left_out[:, :1])  # fmt: skip
  rows = rmia.attack(shadows, members, shadows[2:3], left_out=left_out, gamma=1.0)
  keep = np.ones_like(members)
  np.put_along_axis(keep, left_out[0], False, axis=0)
  p = 1 / (1 + np.exp(-shadows.astype(np.float64)))
  sides = [(p * (keep & side)[..., None]).sum(0) / (keep & side).sum(0)[:, None]
           for side in (members, ~members)]  # fmt: skip
  ratio = p[2] / ((sides[0] + sides[1]) / 2)
  expected = (ratio[:, None] >= ratio[None] * (1 - 1e-12)).mean(axis=(1, 2))
  np.testing.assert_allclose(rows[0], expected, atol=1e-12)
