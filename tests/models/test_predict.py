import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import models, trees
from ptq_jax.models import parallel, predict, units
from tests import fresh


@pytest.fixture(scope="module")
def setup():
  model = models.make("convnet", num_classes=3, width=2, num_convolutions=2)
  images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), dtype=np.uint8)
  labels = np.arange(11) % 3
  one = [fresh.variables(model, np.zeros((1, 8, 8, 1), np.float32), seed=i) for i in range(3)]
  return model, one, images, labels


def two_views(images, positions):
  """The image, and the image with its position in the data set added to every pixel."""
  pixels = images.astype(jnp.float32) / 255
  return jnp.stack([pixels, pixels + positions[:, None, None, None]])


def test_equals_one_model_one_view_at_a_time(setup):
  model, one, images, labels = setup
  run = predict.Predictor(model, prepare=two_views, reduce=lambda logits, labels: logits)
  found = run(trees.stack(one), images, labels, batch_size=4)
  assert found.shape == (3, 11, 2, 3)
  apply = jax.jit(model.apply)
  for m, variables in enumerate(one):
    for v, pixels in enumerate(two_views(images, jnp.arange(11))):
      np.testing.assert_allclose(found[m, :, v], apply(variables, pixels), rtol=1e-4, atol=1e-5)


def test_batch_size_changes_nothing_and_compiles_once(setup):
  model, one, images, labels = setup
  shapes = []

  def correct(logits, labels):
    shapes.append(logits.shape)
    return predict.is_correct(logits, labels)

  run = predict.Predictor(model, prepare=two_views, reduce=correct)
  whole = run(trees.stack(one), images, labels, batch_size=100)
  parts = run(trees.stack(one), images, labels, batch_size=4)
  np.testing.assert_array_equal(whole, parts)
  assert shapes == [(3, 2, 11, 3), (3, 2, 4, 3)]
  assert set(np.unique(whole)) <= {0.0, 1.0}


def test_models_one_by_one_or_together(setup, monkeypatch):
  model, one, images, labels = setup
  run = predict.Predictor(model, prepare=two_views, reduce=lambda logits, labels: logits)
  together = run(trees.stack(one), images, labels, batch_size=4)
  monkeypatch.setattr(parallel, "ALONE_FLOP", 0)
  np.testing.assert_allclose(
    run(trees.stack(one), images, labels, batch_size=4), together, rtol=1e-4, atol=1e-5
  )


def test_heads_share_the_rest(setup, monkeypatch):
  model, one, images, labels = setup
  run = predict.Predictor(model, prepare=two_views, reduce=lambda logits, labels: logits)
  stacked = trees.stack(one)
  body, head = units.split(model, stacked)
  assert set(body["params"]) == {"stem", "blocks_0"}
  assert set(head["params"]) == {"head"}
  heads = [head, jax.tree.map(lambda leaf: leaf + 1, head)]
  times, once = [], run._run_body
  monkeypatch.setattr(run, "_run_body", lambda *args: times.append(1) or once(*args))
  found = run.with_heads(body, heads, images, labels, batch_size=4)
  assert len(times) == 3
  for one_head, logits in zip(heads, found, strict=True):
    whole = {name: body[name] | one_head.get(name, {}) for name in body}
    np.testing.assert_array_equal(logits, run(whole, images, labels, batch_size=4))
  assert not np.array_equal(*found)


def test_out_of_memory_halves_the_models_and_goes_on(setup, monkeypatch):
  model, one, images, labels = setup
  run = predict.Predictor(model, prepare=two_views, reduce=lambda logits, labels: logits)
  stacked = trees.stack([*one, one[0], one[1]])
  expected = run(stacked, images, labels, batch_size=4)
  tried, run_head, fails = [], run._run_head, {1, 5}  # the second time within a share

  def cramped(mesh, head, *rest):
    tried.append(trees.length(head))
    if len(tried) in fails:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return run_head(mesh, head, *rest)

  monkeypatch.setattr(run, "_run_head", cramped)
  with pytest.warns(UserWarning, match="out of memory with . models at once .* going on with"):
    found = run(stacked, images, labels, batch_size=6)
  assert tried == [5, 2, 2, 2, 2] + [1] * 6
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  tried.clear()
  fails.clear()
  np.testing.assert_array_equal(run(stacked, images, labels, batch_size=6)[2:], found[2:])
  assert tried == [1] * 10  # remembered
  fails.add(12)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    run(stacked, images, labels, batch_size=6)


def test_a_model_without_units():
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      return nn.Dense(3)(images.reshape(len(images), -1))

  model, images = Plain(), np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
  one = [fresh.variables(model, np.zeros((1, 4, 4, 1), np.float32), seed=i) for i in range(2)]
  assert units.split(model, one[0]) == ({}, one[0])
  run = predict.Predictor(model, prepare=two_views, reduce=lambda logits, labels: logits)
  found = run(trees.stack(one), images, np.zeros(5, int), batch_size=3)
  apply = jax.jit(model.apply)
  for m, variables in enumerate(one):
    for v, pixels in enumerate(two_views(images, jnp.arange(5))):
      np.testing.assert_allclose(found[m, :, v], apply(variables, pixels), rtol=1e-4, atol=1e-5)


def test_batch_size_must_be_positive(setup):
  model, one, images, labels = setup
  run = predict.Predictor(model, prepare=two_views, reduce=predict.is_correct)
  with pytest.raises(ValueError, match="batch_size is 0"):
    run(trees.stack(one), images, labels, batch_size=0)
