"""Models that no audit can make sense of are told apart before any training."""

from collections.abc import Callable

import flax.linen as nn
import numpy as np
import pytest

from ptq_jax.models import checks

EXAMPLES = np.random.default_rng(0).normal(size=(checks.NUM_EXAMPLES, 4)).astype(np.float32)


class Model(nn.Module):
  """A linear classifier with something after and before its layer."""

  end: Callable = lambda x: x
  before: Callable = lambda x, train: x

  @nn.compact
  def __call__(self, x, train: bool = False):
    return self.end(nn.Dense(3)(self.before(x, train)))


def centred(x, _):
  return x - x.mean(0, keepdims=True)


def notes(**parts):
  return checks.check_classifier(Model(**parts), EXAMPLES, name="mine")


@pytest.mark.parametrize(
  ("parts", "sentence"),
  [
    ({"end": nn.softmax}, "mine gives probabilities, which add up to 1; .* leave out the softmax"),
    ({"end": nn.sigmoid}, "mine gives probabilities from 0 to 1; .* leave out the sigmoid"),
    ({"before": centred}, "other logits when others are in its batch"),
    ({"before": lambda x, _: x[::-1]}, "other logits when others are in its batch"),
  ],
)
def test_what_gives_no_logits_of_one_example_is_refused(parts, sentence):
  """Trained on the cross-entropy of probabilities, a network learns little and its scores lie."""
  with pytest.raises(ValueError, match=sentence):
    notes(**parts)


@pytest.mark.parametrize(
  ("parts", "words"),
  [
    ({"end": nn.relu}, "are never negative"),
    ({"end": lambda x: x.astype("bfloat16")}, "are bfloat16, so many examples have the same score"),
    (
      {"before": lambda x, _: nn.BatchNorm(True, name="norm")(x)},
      "leaves these batch statistics as they began in training: norm/mean, norm/var; if",
    ),
    ({"before": lambda x, _: nn.Dropout(0.1, name="d")(x, True)}, "is off in training: d; if"),
  ],
)
def test_what_may_be_meant_is_said(parts, words):
  [note] = notes(**parts)
  assert words in note


def test_nothing_is_said_of_what_is_well():
  def before(x, train):
    return nn.Dropout(0.1)(nn.BatchNorm(not train)(nn.Dropout(0.0)(x, True)), not train)

  for end in (nn.log_softmax, nn.tanh, lambda x: 1e-3 * x, lambda x: 0 * x):
    assert notes(end=end, before=before) == []
  lonely = EXAMPLES[[0] * checks.NUM_EXAMPLES]
  assert checks.check_classifier(Model(before=centred), lonely, name="mine") == []
