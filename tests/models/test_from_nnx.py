"""nnx models as Linen modules: the same function, layers that are seen, codes that fit back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ptq_jax import models, trees
from ptq_jax.data import augment
from ptq_jax.models import call, from_nnx, units
from ptq_jax.quantize import METHODS, adaround, brecq
from ptq_jax.train import fit, optimizer, shadows

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32)
QUICK = {
  "nearest": {},
  "adaround": {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 1},
  "brecq": {"schedule": brecq.SCHEDULE._replace(num_steps=10, batch_size=4)},
  "obc": {},
}


class Block(nnx.Module):
  def __init__(self, width, *, rngs):
    self.conv = nnx.Conv(width, width, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(width, momentum=0.5, rngs=rngs)
    self.dropout = nnx.Dropout(0.3, rngs=rngs)

  def __call__(self, x):
    return self.dropout(nnx.relu(self.norm(self.conv(x))))


class Net(nnx.Module):
  def __init__(self, num_classes, *, rngs):
    self.block = Block(1, rngs=rngs)
    self.widen = nnx.Linear(1, 4, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=rngs)
    self.head = nnx.Linear(4, num_classes, rngs=rngs)

  def __call__(self, x):
    x = self.block(x)
    x = self.widen(x.reshape(len(x), -1, 1))
    return self.head((x + self.attention(x)).mean(axis=1))


LAYERS = ["block/conv", "widen", *(f"attention/{n}" for n in ("query", "key", "value", "out")),
          "head"]  # fmt: skip


@pytest.fixture(scope="module")
def net():
  made = Net(3, rngs=nnx.Rngs(0))
  made.eval()
  return made


def test_the_same_function_with_layers_that_are_seen(net):
  model, variables = from_nnx.adapt(net), from_nnx.variables_of(nnx.state(net))
  np.testing.assert_allclose(
    call.apply(model, variables, IMAGES), net(IMAGES), rtol=1e-5, atol=1e-6
  )
  survey = units.survey(model, variables, IMAGES)
  assert [layer.path for layer in survey.layers] == LAYERS
  assert not survey.kept


@pytest.mark.parametrize("name", ["brecq", "obc"])  # unit by unit, and each layer alone
def test_a_state_goes_in_and_a_state_comes_back(net, name):
  state = nnx.state(net)
  quantized, info = METHODS[name].quantize_params(
    jax.random.key(0), net, state, IMAGES, levels=3, **QUICK[name]
  )
  assert jax.tree.structure(quantized) == jax.tree.structure(state)
  grids = {path for record in info for path in record.grids}
  assert grids == set(LAYERS)
  kernels = from_nnx.variables_of(quantized)["params"]
  for path in LAYERS[:2]:
    kernel = np.asarray(trees.get(kernels, f"{path}/kernel"))
    assert max(len(np.unique(kernel[..., k])) for k in range(kernel.shape[-1])) <= 3
  full = net(IMAGES)
  rounded = nnx.merge(nnx.graphdef(net), quantized)(IMAGES)
  assert 0 < np.abs(rounded - full).max() < 10


def test_a_factory_trains_as_any_model():
  model = models.make(f"{__name__}:Net", num_classes=3)
  recipe = fit.Recipe(
    model, optimizer.sgd(learning_rate=0.1, epochs=1, steps_per_epoch=1), augment.make(()),
    (0.5,), (0.25,), batch_size=6,
  )  # fmt: skip
  keys = shadows.model_keys(jax.random.key(0), jnp.arange(2))
  images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (12, 8, 8, 1)), jnp.uint8)
  states = shadows.init(keys, recipe, image_shape=(8, 8, 1))
  before = jax.tree.map(np.asarray, states.variables)
  members = jnp.stack([jnp.arange(6), jnp.arange(6, 12)])
  labels = jnp.arange(12, dtype=jnp.int32) % 3
  (epoch,) = shadows.epochs(states, keys, recipe, images, labels, members, first=0, last=1)
  after = epoch.states.variables
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  assert changed["params"]["head"]["kernel"]
  assert changed["params"]["attention"]["query"]["kernel"]
  assert changed["batch_stats"]["block"]["norm"]["mean"]
  head = before["params"]["head"]["kernel"]
  assert (head[0] != head[1]).any()
  assert models.make(f"{__name__}:Net", num_classes=3) == model
