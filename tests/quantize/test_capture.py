"""Layer inputs and outputs of any model, in batches, and the checks before them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import parallel, units
from ptq_jax.models.call import Hashable
from ptq_jax.quantize import capture
from ptq_jax.quantize.layer import kernel_matrix, matrix_kernel, patches


def parts(ensemble):
  """One model of an ensemble, its images and its layers."""
  variables, images = trees.take((ensemble.variables, ensemble.images), 0)
  return ensemble.model, variables, images, units.layers(ensemble.model, variables, images)


def gram(layer, inputs):
  rows = patches(inputs, layer)
  return jnp.einsum("gpd,gpe->gde", rows, rows)


def test_patches_times_kernel_is_the_layer(foreign):
  model, variables, images, layers = parts(foreign)
  calls = jax.jit(lambda v, x: capture.calls(model, v, x, layers))(variables, images)
  assert set(calls) == {"down", "grouped", "pointwise", "classifier"}
  for layer in layers:
    kernel = trees.get(variables, layer.kernel)
    matrix = kernel_matrix(kernel, layer)
    np.testing.assert_array_equal(matrix_kernel(matrix, layer), kernel)
    rows = patches(calls[layer.path][0].inputs, layer)
    product = jnp.moveaxis(rows @ matrix, 0, 1).reshape(len(images), *layer.output_shape)
    bias = trees.get(variables, f"params/{layer.path}").get("bias", 0.0)
    expected = np.asarray(calls[layer.path][0].outputs) - np.asarray(bias)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


def test_padding_before_and_after_may_differ():
  layer = units.Layer("c", "conv", (2, 3, 1, 1), (1, 2), ((1, 0), (0, 2)), (1, 1))
  image = jnp.arange(1.0, 7.0).reshape(1, 2, 3, 1)
  rows = patches(image, layer)[0]
  expected = [[0, 0, 0, 1, 2, 3], [0, 0, 0, 3, 0, 0], [1, 2, 3, 4, 5, 6], [3, 0, 0, 6, 0, 0]]
  np.testing.assert_array_equal(rows, expected)


def test_a_unit_alone_captures_what_the_whole_model_does(untrained):
  model, variables, images, _ = parts(untrained)
  x = images[:8]
  for unit in units.chain(model, variables, images):
    alone = capture.calls(model, variables, x, unit.layers, unit=unit)
    whole = capture.calls(model, variables, images[:8], unit.layers)
    for path, (one,) in alone.items():
      np.testing.assert_allclose(one.inputs, whole[path][0].inputs, rtol=1e-4, atol=1e-5)
    x = units.run(model, variables, x, unit.name)


def test_vmap_over_models_is_the_loop(foreign):
  layers = parts(foreign)[3]

  def inputs(variables, images):
    return capture.calls(foreign.model, variables, images, layers[2:3])["pointwise"][0].inputs

  stacked = jax.jit(jax.vmap(inputs))(foreign.variables, foreign.images)
  for m in range(2):
    one = inputs(*trees.take((foreign.variables, foreign.images), m))
    np.testing.assert_allclose(stacked[m], one, rtol=1e-4, atol=1e-5)


def test_an_early_layer_costs_no_whole_forward_pass(untrained):
  model, variables, images, layers = parts(untrained)

  def flops(layer):
    run = jax.jit(lambda v, x: capture.calls(model, v, x, [layer])[layer.path][0].inputs)
    return run.lower(variables, images).compile().cost_analysis().get("flops", 0)

  assert flops(layers[1]) < 0.5 * flops(layers[-1])


def summed(*arguments, **options):
  """What `capture.stream` yields, added up."""
  return functools.reduce(
    functools.partial(jax.tree.map, jnp.add), capture.stream(gram, *arguments, **options)
  )


def test_sums_do_not_depend_on_the_batches(foreign):
  model, variables, images, layers = parts(foreign)
  whole = summed(model, variables, images, layers)
  some = summed(model, variables, images, layers[1:3], batch_size=7)
  calls = capture.calls(model, variables, images, layers)
  assert list(some) == ["grouped", "pointwise"]
  for layer in layers[1:3]:
    direct = gram(layer, calls[layer.path][0].inputs)
    np.testing.assert_allclose(whole[layer.path], direct, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(some[layer.path], direct, rtol=1e-4, atol=1e-4)


def test_a_model_with_a_list_for_a_field_can_be_captured():
  class Widths(nn.Module):
    widths: list

    @nn.compact
    def __call__(self, x, train: bool = False):
      for width in self.widths:
        x = nn.Dense(width)(x)
      return x

  images = jnp.ones((4, 3))
  totals = []
  for model in (Widths([5, 2]), Widths([5, 2])):
    variables = model.init(jax.random.key(0), images)
    layers = units.layers(model, variables, images)
    totals.append(summed(model, variables, images, layers)["Dense_0"])
  np.testing.assert_array_equal(totals[0], np.full((1, 3, 3), 4.0))
  np.testing.assert_array_equal(*totals)
  assert Hashable(Widths([5, 2])) == Hashable(Widths([5, 2]))
  assert Hashable(Widths([5, 2])) != Hashable(Widths([5, 3]))


def test_batches_are_even_and_fit_the_bytes():
  sizes = [len(batch) for batch in capture.batches(np.arange(10), 4)]
  assert sizes == [3, 4, 3]
  np.testing.assert_array_equal(jnp.concatenate([*capture.batches(np.arange(10), 4)]), range(10))
  layer = units.Layer("c", "conv", (3, 3, 2, 8), feature_group_count=2, output_shape=(5, 5, 8))
  patch_bytes = 4 * 5 * 5 * 9 * 2 * 2
  assert capture.images_at_once([layer], memory_bytes=3 * patch_bytes) == 3
  assert capture.images_at_once([layer], memory_bytes=1) == 1
  assert capture.images_at_once([layer]) == capture.batch_bytes() // patch_bytes


def test_batches_grow_with_an_accelerator_s_memory(monkeypatch):
  on_cpu = capture.batch_bytes()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(parallel, "device_memory_bytes", lambda: 640 * on_cpu)
  assert capture.batch_bytes() == 10 * on_cpu
  monkeypatch.setattr(parallel, "device_memory_bytes", lambda: on_cpu)
  assert capture.batch_bytes() == on_cpu


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda v, x: (v, x[:, :0]), "the calibration set is empty"),
    (lambda v, x: (v, x[:1]), "with 2 models"),
    (lambda v, x: (v, x[0]), "with 2 models"),
    (lambda v, x: (v, x[..., :1]), "do not fit Foreign"),
    (lambda v, x: (v, x.at[1, 3, 0, 0, 0].set(jnp.nan)), "images hold NaN"),
    (
      lambda v, x: (trees.replace(v, {"params/down/bias": jnp.full((2, 8), jnp.inf)}), x),
      "'params/down/bias' holds NaN or infinite",
    ),
  ],
)
def test_check_refuses(foreign, change, message):
  variables, images = change(foreign.variables, foreign.images)
  with pytest.raises(ValueError, match=message):
    capture.check(foreign.model, variables, images)


def test_all_layers_that_cannot_be_captured_are_named_at_once():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, inputs):
      hidden = nn.WeightNorm(nn.Dense(4, name="one"))(inputs)
      return nn.WeightNorm(nn.Dense(3, name="two"))(hidden)

  model, inputs = Model(), jnp.ones((2, 5))
  variables = model.init(jax.random.key(0), inputs)
  layers = units.layers(model, variables, inputs)
  with pytest.raises(ValueError, match=r'1 more layers.*levels={"one": None, "two": None, "\*"'):
    capture.calls(model, variables, inputs, layers)
