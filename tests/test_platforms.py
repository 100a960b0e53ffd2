"""The programs of an audit lowered for accelerators that this machine does not have."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from ptq_jax import models
from ptq_jax.attack import confidence
from ptq_jax.data import augment
from ptq_jax.models import fold_batchnorm, predict, units
from ptq_jax.models.call import Hashable
from ptq_jax.quantize import adaround, brecq, grid, hessian, obc, quadratic, reconstruct
from ptq_jax.train import fit, optimizer, shadows

M, BATCH, IMAGE = 2, 8, (8, 8, 3)


@pytest.fixture(params=["cuda", "tpu"])
def lower(request, monkeypatch):
  """Text of a function's program for a platform; code that asks where it runs is told so."""
  name = {"cuda": "gpu"}.get(request.param, request.param)
  monkeypatch.setattr(jax, "default_backend", lambda: name)

  def text(function, *arguments):
    exported = jax.export.export(jax.jit(function), platforms=[request.param])(*arguments)
    return exported.mlir_module()

  yield text
  jax.clear_caches()


@pytest.fixture(scope="module")
def model():
  return models.make("resnet8", num_classes=5, width=4, dtype="bfloat16")


def zeros(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def stacked(tree):
  return jax.tree.map(lambda leaf: zeros(M, *leaf.shape, dtype=leaf.dtype), tree)


def variables_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), zeros(1, *IMAGE))


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_training_in_half_precision(lower, model, name):
  recipe = fit.Recipe(
    model,
    optimizer.OPTIMIZERS[name](learning_rate=0.1, epochs=1, steps_per_epoch=3),
    augment.make(("flip", "crop4")),
    (0.5,) * 3,
    (0.25,) * 3,
    BATCH,
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), M))
  init = functools.partial(fit.init, recipe=recipe, image_shape=IMAGE)
  run = functools.partial(shadows._run.__wrapped__, recipe, None, IMAGE)
  text = lower(
    run,
    jax.eval_shape(jax.vmap(init), keys),
    keys,
    zeros(20, math.prod(IMAGE), dtype=jnp.uint8),
    zeros(20, dtype=jnp.int32),
    zeros(M, 3, BATCH, dtype=jnp.int32),
  )
  assert "stablehlo.while" in text  # many steps in one dispatch
  assert "bf16" in text
  assert "custom_call" not in text


def test_prediction(lower, model):
  run = predict.Predictor(
    model,
    prepare=lambda images, positions: images[None].astype(jnp.float32),
    reduce=confidence.logit_scaled,
  )
  body, head = units.split(model, stacked(variables_of(model)))
  pixels, positions = zeros(BATCH, *IMAGE, dtype=jnp.uint8), zeros(BATCH, dtype=jnp.int32)
  assert "bf16" in lower(
    functools.partial(run._run_body.__wrapped__, None), body, pixels, positions
  )
  features = jax.eval_shape(
    functools.partial(run._run_body.__wrapped__, None), body, pixels, positions
  )
  assert "stablehlo" in lower(
    functools.partial(run._run_head.__wrapped__, None), head, features, positions
  )


def test_adaround(lower):
  solve = functools.partial(
    quadratic.solve, schedule=adaround.SECOND_MOMENT, stop="plateau", sweeps=2
  )
  moments = quadratic.Moments(zeros(1, 36, 36), zeros(1, 36, 4), zeros())
  scale = zeros(1, 1, 4)
  text = lower(
    lambda weights, scale, moments: solve(weights, grid.Grid(scale, scale, 4), moments),
    zeros(1, 36, 4),
    scale,
    moments,
  )
  assert "stablehlo.while" in text


def test_obc(lower):
  def run(weights, matrix, scale):
    inverse = jax.vmap(hessian.inverse)(matrix)
    rows = grid.Grid(scale, scale, 4)
    return obc.quantize_rows(weights, inverse, jnp.zeros(6, jnp.int32), rows, memory_bytes=2**20)

  text = lower(run, zeros(6, 20), zeros(1, 20, 20), zeros(6, 1))
  assert ("f64" in text) == (jax.default_backend() == "gpu")  # a TPU has none


def test_brecq(lower, model):
  variables = variables_of(model)
  images = zeros(BATCH, *IMAGE)
  folded = jax.eval_shape(lambda v, x: fold_batchnorm.fold(model, v, x), variables, images)
  unit = units.chain(model, folded, images)[1]
  lowering, at_once, steps = brecq._execution(unit, jax.default_backend())
  assert at_once > 1
  assert steps > 1
  run = brecq.UnitRun(Hashable(model), unit, lowering)
  inputs = jax.eval_shape(lambda v, x: units.run(model, v, x, "stem"), folded, images)
  targets = jax.eval_shape(lambda v, x: units.run(model, v, x, unit.name), folded, inputs)
  weights = {layer.path: zeros(*layer.kernel_shape) for layer in unit.layers}
  scales = {path: zeros(1, 1, 1, kernel.shape[-1]) for path, kernel in weights.items()}

  def advance(weights, scales, variables, inputs, targets, keys):
    grids = {path: grid.Grid(s, s, jnp.full(M, 4)) for path, s in scales.items()}
    problems = reconstruct.Problem(weights, grids, variables, inputs, targets)
    state = reconstruct._start(brecq.SCHEDULE, weights, grids)
    advance = reconstruct._advance.__wrapped__
    return advance(run, brecq.SCHEDULE, steps, problems, keys, state, 0)

  text = lower(
    advance,
    *map(stacked, (weights, scales, brecq._of_unit(folded, unit), inputs, targets)),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), M)),
  )
  assert "stablehlo.while" in text
