"""BRECQ: units run the same either way, the Fisher weights, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import fold_batchnorm, resnet, units
from ptq_jax.models.call import Hashable
from ptq_jax.quantize import brecq, grid, reconstruct, walk

QUICK = brecq.SCHEDULE._replace(num_steps=50, batch_size=16)


@pytest.fixture(scope="module")
def residual():
  """A narrow ResNet with a projection shortcut, its variables and images."""
  model = resnet.ResNet(num_classes=5, stages=(1, 1), width=4)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(24, 8, 8, 3)).cumsum(axis=1), jnp.float32)
  variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), images))
  noisy = {
    path: jnp.asarray(leaf + 0.2 * rng.uniform(size=leaf.shape), leaf.dtype)
    for path, leaf in trees.flatten(variables).items()
  }
  return model, trees.unflatten(noisy), images


RUN = jax.jit(units.run, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def rounded(residual):
  """What BRECQ makes of it."""
  return quantize(residual)


def quantize(residual, **options):
  return brecq.quantize_params(jax.random.key(0), *residual, levels=3, schedule=QUICK, **options)


def site_of(model, variables, images, name):
  """Where BRECQ stands before a unit, one branch."""
  unit = next(u for u in units.chain(model, variables, images) if u.name == name)
  x = images
  for before in model.units():
    if before == name:
      break
    x = RUN(model, variables, x, before)
  keys = jax.random.split(jax.random.key(0), 1)
  return walk.Site(model, unit, {}, keys, [0], {0: variables}, {0: x}, [variables], [x])


def test_patches_and_native_convolutions_agree(residual):
  model, variables, images = residual
  unit = units.chain(model, variables, images)[2]
  x = RUN(model, variables, RUN(model, variables, images, "stem"), "blocks_0")
  weights = {layer.path: trees.get(variables, layer.kernel) * 1.1 for layer in unit.layers}
  part = brecq._of_unit(variables, unit)

  def loss(weights, lowering):
    return jnp.sum(brecq.UnitRun(Hashable(model), unit, lowering)(weights, part, x) ** 2)

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  (value, gradient), (expected, expected_gradient) = (
    run(weights, lowering) for lowering in ("patches", "native")
  )
  assert len(weights) == 3
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  for path in weights:
    np.testing.assert_allclose(gradient[path], expected_gradient[path], rtol=1e-3, atol=1e-2)


def test_block_errors_are_those_of_the_results(residual, rounded):
  (model, variables, images), (quantized, info) = residual, rounded
  assert [record.name for record in info] == model.units()
  assert set(info[2].grids) == {f"blocks_1/{n}/conv" for n in ("conv1", "conv2", "shortcut")}
  x = y = images
  for record in info:
    x, y = RUN(model, variables, x, record.name), RUN(model, quantized, y, record.name)
    error = np.mean(np.sum(np.square(x - y), axis=-1))
    np.testing.assert_allclose(record.error_after, error, rtol=1e-3)
    assert record.error_after <= record.error_before
  assert all(record.error_after < record.error_before for record in info[1:])


def test_normalisation_is_folded_and_neutral(residual):
  model, variables, images = residual
  quantized, _ = brecq.quantize_params(
    jax.random.key(0), model, variables, images, levels=None, schedule=QUICK
  )
  folded = fold_batchnorm.fold(model, variables, images)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), quantized, folded
  )


@pytest.mark.parametrize("given", [True, False], ids=["labels", "own labels"])
def test_fisher_weights_are_squared_gradients(residual, given):
  model, variables, images = residual
  site = site_of(model, variables, images, "blocks_0")
  labels = jnp.arange(24) % 5 if given else None
  weights = brecq._importance(site, 0, None if labels is None else labels[None])
  outputs = RUN(model, variables, site.full_inputs[0], "blocks_0")
  if not given:
    logits = jax.jit(model.apply)(variables, images)
    draw = jax.vmap(lambda i, row: jax.random.categorical(jax.random.fold_in(site.keys[0], i), row))
    labels = draw(jnp.arange(24), logits)

  def cross_entropy(output, label):
    x = output[None]
    for name in ("blocks_1", "head"):
      x = units.run(model, variables, x, name)
    return -jax.nn.log_softmax(x)[0, label]

  squares = jax.jit(jax.vmap(jax.grad(cross_entropy)))(outputs, labels) ** 2
  np.testing.assert_allclose(weights, squares / squares.mean(), rtol=1e-2, atol=1e-3)


def test_fisher_weights_reach_the_loop(residual, monkeypatch):
  model, variables, images = residual
  seen = []

  def idle(run, problems, keys, **options):
    seen.append(problems.importance)
    alphas = jax.tree.map(jnp.zeros_like, problems.weights)
    return alphas, np.zeros(len(keys), int)

  monkeypatch.setattr(reconstruct, "minimize", idle)
  run = functools.partial(
    brecq.quantize_params, jax.random.key(0), model, variables, images, levels=4
  )
  run(loss="mse")
  assert seen == [None] * (len(model.units()) - 1)  # the head needs no loop
  _, info = run(loss="fisher", labels=jnp.arange(24)[None] % 5)
  importance = seen[len(model.units()) - 1][0]
  np.testing.assert_allclose(importance.mean(), 1, rtol=1e-4)
  folded = fold_batchnorm.fold(model, variables, images)
  path = "params/stem/conv/kernel"
  kernel = trees.get(folded, path)
  rounded = trees.replace(folded, {path: grid.nearest(kernel, grid.fit(kernel, levels=4))})
  outputs, targets = (RUN(model, v, images, "stem") for v in (rounded, folded))
  error = np.mean(np.sum(importance * np.square(outputs - targets), axis=-1))
  np.testing.assert_allclose(info[0].error_before, error, rtol=1e-3)


@pytest.mark.parametrize(
  ("name", "layerwise"), [("stem", False), ("blocks_1", False), ("head", True)]
)
def test_only_a_layer_with_nothing_after_it_is_left_to_adaround(residual, name, layerwise):
  site = site_of(*residual, name)
  options = brecq._Options("mse", None, "auto", brecq.SCHEDULE, "plateau", {})
  assert brecq._is_quadratic(site, options) == layerwise
  assert not brecq._is_quadratic(site, options._replace(form="mini_batch"))
  assert not brecq._is_quadratic(site, options._replace(loss="fisher"))


def test_the_head_is_rounded_better_than_by_mini_batches(residual, rounded):
  _, info = quantize(residual, form="mini_batch")
  assert [record.name for record in info] == residual[0].units()
  auto, batches = ([float(record.error_after) for record in each] for each in (rounded[1], info))
  assert auto[:-1] == batches[:-1]
  assert auto[-1] < batches[-1]


def test_unknown_form(untrained):
  with pytest.raises(ValueError, match='form must be "auto" or "mini_batch", got \'x\''):
    brecq.quantize_stacked(
      untrained.keys, untrained.model, untrained.variables, untrained.images, plans=[], form="x"
    )


def test_how_units_run():
  layer = units.Layer("a", "conv", (3, 3, 1, 1))
  single, block = units.Unit("a", (layer,)), units.Unit("b", (layer, layer))
  assert brecq._execution(single, "cpu") == ("patches", None, 50)
  assert brecq._execution(block, "cpu") == ("native", 1, 1)
  products = units.Unit("c", (units.Layer("c", "dense", (3, 3)),) * 2)
  assert brecq._execution(products, "cpu") == ("native", None, 50)
  assert brecq._execution(block, "gpu") == ("native", brecq.BRANCHES_AT_ONCE, 50)


def test_unknown_loss(untrained):
  with pytest.raises(ValueError, match='loss must be "mse" or "fisher", got \'l1\''):
    brecq.quantize_stacked(
      untrained.keys, untrained.model, untrained.variables, untrained.images, plans=[], loss="l1"
    )
