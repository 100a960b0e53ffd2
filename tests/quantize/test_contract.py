"""What every method promises, each run through the same tests; and the claims on a trained net."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import METHODS, brecq, grid, plan

QUICK = {
  "nearest": {},
  "adaround": {},
  "brecq": {"schedule": brecq.SCHEDULE._replace(num_steps=20, batch_size=16)},
  "obc": {},
}
LEVELS = (3, 4, 16)


def layers_of(ensemble):
  return units.layers(ensemble.model, *trees.take((ensemble.variables, ensemble.images), 0))


def stacked(name, ensemble, variables=None, images=None, keys=None, plans=None):
  """A method on an ensemble, quickly."""
  plans = plans or [plan.make(layers_of(ensemble), levels=levels) for levels in LEVELS]
  return METHODS[name].quantize_stacked(
    ensemble.keys if keys is None else keys,
    ensemble.model,
    ensemble.variables if variables is None else variables,
    ensemble.images if images is None else images,
    plans=plans,
    **QUICK[name],
  )


@pytest.fixture(scope="module", params=METHODS)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def quick(digits):
  """A function of a method's name: what it gives, quickly."""
  return functools.cache(lambda name: stacked(name, digits))


@pytest.fixture(scope="module")
def result(name, quick):
  return quick(name)


def num_values(kernel):
  """Largest number of distinct values in an output channel."""
  columns = np.asarray(kernel, np.float32).reshape(-1, kernel.shape[-1]).T
  return max(len(np.unique(column)) for column in columns)


def assert_same_tree(quantized, variables, leading):
  assert jax.tree.structure(quantized) == jax.tree.structure(variables)
  for new, old in zip(jax.tree.leaves(quantized), jax.tree.leaves(variables), strict=True):
    assert new.shape == (leading, *old.shape)
    assert new.dtype == old.dtype
    assert np.isfinite(np.asarray(new, np.float32)).all()


def test_same_tree_and_at_most_levels_values_per_channel(result, digits):
  quantized, info = result
  assert_same_tree(quantized, digits.variables, 3)
  for layer in layers_of(digits):
    kernels = trees.get(quantized, layer.kernel)
    for p, m in np.ndindex(3, 2):
      assert 1 < num_values(kernels[p, m]) <= LEVELS[p]
  for record in info:
    for field in record[1:5]:
      assert np.shape(field) == (3, 2)
    assert (record.error_after <= record.error_before).all()


def test_weights_lie_on_the_recorded_grids(result):
  quantized, info = result
  covered = set()
  for record in info:
    for path, grids in record.grids.items():
      covered.add(path)
      kernels = trees.get(quantized, f"params/{path}/kernel")
      for p, m in np.ndindex(3, 2):
        fitted = jax.tree.map(lambda leaf, at=(p, m): jnp.asarray(leaf[at]), grids)
        assert int(fitted.levels) == LEVELS[p]
        np.testing.assert_array_equal(grid.nearest(kernels[p, m], fitted), kernels[p, m])
  assert len(covered) == 4


def test_deterministic(result, name, digits):
  again, _ = stacked(name, digits)
  jax.tree.map(np.testing.assert_array_equal, again, result[0])


@pytest.mark.parametrize("name", ["brecq"], indirect=True)
def test_one_model_alone_gives_the_same(result, name, digits):
  """Of the others: test_nearest, test_walk and test_obc."""
  variables, images = trees.take((digits.variables, digits.images), 1)
  alone, info = METHODS[name].quantize_params(
    digits.keys[1], digits.model, variables, images, levels=3, **QUICK[name]
  )
  expected = jax.tree.map(lambda leaf: leaf[0, 1], result[0])
  for path, leaf in trees.flatten(alone).items():
    np.testing.assert_allclose(
      leaf, trees.get(expected, path), rtol=1e-5, atol=1e-6, err_msg=f"{name} {path}"
    )
  assert all(np.shape(record.error_after) == () for record in info)


def test_last_layer_has_its_own_levels(digits):
  """Of AdaRound and OBC: test_walk and test_obc."""
  layers = layers_of(digits)
  plans = [plan.make(layers, levels=3, last_layer_levels=last) for last in (256, "full")]
  quantized, _ = stacked("nearest", digits, plans=plans)
  last = trees.get(quantized, layers[-1].kernel)
  original = trees.get(digits.variables, layers[-1].kernel)
  assert 16 < num_values(last[0, 0]) <= 256
  np.testing.assert_array_equal(last[1], original)
  for layer in layers[:-1]:
    assert num_values(trees.get(quantized, layer.kernel)[1, 1]) <= 3


def test_dead_inputs_and_constant_channels_are_safe(name, digits):
  path = "params/blocks_0/conv/kernel"
  kernel = np.array(trees.get(digits.variables, path))
  kernel[..., 0], kernel[..., 1] = 0.0, 0.25
  stem = np.array(trees.get(digits.variables, "params/stem/bn/scale"))
  stem[:, :3] = 0.0
  changed = {path: jnp.asarray(kernel), "params/stem/bn/scale": jnp.asarray(stem)}
  variables = trees.replace(digits.variables, changed)
  images = jnp.asarray(np.broadcast_to(digits.images[:, :1], digits.images.shape))
  quantized, info = stacked(name, digits, variables=variables, images=images)
  assert_same_tree(quantized, variables, 3)
  np.testing.assert_array_equal(trees.get(quantized, path)[..., 0], 0)
  assert all((record.error_after <= record.error_before).all() for record in info)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda e: {"images": e.images[:, :0]}, "the calibration set is empty"),
    (lambda e: {"images": e.images[:1], "keys": e.keys[:1]}, "with 2 models"),
    (lambda e: {"images": jnp.tile(e.images, (1, 1, 1, 1, 3))}, "do not fit ConvNet"),
    (lambda e: {"images": e.images.at[0, 0].set(jnp.nan)}, "images hold NaN"),
    (
      lambda e: {"variables": jax.tree.map(lambda leaf: leaf * jnp.nan, e.variables)},
      "holds NaN or infinite values; was the model trained",
    ),
    (lambda e: {"plans": [{"stem/conv": 3}]}, "plan and layers differ"),
  ],
)
def test_bad_input(name, digits, change, message):
  with pytest.raises(ValueError, match=message):
    stacked(name, digits, **change(digits))


@pytest.mark.parametrize("levels", [1, 257])
def test_levels_out_of_range(name, digits, levels):
  variables, images = trees.take((digits.variables, digits.images), 0)
  with pytest.raises(ValueError, match="levels must be a whole number from 2 to 256"):
    METHODS[name].quantize_params(digits.keys[0], digits.model, variables, images, levels=levels)


@pytest.fixture(scope="module")
def defaults(digits, quick):
  """Every method as it comes, at 3, 4 and 16 levels, all layers."""
  plans = [plan.make(layers_of(digits), levels=levels) for levels in LEVELS]
  return {
    name: METHODS[name].quantize_stacked(
      digits.keys, digits.model, digits.variables, digits.images, plans=plans
    )
    if options
    else quick(name)
    for name, options in QUICK.items()
  }


@functools.partial(jax.jit, static_argnums=0)
def predictions(model, variables, images):
  """Classes [P, M, n]."""
  logits = jax.vmap(jax.vmap(model.apply, (0, None)), (0, None))(variables, images)
  return logits.argmax(-1)


def accuracies(ensemble, variables):
  """Test accuracy [P, M] in percent."""
  found = np.asarray(predictions(ensemble.model, variables, ensemble.test_images))
  return 100 * np.mean(found == ensemble.test_labels, axis=-1)


def block_errors(ensemble, variables):
  """Error of each unit's output on the calibration images, [units, P, M]."""

  def of_one(full, quantized, images):
    errors, x, y = [], images, images
    for name in ensemble.model.units():
      x = units.run(ensemble.model, full, x, name)
      y = units.run(ensemble.model, quantized, y, name)
      errors.append(jnp.mean(jnp.sum((x - y) ** 2, axis=-1)))
    return jnp.stack(errors)

  per_model = jax.vmap(of_one)
  per_plan = jax.jit(jax.vmap(per_model, (None, 0, None)))
  return np.moveaxis(np.asarray(per_plan(ensemble.variables, variables, ensemble.images)), -1, 0)


def test_every_layer_beats_nearest_rounding(defaults):
  for name in ("adaround", "obc", "brecq"):
    for record in defaults[name][1]:
      assert (record.error_after < record.error_before)[:2].all(), (name, record.name)


def test_all_methods_measure_errors_alike(defaults):
  first = {name: info[0] for name, (_, info) in defaults.items() if name != "brecq"}
  for name, record in first.items():
    np.testing.assert_allclose(
      record.error_before, first["nearest"].error_before, rtol=1e-3, err_msg=name
    )


def test_block_error_of_brecq_is_at_most_that_of_adaround(defaults, digits):
  found, layerwise = (block_errors(digits, defaults[name][0]) for name in ("brecq", "adaround"))
  assert (found[1:].mean(axis=-1) <= 1.02 * layerwise[1:].mean(axis=-1)).all()
  assert found.sum() < layerwise.sum()


def test_accuracy_at_16_levels_is_that_of_full_precision(defaults, digits):
  full = accuracies(digits, jax.tree.map(lambda leaf: np.stack([leaf] * 3), digits.variables))
  assert (full > 90).all()
  for name in ("adaround", "brecq", "obc"):
    quantized = accuracies(digits, defaults[name][0])[2]
    assert abs(quantized - full[0]).max() <= 1.0, name


def test_accuracy_at_3_levels_is_above_that_of_nearest(defaults, digits):
  nearest = accuracies(digits, defaults["nearest"][0])[0]
  for name in ("adaround", "brecq", "obc"):
    assert (accuracies(digits, defaults[name][0])[0] > nearest).all(), name
