import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import models
from ptq_jax.models import parallel

ROOT = pathlib.Path(__file__).resolve().parents[2]

SMALL_MODEL = """
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np

class Small(nn.Module):
  norm: bool = False

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(2, (2, 2))(x)
    if self.norm:
      x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(3)(nn.relu(x).mean(axis=(1, 2)))
"""


TRAIN = """
from ptq_jax import trees
from ptq_jax.data import augment, membership
from ptq_jax.models import parallel
from ptq_jax.train import fit, optimizer, shadows

assert len(jax.devices()) == 4
images = np.random.default_rng(0).integers(0, 256, (48, 6, 6, 1), dtype=np.uint8)
labels = np.arange(48) % 3
recipe = fit.Recipe(
  Small(norm=True),
  optimizer.sgd(learning_rate=0.1, epochs=20, steps_per_epoch=3),
  augment.make(("shift1",)), (0.5,), (0.25,), 8,
)
rows = membership.paired(jax.random.key(1), num_models=6, num_examples=48)
members = membership.members_of(rows)
keys = shadows.model_keys(jax.random.key(0), np.arange(6))
fresh = jax.device_get(shadows.init(keys, recipe, image_shape=(6, 6, 1)))


def train(count, devices, first=0, states=fresh, last=60):
  # Two models in a program, on so many devices: one to three rounds.
  mesh = parallel.mesh_for(devices) if devices > 1 else None
  states = trees.take(states, slice(count))
  data = (images, labels, members[:count])
  *_, done = shadows.dispatches(
    states, keys[:count], recipe, *data, first=first, last=last, together=2, mesh=mesh
  )
  used = {device for leaf in jax.tree.leaves(done.rounds) for device in leaf.devices()}
  assert len(used) == devices
  return done


whole = jax.device_get(train(6, 1).states())
same = lambda one, other: jax.tree.map(np.testing.assert_array_equal, one, other)
same(jax.tree.map(lambda leaf: leaf[:5], whole), train(5, 3).on_host())  # others are beside it
part = train(6, 3, last=34)  # in the middle of an epoch
same(whole, train(6, 2, first=34, states=part.on_host()).on_host())
print("same")
"""


QUANTIZE_AND_PREDICT = """
from ptq_jax import quantize, trees
from ptq_jax.models import predict, units
from ptq_jax.quantize import plan

model = Small()
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (12, 6, 6, 1), dtype=np.uint8)
pixels = jnp.asarray(rng.normal(size=(3, 12, 6, 6, 1)).cumsum(2).cumsum(3), jnp.float32)
keys = jax.random.split(jax.random.key(0), 3)
one = pixels[0]
variables = jax.device_get(jax.jit(jax.vmap(lambda key: model.init(key, one)))(keys))

run = predict.Predictor(
  model, prepare=lambda x, _: x[None] / 255, reduce=lambda logits, labels: logits
)
together = run(variables, images, np.zeros(12, int), batch_size=5)  # on three of four devices
for m in range(3):
  alone = run(trees.take(variables, slice(m, m + 1)), images, np.zeros(12, int), batch_size=5)
  np.testing.assert_allclose(together[m], alone[0], rtol=1e-4, atol=1e-5)

layers = units.layers(model, trees.take(variables, 0), one)
plans = [plan.make(layers, levels=levels) for levels in (3, 16)]
found = []
for devices in (jax.local_devices()[:1], jax.local_devices()[1:3]):  # 1 and 2 models on the two
  quantized, records = quantize.quantize_stacked(
    "obc", keys, model, variables, pixels, plans=plans, devices=devices, batchnorm_images=pixels
  )
  assert [record.name for record in records] == ["Conv_0", "Dense_0"]
  assert records[0].error_after.shape == (2, 3)
  found.append(jax.device_get((quantized, [record.error_after for record in records])))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
print("same")
"""


FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
EVERY_BIT = "--xla_backend_optimization_level=1"
"""Nearer to how users compile: the tests' own flags do not keep every bit."""


def on_four_devices(program, flags):
  """What a program prints in a process with four virtual devices."""
  done = subprocess.run(
    [sys.executable, "-c", SMALL_MODEL + program],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": f"{flags} {FOUR_DEVICES}"},
    capture_output=True,
    text=True,
  )
  return done.stdout or done.stderr[-3000:]


def test_models_are_the_same_bit_by_bit_on_any_number_of_devices():
  assert on_four_devices(TRAIN, EVERY_BIT) == "same\n"


def test_devices_quantize_and_predict_the_same_as_one():
  assert on_four_devices(QUANTIZE_AND_PREDICT, os.environ["XLA_FLAGS"]) == "same\n"


def test_a_mesh_has_all_devices_and_rounds_take_what_is_left():
  one = jax.local_devices()[:1]
  assert parallel.mesh_for(16, devices=one) is None
  assert parallel.rounds(7, together=3, mesh=None) == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_over_models_without_a_mesh_is_vmap():
  def scaled(x, shared):
    return x * shared.sum()

  found = parallel.over_models(scaled, in_axes=(0, None))(jnp.arange(3.0), jnp.ones(2))
  np.testing.assert_array_equal(found, [0.0, 2.0, 4.0])
  assert parallel.place(jnp.ones(2), None).devices() == {jax.local_devices()[0]}


SMALL, BATCH = models.make("convnet", num_classes=3, width=2), (4, 8, 8, 1)


def test_models_with_enough_work_run_one_by_one(monkeypatch):
  together = functools.partial(parallel.together, SMALL, num_models=3, batch_shape=BATCH)
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert together() == 3
  monkeypatch.setattr(parallel, "ALONE_FLOP", 1)
  assert together() == 1
  assert together(num_models=4, devices=2) == 2  # whose convolutions are slow on a CPU anyhow
  assert parallel.rounds(3, together=together(), mesh=None) == [slice(m, m + 1) for m in range(3)]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_on_an_accelerator_small_models_run_together_some_at_a_time(monkeypatch, platform):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  together = functools.partial(parallel.together, SMALL, batch_shape=BATCH)
  assert [together(num_models=m) for m in (1, 3, 8, 9, 12, 64)] == [1, 3, 8, 5, 6, 8]
  assert together(num_models=12, devices=4) == 3
  monkeypatch.setattr(parallel, "ACCELERATOR_ALONE_FLOP", 1)
  assert [together(num_models=m) for m in (1, 3, 64)] == [1, 1, 1]
  assert together(num_models=12, devices=4) == 1


def test_the_line_between_small_and_big_on_an_accelerator(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  found = {
    (name, width): parallel.together(
      models.make(name, num_classes=10, width=width), num_models=8, batch_shape=(128, 32, 32, 3)
    )
    for name, width in (("convnet", 16), ("resnet8", 16), ("resnet20", 16), ("resnet8", 64))
  }
  assert list(found.values()) == [8, 8, 8, 1]
