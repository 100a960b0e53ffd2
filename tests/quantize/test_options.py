"""What is no argument of a method is refused in a sentence before anything is computed."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from ptq_jax.quantize import METHODS, nearest, options, walk
from tests.audit.conftest import unchecked

MODEL, IMAGES = nn.Sequential([nn.Dense(3)]), np.ones((4, 2), np.float32)
GIVEN = {"key": jax.random.key(0), "model": MODEL, "variables": {}, "images": IMAGES}


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"key": 0}, "key is of the type int; give one of jax.random.key"),
    ({"model": nn.Dense}, "model is of the type type; give a flax.linen.Module"),
    ({"variables": None}, "variables is of the type NoneType; give what model.init gives"),
    (
      {"variables": {"kernel": 1}},
      r'no collection "params" but \[.kernel.\]; give what model.init',
    ),
    ({"images": [1, 2]}, "images is of the type list; give an array"),
    ({"damping": -1.0}, "^damping is -1.0; it must be at least 0"),
    ({"block_size": 1.5}, "^block_size is 1.5; it must be a whole number of at least 1, or None"),
    ({"grid_options": {"norm": np.float32(0)}}, "^grid_options.norm is np.float32"),
    ({"memory_bytes": True}, "^memory_bytes is True"),
  ],
)
def test_what_is_no_argument(changes, sentence):
  arguments = {name: changes.get(name, value) for name, value in GIVEN.items()}
  of_obc = {name: changes[name] for name in changes.keys() - GIVEN}
  with unchecked(), pytest.raises(ValueError, match=sentence):
    METHODS["obc"].quantize_params(*arguments.values(), levels=3, **of_obc)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"levels": [3]}, r"levels of a layer are \[3\]; give one whole number"),
    ({"levels": {"*": (3, 4)}}, r"levels of a layer are \(3, 4\); give one"),
    ({"grid_options": 3}, "grid_options is 3; give options of grid.fit by name"),
    ({"grid_options": {"sides": 2}}, "grid_options has 'sides'; the options of a grid are symm"),
  ],
)
def test_what_a_layer_or_a_grid_cannot_be_given(changes, sentence):
  variables = jax.device_get(MODEL.init(jax.random.key(0), IMAGES))
  arguments = (GIVEN | {"variables": variables}).values()
  with unchecked(), pytest.raises(ValueError, match=sentence):
    METHODS["nearest"].quantize_params(*arguments, **{"levels": 3, **changes})


def test_inside_of_jit_is_a_sentence():
  variables = MODEL.init(jax.random.key(0), IMAGES)
  run = functools.partial(METHODS["nearest"].quantize_params, jax.random.key(0), MODEL, levels=3)
  with pytest.raises(ValueError, match=r"cannot run inside jax.jit, vmap or grad"):
    jax.jit(lambda v: run(v, IMAGES)[0])(variables)


def test_numbers_may_be_of_numpy_and_jax():
  options.check("obc", {"damping": jax.numpy.float32(0.1), "block_size": np.int64(3)})
  options.check(
    "brecq", {"schedule": {"num_steps": np.array(3), "decay_rates": (0, np.float32(0))}}
  )


def test_options_of_a_method_of_ones_own_are_left_to_it():
  def quantize_stacked(keys, model, variables, images, *, plans, norm):
    raise KeyError(norm)

  variables = MODEL.init(jax.random.key(0), IMAGES)
  arguments = (GIVEN | {"variables": variables}).values()
  with pytest.raises(KeyError, match="euclid"):
    walk.for_one_model(quantize_stacked)(*arguments, levels=3, norm="euclid")
  assert nearest.quantize_params.__module__ == nearest.__name__
