"""LiRA against loops and closed forms; what must not change it; degenerate and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ptq_jax.attack import lira
from ptq_jax.metrics import roc
from tests.attack import naive

VARIANTS = [
  lira.Variant("online", "per_example"),
  lira.Variant("online", "pooled"),
  lira.Variant("online", "reference"),
  lira.Variant("online", "per_example", center="mean"),
  lira.Variant("offline", "per_example", "cdf"),
  lira.Variant("offline", "per_example", "density"),
  lira.Variant("offline", "pooled", "cdf"),
  lira.Variant("offline", "reference", "density", "mean"),
  lira.Variant("online", "shrunk"),
  lira.Variant("offline", "shrunk", "cdf"),
]
M, E, V = 9, 41, 2


@pytest.fixture(scope="module")
def scores():
  """Uneven membership and many equal scores, so that medians meet odd, even and tied groups."""
  rng = np.random.default_rng(3)
  members = rng.random((M, E)) < 0.5
  members[:4] = [[True], [True], [False], [False]]
  members[4:8, 0] = True
  shadows = 3 * rng.normal(size=(1, E, 1)) + rng.normal(size=(M, E, V)) + members[..., None]
  return np.round(shadows, 1).astype(np.float32), members


def without(scores, members, shadows):
  keep = np.setdiff1d(np.arange(len(members)), shadows)
  return scores[keep], members[keep]


def test_all_variants_match_loops(scores):
  shadows, members = scores
  targets = shadows[:2] + np.float32(0.25)
  result = lira.attack(shadows, members, targets, variants=VARIANTS, block_size=16)
  assert result.shape == (len(VARIANTS), 2, E)
  assert result.dtype == np.float64
  for i, variant in enumerate(VARIANTS):
    for t, target in enumerate(targets):
      expected = naive.lira(shadows, members, target, variant)
      np.testing.assert_allclose(result[i, t], expected, rtol=1e-8, err_msg=str(variant))


def test_leaving_one_out_is_attacking_without_it(scores):
  shadows, members = scores
  members = members[4:]  # at least two on each side must remain
  members = np.concatenate([scores[1][:4], scores[1][:4], members])
  shadows = np.concatenate([shadows[:4] - 1, shadows])
  left_out = np.arange(4)[:, None] + 2
  result = lira.attack(
    shadows, members, shadows[2:6], variants=VARIANTS, left_out=left_out, block_size=16
  )
  for t in range(4):
    rest = without(shadows, members, left_out[t])
    for i, variant in enumerate(VARIANTS):
      expected = naive.lira(*rest, shadows[2 + t], variant)
      np.testing.assert_allclose(
        result[i, t], expected, rtol=1e-8, atol=1e-10, err_msg=str(variant)
      )


def test_leaving_a_pair_out_is_attacking_without_it():
  rng = np.random.default_rng(5)
  half = rng.random((4, 12)) < 0.5
  half[:2] = [[True], [False]]
  members = np.stack([half, ~half], axis=1).reshape(8, 12)
  shadows = np.round(rng.normal(size=(8, 12, 1)), 1).astype(np.float32)
  left_out = np.stack([np.arange(8), np.arange(8) ^ 1], axis=1)
  result = lira.attack(shadows, members, shadows, variants=VARIANTS, left_out=left_out)
  for t in range(8):
    rest = without(shadows, members, left_out[t])
    for i, variant in enumerate(VARIANTS):
      expected = naive.lira(*rest, shadows[t], variant)
      np.testing.assert_allclose(
        result[i, t], expected, rtol=1e-8, atol=1e-10, err_msg=str(variant)
      )


def test_leaving_out_an_outlier_keeps_the_digits():
  """The squares that remain are 1e-10 of those before; and exactly zero stays exactly zero."""
  rng = np.random.default_rng(0)
  shadows = rng.normal(size=(12, 5, 1)) * 1e-3
  shadows[0] = 100.0
  shadows[1:6, 0] = 7.0  # all that remain "in" of example 0 agree
  members = np.broadcast_to(np.arange(12)[:, None] < 6, (12, 5)).copy()
  target = shadows[:1] + 1e-3
  result = lira.attack(shadows, members, target, left_out=np.array([[0]]))[0, 0]
  expected = naive.lira(shadows[1:], members[1:], target[0], VARIANTS[0])
  np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("num", [1, 3, 8, 13])
def test_network_sorts(num):
  values = np.random.default_rng(num).integers(0, 9, size=(num, 3, 2)).astype(np.float32)
  np.testing.assert_array_equal(jax.jit(lira._sort)(values)[:num], np.sort(values, axis=0))


def test_order_blocks_and_memory_maps_do_not_matter(scores, tmp_path):
  shadows, members = scores
  target = shadows[0]
  whole = lira.online(shadows, members, target, variance="pooled")
  models, examples = (
    np.random.default_rng(0).permutation(M),
    np.random.default_rng(1).permutation(E),
  )
  shuffled = lira.online(
    shadows[models][:, examples], members[models][:, examples], target[examples], variance="pooled"
  )
  np.testing.assert_allclose(shuffled, whole[examples], rtol=1e-11)
  np.save(tmp_path / "scores.npy", shadows)
  mapped = np.load(tmp_path / "scores.npy", mmap_mode="r")
  for size in (7, E, 1000):
    blocked = lira.online(mapped, members, target, variance="pooled", block_size=size)
    np.testing.assert_allclose(blocked, whole, rtol=1e-11)
  lists = [array.tolist() for array in (shadows, members, target)]
  np.testing.assert_allclose(lira.online(*lists, variance="pooled"), whole, rtol=1e-11)


def test_shifting_and_scaling_examples_does_not_matter(scores):
  """Each example is judged by its own shadows: units and offsets of its score are free."""
  shadows, members = scores
  rng = np.random.default_rng(0)
  scale, offset = rng.uniform(0.5, 4, size=(E, 1)), rng.normal(size=(E, 1))
  moved = shadows * scale[None] + offset[None]
  plain = lira.online(shadows, members, shadows[1])
  np.testing.assert_allclose(lira.online(moved, members, moved[1]), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("variance", "power"), [("per_example", 0.97), ("pooled", 0.99)])
def test_known_gaussians_meet_the_analytic_rates(variance, power):
  """Scores N(m_e + d * member, 1): the best attack has AUC Phi(d / sqrt 2) whatever the m_e."""
  rng = np.random.default_rng(0)
  num_models, num_examples, gap = 64, 20_000, 1.5
  members = np.arange(num_models)[:, None] % 2 == rng.integers(0, 2, size=(1, num_examples))
  center = 5 * rng.normal(size=(1, num_examples, 1))
  shadows = center + rng.normal(size=(num_models, num_examples, 1)) + gap * members[..., None]
  inside = rng.random(num_examples) < 0.5
  target = center[0] + rng.normal(size=(num_examples, 1)) + gap * inside[:, None]
  result = lira.online(
    shadows.astype(np.float32), members, target.astype(np.float32), variance=variance
  )
  best = stats.norm.cdf(gap / np.sqrt(2))
  error = np.sqrt(best * (1 - best) / (num_examples / 2))
  area = roc.auc(result, inside)
  assert power * best < area < best + 3 * error
  best_rate = stats.norm.sf(stats.norm.isf(0.01) - gap)
  rate = roc.tpr_at_fpr(result, inside, fpr=0.01)
  slack = 4 * np.sqrt(best_rate / (num_examples / 2) + best_rate**2 / (0.01 * num_examples / 2))
  assert rate < best_rate + slack
  assert rate > 0.8 * best_rate - slack


def test_tail_does_not_saturate():
  """The CDF is 1 for both of these in float64; their order is kept."""
  shadows = np.linspace(-1, 1, 8)[:, None, None] * np.ones((8, 2, 1))
  members = np.arange(8)[:, None] < np.array([[2, 2]])
  far = lira.offline(shadows, members, np.array([[20.0], [30.0]]))
  assert np.isfinite(far).all()
  assert far[1] > far[0] > 37


def test_shadows_that_agree_call_for_the_nearer_side():
  shadows = np.array([1.1] * 3 + [0.1] * 3)[:, None, None] * np.ones((6, 2, 1))  # 3 * 0.1 != 0.3
  members = np.array([True] * 3 + [False] * 3)[:, None] & np.ones((6, 2), bool)
  result = lira.online(shadows, members, np.array([[0.9], [0.2]]))
  assert np.isfinite(result).all()
  assert result[0] > 1e50
  assert result[1] < -1e50


def test_one_shadow_suffices_only_with_a_shared_variance(scores):
  shadows, members = scores
  few = members.copy()
  few[:, 17] = np.arange(M) == 4  # one "in"
  with pytest.raises(ValueError, match=r"1 examples, the first number 17, have fewer than 2 'in'"):
    lira.online(shadows, few, shadows[0])
  assert np.isfinite(lira.online(shadows, few, shadows[0], variance="pooled")).all()
  assert np.isfinite(lira.offline(shadows, few, shadows[0])).all()
  targets, left_out = shadows[[4, 0]], np.array([[4], [0]])
  with pytest.raises(ValueError, match="fewer than 1 'in' shadows for some target"):
    lira.attack(
      shadows, few, targets, variants=[lira.Variant("online", "pooled")], left_out=left_out
    )
  few[:, 17] = True  # no "out" at all
  with pytest.raises(ValueError, match="fewer than 1 'out' shadows"):
    lira.offline(shadows, few, shadows[0], variance="pooled")


def test_bad_input_is_named(scores):
  shadows, members = scores
  for bad in (np.nan, np.inf):
    broken = shadows.copy()
    broken[2, 40] = bad
    with pytest.raises(ValueError, match="shadow scores are NaN or infinite"):
      lira.online(broken, members, shadows[0])
    with pytest.raises(
      ValueError, match="target scores are NaN or infinite among examples 32 to 40"
    ):
      lira.online(shadows, members, broken[2], block_size=16)
  wrong = (ValueError, TypeError)  # checked annotations refuse first where they are on
  with pytest.raises(wrong, match="variance"):
    lira.online(shadows, members, shadows[0], variance="fixed")
  with pytest.raises(wrong, match="tail"):
    lira.offline(shadows, members, shadows[0], tail="upper")
  with pytest.raises(ValueError, match="block_size is 0"):
    lira.online(shadows, members, shadows[0], block_size=0)
  with pytest.raises(wrong):
    lira.online(shadows, members[:-1], shadows[0])
  for left_out, message in (
    (np.array([[M]]), "outside"),
    (np.array([[0], [1]]), "must be|left_out"),
    (np.array([[0, 1]]), "complementary"),
  ):
    with pytest.raises(wrong, match=message):
      lira.attack(shadows, members, shadows[:1], left_out=left_out)


@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (1, 5, 7, 8)], ids=str)
def test_on_device_jit_is_eager_is_the_loop(scores, variant):
  """Row 13: traced, eager and float64 on the host are one attack; vmap over targets is a loop."""
  shadows, members = scores
  targets = shadows[:3] + np.float32(0.25)
  options = {"variance": variant.variance, "center": variant.center}
  if variant.side == "offline":
    options["tail"] = variant.tail
  function = functools.partial(getattr(lira, variant.side), **options)
  on_device = [jnp.asarray(array) for array in (shadows, members, targets)]
  eager = [function(*on_device[:2], target) for target in on_device[2]]
  assert all(isinstance(row, jax.Array) and row.dtype == jnp.float32 for row in eager)
  jitted = jax.jit(function)(*on_device[:2], on_device[2][0])
  np.testing.assert_allclose(jitted, eager[0], rtol=1e-6, atol=1e-6)
  mapped = jax.jit(jax.vmap(function, in_axes=(None, None, 0)))(*on_device)
  np.testing.assert_allclose(mapped, eager, rtol=1e-5, atol=1e-5)
  expected = [naive.lira(shadows, members, target, variant) for target in targets]
  np.testing.assert_allclose(eager, expected, rtol=2e-4, atol=2e-4)
  with jax.enable_x64(True):
    wide = jax.jit(function)(
      jnp.asarray(shadows, jnp.float64), members, jnp.asarray(targets[0], jnp.float64)
    )
    assert wide.dtype == jnp.float64
    np.testing.assert_allclose(wide, expected[0], rtol=1e-8)


def test_gradient_with_respect_to_the_target(scores):
  shadows, members = (jnp.asarray(array) for array in scores)
  target = shadows[1] + 0.25
  slope = jax.jit(jax.grad(lambda t: lira.online(shadows, members, t).sum()))(target)
  with jax.enable_x64(True):
    wide = [np.asarray(array, np.float64) for array in (shadows, target)]
    step = 1e-5
    for e, v in ((0, 0), (7, 1)):
      moved = [wide[1].copy(), wide[1].copy()]
      moved[0][e, v] += step
      moved[1][e, v] -= step
      up, down = (lira.online(wide[0], np.asarray(members), t)[e] for t in moved)
      np.testing.assert_allclose(slope[e, v], (up - down) / (2 * step), rtol=1e-3)
  shadow_slope = jax.grad(lambda s: lira.online(s, members, target, variance="shrunk").sum())
  assert np.isfinite(jax.jit(shadow_slope)(shadows)).all()


def test_what_is_an_error_is_nan_inside_jit(scores):
  shadows, members = scores
  few = members.copy()
  few[:, 17] = np.arange(M) == 4
  device = [jnp.asarray(array) for array in (shadows, few, shadows[0])]
  with pytest.raises(ValueError, match=r"1 examples, the first number 17, have fewer than 2 'in'"):
    lira.online(*device)
  traced = np.asarray(jax.jit(lira.online)(*device))
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(traced)), [17])
  broken = device[2].at[3].set(jnp.nan)
  with pytest.raises(ValueError, match="target scores are NaN or infinite"):
    lira.online(device[0], jnp.asarray(members), broken)
  traced = np.asarray(jax.jit(lira.online)(device[0], jnp.asarray(members), broken))
  np.testing.assert_array_equal(np.flatnonzero(np.isnan(traced)), [3])
  with pytest.raises(ValueError, match="must be bool"):
    jax.jit(lira.online)(device[0], jnp.asarray(members, jnp.int32), device[2])


def test_core_composes(scores):
  """`normals` and `log_ratio` by hand are `online`."""
  shadows, members = (jnp.asarray(array) for array in scores)

  @jax.jit
  def by_hand(shadows, members, target):
    inside, outside = lira.normals(shadows, members)
    pooled = tuple(lira.spread(side, num_models=M).pooled for side in (inside, outside))
    ratios = (lira.log_ratio(target, inside, outside, *each) for each in ((), (pooled,)))
    return [ratio.mean(axis=-1) for ratio in ratios]

  plain, ratio = by_hand(shadows, members, shadows[1])
  np.testing.assert_allclose(plain, lira.online(shadows, members, shadows[1]), rtol=1e-5)
  expected = lira.online(shadows, members, shadows[1], variance="pooled")
  np.testing.assert_allclose(ratio, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["pooled", "shrunk"])
@pytest.mark.parametrize("side", [lira.online, lira.offline])
def test_no_degree_of_freedom_is_refused(side, variance):
  """Row 7: one shadow a side has no variance, and no score of 1e60."""
  shadows, members = np.random.default_rng(0).normal(size=(2, 5, 1)), np.array([[True] * 5] * 2)
  members[1] = False
  with pytest.raises(ValueError, match="fewer than one degree of freedom"):
    side(shadows, members, shadows[0], variance=variance)
  device = [jnp.asarray(array, jnp.float32) for array in (shadows, shadows[0])]
  with pytest.raises(ValueError, match="fewer than one degree of freedom"):
    side(device[0], members, device[1], variance=variance)
  traced = jax.jit(functools.partial(side, variance=variance))
  assert np.isnan(traced(device[0], jnp.asarray(members), device[1])).all()


def test_shrinking_lies_between_per_example_and_pooled():
  """True variances alike: the prior knows all; far apart: it knows little; and it attacks best."""
  rng = np.random.default_rng(0)
  members = np.arange(16)[:, None] % 2 == rng.integers(0, 2, size=(1, 4000))
  areas = {}
  freedoms = jax.jit(
    lambda *given: [lira.spread(side, num_models=16).freedom for side in lira.normals(*given)]
  )
  for scale in ("alike", "apart"):
    deviation = 1.0 if scale == "alike" else np.exp(rng.normal(size=(1, 4000, 1)))
    draw = deviation * rng.normal(size=(17, 4000, 1))
    shadows = draw[:16] + 1.5 * deviation * members[..., None]
    inside = rng.random(4000) < 0.5
    target = draw[16] + (1.5 * deviation * inside[None, :, None])[0]
    freedom = freedoms(np.asarray(shadows, np.float32), members)
    assert min(freedom) > 40 if scale == "alike" else max(freedom) < 5
    areas[scale] = {
      name: roc.auc(lira.online(shadows, members, target, variance=name), inside)
      for name in ("per_example", "pooled", "shrunk")
    }
  assert areas["alike"]["shrunk"] == pytest.approx(areas["alike"]["pooled"], abs=0.003)
  assert areas["alike"]["shrunk"] > areas["alike"]["per_example"] + 0.01
  assert areas["apart"]["shrunk"] > areas["apart"]["pooled"] + 0.005
  assert areas["apart"]["shrunk"] > areas["apart"]["per_example"]


def test_one_view_may_be_left_away(scores):
  """Row 17: scores [M, E] and a target [E] are of one view."""
  shadows, members = scores
  plain = lira.online(shadows[..., :1], members, shadows[0, :, :1])
  np.testing.assert_array_equal(lira.online(shadows[..., 0], members, shadows[0, :, 0]), plain)
  device = [jnp.asarray(array) for array in (shadows[..., 0], members, shadows[0, :, 0])]
  np.testing.assert_allclose(lira.online(*device), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, np.nan, 2])
def test_members_are_flags(scores, wrong):
  """Row 11: -1, NaN and text are not membership; 0 and 1 are."""
  shadows, members = scores
  plain = lira.online(shadows, members, shadows[0])
  np.testing.assert_array_equal(lira.online(shadows, members.astype(int), shadows[0]), plain)
  other = np.where(members, 1.0, wrong)
  with pytest.raises(ValueError, match="shadow_members hold"):
    lira.online(shadows, other, shadows[0])
  with pytest.raises(ValueError, match="must be bool"):
    lira.online(shadows, np.where(members, "True", "False"), shadows[0])


def test_left_out_may_differ_by_example(scores):
  """One shadow of each side per example is left away: the loop over examples agrees."""
  shadows, members = scores
  members = members.copy()
  members[:8] = [[True]] * 4 + [[False]] * 4
  rng = np.random.default_rng(0)
  left_out = np.stack([rng.integers(0, 4, size=(2, E)), rng.integers(4, 8, size=(2, E))], axis=1)
  rows = lira.attack(
    shadows, members, shadows[:2], variants=VARIANTS[:1], left_out=left_out, block_size=16
  )[0]
  for t in range(2):
    for e in (0, 15, 16, E - 1):
      keep = np.setdiff1d(np.arange(M), left_out[t, :, e])
      one = slice(e, e + 1)
      expected = naive.lira(shadows[keep, one], members[keep, one], shadows[t, one], VARIANTS[0])
      np.testing.assert_allclose(rows[t, e], expected[0], rtol=1e-8)


def test_all_blocks_share_one_compilation(scores):
  shadows, members = scores
  before = lira._normals._cache_size()
  for examples in (E, E - 5):
    lira.online(
      shadows[:, :examples, :1], members[:, :examples], shadows[0, :examples, :1], block_size=8
    )
  assert lira._normals._cache_size() == before + 1
  assert not jax.config.jax_enable_x64
