"""nnx models as Linen modules: the same function, layers that are seen, codes that fit back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ptq_jax import models, quantize, trees
from ptq_jax.data import augment
from ptq_jax.models import call, from_nnx, units
from ptq_jax.quantize import METHODS, brecq
from ptq_jax.train import fit, optimizer, shadows

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32)
QUICK = {
  "nearest": {},
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


class Small(nnx.Module):
  """No attention, which `Net` has with every layer quantized alone."""

  def __init__(self, num_classes, *, rngs):
    self.block = Block(1, rngs=rngs)
    self.head = nnx.Linear(1, num_classes, rngs=rngs)

  def __call__(self, x):
    return self.head(self.block(x).mean(axis=(1, 2)))


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


@pytest.mark.parametrize(
  ("name", "kind", "layers"),
  [
    ("brecq", Small, ["block/conv", "head"]),  # unit by unit
    ("obc", Small, ["block/conv", "head"]),  # each layer alone, then the normalisation
    ("nearest", Net, LAYERS),
  ],
)
def test_a_state_goes_in_and_a_state_comes_back(name, kind, layers):
  net = kind(3, rngs=nnx.Rngs(0))
  net.eval()
  state = nnx.state(net)
  quantized, info = METHODS[name].quantize_params(
    jax.random.key(0), net, state, IMAGES, levels=3, **QUICK[name]
  )
  assert jax.tree.structure(quantized) == jax.tree.structure(state)
  grids = {path for record in info for path in record.grids}
  assert grids == set(layers)
  kernels = from_nnx.variables_of(quantized)["params"]
  for path in layers[:2]:
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


class Changing(nnx.Module):
  """A model that changes something of its own in training."""

  def __init__(self, own, *, rngs):
    self.head = nnx.Linear(1, 3, rngs=rngs)
    self.own, self.rngs = own(jnp.ones((1, 3))), rngs

  def __call__(self, x, train: bool = False):
    logits = self.head(x.mean(axis=(1, 2)))
    if train:
      self.own[...] = 0.9 * self.own[...] + 0.1 * logits.mean(axis=0, keepdims=True)
      logits += jax.random.normal(self.rngs.noise(), (1, 3))
    return logits - self.own[...]


class Counter(nnx.Variable):
  pass


def trained(model, variables, key=0):
  options = {"mutable": ["batch_stats"], "rngs": call.rngs(jax.random.key(key))}
  return call.apply(model, variables, IMAGES, train=True, **options)


def test_statistics_of_its_own_are_kept_and_random_numbers_are_new_in_every_step():
  model = from_nnx.adapt(Changing, own=nnx.BatchStat)
  variables = call.init(model, jax.random.key(0), IMAGES)
  logits = call.apply(model, variables, IMAGES) + 1
  first, changed = trained(model, variables)
  expected = 0.9 + 0.1 * logits.mean(axis=0, keepdims=True)
  np.testing.assert_allclose(changed["batch_stats"]["own"], expected, rtol=1e-5)
  second, _ = trained(model, variables, key=1)
  noise = [np.asarray(each - (logits - expected)) for each in (first, second)]
  for each in noise:
    np.testing.assert_allclose(each, np.broadcast_to(each[0], each.shape), atol=1e-5)
  assert np.abs(noise[0] - noise[1]).min() > 1e-3


@pytest.mark.parametrize(
  ("own", "message"),
  [(Counter, "'own' in training, .* kind Counter; make it"), (nnx.Param, "its weights 'own' when")],
)
def test_what_training_would_lose_is_refused(own, message):
  model = from_nnx.adapt(Changing, own=own)
  variables = call.init(model, jax.random.key(0), IMAGES)
  with pytest.raises(ValueError, match=message):
    trained(model, variables)


def test_statistics_that_change_in_evaluation_are_refused():
  class Always(Changing):
    def __call__(self, x):
      return super().__call__(x, train=True)

  model = from_nnx.adapt(Always, own=nnx.BatchStat)
  variables = call.init(model, jax.random.key(0), IMAGES)
  with pytest.raises(ValueError, match="batch statistics 'own' in evaluation mode, too"):
    call.apply(model, variables, IMAGES)


def doubled(*args, **kwargs):
  return 2 * jax.lax.dot_general(*args, **kwargs)


class Odd(nnx.Module):
  def __init__(self, *, rngs):
    self.up = nnx.ConvTranspose(1, 4, (2, 2), strides=2, rngs=rngs)
    self.mix = nnx.Einsum("nlc,cd->nld", (4, 4), (4,), rngs=rngs)
    self.loop = nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs))
    self.twice = nnx.LinearGeneral(4, 4, dot_general=doubled, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = self.mix(self.up(x).reshape(len(x), -1, 4))
    return self.head(nnx.relu(self.twice(self.loop(x)[:, -1])))


def test_what_linen_lacks_runs_as_it_is_and_stays_in_full_precision():
  net = Odd(rngs=nnx.Rngs(0))
  model, variables = from_nnx.adapt(net), from_nnx.variables_of(nnx.state(net))
  expected = net(IMAGES)
  np.testing.assert_allclose(call.apply(model, variables, IMAGES), expected, rtol=1e-4, atol=1e-6)
  survey = units.survey(model, variables, IMAGES)
  assert [layer.path for layer in survey.layers] == ["up", "mix", "head"]
  kept = ["loop/cell/dense_h/kernel", "loop/cell/dense_i/kernel", "twice/kernel"]
  assert sorted(each.path for each in survey.kept) == kept
  with pytest.warns(UserWarning, match="'twice/kernel'"):
    _, info = METHODS["nearest"].quantize_params(
      jax.random.key(0), net, nnx.state(net), IMAGES, levels=4
    )
  assert [record.name for record in info] == ["up", "mix", "head", *kept]


def test_a_normalised_kernel_is_refused_before_training():
  class Normalised(nnx.Module):
    def __init__(self, *, rngs):
      self.odd = nnx.SpectralNorm(nnx.Linear(1, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x, train: bool = False):
      return self.odd(x.mean(axis=(1, 2)), update_stats=train)

  with pytest.raises(ValueError, match="changes its weights 'odd/layer_instance/kernel'"):
    quantize.check_model(from_nnx.adapt(Normalised), image_shape=(8, 8, 1))
