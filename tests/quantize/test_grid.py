"""Grids: reference values, a naive loop, invariances, safe results, errors."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.quantize import grid

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "grid.npz")
LEVELS = {"1.58": 3, "2": 4, "3": 8, "4": 16, "8": 256}


def flax_kernel(weights):
  """O, I, kh, kw -> kh, kw, I, O; or O, I -> I, O."""
  return weights.transpose(2, 3, 1, 0) if weights.ndim == 4 else weights.T


def kernel(seed=0, shape=(3, 3, 4, 6)):
  return np.random.default_rng(seed).normal(0.02, 0.1, shape).astype(np.float32)


def naive_search(channel, levels, norm):
  """The search "mse" on one channel, one factor at a time, in float64."""
  best = (np.inf, None, None)
  for i in range(80):
    low, high = (1 - i / 100) * min(channel.min(), 0), (1 - i / 100) * max(channel.max(), 0)
    scale = (high - low) / (levels - 1)
    zero = np.round(-low / scale)
    rounded = (np.clip(np.round(channel / scale) + zero, 0, levels - 1) - zero) * scale
    loss = np.mean(np.abs(rounded - channel) ** norm)
    if loss < best[0]:
      best = (loss, scale, zero)
  return best


CASES = [(origin, "asym", bits) for origin in ("obc", "brecq") for bits in LEVELS]
CASES += [("obc", "sym", bits) for bits in LEVELS if bits != "1.58"]  # its zero point is 1.5


@pytest.mark.parametrize("layer", ["conv", "dense"])
@pytest.mark.parametrize(("origin", "symmetry", "bits"), CASES)
def test_reference(layer, origin, symmetry, bits):
  weights = flax_kernel(REFERENCE[f"{layer}_w"])
  fitted = grid.fit(
    weights,
    levels=LEVELS[bits],
    symmetric=symmetry == "sym",
    include_zero=origin == "obc",
  )
  expected = {
    part: REFERENCE[f"{layer}_{origin}_b{bits}_{symmetry}_{part}"]
    for part in ("delta", "zero", "dequant")
  }
  np.testing.assert_allclose(np.ravel(fitted.scale), expected["delta"], rtol=1e-6)
  np.testing.assert_array_equal(np.ravel(fitted.zero_point), expected["zero"])
  delta, zero = (
    flax_kernel(expected[part].reshape(-1, *[1] * (weights.ndim - 1))) for part in ("delta", "zero")
  )
  dequantized = flax_kernel(expected["dequant"])
  tie = np.abs(np.abs(weights / delta) % 1 - 0.5) < 1e-5  # the ends of symmetric, even ranges
  assert tie.mean() < 0.02
  codes = np.where(tie, grid.codes(weights, fitted), np.round(dequantized / delta) + zero)
  np.testing.assert_array_equal(grid.codes(weights, fitted), codes)
  rounded = np.where(tie, dequantized, grid.nearest(weights, fitted))
  np.testing.assert_allclose(rounded, dequantized, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("levels", [3, 4, 16])
def test_search_is_the_naive_loop(levels):
  weights = kernel()
  fitted = grid.fit(weights, levels=levels, norm=2.0)
  errors = grid.error(weights, fitted, norm=2.0)
  for channel in range(weights.shape[-1]):
    loss, scale, zero = naive_search(weights[..., channel].astype(np.float64), levels, 2.0)
    np.testing.assert_allclose(fitted.scale[0, 0, 0, channel], scale, rtol=1e-5)
    assert fitted.zero_point[0, 0, 0, channel] == zero
    np.testing.assert_allclose(errors[channel], loss, rtol=1e-4)


def test_minmax_spans_the_range():
  weights = np.array([[-1.0, 0.5], [0.0, 2.0], [2.0, 1.0]], np.float32)
  fitted = grid.fit(weights, levels=4, search="minmax")
  np.testing.assert_allclose(fitted.scale, [[1.0, 2 / 3]], rtol=1e-6)
  np.testing.assert_array_equal(fitted.zero_point, [[1.0, 0.0]])
  np.testing.assert_array_equal(grid.codes(weights, fitted), [[0, 1], [1, 3], [3, 2]])


def test_search_never_loses_to_minmax():
  weights = kernel()
  searched = grid.error(weights, grid.fit(weights, levels=4))
  plain = grid.error(weights, grid.fit(weights, levels=4, search="minmax"))
  assert (searched <= plain).all()
  assert (searched < plain).any()


@pytest.mark.parametrize("levels", [3, 4, 5, 8, 16, 255, 256])
@pytest.mark.parametrize("search", ["mse", "minmax"])
def test_symmetric_grids_hold_zero_and_are_even(levels, search):
  fitted = grid.fit(kernel(), levels=levels, symmetric=True, search=search)
  table = grid.dequantize(
    np.arange(levels)[:, None, None, None, None],
    jax.tree.map(lambda part: jnp.asarray(part)[None] if jnp.ndim(part) else part, fitted),
  )
  table = np.asarray(table)[:, 0, 0, 0]
  assert (table == 0).any(axis=0).all()
  np.testing.assert_allclose(
    np.diff(table, axis=0),
    np.broadcast_to(fitted.scale[0, 0], (levels - 1, table.shape[1])),
    rtol=1e-4,
  )
  if levels % 2:
    np.testing.assert_array_equal(table, -table[::-1])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("include_zero", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
def test_codes_of_dequantized_weights_are_exact(levels, symmetric, include_zero):
  weights = kernel() + 0.7  # far from zero: large zero points without include_zero
  fitted = grid.fit(weights, levels=levels, symmetric=symmetric, include_zero=include_zero)
  codes = np.random.default_rng(1).integers(0, levels, weights.shape)
  weights = grid.dequantize(codes, fitted)
  np.testing.assert_array_equal(grid.codes(weights, fitted), codes)
  np.testing.assert_array_equal(grid.nearest(weights, fitted), weights)


def test_levels_share_one_vmap():
  weights, levels = kernel(), np.array([3, 4, 16, 256])
  together = jax.vmap(lambda count: grid.fit(weights, levels=count))(levels)
  rounded = jax.vmap(lambda one: grid.nearest(weights, one))(together)
  for i, count in enumerate(levels):
    alone = grid.fit(weights, levels=int(count))
    np.testing.assert_allclose(together.scale[i], alone.scale, rtol=1e-6)
    np.testing.assert_array_equal(together.zero_point[i], alone.zero_point)
    np.testing.assert_allclose(rounded[i], grid.nearest(weights, alone), rtol=1e-5, atol=1e-7)


def test_constants_pass_through_jit():
  weights = jnp.asarray(kernel())
  fitted = jax.jit(lambda: grid.fit(weights, levels=4))()
  np.testing.assert_array_equal(fitted.zero_point, grid.fit(weights, levels=4).zero_point)


def test_channels_are_independent():
  weights, order = kernel(), np.array([3, 1, 0, 5, 2, 4])
  fitted = grid.fit(weights, levels=4)
  permuted = grid.fit(weights[..., order], levels=4)
  np.testing.assert_allclose(permuted.scale, fitted.scale[..., order], rtol=1e-6)


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("include_zero", [False, True])
@pytest.mark.parametrize("levels", [2, 3, 4, 256])
def test_degenerate_channels_are_safe(levels, include_zero, symmetric, search):
  """Zero, constant, nearly constant, tiny and huge channels."""
  columns = [np.zeros(8), np.full(8, 0.3), np.full(8, -0.3), np.full(8, 1e-42), np.full(8, 1e30)]
  columns.append(np.linspace(0.3, 0.3 + 1e-7, 8))
  weights = np.stack(columns, axis=1).astype(np.float32)
  fitted = grid.fit(
    weights, levels=levels, include_zero=include_zero, symmetric=symmetric, search=search
  )
  rounded = np.asarray(grid.nearest(weights, fitted))
  assert (np.asarray(fitted.scale) > 0).all()
  assert np.isfinite(rounded).all()
  assert (rounded[:, 0] == 0).all()
  assert float(fitted.scale[0, 0]) == np.float32(2 / (levels - 1))  # all shrink factors tie
  if not symmetric:  # the range of a constant channel ends at the constant
    np.testing.assert_allclose(rounded[:, [1, 2, 5]], weights[:, [1, 2, 5]], rtol=0.01)


def test_half_precision_weights_fit_in_float32():
  weights = kernel().astype(jnp.bfloat16)
  fitted = grid.fit(weights, levels=4)
  assert fitted.scale.dtype == jnp.float32
  same = grid.fit(weights.astype(np.float32), levels=4)
  np.testing.assert_array_equal(fitted.scale, same.scale)


def test_one_compilation_per_shape():
  from ptq_jax.quantize.grid import _fit

  before = _fit._cache_size()
  for count in (3, 4, 16):
    grid.fit(kernel(count, (2, 2, 3, 5)), levels=count)
  assert _fit._cache_size() == before + 1


@pytest.mark.parametrize("levels", [1, 0, -3, 257, 3.5, np.array([4, 300])])
def test_bad_levels(levels):
  with pytest.raises(ValueError, match=r"levels must be a whole number from 2 to 256, got"):
    grid.check_levels(levels)


def test_bad_input():
  weights = kernel()
  with pytest.raises(ValueError, match=r"levels must be .* got 300"):
    grid.fit(weights, levels=300)
  with pytest.raises(ValueError, match='search must be "mse" or "minmax", got \'max\''):
    grid.fit(weights, levels=3, search="max")
  for bad in (np.nan, np.inf):
    weights[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
      grid.fit(weights, levels=4)


@pytest.mark.parametrize(
  ("options", "tolerance"),
  [({}, 0.1), ({"symmetric": True}, 1e-6), ({"include_zero": False}, 0.1)],
)
def test_two_levels_stand_on_both_sides(options, tolerance):
  weights = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
  fitted = grid.fit(weights, levels=2, **options)
  rounded = np.asarray(grid.nearest(weights, fitted))
  low, high = rounded.min(axis=0), rounded.max(axis=0)
  np.testing.assert_allclose(high, -low, atol=tolerance)
  np.testing.assert_allclose(high, 0.798, atol=0.05)  # of a normal distribution sqrt(2 / pi)
  assert ((rounded - weights) ** 2).mean() < 0.37  # 1 - 2 / pi


def test_two_levels_have_the_least_squared_error():
  weights = np.random.default_rng(1).exponential(size=(40, 5)).astype(np.float32)
  found = grid.error(weights, grid.fit(weights, levels=2), norm=2.0)
  for channel in range(5):
    ordered = np.sort(weights[:, channel].astype(np.float64))
    best = min(np.var(ordered[:k]) * k + np.var(ordered[k:]) * (40 - k) for k in range(1, 40)) / 40
    assert best * 0.999 < found[channel] < best * 1.02


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize(
  "values", [(0.0, 0.0), (0.25, 0.25), (-3.0, -3.0), (-1.0, 2.0), (0.5, 1.5)]
)
def test_two_values_are_exact_on_two_levels(values, search):
  weights = np.array([[values[0]], [values[1]], [values[0]]], np.float32)
  fitted = grid.fit(weights, levels=2, search=search)
  np.testing.assert_allclose(grid.nearest(weights, fitted), weights, rtol=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e-16, 1e16, 1e30])
def test_codes_do_not_depend_on_the_scale_of_the_weights(levels, factor):
  weights = np.random.default_rng(2).normal(size=(200, 4)).astype(np.float32)
  scaled = weights * np.float32(factor)
  expected = grid.codes(weights, grid.fit(weights, levels=levels))
  found = grid.codes(scaled, grid.fit(scaled, levels=levels))
  assert (np.asarray(found) != expected).mean() < 0.005  # ties may turn by the rounding of `scaled`
  two = np.float32(2.0**40)
  np.testing.assert_array_equal(
    grid.codes(weights * two, grid.fit(weights * two, levels=levels)), expected
  )


def test_without_the_search_for_two_levels_others_are_the_same():
  weights = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
  for two_levels in (True, False):
    fit = jax.jit(lambda levels, two=two_levels: grid.fit(weights, levels=levels, two_levels=two))
    for levels in (3, 16):
      found, expected = fit(levels), grid.fit(weights, levels=levels, two_levels=False)
      np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
      np.testing.assert_array_equal(found.zero_point, expected.zero_point)
  np.testing.assert_array_equal(
    grid.fit(weights, levels=2, two_levels=False).scale, grid.fit(weights, levels=2).scale
  )
