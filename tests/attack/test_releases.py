"""Joint ratio of several releases: one release is LiRA, SciPy's densities, more is more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ptq_jax.attack import lira, releases
from ptq_jax.metrics import roc

M, E, V = 8, 30, 2


@pytest.fixture(scope="module")
def scores():
  rng = np.random.default_rng(0)
  half = rng.random((M // 2, E)) < 0.5
  members = np.stack([half, ~half], axis=1).reshape(M, E)
  first = rng.normal(size=(M, E, V)) + members[..., None] + 2 * rng.normal(size=(1, E, 1))
  second = 0.5 * first + 0.5 * rng.normal(size=(M, E, V)) + 0.5 * members[..., None]
  return np.stack([first, second]), members


def by_hand(shadows, members, target):
  """A loop over examples and views with SciPy's multivariate density."""
  ratio = np.zeros((E, V))
  for sign, inside in ((1, True), (-1, False)):
    groups = {(e, v): shadows[:, members[:, e] == inside, e, v] for e in range(E) for v in range(V)}
    freedom = sum(g.shape[1] - 1 for g in groups.values())
    parts = [g - g.mean(axis=1, keepdims=True) for g in groups.values()]
    covariance = sum(p @ p.T for p in parts) / freedom
    for (e, v), group in groups.items():
      density = stats.multivariate_normal(group.mean(axis=1), covariance)
      ratio[e, v] += sign * density.logpdf(target[:, e, v])
  return ratio.mean(axis=1)


def test_matches_scipy_and_one_release_is_lira(scores):
  shadows, members = scores
  targets = shadows[:, :2] + 0.3
  rows = releases.attack(shadows, members, targets)
  for t in range(2):
    np.testing.assert_allclose(rows[t], by_hand(shadows, members, targets[:, t]), atol=1e-6)
  alone = releases.attack(shadows[:1], members, targets[:1])[0]
  expected = lira.online(shadows[0], members, targets[0, 0], variance="pooled", center="mean")
  np.testing.assert_allclose(alone, expected, atol=1e-6)


def test_leaving_out_is_attacking_without(scores):
  shadows, members = scores
  left_out = np.stack([np.arange(M), np.arange(M) ^ 1], axis=1)
  rows = releases.attack(shadows, members, shadows, left_out=left_out)
  by_example = np.broadcast_to(left_out[..., None], (M, 2, E))
  np.testing.assert_array_equal(
    releases.attack(shadows, members, shadows, left_out=by_example), rows
  )
  keep = np.setdiff1d(np.arange(M), left_out[3])
  alone = releases.attack(shadows[:, keep], members[keep], shadows[:, 3:4])[0]
  np.testing.assert_allclose(rows[3], alone, rtol=1e-9)


def test_jit_and_vmap_over_targets(scores):
  shadows, members = jnp.asarray(scores[0], jnp.float32), jnp.asarray(scores[1])
  targets = jnp.moveaxis(shadows[:, :3] + 0.3, 1, 0)
  each = jnp.stack([releases.joint_ratio(shadows, members, target) for target in targets])
  mapped = jax.jit(jax.vmap(releases.joint_ratio, in_axes=(None, None, 0)))(
    shadows, members, targets
  )
  np.testing.assert_allclose(mapped, each, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    each, releases.attack(*scores, np.asarray(scores[0][:, :3] + 0.3)), rtol=2e-3, atol=2e-3
  )


def test_two_noisy_releases_find_more_than_either():
  rng = np.random.default_rng(1)
  members = np.arange(12)[:, None] % 2 == rng.integers(0, 2, size=(1, 3000))
  inside = rng.random(3000) < 0.5
  noise = rng.normal(size=(2, 13, 3000, 1))
  shadows = noise[:, :12] + members[None, ..., None]
  target = noise[:, 12] + inside[None, :, None]
  both = roc.auc(releases.attack(shadows, members, target[:, None])[0], inside)
  alone = [
    roc.auc(releases.attack(shadows[[r]], members, target[[r], None])[0], inside) for r in (0, 1)
  ]
  assert both > max(alone) + 0.05
  assert stats.norm.cdf(1.0) - 0.06 < both < stats.norm.cdf(1.0)


def test_bad_input_is_named(scores):
  shadows, members = scores
  with pytest.raises((ValueError, TypeError), match=r"same releases|target_scores"):
    releases.attack(shadows, members, shadows[:1])
  with pytest.raises(ValueError, match="target scores are NaN"):
    releases.attack(shadows, members, np.full_like(shadows, np.nan))
  with pytest.raises(ValueError, match="fewer than one degree of freedom"):
    releases.attack(shadows[:, :2], members[:2], shadows[:, :1])
