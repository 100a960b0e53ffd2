import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import models
from tests import fresh

PARAMETERS = {  # published numbers, or counted by hand
  ("resnet18", 10): 11_173_962,
  ("resnet18", 100): 11_220_132,
  ("resnet34", 10): 21_282_122,
  ("resnet50", 10): 23_520_842,
  ("resnet8", 10): 78_042,
  ("convnet", 10): 24_346,
  ("vit", 10): 207_946,
  ("mlp", 10): 820_874,
}
SHORT = {"convnet": {}, "resnet8": {"width": 4}, "resnet20": {"width": 4},
         "vit": {"width": 8, "depth": 2, "num_heads": 2}, "mlp": {"hidden": (4, 3)},
         "transformer": {"width": 8, "depth": 1, "num_heads": 2, "vocabulary": 9}}  # fmt: skip


def shapes(model, size=32, channels=3):
  images = jnp.zeros((1, size, size, channels))
  return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_number_of_parameters(name, classes):
  params = shapes(models.make(name, num_classes=classes))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name, classes]


def test_parameters_of_a_transformer_counted_by_hand():
  model = models.make("transformer", num_classes=10, vocabulary=100)
  tokens = jnp.zeros((1, 16), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  attention, perceptron, norm = 4 * (64 * 64 + 64), 64 * 256 + 256 + 256 * 64 + 64, 2 * 64
  blocks = 2 * (attention + perceptron + 2 * norm)
  counted = 100 * 64 + 16 * 64 + blocks + norm + 64 * 10 + 10
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == counted


@pytest.mark.parametrize("hidden", [(), (4, 0), (2.5,)])
def test_widths_of_a_perceptron_are_checked(hidden):
  assert models.make("mlp", num_classes=2, hidden=7).hidden == (7,)
  with pytest.raises(ValueError, match=r"hidden is .*; give the width of each hidden layer"):
    models.make("mlp", num_classes=2, hidden=hidden)


@pytest.mark.parametrize(
  ("name", "option", "least"),
  [("convnet", "num_convolutions", 1), ("resnet8", "width", 1), ("vit", "depth", 0)],
)
def test_sizes_of_a_model_that_are_too_small(name, option, least):
  models.make(name, num_classes=2, **{option: least})
  for value in range(-1, least):
    with pytest.raises(ValueError, match=f"^model.{option} is {value}; it must be at least"):
      models.make(name, num_classes=2, **{option: value})


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_auto_is_half_precision_on_accelerators_alone(monkeypatch, platform, dtype):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert models.make("resnet8", num_classes=5, dtype="auto").dtype == dtype
  for given in ("float16", jnp.bfloat16, None):
    assert models.make("resnet8", num_classes=5, dtype=given).dtype == given


@pytest.mark.parametrize("name", SHORT)
def test_units_in_order_are_the_model(name, key):
  model = models.make(name, num_classes=5, **SHORT[name])
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  if name == "transformer":
    images = np.arange(10).reshape(2, 5) % 9
  variables = fresh.variables(model, images)

  @jax.jit
  def chain(variables, x):
    for unit in model.units():
      x = model.apply(variables, x, unit, method="run_unit")
    return x

  np.testing.assert_allclose(
    chain(variables, images), jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-6
  )
  assert set(model.units()) == set(variables["params"])
  with pytest.raises(ValueError, match="no unit 'tail'; the units are"):
    model.apply(variables, images, "tail", method="run_unit")


def test_training_uses_and_updates_batch_statistics(key):
  model = models.make("convnet", num_classes=3, width=2)
  images = 5 + jax.random.normal(key, (64, 8, 8, 1))
  variables = jax.jit(model.init)(key, images)
  train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  _, updates = train(variables, images)
  kernel = variables["params"]["stem"]["conv"]["kernel"]
  out = jax.lax.conv_general_dilated(
    images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  np.testing.assert_allclose(
    updates["batch_stats"]["stem"]["bn"]["mean"], 0.1 * out.mean((0, 1, 2)), rtol=1e-3
  )


def test_initialisation_is_pytorch_s_default(key):
  model = models.make("resnet8", num_classes=100, width=16)
  params = jax.jit(model.init)(key, jnp.zeros((1, 8, 8, 3)))["params"]
  kernel = params["blocks_1"]["conv1"]["conv"]["kernel"]
  bound = (9 * 16) ** -0.5
  assert np.abs(kernel).max() <= bound
  assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
  bias = params["head"]["classifier"]["bias"]
  assert 0.5 * 64**-0.5 < np.abs(bias).max() <= 64**-0.5


def test_bfloat16_computes_in_16_bit_and_keeps_float32_parameters_and_logits(key):
  model = models.make("resnet8", num_classes=3, width=4, dtype=jnp.bfloat16)
  images = jax.random.normal(key, (2, 8, 8, 3))
  variables = jax.jit(model.init)(key, images)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  stem = jax.eval_shape(
    lambda v, x: model.apply(v, x, "stem", method="run_unit"), variables, images
  )
  assert stem.dtype == jnp.bfloat16
  assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32


class Tiny(nn.Module):
  num_classes: int

  @nn.compact
  def __call__(self, images, train=False):
    return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


def test_own_factory_by_name(monkeypatch):
  import sys
  import types

  module = types.ModuleType("somebody")
  module.make = Tiny
  module.wrong = lambda num_classes: "a string"
  monkeypatch.setitem(sys.modules, "somebody", module)
  assert models.make("somebody:make", num_classes=4) == Tiny(4)
  with pytest.raises(ValueError, match=r"made a str, not a flax\.linen\.Module"):
    models.make("somebody:wrong", num_classes=4)
  with pytest.raises(ValueError, match="cannot be imported"):
    models.make("somebody:other", num_classes=4)


def test_unknown_names_and_options_are_refused():
  with pytest.raises(ValueError, match=r"model\.name is 'resnet9'; use one of"):
    models.make("resnet9", num_classes=2)
  with pytest.raises(ValueError, match=r"'convnet' has no option 'depth'; it has \['dtype', "):
    models.make("convnet", num_classes=2, depth=3)
