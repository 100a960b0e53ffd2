import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.models import parallel

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from ptq_jax import models
from ptq_jax.data import augment, membership
from ptq_jax.models import parallel
from ptq_jax.train import fit, optimizer, shadows

assert len(jax.devices()) == 4
images = np.random.default_rng(0).integers(0, 256, (48, 6, 6, 1), dtype=np.uint8)
labels = jnp.arange(48) % 3
recipe = fit.Recipe(
  models.make("convnet", num_classes=3, width=2),
  optimizer.sgd(learning_rate=0.1, epochs=1, steps_per_epoch=3),
  augment.make(("shift1",)), (0.5,), (0.25,), 8,
)
rows = membership.paired(jax.random.key(1), num_models=4, num_examples=48)
members = jnp.asarray(membership.members_of(rows))
found = []
for mesh in (None, parallel.mesh_for(4)):
  keys = shadows.model_keys(jax.random.key(0), jnp.arange(4))
  states = shadows.init(keys, recipe, image_shape=(6, 6, 1))
  data = (jnp.asarray(images), labels, members)
  epoch, = shadows.epochs(states, keys, recipe, *data, first=0, last=1, mesh=mesh)
  assert len(jax.tree.leaves(epoch.states)[0].devices()) == (1 if mesh is None else 4)
  found.append(jax.device_get((epoch.states, epoch.metrics)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
print("same")
"""


def test_four_devices_train_the_same_models_as_one():
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    capture_output=True,
    text=True,
  )
  assert done.stdout == "same\n", done.stderr[-3000:]


def test_mesh_has_as_many_devices_as_divide_the_models():
  one = jax.local_devices()[:1]
  assert parallel.mesh_for(16, devices=one) is None
  assert parallel.mesh_for(7, devices=one * 2) is None


def test_over_models_without_a_mesh_is_vmap():
  def scaled(x, shared):
    return x * shared.sum()

  found = parallel.over_models(scaled, in_axes=(0, None))(jnp.arange(3.0), jnp.ones(2))
  np.testing.assert_array_equal(found, [0.0, 2.0, 4.0])
  assert parallel.place(jnp.ones(2), None).devices() == {jax.local_devices()[0]}
