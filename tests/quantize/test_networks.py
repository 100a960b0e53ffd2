"""Networks of several kinds from training to predictions: methods, codes in a file, logits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import models, trees
from ptq_jax.data import augment
from ptq_jax.models import call, predict
from ptq_jax.quantize import adaround, brecq, pack, plan, quantize_stacked
from ptq_jax.train import fit, optimizer, shadows

QUICK = {
  "nearest": {},
  "adaround": {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 1},
  "brecq": {"schedule": brecq.SCHEDULE._replace(num_steps=10, batch_size=8)},
  "obc": {"batchnorm": "none"},
}
MODELS, EXAMPLES, SIZE = 2, 24, 8


class Separable(nn.Module):
  """A block of a MobileNet: wide, depthwise and narrow convolutions beside a shortcut."""

  features: int

  @nn.compact
  def __call__(self, x, train):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
    y = nn.relu6(norm()(nn.Conv(2 * self.features, (1, 1), use_bias=False)(x)))
    y = nn.Conv(2 * self.features, (3, 3), feature_group_count=2 * self.features)(y)
    return x + norm()(nn.Conv(self.features, (1, 1), use_bias=False)(nn.relu6(norm()(y))))


class MobileNet(nn.Module):
  """No names of units; says `training`; dropout before the classifier."""

  @nn.compact
  def __call__(self, images, training):
    x = nn.Conv(4, (3, 3), strides=2, name="stem")(images)
    x = Separable(4, name="block")(x, training)
    x = nn.Dropout(0.2, deterministic=not training)(x.mean(axis=(1, 2)))
    return nn.Dense(3, name="head")(x)


class SharedBlock(nn.Module):
  """One block twice; no argument but the images."""

  @nn.compact
  def __call__(self, images):
    x = nn.Dense(6, name="stem")(images.reshape(len(images), SIZE, -1))
    block = nn.Dense(6, name="block")
    for _ in range(2):
      x = x + nn.relu(block(x))
    return nn.Dense(3, name="head")(x.mean(axis=1))


NETWORKS = {
  "vit": models.make("vit", num_classes=3, width=8, depth=1, num_heads=2, dropout=0.1),
  "mobile": MobileNet(),
  "shared": SharedBlock(),
}


@pytest.fixture(scope="module")
def train():
  """A function of a network's name: two models after an epoch, and what they were trained on."""
  return functools.cache(_train)


def _train(network):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 256, (EXAMPLES, SIZE, SIZE, 1)), jnp.uint8)
  labels = jnp.asarray(rng.integers(0, 3, EXAMPLES), jnp.int32)
  recipe = fit.Recipe(
    model=NETWORKS[network],
    optimizer=optimizer.sgd(learning_rate=0.1, epochs=1, steps_per_epoch=2),
    augmentation=augment.make(()),
    mean=(0.5,),
    std=(0.25,),
    batch_size=6,
  )
  keys = shadows.model_keys(jax.random.key(0), jnp.arange(MODELS))
  members = jnp.stack([jnp.arange(0, EXAMPLES, 2), jnp.arange(1, EXAMPLES, 2)])
  states = shadows.init(keys, recipe, image_shape=images.shape[1:])
  (epoch,) = shadows.epochs(states, keys, recipe, images, labels, members, first=0, last=1)
  return recipe.model, epoch.states.variables, images, labels, keys


def pixels(images):
  return augment.normalise(images, jnp.array([0.5]), jnp.array([0.25]))


@pytest.mark.filterwarnings("ignore:these weights stay")
@pytest.mark.parametrize(
  ("network", "name"),
  [
    ("vit", "adaround"),
    ("mobile", "brecq"),
    ("mobile", "obc"),
    ("shared", "nearest"),
  ],
)
def test_a_network_goes_all_the_way(train, network, name, tmp_path):
  model, variables, images, labels, keys = train(network)
  calibration = jnp.stack([pixels(images[m::2]) for m in range(MODELS)])
  one = trees.take(variables, 0)
  layers = models.units.layers(model, one, calibration[0])
  plans = [plan.make(layers, levels=3, last_layer_levels=256), plan.make(layers, levels=16)]
  quantized, records = quantize_stacked(
    name, keys, model, variables, calibration, plans=plans, **QUICK[name]
  )
  assert jax.tree.structure(quantized) == jax.tree.structure(variables)
  for new, old in zip(jax.tree.leaves(quantized), jax.tree.leaves(variables), strict=True):
    assert (new.shape, new.dtype) == ((2, *old.shape), old.dtype)
  assert {layer.path for layer in layers} <= {path for record in records for path in record.grids}
  for layer in layers[:-1]:
    kernel = np.asarray(trees.get(quantized, layer.kernel)[0, 0])
    columns = np.transpose(kernel, layer.axes).reshape(-1, layer.num_columns).T
    assert max(len(np.unique(column)) for column in columns) <= 3
  predictor = predict.Predictor(
    model, prepare=lambda x, _: pixels(x)[None], reduce=lambda logits, _: logits
  )
  full = predictor(variables, images, labels, batch_size=12)
  apply = jax.jit(functools.partial(call.apply, model))
  errors = []
  for index in range(2):
    grids = {p: trees.take(g, index) for record in records for p, g in record.grids.items()}
    path = tmp_path / f"{index}.npz"
    pack.save(path, pack.pack(trees.take(quantized, index), grids))
    found = predictor(pack.unpack(pack.load(path)), images, labels, batch_size=12)
    for m in range(MODELS):
      direct = apply(trees.take(quantized, (index, m)), pixels(images))
      np.testing.assert_allclose(found[m, :, 0], direct, rtol=1e-4, atol=1e-5)
    errors.append(np.square(found - full).mean())
  assert 0 < errors[1] < errors[0]
  for record in records:
    assert (record.error_after <= record.error_before).all()
    if name in ("brecq", "obc"):
      assert (record.error_after < record.error_before).any()
