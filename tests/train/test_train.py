import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ptq_jax import models, trees
from ptq_jax.data import augment, membership
from ptq_jax.models import conv, parallel
from ptq_jax.train import fit, loss, optimizer, shadows
from tests import programs

EXAMPLES, BATCH, EPOCHS, MODELS = 48, 8, 2, 4
SCHEDULED = 12
"""Epochs of the schedule; only one test trains them all."""


@pytest.fixture(scope="module")
def setup():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (EXAMPLES, 6, 6, 1), dtype=np.uint8)
  labels = rng.integers(0, 3, EXAMPLES).astype(np.int32)
  recipe = fit.Recipe(
    model=models.make("convnet", num_classes=3, width=2, num_convolutions=2),
    optimizer=optimizer.sgd(learning_rate=0.1, epochs=SCHEDULED, steps_per_epoch=3),
    augmentation=augment.make(("flip", "shift1")),
    mean=(0.5,),
    std=(0.25,),
    batch_size=BATCH,
  )
  rows = membership.paired(jax.random.key(1), num_models=MODELS, num_examples=EXAMPLES)
  members = jnp.asarray(membership.members_of(rows))
  return recipe, jnp.asarray(images), jnp.asarray(labels), members


def train(setup, ids, *, first=0, last=EPOCHS, states=None, steps_per_dispatch=None):
  """The chunk of models `ids`, from fresh or given states."""
  recipe, images, labels, members = setup
  keys = shadows.model_keys(jax.random.key(0), jnp.asarray(ids))
  if states is None:
    states = shadows.init(keys, recipe, image_shape=images.shape[1:])
  return list(
    shadows.epochs(
      states,
      keys,
      recipe,
      images,
      labels,
      members[jnp.asarray(ids)],
      first=first,
      last=last,
      steps_per_dispatch=steps_per_dispatch,
    )
  )


def assert_close(ours, theirs, rtol=2e-4, atol=2e-5):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), ours, theirs)


@pytest.fixture(scope="module")
def together(setup):
  return train(setup, range(MODELS))


@pytest.fixture(scope="module")
def pair(setup):
  """Models 0 and 1, which a single program has trained."""
  before = shadows._run.jitted()._cache_size()
  epochs = train(setup, [0, 1])
  assert shadows._run.jitted()._cache_size() <= before + 1
  return epochs


def test_many_models_at_once_are_each_model_alone(setup, together):
  recipe, images, labels, members = setup
  model_key = jax.random.fold_in(jax.random.key(0), 2)
  variables, metrics = jax.jit(fit.fit, static_argnums=1, static_argnames="epochs")(
    model_key, recipe, images, labels, members[2], epochs=EPOCHS
  )
  assert_close(trees.take(together[-1].states.variables, 2), variables)
  assert_close([epoch.metrics.loss[2] for epoch in together], list(metrics.loss))


def test_chunks_do_not_matter_and_share_a_program(setup, together, pair):
  before = shadows._run.jitted()._cache_size()
  other = train(setup, [3, 2])
  assert shadows._run.jitted()._cache_size() == before
  for ids, chunk in (([0, 1], pair), ([3, 2], other)):
    assert_close(chunk[-1].states, trees.take(together[-1].states, np.asarray(ids)))


def test_steps_per_dispatch_do_not_matter(setup, pair):
  scanned = train(setup, [0, 1], steps_per_dispatch=2)  # 3 steps: 2 and 1
  assert_close(scanned[-1].states, pair[-1].states)
  assert_close(scanned[-1].metrics, pair[-1].metrics)


def test_heavy_models_train_one_after_the_other_to_the_same_result(setup, together, monkeypatch):
  monkeypatch.setattr(parallel, "ALONE_FLOP", 0)
  assert shadows.models_together(setup[0], MODELS, image_shape=setup[1].shape[1:]) == 1
  before = shadows._run.jitted()._cache_size()
  alone = train(setup, range(MODELS))
  assert shadows._run.jitted()._cache_size() <= before + 1  # one program, whatever the chunk
  assert_close(alone[-1].states, together[-1].states)
  assert_close(alone[-1].metrics, together[-1].metrics)


def test_going_on_from_an_epoch_is_the_same_training(setup, together):
  first = train(setup, range(MODELS), last=1)[-1]
  rest = train(setup, range(MODELS), first=1, states=first.states)
  jax.tree.map(np.testing.assert_array_equal, rest[-1].states, together[-1].states)
  assert [epoch.epoch for epoch in together] == [1, 2]


def test_only_members_are_trained_on(setup, together):
  recipe, images, labels, members = setup
  is_member = np.isin(np.arange(EXAMPLES), members[0])[:, None, None, None]
  spoiled = jnp.asarray(np.where(is_member, images, np.uint8(0)))
  other = train((recipe, spoiled, labels, members), [0])[-1].states
  assert_close(other, trees.take(together[-1].states, np.array([0])))


def test_models_differ_and_learn(setup):
  recipe, images, labels, members = setup
  easy = np.broadcast_to(np.where(labels > 0, 255, 0)[:, None, None, None], images.shape)
  task = (recipe, jnp.asarray(easy, jnp.uint8), jnp.minimum(labels, 1), members)
  epochs = train(task, [0, 1], last=SCHEDULED)
  assert epochs[-1].metrics.loss.max() < 0.3 * epochs[0].metrics.loss.min()
  kernel = epochs[-1].states.variables["params"]["stem"]["conv"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_one_step_is_pytorch_s_sgd_with_weight_decay():
  """v = m v + g + wd p;  p -= lr v, from torch.optim.SGD's documentation."""
  transform = optimizer.sgd(
    learning_rate=0.1, epochs=1, steps_per_epoch=10, momentum=0.9, weight_decay=0.01
  )
  p = {"w": jnp.array([1.0, -2.0])}
  state, velocity, expected = transform.init(p), np.zeros(2), np.array([1.0, -2.0])
  for gradient in ([0.5, 0.5], [-1.0, 2.0]):
    update, state = transform.update({"w": jnp.array(gradient)}, state, p)
    p = optax.apply_updates(p, update)
    velocity = 0.9 * velocity + np.array(gradient) + 0.01 * expected
    expected = expected - 0.1 * velocity
  np.testing.assert_allclose(p["w"], expected, rtol=1e-6)


def test_a_step_of_muon_is_an_orthogonal_kernel_and_sgd_for_the_rest():
  rng = np.random.default_rng(0)
  params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 6))), "bias": jnp.ones(6)}
  gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
  sizes = {"epochs": 1, "steps_per_epoch": 10, "schedule": "constant"}
  kernels = optimizer.Muon(learning_rate=0.2, weight_decay=0.5, momentum=0.9)
  transform = optimizer.muon(learning_rate=0.1, kernels=kernels, **sizes)
  plain = optimizer.sgd(learning_rate=0.1, **sizes)
  update, state = transform.update(gradient, transform.init(params), params)
  expected, _ = plain.update(gradient, plain.init(params), params)
  np.testing.assert_allclose(update["bias"], expected["bias"], rtol=1e-6)

  def assert_orthogonalised(update, matrix):
    """Without its decay, lr * wd * kernel, the step has the singular vectors of `matrix`."""
    step = -(update["kernel"] / 0.2 + 0.5 * params["kernel"]).reshape(36, 6)
    left, _, right = np.linalg.svd(np.asarray(matrix).reshape(36, 6), full_matrices=False)
    inner = left.T @ step @ right.T
    values = np.diag(inner)
    assert 0.6 < values.min() <= values.max() < 1.3  # five iterations end near 1, not at it
    np.testing.assert_allclose(inner, np.diag(values), atol=1e-4)

  assert_orthogonalised(update, gradient["kernel"])
  second = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
  update, _ = transform.update(second, state, params)
  velocity = 0.9 * 0.1 * gradient["kernel"] + 0.1 * second["kernel"]
  ahead = 0.9 * velocity / (1 - 0.9**3) + 0.1 * second["kernel"] / (1 - 0.9**2)
  assert_orthogonalised(update, ahead)


def test_muon_trains_each_model_as_if_alone(setup, pair):
  recipe, *rest = setup
  recipe = recipe._replace(optimizer=optimizer.muon(epochs=2, steps_per_epoch=3, learning_rate=0.1))
  both = train((recipe, *rest), [0, 1])[-1]
  assert_close(train((recipe, *rest), [1])[-1].states, trees.take(both.states, np.array([1])))
  kernels = [each.states.variables["params"]["stem"]["conv"]["kernel"] for each in (both, pair[-1])]
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_schedules():
  cosine = optimizer.cosine(peak=0.2, epochs=4, steps_per_epoch=5)
  for step in (0, 4, 5, 19):
    epoch = step // 5
    assert float(cosine(step)) == pytest.approx(0.1 * (1 + math.cos(math.pi * epoch / 4)))
  triangle = optimizer.triangular(peak=1.0, epochs=2, steps_per_epoch=10, rise=0.25)
  rates = [float(triangle(step)) for step in range(20)]
  assert np.argmax(rates) == 4
  assert 0 < rates[0] < rates[1]
  assert 0 < rates[-1] < rates[-2] < 0.2
  assert float(optimizer.constant(peak=0.3, epochs=1, steps_per_epoch=1)(7)) == pytest.approx(0.3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"schedule": "linear"}, r"train\.schedule is 'linear'; choose one of"),
    ({"epochs": 0}, r"train\.epochs is 0; it must be at least 1"),
    ({"learning_rate": -1.0}, r"train\.learning_rate is -1\.0"),
    ({"momentum": 1.0}, r"train\.momentum is 1\.0; it must be in \[0, 1\)"),
    ({"kernels": optimizer.Muon(momentum=-1.0)}, r"train\.muon\.momentum is -1\.0"),
  ],
)
def test_bad_optimizer_settings(options, message):
  make = optimizer.muon if "kernels" in options else optimizer.sgd
  with pytest.raises(ValueError, match=message):
    make(**{"learning_rate": 0.1, "epochs": 1, "steps_per_epoch": 1} | options)


def test_cross_entropy_and_accuracy_against_numpy():
  logits = np.array([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]], np.float32)
  labels = np.array([0, 2])
  log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  plain = -log_probabilities[[0, 1], labels].mean()
  smooth = 0.9 * plain - 0.1 * log_probabilities.mean()
  assert loss.cross_entropy(logits, labels) == pytest.approx(plain, rel=1e-5)
  assert loss.cross_entropy(logits, labels, label_smoothing=0.1) == pytest.approx(smooth, rel=1e-5)
  assert loss.accuracy(logits, labels) == 0.5


@pytest.mark.parametrize("lowering", conv.LOWERINGS)
def test_how_convolutions_are_lowered_does_not_matter(setup, pair, lowering):
  recipe, *rest = setup
  lowered = train((recipe._replace(lowering=lowering), *rest), [0, 1])
  assert_close(lowered[-1].states, pair[-1].states)


def test_lowering_is_what_the_recipe_says(setup):
  recipe, images, labels, members = setup
  keys = shadows.model_keys(jax.random.key(0), jnp.arange(MODELS))
  states = shadows.init(keys, recipe, image_shape=images.shape[1:])
  convolutions = {}
  for lowering in conv.LOWERINGS:
    lowered = recipe._replace(lowering=lowering)
    run = functools.partial(shadows._run.__wrapped__, lowered, None, images.shape[1:])
    rows = images.reshape(len(images), -1)
    program = jax.make_jaxpr(run)(states, keys, rows, labels, members[:, None, :BATCH])
    convolutions[lowering] = programs.count(program, "conv_general_dilated")
  assert convolutions["patches"] == 0
  assert convolutions["unrolled"] == MODELS * convolutions["grouped"] > 0


def timed(setup, monkeypatch, speeds, **options):
  """What `training_rates` makes of updates that take no time but 1 / speeds[pair] seconds each."""
  recipe, images, labels, members = setup
  keys, clock = shadows.model_keys(jax.random.key(0), jnp.arange(MODELS)), [0.0]

  def dispatches(states, keys, recipe, *data, together, **rest):
    speed = speeds[together, recipe.lowering]
    if not speed:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    for step in range(1, 100):
      clock[0] += (1000 if step == 1 else 1) / speed  # the first compiles
      yield shadows.Dispatch(step, (states,), None, len(keys))

  monkeypatch.setattr(shadows, "dispatches", dispatches)
  monkeypatch.setattr(shadows, "init", lambda keys, recipe, image_shape: keys)
  monkeypatch.setattr(shadows.time, "perf_counter", lambda: clock[0])
  return shadows.training_rates(keys, recipe, images, labels, members, **options)


def test_pairs_are_timed_while_company_is_worth_it_and_one_without_room_is_0(setup, monkeypatch):
  speeds = {
    (1, "unrolled"): 100,  # updates per second of a round
    (1, "patches"): 40,
    (2, "unrolled"): 52,  # 1.04 times as many images as alone: not worth trying more
    (2, "patches"): 0,
    (2, "grouped"): 60,
    (4, "grouped"): 40,
  }
  rates = timed(setup, monkeypatch, speeds, together=(1, 2, 4))
  images = {pair: speed * pair[0] * BATCH for pair, speed in speeds.items()}
  assert list(rates) == list(speeds)
  assert rates == pytest.approx(images)


def test_a_last_round_that_is_not_full_counts_as_what_it_does(setup, monkeypatch):
  rates = timed(setup, monkeypatch, {(3, "grouped"): 10}, together=(3,), lowerings=("grouped",))
  assert rates == pytest.approx({(3, "grouped"): 10 / 2 * MODELS * BATCH})  # 3 and 1 in two rounds


def test_real_steps_are_timed_in_the_programs_that_training_runs(setup):
  recipe, images, labels, members = setup
  keys = shadows.model_keys(jax.random.key(0), jnp.arange(MODELS))
  train((recipe._replace(lowering="patches"), *setup[1:]), [0, 1])
  before = shadows._run.jitted()._cache_size()
  rates = shadows.training_rates(
    keys, recipe, images, labels, members, together=(2,), lowerings=("patches",)
  )
  assert list(rates) == [(2, "patches")]
  assert 0 < rates[2, "patches"] < math.inf
  assert shadows._run.jitted()._cache_size() == before


def test_largest_chunk_follows_the_memory(setup):
  recipe = setup[0]
  sizes = {"num_examples": EXAMPLES, "num_members": EXAMPLES // 2, "image_shape": (6, 6, 1)}
  choose = functools.partial(shadows.largest_chunk, recipe, **sizes, at_most=100)
  one, two = (shadows._step_bytes(recipe, models, *sizes.values()) for models in (1, 2))
  assert one < two
  assert choose(memory_bytes=0) == 1
  assert choose(memory_bytes=two) == 2
  assert choose(memory_bytes=one + 6 * (two - one)) == 7
  assert choose(memory_bytes=10**12) == 100


class Noisy(nn.Module):
  """Dropout, and noise of another name; evaluation mode by `deterministic`."""

  rate: float = 0.5

  @nn.compact
  def __call__(self, images, deterministic: bool):
    x = nn.Dense(8)(images.reshape(len(images), -1))
    x = nn.Dropout(self.rate, deterministic=deterministic)(nn.relu(x))
    if self.rate and not deterministic:
      x = x + 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
    return nn.Dense(3)(x)


def test_dropout_trains_with_a_key_of_each_model_and_step(setup):
  recipe, images, labels, members = setup

  def trained(ids, rate=0.5):
    mine = (recipe._replace(model=Noisy(rate)), images, labels, members)
    return train(mine, ids)[-1].states.variables

  both, again, still = trained((0, 1)), trained((1,)), trained((1,), rate=0.0)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-4, atol=1e-5), both, again
  )
  assert not np.allclose(again["params"]["Dense_1"]["kernel"], still["params"]["Dense_1"]["kernel"])
  states = shadows.init(
    jax.random.split(jax.random.key(0), 1), recipe._replace(model=Noisy()), image_shape=(6, 6, 1)
  )
  state = trees.take(states, 0)
  batch = (jax.random.key(2), images[:BATCH], labels[:BATCH])
  step = jax.jit(fit.step, static_argnums=0)
  losses = {
    float(
      step(
        recipe._replace(model=Noisy(), augmentation=augment.make(())),
        state._replace(step=jnp.int32(i)),
        *batch,
      )[1].loss
    )
    for i in range(3)
  }
  assert len(losses) == 3  # the same images, another mask
