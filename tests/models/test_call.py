"""Models are told by their own words whether they train."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.models import call

IMAGES = jnp.ones((4, 6))


def model_with(word, trains):
  """A model with dropout and a normalisation whose `__call__` has an argument of this name."""

  def body(self, images, value):
    x = nn.Dense(8)(images)
    x = nn.BatchNorm(use_running_average=(value != trains), name="norm")(x)
    return nn.Dropout(0.5, deterministic=(value != trains))(x)

  scope = {"body": nn.compact(body)}
  exec(f"def __call__(self, images, {word}): return self.body(images, {word})", scope)
  return type("Model", (nn.Module,), {"__call__": scope["__call__"], "body": scope["body"]})()


@pytest.mark.parametrize(
  ("word", "trains"),
  [
    ("train", True),
    ("training", True),
    ("is_training", True),
    ("deterministic", False),
    ("use_running_average", False),
  ],
)
def test_every_word_is_understood(word, trains):
  model = model_with(word, trains)
  assert call.mode(model, train=True) == {word: trains}
  variables = call.init(model, jax.random.key(0), IMAGES)
  still = call.apply(model, variables, IMAGES)
  assert (still != 0).all()
  moving, changed = call.apply(
    model,
    variables,
    IMAGES,
    train=True,
    mutable=["batch_stats"],
    rngs=call.rngs(jax.random.key(1)),
  )
  assert (moving == 0).any()
  mean = variables["batch_stats"]["norm"]["mean"]
  assert not np.array_equal(changed["batch_stats"]["norm"]["mean"], mean)


def test_a_model_without_such_an_argument_is_called_plainly():
  model = nn.Sequential([nn.Dense(3), nn.relu])
  variables = call.init(model, jax.random.key(0), IMAGES)
  np.testing.assert_array_equal(
    call.apply(model, variables, IMAGES, train=True), model.apply(variables, IMAGES)
  )


def test_randomness_of_other_names_has_a_key():
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool):
      return images + train * jax.random.normal(self.make_rng("noise"), images.shape)

  one, same, other = (
    call.apply(Noisy(), {}, IMAGES, train=True, rngs=call.rngs(jax.random.key(seed)))
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).all()
