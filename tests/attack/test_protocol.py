"""Audits by protocol: leave-one-out is a loop over targets, unbiased without leakage; bad input."""

import jax
import numpy as np
import pytest

from ptq_jax.attack import protocol, rmia
from ptq_jax.metrics import roc

M, E, V = 8, 30, 2


def paired(rng, num_models, num_examples):
  half = rng.permuted(np.tile(np.arange(num_examples) % 2 == 0, (num_models // 2, 1)), axis=1)
  return np.stack([half, ~half], axis=1).reshape(num_models, num_examples)


@pytest.fixture(scope="module")
def scores():
  rng = np.random.default_rng(0)
  members = paired(rng, M, E)
  shadows = rng.normal(size=(M, E, V)) + 2 * rng.normal(size=(1, E, 1)) + members[..., None]
  return shadows.astype(np.float32), members


@pytest.mark.parametrize("left_out", ["target", "pair"])
def test_leave_one_out_is_a_loop_over_dedicated_targets(scores, left_out):
  shadows, members = scores
  audited = shadows + np.float32(0.3)
  options = {"attacks": protocol.ATTACKS, "labels": np.arange(E) % 2}
  result = protocol.leave_one_out(
    shadows, members, audited_scores=audited, left_out=left_out, **options
  )
  assert tuple(result) == protocol.ATTACKS
  for t in (0, 5):
    keep = ~np.isin(np.arange(M), [t] if left_out == "target" else [t, t ^ 1])
    alone = protocol.dedicated_targets(shadows[keep], members[keep], audited[t : t + 1], **options)
    for name in protocol.ATTACKS:
      if name == "class_threshold":
        continue  # its candidate thresholds are quantiles of all shadows; see test_threshold
      np.testing.assert_allclose(result[name][t], alone[name][0], rtol=1e-8, err_msg=name)


def test_without_leakage_pairs_are_unbiased_and_single_targets_are_not():
  rng = np.random.default_rng(1)
  members = paired(rng, 8, 4000)
  scores = rng.normal(size=(8, 4000, 1)).astype(np.float32)
  areas = {}
  for left_out in ("pair", "target"):
    rows = protocol.leave_one_out(scores, members, attacks=["lira_online"], left_out=left_out)
    pairs = zip(rows["lira_online"], members, strict=True)
    areas[left_out] = np.mean([roc.auc(*pair) for pair in pairs])
  assert areas["pair"] == pytest.approx(0.5, abs=0.01)  # 3.3 standard errors over 8 models
  assert areas["target"] < 0.45
  default = protocol.leave_one_out(scores, members, attacks=["lira_online"])["lira_online"]
  assert np.mean([roc.auc(*p) for p in zip(default, members, strict=True)]) == areas["pair"]


@pytest.mark.parametrize("num_models", [8, 16])
def test_fixed_counts_without_pairs_are_unbiased(num_models):
  """Row 5: each example in exactly half of the shadows, no pairs, scores that know nothing."""
  rng = np.random.default_rng(2)
  half = np.arange(num_models)[:, None] % 2 == 0
  members = rng.permuted(np.broadcast_to(half, (num_models, 4000)), axis=0)
  scores = rng.normal(size=(num_models, 4000)).astype(np.float32)
  names = ["lira_online", "lira_online_pooled", "rmia_online"]

  def area(left_out):
    rows = protocol.leave_one_out(scores, members, attacks=names, left_out=left_out)
    return [np.mean([roc.auc(*p) for p in zip(r, members, strict=True)]) for r in rows.values()]

  np.testing.assert_allclose(area(None), 0.5, atol=3.5 * 0.29 / np.sqrt(num_models * 1000))
  assert area("target")[0] < (0.45 if num_models == 8 else 0.485)


def test_left_out_shadows_follow_the_membership(scores):
  members = scores[1]
  assert protocol.left_out_shadows(members).tolist() == [[m, m ^ 1] for m in range(M)]
  shuffled = members[[0, 2, 1, 3, 4, 5, 6, 7]]
  left_out = protocol.left_out_shadows(shuffled)
  assert left_out.shape == (M, 2, E)
  np.testing.assert_array_equal(left_out[:, 0], np.broadcast_to(np.arange(M)[:, None], (M, E)))
  own, other = (np.take_along_axis(shuffled, rows, axis=0) for rows in left_out.swapaxes(0, 1))
  assert (own != other).all()
  independent = np.random.default_rng(0).random((16, 400)) < 0.5
  assert protocol.left_out_shadows(independent).tolist() == [[m] for m in range(16)]
  assert protocol.left_out_shadows(members, left_out="target").shape == (M, 1)
  with pytest.raises(ValueError, match="needs model 2k \\+ 1 trained on the complement"):
    protocol.left_out_shadows(shuffled, left_out="pair")


def test_population_reaches_rmia(scores):
  shadows, members = scores
  rng = np.random.default_rng(2)
  population = rmia.Population(*(rng.normal(size=(n, 11, V)) for n in (M, 2)))
  result = protocol.dedicated_targets(
    shadows, members, shadows[:2], attacks=["rmia_offline"], population=population
  )["rmia_offline"]
  expected = rmia.attack(shadows, members, shadows[:2], side="offline", population=population)
  np.testing.assert_array_equal(result, expected)


def test_bad_requests_are_named(scores):
  shadows, members = scores
  with pytest.raises(ValueError, match="attack 'lira' is unknown; there are lira_online,"):
    protocol.leave_one_out(shadows, members, attacks=["lira"])
  with pytest.raises(ValueError, match="labels are missing"):
    protocol.leave_one_out(shadows, members, attacks=["class_threshold"])
  with pytest.raises(ValueError, match="have fewer than 2 'in' shadows for some target"):
    protocol.leave_one_out(shadows[:4], members[:4])


def test_computing_leaves_precision_settings_alone(scores):
  protocol.leave_one_out(*scores)
  assert not jax.config.jax_enable_x64
