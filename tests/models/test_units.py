"""Layers and units of models, ours and others'."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import models, trees
from ptq_jax.models import convnet, resnet, units
from tests import fresh

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
  variables = fresh.variables(model, IMAGES)
  assert units.layers(model, variables, images) == found(model)


def test_causal_padding_comes_before():
  model = single(nn.Conv, features=4, kernel_size=(3,), padding="CAUSAL", kernel_dilation=2)
  assert found(model, jnp.zeros((2, 9, 3)))[0].padding == ((4, 0),)


@pytest.mark.parametrize("model", [convnet.ConvNet(10), resnet.resnet8(10, width=4)])
def test_chain_holds_every_layer_once_and_runs_unit_by_unit(model):
  images = np.cos(np.arange(2 * 8 * 8 * 3, dtype=np.float32)).reshape(2, 8, 8, 3)
  variables = fresh.variables(model, images)
  chain = units.chain(model, variables, images)
  assert [unit.name for unit in chain] == model.units()
  assert [layer for unit in chain for layer in unit.layers] == found(model, images)
  x = images
  for unit in chain:
    x = jax.jit(units.run, static_argnums=(0, 3))(model, variables, x, unit.name)
  np.testing.assert_allclose(x, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
  @nn.compact
  def __call__(self, images, train: bool = False):
    layer = nn.Conv(3, (3, 3), name="twice")
    return layer(layer(images)[:, ::2])


class Step(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Conv(3, (3, 3), name="inside")(x), None


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, images, train: bool = False):
    body = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return nn.Dense(2, name="head")(body(name="body")(images, None)[0])


class Attentive(nn.Module):
  """Patches, a position, attention, a transposed convolution, a table and an Einsum."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.Conv(8, (4, 4), strides=4, name="patch")(images)
    x = x.reshape(x.shape[0], -1, 8)
    x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 8))
    x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2, name="attention")(x, x))
    x = nn.ConvTranspose(3, (2,), strides=2, name="up")(x)
    x = x + nn.Embed(5, 3, name="table")(jnp.arange(x.shape[1]) % 5)[None]
    x = nn.Einsum((3, 2, 4), "btd,dhk->bthk", name="einsum")(x)
    return nn.DenseGeneral(4, axis=(-2, -1), name="merge")(x).mean(1)


def test_every_kind_is_a_matrix():
  survey = units.survey(Attentive(), shapes(Attentive()), IMAGES)
  found = {
    layer.path: (layer.kind, layer.num_rows, layer.num_columns, layer.positions)
    for layer in survey.layers
  }
  projection = ("dense", 8, 8, 4)
  assert found == {
    "patch": ("conv", 48, 8, 4),
    **{f"attention/{name}": projection for name in ("query", "key", "value", "out")},
    "up": ("conv", 16, 3, 8),
    "table": ("embed", 5, 3, 1),
    "einsum": ("dense", 3, 8, 8),
    "merge": ("dense", 8, 4, 8),
  }
  layers = {layer.path: layer for layer in survey.layers}
  assert layers["attention/out"].contracted == (2, 3)
  assert layers["attention/query"].grid_shape == (1, 2, 4)
  assert layers["table"].kernel == "params/table/embedding"
  assert not layers["table"].by_image
  assert [kept[:2] for kept in survey.kept] == [("position", (1, 4, 8))]
  assert "a parameter of Attentive" in survey.kept[0].reason


def test_a_layer_that_runs_twice_is_one_layer_with_two_geometries():
  (layer,) = found(Shared())
  assert [one.input_shape for one in layer.geometries] == [(8, 8, 3), (4, 8, 3)]
  assert layer.positions == 8 * 8 + 4 * 8


@pytest.mark.parametrize(
  ("layer", "options", "reason"),
  [
    (nn.ConvLocal, {"features": 3, "kernel_size": (2, 2)}, "a parameter of ConvLocal"),
    (nn.Conv, {"features": 3, "kernel_size": (2, 2), "mask": jnp.ones((2, 2, 3, 3))}, "a mask"),
    (nn.ConvTranspose, {"features": 3, "kernel_size": (2, 2), "transpose_kernel": True}, "transp"),
    (nn.Einsum, {"shape": (8, 3), "einsum_str": "nhwc,hd->nwd"}, "no product of a matrix"),
  ],
)
def test_what_is_no_matrix_is_kept_by_name(layer, options, reason):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      x = layer(name="odd", **options)(nn.Conv(3, (1, 1), name="plain")(images))
      return nn.Dense(2, name="head")(x)

  survey = units.survey(Model(), shapes(Model()), IMAGES)
  assert [layer.path for layer in survey.layers] == ["plain", "head"]
  assert [kept.path for kept in survey.kept] == ["odd/kernel"]
  assert reason in survey.kept[0].reason


def test_a_layer_without_inputs_is_kept():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      none = nn.Dense(2, name="none", kernel_init=nn.initializers.zeros)(images[..., :0])
      return nn.Dense(2, name="head")(images) + none

  survey = units.survey(Model(), shapes(Model()), IMAGES)
  assert [layer.path for layer in survey.layers] == ["head"]
  assert survey.kept == (units.Kept("none/kernel", (0, 2), "it has no weights"),)


def test_a_scanned_layer_is_kept():
  survey = units.survey(Scanned(), shapes(Scanned()), IMAGES)
  assert [layer.path for layer in survey.layers] == ["head"]
  assert [kept.path for kept in survey.kept] == ["body/inside/kernel"]
  assert "scanned" in survey.kept[0].reason


def test_a_table_that_is_also_an_output_layer_is_kept():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens, train: bool = False):
      table = nn.Embed(7, 4, name="table")
      return table.attend(nn.Dense(4, name="dense")(table(tokens)))

  tokens = jnp.zeros((2, 5), jnp.int32)
  survey = units.survey(Tied(), shapes(Tied(), tokens), tokens)
  assert [layer.path for layer in survey.layers] == ["dense"]
  assert survey.kept[0].path == "table/embedding"
  assert "attend" in survey.kept[0].reason


def test_a_model_without_layers_is_refused():
  with pytest.raises(ValueError, match="no layer that can be quantized"):
    found(single(nn.GroupNorm, num_groups=3))
  images = jnp.zeros((2, 5))
  with pytest.raises(ValueError, match=r"Dense .*it is a layer itself, put it into a module"):
    units.layers(nn.Dense(3), shapes(nn.Dense(3), images), images)


def test_boxed_parameters_are_parameters():
  boxed = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  (layer,) = found(single(nn.Dense, features=4, kernel_init=boxed))
  assert (layer.path, layer.kernel_shape) == ("odd", (3, 4))


def test_names_with_slashes_are_told_apart():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      return nn.Dense(2, name="a/b")(images)

  (layer,) = found(Model())
  assert (layer.path, layer.kernel) == ("a~1b", "params/a~1b/kernel")


class Blocks(nn.Module):
  """No names of units; a stem, two blocks with an argument of their own, and a head."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.relu(nn.Conv(4, (3, 3), name="stem")(images))
    for index in range(2):
      x = x + Block(name=f"block_{index}")(x, train)
    return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.Conv(4, (3, 3), name="second")(nn.relu(nn.Conv(4, (3, 3), name="first")(x)))


@pytest.mark.parametrize(
  ("given", "names"),
  [
    (None, ["stem", "block_0", "block_1", "head"]),
    (("block_*",), ["stem", "block_0", "block_1", "head"]),
    (("block_1/first",), ["stem", "block_0/first", "block_0/second"]),
  ],
)
def test_submodules_are_units_that_run_alone(given, names):
  model, images = Blocks(), jnp.cos(jnp.arange(2 * 8 * 8 * 3.0)).reshape(2, 8, 8, 3)
  variables = model.init(jax.random.key(0), images)
  chain = units.chain(model, variables, images, units=given)
  assert [unit.name for unit in chain][: len(names)] == names
  assert [layer for unit in chain for layer in unit.layers] == found(model, images)

  def all_outputs(_, *names):
    return isinstance(names[0], str)

  _, state = model.apply(variables, images, capture_intermediates=all_outputs)
  for unit in chain:
    inputs = units.inputs_of(model, variables, images, unit)
    alone = jax.jit(units.run, static_argnums=(0, 3))(model, variables, inputs, unit)
    expected = trees.get(state["intermediates"], f"{unit.name}/__call__")[0]
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)
    logits = units.logits_from(model, variables, expected, images, unit)
    np.testing.assert_allclose(logits, model.apply(variables, images), rtol=1e-5, atol=1e-6)


def test_a_chain_without_blocks_is_known():
  flat = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(4, (3, 3)), nn.BatchNorm(True)])
  assert units.layer_by_layer(units.chain(flat, shapes(flat), IMAGES))
  for blocks in (Blocks(), models.make("mlp", num_classes=3, hidden=(4,))):
    images = IMAGES if isinstance(blocks, Blocks) else jnp.zeros((2, 5))
    assert not units.layer_by_layer(units.chain(blocks, shapes(blocks, images), images))


def test_a_block_that_runs_twice_makes_the_model_one_unit():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      block = Block(name="block")
      x = nn.Conv(4, (1, 1), name="stem")(images)
      return nn.Dense(2, name="head")(block(block(x, train), train).mean((1, 2)))

  (unit,) = units.chain(Model(), shapes(Model()), IMAGES)
  assert (unit.name, len(unit.layers)) == (units.WHOLE_MODEL, 4)
  with pytest.raises(ValueError, match="'block' cannot be a unit of its own: it runs more than"):
    units.chain(Model(), shapes(Model()), IMAGES, units=("block",))
  with pytest.raises(ValueError, match=r"unit 'tail' matches no module; there are \['stem'"):
    units.chain(Model(), shapes(Model()), IMAGES, units=("tail",))


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
