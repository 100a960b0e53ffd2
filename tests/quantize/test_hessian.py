"""Hessians against reference values and a naive loop; inverses of singular ones."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import capture, hessian
from ptq_jax.quantize.layer import kernel_matrix
from tests import fresh

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "obc.npz")


def reference(layer):
  """Inputs and Hessian in Flax order: the reference has D = I * kh * kw."""
  inputs, matrix = REFERENCE[f"{layer}_x"], REFERENCE[f"{layer}_hessian"]
  if inputs.ndim == 2:
    return inputs, matrix
  depth = inputs.shape[1]
  split = matrix.reshape(depth, 9, depth, 9).transpose(1, 0, 3, 2)
  return inputs.transpose(0, 2, 3, 1), split.reshape(matrix.shape)


def naive(inputs, window, strides, pads, dilation, groups):
  """2/n sum x x^T, patch by patch, [groups, D, D] in float64."""
  inputs = np.pad(inputs.astype(np.float64), [(0, 0), *pads, (0, 0)])
  extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
  patches = [
    image[
      tuple(
        slice(start, start + size, step)
        for start, size, step in zip((top, left), extent, dilation, strict=True)
      )
    ]
    for image in inputs
    for top in range(0, image.shape[0] - extent[0] + 1, strides[0])
    for left in range(0, image.shape[1] - extent[1] + 1, strides[1])
  ]
  rows = [
    np.stack([patch[..., part].ravel() for patch in patches])
    for part in np.split(np.arange(inputs.shape[-1]), groups)
  ]
  return 2 / len(inputs) * np.stack([row.T @ row for row in rows])


@pytest.mark.parametrize(("layer", "strides"), [("conv", 1), ("conv_s2", 2), ("dense", 1)])
def test_reference(layer, strides):
  inputs, expected = reference(layer)
  shape = (3, 3, inputs.shape[-1], 7) if inputs.ndim == 4 else (inputs.shape[-1], 7)
  found = hessian.from_inputs(inputs, kernel_shape=shape, strides=strides, padding=1)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.max())


CASES = [
  # window, strides, padding, pads, dilation, groups
  ((3, 2), (1, 2), "SAME", ((1, 1), (0, 0)), (1, 1), 1),
  ((3, 3), (2, 2), "VALID", ((0, 0), (0, 0)), (1, 1), 1),
  ((2, 3), (1, 1), (0, 2), ((0, 0), (2, 2)), (2, 1), 1),
  ((3, 3), (1, 1), ((2, 0), (1, 1)), ((2, 0), (1, 1)), (1, 1), 2),
  ((1, 1), (2, 1), 0, ((0, 0), (0, 0)), (1, 1), 4),
]


@pytest.mark.parametrize(("window", "strides", "padding", "pads", "dilation", "groups"), CASES)
def test_naive_loop(window, strides, padding, pads, dilation, groups):
  inputs = np.random.default_rng(0).normal(size=(5, 7, 6, 4)).astype(np.float32)
  found = hessian.from_inputs(
    inputs,
    kernel_shape=(*window, 4 // groups, 8),
    strides=strides,
    padding=padding,
    kernel_dilation=dilation,
    feature_group_count=groups,
  )
  expected = naive(inputs, window, strides, pads, dilation, groups)
  assert found.ndim == (3 if groups > 1 else 2)
  np.testing.assert_allclose(np.reshape(found, expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_dense_on_sequences_sums_over_positions():
  inputs = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
  found = hessian.from_inputs(inputs, kernel_shape=(5, 3))
  rows = inputs.reshape(-1, 5)
  np.testing.assert_allclose(found, 2 / 4 * rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_batches_do_not_matter_and_vmap_is_a_loop():
  inputs = np.random.default_rng(0).normal(size=(2, 7, 5, 5, 2)).astype(np.float32)

  def of(memory_bytes, one):
    return hessian.from_inputs(one, kernel_shape=(3, 3, 2, 1), memory_bytes=memory_bytes)

  small = of(3 * 25 * 18 * 4, inputs[1])  # 3 images at once: batches of 3, 3, and 1
  near = {"rtol": 1e-5, "atol": 1e-5}
  np.testing.assert_allclose(small, of(2**20, inputs[1]), **near)
  stacked = jax.vmap(lambda one: of(2**20, one))(jnp.asarray(inputs))
  np.testing.assert_allclose(stacked[1], small, **near)


def test_sums_in_float64():
  """2^24 + 1 is not a float32: a long float32 sum would lose every 1 after the first term."""
  inputs = np.ones((65, 1), np.float32)
  inputs[0] = 2.0**12
  found = hessian.from_inputs(inputs, kernel_shape=(1, 1), memory_bytes=4)
  assert float(found[0, 0]) == np.float32(2 / 65 * (2.0**24 + 64))


class Net(nn.Module):
  """A strided and a grouped convolution and a classifier."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="first")(x))
    x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=2, name="second")(x))
    return nn.Dense(3, name="last")(x.mean((1, 2)))


def test_layers_of_stacked_models():
  model, images = Net(), jax.random.normal(jax.random.key(0), (2, 5, 6, 6, 2))
  variables = fresh.stacked(model, images[0], num_models=len(images))
  layers = units.layers(model, trees.take(variables, 0), images[0])
  sizes = [np.prod(layer.kernel_shape[:-1]) ** 2 * layer.feature_group_count for layer in layers]
  budget = 2 * 8 * (sizes[0] + sizes[1])  # the third layer needs another forward pass
  found = dict(hessian.of_layers(model, variables, images, layers, memory_bytes=int(budget)))
  assert [layer.path for layer in found] == ["first", "second", "last"]
  calls = jax.jit(lambda one, x: capture.calls(model, one, x, list(found)))
  for m in range(2):
    called = calls(trees.take(variables, m), images[m])
    for layer in layers:
      expected = hessian.from_inputs(
        called[layer.path][0].inputs,
        kernel_shape=layer.kernel_shape,
        strides=layer.strides,
        padding=layer.padding,
        feature_group_count=layer.feature_group_count,
      )
      shape = found[layer][m].shape
      np.testing.assert_allclose(found[layer][m], expected.reshape(shape), rtol=1e-5, atol=1e-6)


def test_output_error_is_the_distance_of_outputs():
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(5, 6, 6, 2)).astype(np.float32)
  kernels = rng.normal(size=(2, 3, 3, 2, 4)).astype(np.float32)

  class One(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Conv(4, (3, 3), use_bias=False, padding="VALID", name="conv")(x)

  first, second = ({"params": {"conv": {"kernel": kernel}}} for kernel in kernels)
  outputs = One().apply(first, inputs) - One().apply(second, inputs)
  expected = jnp.square(outputs).sum(-1).mean()
  (layer,) = units.layers(One(), first, inputs)
  matrix = hessian.from_inputs(inputs, kernel_shape=(3, 3, 2, 4), padding="VALID")[None]
  change = kernel_matrix(kernels[0] - kernels[1], layer)
  np.testing.assert_allclose(hessian.output_error(change, matrix, layer), expected, rtol=1e-4)


def test_inverse_of_a_regular_hessian_is_not_damped():
  _, matrix = reference("dense")
  found = hessian.inverse(matrix)
  assert float(found.damping) == 0
  np.testing.assert_allclose(found.matrix, np.linalg.inv(matrix), rtol=1e-4, atol=1e-6)


def test_damping_scales_the_diagonal():
  _, matrix = reference("dense")
  found = hessian.inverse(matrix, damping=0.1)
  expected = np.linalg.inv(matrix + 0.1 * np.diag(np.diagonal(matrix)))
  np.testing.assert_allclose(found.matrix, expected, rtol=1e-4, atol=1e-6)
  assert float(found.damping) == pytest.approx(0.1)


def test_singular_and_dead():
  """Rank 4 of 12, of which two columns are dead and two are equal up to a factor 1000."""
  rows = np.random.default_rng(0).normal(size=(4, 12))
  rows[:, 3] = rows[:, 7] = 0
  rows[:, 5] = 1000 * rows[:, 2]
  matrix = rows.T @ rows
  found = hessian.inverse(matrix)
  assert float(found.damping) == pytest.approx(1e-4)
  diagonal = np.diagonal(matrix).copy()
  diagonal[[3, 7]] = diagonal[diagonal > 0].mean()
  damped = matrix + np.diag(diagonal) * 1e-4
  damped[[3, 7], [3, 7]] = diagonal[3] * (1 + 1e-4)
  root = np.sqrt(diagonal)
  np.testing.assert_allclose(
    found.matrix * np.outer(root, root), np.linalg.inv(damped) * np.outer(root, root), atol=1
  )  # of entries up to 1e4
  inflation = np.diagonal(found.matrix) * diagonal
  assert inflation.max() <= hessian.MAX_INFLATION
  assert (np.asarray(found.matrix)[3, np.arange(12) != 3] == 0).all()


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), -np.eye(3), np.full((3, 3), np.nan)])
def test_no_hessian_at_all_decouples_every_column(matrix):
  found = hessian.inverse(matrix)
  np.testing.assert_array_equal(found.matrix, np.eye(3))


def test_inverse_under_vmap_and_jit():
  _, regular = reference("dense")
  both = np.stack([regular, np.ones_like(regular)]).astype(np.float32)
  found = jax.jit(jax.vmap(hessian.inverse))(both)
  assert found.matrix.dtype == jnp.float32
  np.testing.assert_allclose(found.matrix[0], np.linalg.inv(regular), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(found.damping, [0, 1e-4])


def test_bad_input():
  inputs = np.zeros((4, 5, 5, 3), np.float32)
  with pytest.raises(ValueError, match="no image"):
    hessian.from_inputs(inputs[:0], kernel_shape=(3, 3, 3, 2))
  with pytest.raises(ValueError, match=r"inputs of shape \(4, 5, 5, 3\) do not fit"):
    hessian.from_inputs(inputs, kernel_shape=(3, 3, 4, 2))
  with pytest.raises(ValueError, match="leaves no output pixel"):
    hessian.from_inputs(inputs, kernel_shape=(7, 7, 3, 2), padding="VALID")
  with pytest.raises(ValueError, match='padding must be "SAME", "VALID" or numbers'):
    hessian.from_inputs(inputs, kernel_shape=(3, 3, 3, 2), padding="CIRCULAR")
  with pytest.raises(ValueError, match="one entry per axis"):
    hessian.from_inputs(inputs, kernel_shape=(3, 3, 3, 2), padding=(1, 1, 1))
  with pytest.raises(ValueError, match="NaN or infinite"):
    hessian.from_inputs(inputs * np.nan, kernel_shape=(3, 3, 3, 2))
