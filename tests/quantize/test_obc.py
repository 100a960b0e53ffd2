"""OBC against reference codes and plain rank-1 updates; its claims; safe results."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import grid, hessian, nearest, obc, plan
from tests import fresh

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "obc.npz")
LEVELS = {"1.58": 3, "2": 4, "3": 8, "4": 16}


def problem(rows, columns, seed=0):
  """Weights and the Hessian of correlated inputs."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns)
  inputs = np.maximum(rng.normal(size=(4 * columns, columns)) @ mixing + 0.2, 0)
  weights = rng.normal(0, 0.1, (rows, columns)).astype(np.float32)
  return weights, 2 * inputs.T @ inputs / len(inputs)


def row_grid(weights, levels):
  """Grid of a matrix [rows, D], parts [rows, 1]."""
  fitted = grid.fit(weights.T, levels=levels)
  return grid.Grid(fitted.scale.T, fitted.zero_point.T, levels)


def error(weights, quantized, matrix):
  """Half of sum dw H dw^T."""
  change = np.asarray(quantized, np.float64) - weights
  return 0.5 * np.einsum("rd,de,re->", change, matrix, change)


def rank_one_updates(weights, matrix, fitted):
  """The paper's algorithm 3 with one full rank-1 update per weight, row by row, in float64."""
  scale, zero, levels = (np.asarray(part, np.float64) for part in fitted)
  scale, zero = (np.broadcast_to(part, (len(weights), 1))[:, 0] for part in (scale, zero))
  result = weights.astype(np.float64)
  for w, s, z in zip(result, scale, zero, strict=True):
    inverse, left = np.linalg.inv(matrix), np.ones(len(w), bool)
    for _ in w:
      rounded = (np.clip(np.round(w / s) + z, 0, levels - 1) - z) * s
      squared = np.where(left, (w - rounded) ** 2, 0)
      if (squared > 0.25 * s * s).any():
        j = squared.argmax()
      else:
        j = np.where(left, squared / np.diagonal(inverse), np.inf).argmin()
      column = np.where(left, inverse[j], 0)
      w -= column * (w[j] - rounded[j]) / column[j]
      w[j], left[j] = rounded[j], False
      inverse = inverse - np.outer(column, column) / column[j]
      np.fill_diagonal(inverse, np.where(left, np.diagonal(inverse), 1))
  return result


def same_codes(found, expected, fitted):
  np.testing.assert_array_equal(grid.codes(found, fitted), grid.codes(expected, fitted))


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("layer", ["conv", "conv_s2", "dense"])
def test_reference(layer, bits):
  weights = REFERENCE[f"{layer}_w"]
  weights = weights.reshape(len(weights), -1)  # columns in the order of the reference's Hessian
  parts = (REFERENCE[f"{layer}_b{bits}_{name}"][:, None] for name in ("delta", "zero"))
  fitted = grid.Grid(*parts, np.array([[LEVELS[bits]]]))
  found = obc.quantize_matrix(weights, REFERENCE[f"{layer}_hessian"], fitted)
  expected = REFERENCE[f"{layer}_b{bits}_wq"].reshape(weights.shape)
  same_codes(found, expected, fitted)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  loss = error(weights, found, REFERENCE[f"{layer}_hessian"])
  np.testing.assert_allclose(loss, REFERENCE[f"{layer}_b{bits}_loss"], rtol=1e-4)


class OneLayer(nn.Module):
  """One convolution of stride 2, with a bias."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Conv(8, (3, 3), strides=2, padding=1, name="conv")(x)


def test_reference_through_a_model():
  """From images and a Flax kernel to the reference's codes, with our Hessian and our grid."""
  kernel = REFERENCE["conv_s2_w"].transpose(2, 3, 1, 0)
  variables = {"params": {"conv": {"kernel": kernel, "bias": np.arange(8, dtype=np.float32)}}}
  images = REFERENCE["conv_s2_x"].transpose(0, 2, 3, 1)
  quantized, (record,) = obc.quantize_params(
    jax.random.key(0), OneLayer(), variables, images, levels=4
  )
  expected = REFERENCE["conv_s2_b2_wq"].transpose(2, 3, 1, 0)
  np.testing.assert_allclose(quantized["params"]["conv"]["kernel"], expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(quantized["params"]["conv"]["bias"], np.arange(8))
  loss = REFERENCE["conv_s2_b2_loss"] / 25  # per image and pixel of the 5x5 output
  np.testing.assert_allclose(record.error_after, loss, rtol=1e-4)
  assert record.error_before > record.error_after


BLOCKS_AND_CHUNKS = [
  # rows, columns, block_size, memory_bytes
  (2, 6, 1, None),
  (6, 24, 9, None),
  (6, 24, 24, None),
  (6, 24, 100, None),
  (6, 24, None, 1),  # one row at once
  (5, 24, 9, 20_000),  # chunks of 3 and 2 rows
  (2, 29, 1, None),  # finished columns are dropped twice
  (3, 110, None, None),  # blocks of 22 columns
]


@pytest.mark.parametrize("levels", [3, 16])
@pytest.mark.parametrize(("rows", "columns", "block_size", "memory_bytes"), BLOCKS_AND_CHUNKS)
def test_blocks_and_chunks_equal_rank_one_updates(rows, columns, block_size, memory_bytes, levels):
  weights, matrix = problem(rows, columns)
  weights[0] *= np.linspace(0.2, 3, columns, dtype=np.float32)
  fitted = row_grid(weights, levels)
  fitted = fitted._replace(scale=fitted.scale * 0.6)  # many outliers
  found = obc.quantize_matrix(
    weights, matrix, fitted, block_size=block_size, memory_bytes=memory_bytes
  )
  same_codes(found, rank_one_updates(weights, matrix, fitted), fitted)


def test_float64_through_and_through():
  weights, matrix = problem(6, 24, seed=1)
  fitted = row_grid(weights, 4)
  with jax.enable_x64(True):
    wide = grid.Grid(*(np.asarray(part, np.float64) for part in fitted[:2]), 4)
    found = obc.quantize_matrix(weights.astype(np.float64), matrix, wide)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, rank_one_updates(weights, matrix, wide), rtol=1e-12)


def test_vmap_over_models_and_levels_is_a_loop():
  weights, matrices = zip(*(problem(2, 12, seed) for seed in range(2)), strict=True)
  weights, matrices = np.stack(weights), np.stack(matrices).astype(np.float32)
  levels = np.array([3, 5, 16])

  def one(weights, matrix, count):
    fitted = grid.fit(weights.T, levels=count)
    rows = grid.Grid(fitted.scale.T, fitted.zero_point.T, count)
    return obc.quantize_matrix(weights, matrix, rows)

  models = jax.vmap(one, (0, 0, None))
  together = jax.vmap(models, (None, None, 0))(jnp.asarray(weights), matrices, levels)
  assert together.shape == (3, 2, 2, 12)
  for i, count in enumerate(levels):
    for m in range(2):
      fitted = row_grid(weights[m], int(count))
      alone = obc.quantize_matrix(weights[m], matrices[m], fitted)
      same_codes(together[i, m], alone, fitted)


def test_order_of_rows_and_columns_does_not_matter():
  weights, matrix = problem(6, 24)
  fitted = row_grid(weights, 4)
  found = obc.quantize_matrix(weights, matrix, fitted)
  rng = np.random.default_rng(0)
  rows, columns = rng.permutation(6), rng.permutation(24)
  shuffled = obc.quantize_matrix(
    weights[rows][:, columns],
    matrix[columns][:, columns],
    grid.Grid(fitted.scale[rows], fitted.zero_point[rows], 4),
  )
  np.testing.assert_array_equal(shuffled, found[rows][:, columns])


def test_uncorrelated_inputs_give_nearest_rounding():
  weights, _ = problem(6, 24)
  fitted = row_grid(weights, 4)
  found = obc.quantize_matrix(weights, np.diag(np.linspace(0.1, 5, 24)), fitted)
  np.testing.assert_array_equal(found, grid.nearest(weights, fitted))


@pytest.mark.parametrize("levels", [3, 4, 16])
def test_beats_nearest_rounding(levels):
  weights, matrix = problem(6, 24)
  fitted = row_grid(weights, levels)
  found = obc.quantize_matrix(weights, matrix, fitted)
  assert error(weights, found, matrix) < 0.7 * error(weights, grid.nearest(weights, fitted), matrix)
  assert max(len(np.unique(row)) for row in np.asarray(found)) <= levels


def test_singular_hessian_with_dead_columns():
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(8, 24))
  inputs[:, [4, 11]] = 0
  weights, matrix = problem(6, 24)[0], inputs.T @ inputs
  fitted = row_grid(weights, 4)
  found = np.asarray(obc.quantize_matrix(weights, matrix, fitted))
  rounded = np.asarray(grid.nearest(weights, fitted))
  assert np.isfinite(found).all()
  np.testing.assert_array_equal(found[:, [4, 11]], rounded[:, [4, 11]])
  assert error(weights, found, matrix) < 0.3 * error(weights, rounded, matrix)


def test_float32_stays_accurate_on_badly_conditioned_inputs():
  """Neighbours nearly equal, and scales from 0.03 to 30: condition number above 1e9."""
  rng = np.random.default_rng(0)
  distance = np.subtract.outer(np.arange(64), np.arange(64))
  matrix = np.exp(-0.5 * (distance / 3) ** 2) + 2e-4 * np.eye(64)
  scales = rng.permutation(np.logspace(-1.5, 1.5, 64))
  matrix = matrix * np.outer(scales, scales)
  assert np.linalg.cond(matrix) > 1e9
  assert float(hessian.inverse(matrix).damping) == 0
  weights = rng.normal(0, 0.1, (4, 64)).astype(np.float32)
  fitted = row_grid(weights, 4)
  expected = error(weights, rank_one_updates(weights, matrix, fitted), matrix)
  found = error(weights, obc.quantize_matrix(weights, matrix, fitted), matrix)
  assert found < 1.05 * expected < 0.9 * error(weights, grid.nearest(weights, fitted), matrix)


def test_one_compilation_for_all_levels():
  weights, matrix = problem(3, 17)
  before = obc._quantize_rows._cache_size()
  for levels in (2, 3, 4, 256):
    obc.quantize_matrix(weights, matrix, row_grid(weights, levels))
  assert obc._quantize_rows._cache_size() == before + 1


def test_bad_matrices():
  weights, matrix = problem(3, 6)
  fitted = row_grid(weights, 4)
  with pytest.raises(ValueError, match=r"hessian must be \[6, 6\]"):
    obc.quantize_matrix(weights, matrix[:5, :5], fitted)
  with pytest.raises(ValueError, match="entries of the hessian hold NaN"):
    obc.quantize_matrix(weights, matrix * np.nan, fitted)
  with pytest.raises(ValueError, match="weights hold NaN"):
    obc.quantize_matrix(weights + np.inf, matrix, fitted)
  with pytest.raises(ValueError, match="levels must be"):
    obc.quantize_matrix(weights, matrix, fitted._replace(levels=1))


def test_memory_is_halved_when_it_runs_out(monkeypatch):
  asked = []

  def cramped(*args, memory_bytes, **kwargs):
    asked.append(memory_bytes)
    if memory_bytes > 2**22:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return quantize_rows(*args, memory_bytes=memory_bytes, **kwargs)

  quantize_rows = obc.quantize_rows
  monkeypatch.setattr(obc, "quantize_rows", cramped)
  kernel = REFERENCE["conv_s2_w"].transpose(2, 3, 1, 0)
  images = REFERENCE["conv_s2_x"].transpose(0, 2, 3, 1)
  variables = {"params": {"conv": {"kernel": kernel, "bias": np.zeros(8, np.float32)}}}
  with pytest.warns(UserWarning, match="out of memory in OBC; going on"):
    obc.quantize_params(
      jax.random.key(0), OneLayer(), variables, images, levels=4, memory_bytes=2**24
    )
  assert asked == [2**24, 2**23, 2**22]


class Small(nn.Module):
  """A convolution, batch normalisation, and a classifier."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3), strides=2, use_bias=False, name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
    return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def stacked():
  """Two small networks, their images, and three plans."""
  model, rng = Small(), np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 40, 6, 6, 1)).cumsum(2).cumsum(3), jnp.float32)
  variables = fresh.stacked(model, images[0], num_models=len(images))
  layers = units.layers(model, trees.take(variables, 0), images[0])
  plans = [
    plan.make(layers, levels=3, last_layer_levels=256),
    plan.make(layers, levels=16, last_layer_levels="full"),
    plan.make(layers, levels=None),
  ]
  return model, variables, images, plans


KEYS = jax.random.split(jax.random.key(1), 2)


@pytest.fixture(scope="module")
def everything(stacked):
  """All models under all plans."""
  model, variables, images, plans = stacked
  return obc.quantize_stacked(KEYS, model, variables, images, plans=plans)


def test_models_and_plans_at_once_are_one_by_one(stacked, everything):
  (model, variables, images, plans), (together, records) = stacked, everything
  assert [record.name for record in records] == list(plans[0])
  for p, m in ((0, 0), (0, 1), (1, 1), (2, 0)):
    alone, infos = obc.quantize_params(
      KEYS[m], model, trees.take(variables, m), images[m], levels=plans[p]
    )
    for path, leaf in trees.flatten(alone).items():
      np.testing.assert_allclose(
        trees.get(together, path)[p, m], leaf, rtol=1e-4, atol=1e-5, err_msg=path
      )
    for record, info in zip(records, infos, strict=True):
      np.testing.assert_allclose(record.error_after[p, m], info.error_after, rtol=1e-3)


class Grouped(nn.Module):
  """A dilated convolution in three groups."""

  @nn.compact
  def __call__(self, x, train=False):
    options = {"feature_group_count": 3, "kernel_dilation": 2, "padding": "VALID"}
    return nn.Conv(6, (2, 2), name="conv", **options)(x)


def test_groups_are_quantized_apart(key):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(20, 6, 6, 6)).cumsum(1).cumsum(2), jnp.float32)
  variables = fresh.variables(Grouped(), images)
  quantized, _ = obc.quantize_params(key, Grouped(), variables, images, levels=4)
  hessians = hessian.from_inputs(
    images,
    kernel_shape=(2, 2, 2, 6),
    padding="VALID",
    kernel_dilation=2,
    feature_group_count=3,
  )
  found, original = (
    np.asarray(tree["params"]["conv"]["kernel"]) for tree in (quantized, variables)
  )
  for group, matrix in enumerate(hessians):
    outputs = slice(2 * group, 2 * group + 2)
    rows = original[..., outputs].reshape(8, 2).T
    expected = obc.quantize_matrix(rows, matrix, row_grid(rows, 4))
    np.testing.assert_allclose(found[..., outputs].reshape(8, 2).T, expected, rtol=1e-5, atol=1e-7)


def test_records_and_full_precision_layers(stacked, everything):
  (model, variables, images, plans), (quantized, records) = stacked, everything
  _, rounded = nearest.quantize_stacked(KEYS, model, variables, images, plans=plans)
  for record, other in zip(records, rounded, strict=True):
    assert (record.error_after <= record.error_before).all()
    np.testing.assert_allclose(record.error_before, other.error_after, rtol=1e-5)
    assert (record.seconds > 0).all()
  conv, head = records
  assert (conv.error_after[:2] < 0.9 * conv.error_before[:2]).all()
  assert (head.error_after[1:] == 0).all()
  for record in records:
    path = f"params/{record.name}/kernel"
    fitted = record.grids[record.name]
    for p, levels in enumerate(chosen[record.name] for chosen in plans):
      found, original = trees.get(quantized, path)[p], trees.get(variables, path)
      assert (fitted.levels[p] == (levels or 0)).all()
      if levels is None:
        np.testing.assert_array_equal(found, original)
      else:
        one = grid.Grid(fitted.scale[p], fitted.zero_point[p], levels)
        np.testing.assert_array_equal(grid.nearest(found, one), found)


def test_batchnorm_is_estimated_only_where_weights_changed(stacked, everything):
  (model, variables, images, plans), (changed, _) = stacked, everything
  options = {"model": model, "variables": variables, "images": images, "plans": plans}
  moved = {"batchnorm_images": np.asarray(images[:, :10]) + 1}
  kept, _ = obc.quantize_stacked(KEYS, **options, batchnorm="none")
  others, _ = obc.quantize_stacked(KEYS, **options, **moved)
  as_all, _ = obc.quantize_stacked(KEYS, **options, **moved, batchnorm="all")
  jax.tree.map(np.testing.assert_array_equal, as_all, others)
  old = variables["batch_stats"]["bn"]["mean"]
  none, default, given = (
    np.asarray(tree["batch_stats"]["bn"]["mean"]) for tree in (kept, changed, others)
  )
  np.testing.assert_array_equal(none, np.stack([old] * 3))
  for mean in (default, given):
    assert (np.abs(mean[:2] - none[:2]) > 1e-5).all()
    np.testing.assert_array_equal(mean[2], old)
  assert (np.abs(default[:2] - given[:2]) > 1e-5).all()


def test_bad_options(stacked):
  model, variables, images, plans = stacked
  options = {"model": model, "variables": variables, "images": images, "plans": plans}
  with pytest.raises(ValueError, match='batchnorm must be "members", "all" or "none"'):
    obc.quantize_stacked(KEYS, **options, batchnorm="some")
  with pytest.raises(ValueError, match='batchnorm="all" needs batchnorm_images'):
    obc.quantize_stacked(KEYS, **options, batchnorm="all")
  with pytest.raises(ValueError, match=r"batchnorm_images must be \[2, n >= 1"):
    obc.quantize_stacked(KEYS, **options, batchnorm_images=images[:, :0])
  with pytest.raises(ValueError, match="calibration set is empty"):
    obc.quantize_stacked(KEYS, model, variables, images[:, :0], plans=plans)
  with pytest.raises(ValueError, match="levels must be"):
    obc.quantize_stacked(KEYS, model, variables, images, plans=[dict.fromkeys(plans[0], 1)])
