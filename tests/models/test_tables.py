import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ptq_jax import models
from ptq_jax.models import tables
from tests import fresh

TOKENS = np.array([[0, 3, 1], [4, 0, 2]], np.int32)


class Model(nn.Module):
  """A table of ids after some are added, and one of places, which is smaller and large enough."""

  rows: int
  added: int = 0

  @nn.compact
  def __call__(self, tokens):
    places = nn.Embed(3, 4, name="places")(jnp.arange(tokens.shape[1]))
    x = nn.Embed(self.rows, 4, name="words")(tokens + self.added) + places[None]
    return nn.Dense(2, name="head")(x.mean(axis=1))


def check(model, tokens=TOKENS):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(tokens))
  tables.require_rows(model, shapes, tokens)


@pytest.mark.parametrize(
  ("model", "sentence"),
  [
    (Model(4), "table 'words' has rows 0 to 3, but the token ids ask for row 4"),
    (Model(6, added=2), "table 'words' has rows 0 to 5, .* row 6"),
    (Model(9, added=-5), "table 'words' has rows 0 to 8, .* row -"),
  ],
)
def test_a_row_that_there_is_not_is_refused(model, sentence):
  with pytest.raises(ValueError, match=sentence):
    check(model)


def test_rows_that_there_are():
  check(Model(5))
  check(Model(7, added=2))


def test_a_model_of_no_tokens_is_refused():
  class Numbers(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2)(x)

  with pytest.raises(ValueError, match=r"Numbers has no table \(flax\.linen\.Embed\)"):
    check(Numbers())


class OfNnx(nnx.Module):
  def __init__(self, num_classes, vocabulary, rngs):
    self.words = nnx.Embed(vocabulary, 4, rngs=rngs)
    self.head = nnx.Linear(4, num_classes, rngs=rngs)

  def __call__(self, tokens):
    return self.head(self.words(tokens).mean(axis=1))


def test_a_factory_is_given_the_number_of_ids_unless_it_was_chosen():
  model = models.make(OfNnx, num_classes=2, num_tokens=5)
  check(model)
  with pytest.raises(ValueError, match="table 'words' has rows 0 to 3"):
    check(models.make(OfNnx, num_classes=2, num_tokens=5, vocabulary=4))
  assert models.make("transformer", num_classes=2, num_tokens=5).vocabulary == 5
  with pytest.raises(ValueError, match=r"model 'transformer' takes token ids .*; these are none"):
    models.make("transformer", num_classes=2)


def test_a_large_table_is_kept_and_its_ids_are_no_bytes():
  """Above `units.MAX_TABLE` rows it is listed; what reads it still takes integers."""
  from ptq_jax import quantize

  model = models.make("transformer", num_classes=2, vocabulary=5000, width=4, depth=0, num_heads=1)
  survey = quantize.check_model(model, image_shape=(3,), tokens=TOKENS[:1])
  assert [kept.path for kept in survey.kept] == ["stem/position", "stem/tokens/embedding"]
  assert [layer.path for layer in survey.layers] == ["head/classifier"]
  variables = fresh.variables(model, jnp.asarray(TOKENS))
  assert model.apply(variables, jnp.asarray(TOKENS)).shape == (2, 2)
