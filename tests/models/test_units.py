"""Layers and units of models, ours and others'."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.models import convnet, resnet, units

IMAGES = jnp.zeros((2, 8, 8, 3))


class Branched(nn.Module):
  """Every kind of layer that is supported."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.Conv(8, (3, 3), strides=2, padding="SAME", name="down")(images)
    y = nn.Conv(12, (3, 3), feature_group_count=4, kernel_dilation=2, padding=1, name="grouped")(x)
    y = nn.remat(nn.Conv)(12, (1, 1), use_bias=False, name="pointwise")(nn.relu(y))
    x = nn.Conv(12, (4, 4), padding=[(3, 0), (1, 0)], name="branch")(images)
    return nn.Dense(5, name="classifier")(x.mean(axis=(1, 2)) + y.mean(axis=(1, 2)))


def shapes(model, images=IMAGES):
  """Variables of a model, as shapes."""
  return jax.eval_shape(model.init, jax.random.key(0), images)


def found(model, images=IMAGES):
  return units.layers(model, shapes(model, images), images)


def single(layer, **options):
  """A model of one layer, given by its class."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      return layer(name="odd", **options)(images)

  return Model()


def test_layers_in_execution_order_with_their_geometry():
  layers = {layer.path: layer for layer in found(Branched())}
  assert list(layers) == ["down", "grouped", "pointwise", "branch", "classifier"]
  down, grouped, branch = layers["down"], layers["grouped"], layers["branch"]
  assert (down.strides, down.padding, down.output_shape) == ((2, 2), ((0, 1), (0, 1)), (4, 4, 8))
  assert (grouped.feature_group_count, grouped.kernel_dilation) == (4, (2, 2))
  assert (grouped.kernel_shape, grouped.output_shape) == ((3, 3, 2, 12), (2, 2, 12))
  assert (branch.padding, branch.positions) == (((3, 0), (1, 0)), 8 * 6)
  dense = layers["classifier"]
  assert (dense.kind, dense.kernel_shape, dense.positions) == ("dense", (12, 5), 1)
  assert dense.kernel == "params/classifier/kernel"


def test_layers_work_on_shapes_alone():
  model = Branched()
  images = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  assert units.layers(model, variables, images) == found(model)


def test_causal_padding_comes_before():
  model = single(nn.Conv, features=4, kernel_size=(3,), padding="CAUSAL", kernel_dilation=2)
  assert found(model, jnp.zeros((2, 9, 3)))[0].padding == ((4, 0),)


@pytest.mark.parametrize("model", [convnet.ConvNet(10), resnet.resnet8(10, width=4)])
def test_chain_holds_every_layer_once_and_runs_unit_by_unit(model):
  images = jnp.cos(jnp.arange(2 * 8 * 8 * 3.0)).reshape(2, 8, 8, 3)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  chain = units.chain(model, variables, images)
  assert [unit.name for unit in chain] == model.units()
  assert [layer for unit in chain for layer in unit.layers] == found(model, images)
  x = images
  for unit in chain:
    x = jax.jit(units.run, static_argnums=(0, 3))(model, variables, x, unit.name)
  np.testing.assert_allclose(x, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-5)


def test_a_model_without_units_is_one_unit():
  model = Branched()
  variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
  (unit,) = units.chain(model, variables, IMAGES)
  assert unit.name == units.WHOLE_MODEL
  assert len(unit.layers) == 5
  logits = units.run(model, variables, IMAGES, unit.name)
  assert jnp.array_equal(logits, model.apply(variables, IMAGES))


class Shared(nn.Module):
  @nn.compact
  def __call__(self, images, train: bool = False):
    layer = nn.Conv(3, (3, 3), name="twice")
    return layer(layer(images))


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, images, train: bool = False):
    body = nn.scan(
      lambda module, x, _: (nn.Conv(3, (3, 3), name="inside")(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
    )
    return body(self, images, None)[0]


class Standardized(nn.Conv):
  @nn.compact
  def __call__(self, inputs):
    return super().__call__(inputs - inputs.mean())


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (single(nn.ConvTranspose, features=3, kernel_size=(2, 2)), "'odd' is a ConvTranspose"),
    (single(nn.DenseGeneral, features=(2, 2)), "'odd' is a DenseGeneral"),
    (single(nn.ConvLocal, features=3, kernel_size=(2, 2)), "'odd' is a ConvLocal"),
    (single(Standardized, features=3, kernel_size=(2, 2)), "'odd' is a Standardized"),
    (single(nn.Conv, features=3, kernel_size=(2, 2), padding="CIRCULAR"), "CIRCULAR padding"),
    (single(nn.Conv, features=3, kernel_size=(2, 2), padding=1, input_dilation=2), "dilated input"),
    (Shared(), "'twice' runs more than once"),
    (Scanned(), "'inside' is a lifted"),
    (single(nn.GroupNorm, num_groups=3), "no Conv or Dense layer"),
  ],
)
def test_unsupported_layers_are_named(model, message):
  with pytest.raises(ValueError, match=message):
    found(model)


def test_an_embedding_is_named():
  class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens, train: bool = False):
      return nn.Dense(3)(nn.Embed(7, 4, name="table")(tokens))

  with pytest.raises(ValueError, match="'table' is a Embed"):
    found(Words(), jnp.zeros((2, 5), jnp.int32))


@pytest.mark.parametrize(
  ("shape", "message"),
  [((2, 8, 8, 1), "do not fit Branched"), ((8, 8, 3), "needs one batch axis")],
)
def test_misfitting_images_are_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    units.layers(Branched(), shapes(Branched()), jnp.zeros(shape))


def test_a_layer_outside_all_units_is_refused():
  class Leaky(convnet.ConvNet):
    def units(self):
      return super().units()[1:]

    def __call__(self, images, train: bool = False):
      return super().__call__(self.stem(images, train), train)

  with pytest.raises(ValueError, match="'stem/conv' belongs to none of the units"):
    units.chain(Leaky(10), shapes(Leaky(10)), IMAGES)
