"""AdaRound and BRECQ, batched, against the plain loop: one model, one bit width, mini-batches.

    bash launch/run bench quantize [--part layers|models|brecq|all] [--shapes NAME ...]
        [--levels N] [--models N] [--plain_steps N]

layers  One layer by AdaRound. The plain version is the paper's: 20 000 steps of Adam at 1e-3 on 32
        of the calibration images, one compiled step after the other. It is timed over --plain_steps
        and scaled; with --plain_steps 20000 it runs to its end, and the rounded errors compare.
models  A digits network by AdaRound: N models under three plans at once, and one after the other.
brecq   The same network by BRECQ, beside the plain loop over its units.

Inputs are random but correlated, as behind a convolution and ReLU. Ratios are of wall time without
compilation, and of processor time in brackets, which hardly moves with what else the machine does.
MB are what the compiled programs hold: arguments, results and temporaries.
"""

import argparse
import functools
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ptq_jax import trees
from ptq_jax.models import convnet, fold_batchnorm, units
from ptq_jax.models.call import Hashable
from ptq_jax.models.units import Layer
from ptq_jax.quantize import adaround, brecq, capture, grid, plan, quadratic, rounding
from ptq_jax.quantize.layer import matrix_kernel

PLAIN = adaround.MINI_BATCH
DIGITS_LEVELS = (3, 4, 16)

SHAPES = {  # images, height and width, channels in, channels out, window, stride
  "resnet18_stem": (1024, 32, 3, 64, 3, 1),
  "resnet18_64": (1024, 16, 64, 64, 3, 1),
  "resnet18_128": (1024, 16, 128, 128, 3, 1),
  "resnet18_256": (1024, 8, 256, 256, 3, 1),
  "resnet18_512": (1024, 4, 512, 512, 3, 1),
  "digits_stem": (256, 8, 1, 16, 3, 1),
  "digits_32": (256, 8, 16, 32, 3, 2),
  "digits_64": (256, 4, 32, 64, 3, 2),
}
"""Layers of ResNet-18 and of the digits network."""

QUICK_SHAPES = ("resnet18_64", "digits_stem", "digits_32", "digits_64")


class Times(NamedTuple):
  """Seconds."""

  wall: float
  processor: float  # summed over cores

  def scaled(self, factor: float) -> "Times":
    return Times(self.wall * factor, self.processor * factor)

  def __str__(self):
    return f"{self.wall:.3g} s ({self.processor:.3g} s of processor)"


def main(argv: list[str]) -> None:
  """Prints times, errors, memory and ratios."""
  flags = _parser().parse_args(argv)
  device = jax.devices()[0].device_kind
  print(f"{os.cpu_count()} cores, {device}, JAX {jax.__version__}; {flags.levels} levels")
  if flags.part in ("layers", "all"):
    for name in flags.shapes:
      _print_layer(name, layer(SHAPES[name], flags.levels, flags.plain_steps), flags.plain_steps)
  if flags.part in ("models", "all"):
    _print_models("adaround", models(flags.models, flags.plain_steps))
  if flags.part in ("brecq", "all"):
    _print_models("brecq", blocks(flags.models, flags.plain_steps))


def layer(shape, levels: int, plain_steps: int) -> dict:
  """One layer by the second-moment form with its defaults, and by the plain loop."""
  described, kernel, inputs = _layer_case(shape)
  fitted = grid.fit(kernel, levels=levels)
  outputs = _convolve(described, inputs, kernel)

  def ours():
    return _second_moments(described, kernel, fitted, inputs, outputs)

  _, first = timed(ours)
  solution, times = timed(ours)
  alpha, plain = plain_adaround(described, kernel, fitted, inputs, outputs, plain_steps)
  rounded = rounding.hard_weights(kernel, alpha, fitted)
  exact = functools.partial(_exact_error, described, inputs, outputs)
  found = matrix_kernel(solution.codes, described)
  return {
    "ours": times,
    "compile": first.wall - times.wall,
    "plain": plain.scaled(PLAIN.num_steps / plain_steps),
    "nearest_error": exact(grid.nearest(kernel, fitted)),
    "error": exact(grid.dequantize(found, fitted)),
    "plain_error": exact(rounded),
    "steps": int(solution.steps),
    "bytes": _layer_bytes(described, kernel, fitted, inputs, outputs),
  }


def models(count: int, plain_steps: int) -> dict:
  """AdaRound of digits networks: all at once, one after the other, and the plain loop."""
  case = _digits_case(count)
  return _compare_batches(adaround, case, functools.partial(_plain_layers, case, plain_steps))


def blocks(count: int, plain_steps: int) -> dict:
  """BRECQ of digits networks: all at once, one after the other, and the plain loop."""
  case = _digits_case(count)
  return _compare_batches(brecq, case, functools.partial(_plain_units, case, plain_steps))


def plain_adaround(described: Layer, kernel, fitted, inputs, outputs, num_steps):
  """The paper's loop on one layer, one compiled step after the other: alpha, and its time.

  Stopped early, the schedule is still that of all its steps.
  """

  def run(weights, variables, images):
    del variables
    return _convolve(described, images, weights)

  problem = ({"kernel": kernel}, {"kernel": fitted}, {}, inputs, outputs)
  alphas, times = plain_reconstruct(run, *problem, num_steps)
  return alphas["kernel"], times


def plain_reconstruct(run, weights, grids, variables, inputs, outputs, num_steps):
  """Mini-batch reconstruction of one unit, written the straightforward way."""
  optimizer = optax.adam(PLAIN.learning_rate)
  single = len(weights) == 1 and "kernel" in weights

  @jax.jit
  def step(alphas, state, key, i):
    index = jax.random.permutation(key, len(inputs))[: PLAIN.batch_size]
    beta = rounding.beta(i, num_steps=PLAIN.num_steps)
    factor = jnp.where(rounding.in_warmup(i, num_steps=PLAIN.num_steps), 0.0, PLAIN.weight)

    def loss(alphas):
      soft = {
        path: rounding.soft_weights(weights[path], alpha, grids[path])
        for path, alpha in alphas.items()
      }
      found = run(soft["kernel"] if single else soft, variables, inputs[index])
      error = jnp.mean(jnp.sum((found - outputs[index]) ** 2, axis=-1))
      terms = [rounding.regularizer(alpha, beta=beta) for alpha in alphas.values()]
      return error + factor * sum(terms)

    updates, state = optimizer.update(jax.grad(loss)(alphas), state)
    return optax.apply_updates(alphas, updates), state

  alphas = {path: rounding.initial_alpha(weights[path], grids[path]) for path in weights}
  state, key = optimizer.init(alphas), jax.random.key(0)
  jax.block_until_ready(step(alphas, state, key, 1))

  def loop(alphas, state):
    for i in range(1, num_steps + 1):
      alphas, state = step(alphas, state, jax.random.fold_in(key, i), i)
    return alphas

  return timed(lambda: loop(alphas, state))


def timed(function) -> tuple:
  """The function's result and the times of one call."""
  wall, processor = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(function())
  return result, Times(time.perf_counter() - wall, time.process_time() - processor)


def _layer_case(shape):
  """A layer, its kernel, and inputs that are correlated like those behind a ReLU."""
  num_images, size, depth, features, window, stride = shape
  pad = ((window // 2, window // 2),) * 2
  out = -(-size // stride)
  described = Layer(
    "layer",
    "conv",
    (window, window, depth, features),
    (stride, stride),
    pad,
    (1, 1),
    1,
    (size, size, depth),
    (out, out, features),
  )
  rng = np.random.default_rng(0)
  scenes = rng.normal(size=(num_images, size, size, 8)).cumsum(1).cumsum(2) / size
  mixed = scenes @ rng.normal(size=(8, depth)) + 0.3 * rng.normal(
    size=(num_images, size, size, depth)
  )
  inputs = jnp.asarray(np.maximum(mixed, 0) if depth > 3 else mixed, jnp.float32)
  spread = np.sqrt(2 / (window * window * depth))
  return described, jnp.asarray(rng.normal(0, spread, described.kernel_shape), jnp.float32), inputs


def _convolve(described: Layer, images, kernel):
  """The layer as XLA's convolution."""
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    described.strides,
    described.padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


_batch_moments = jax.jit(quadratic.moments, static_argnums=3)


def _layer_moments(described, kernel, inputs, outputs):
  """Moments of a layer on all its inputs, batch by batch."""
  total = None
  for index in capture.batches(np.arange(len(inputs)), capture.images_at_once([described])):
    part = _batch_moments(inputs[index], outputs[index], kernel, described)
    weighted = _scale(part, len(index) / len(inputs))
    total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
  return total


@jax.jit
def _scale(tree, factor):
  return jax.tree.map(lambda leaf: leaf * factor, tree)


def _second_moments(described, kernel, fitted, inputs, outputs):
  """AdaRound's second-moment form, from the inputs of the layer to its codes."""
  moments = _layer_moments(described, kernel, inputs, outputs)
  one = trees.stack([(kernel, grid.Grid(*fitted[:2], jnp.int32(fitted.levels)), moments)])
  _, solution = adaround._solve(described, adaround.SECOND_MOMENT, "plateau", 10, *one)
  return trees.take(solution, 0)


def _exact_error(described, inputs, outputs, kernel) -> float:
  """Output error of a kernel on all inputs."""
  total = 0.0
  convolve = jax.jit(_convolve, static_argnums=0)
  for index in capture.batches(np.arange(len(inputs)), 128):
    difference = convolve(described, inputs[index], kernel) - outputs[index]
    total += float(jnp.sum(difference**2))
  return total / (len(inputs) * described.positions)


def _layer_bytes(described, kernel, fitted, inputs, outputs) -> tuple[int, int]:
  """Bytes that ours and the plain loop hold."""
  count = min(len(inputs), capture.images_at_once([described]))
  batch = _batch_moments.lower(inputs[:count], outputs[:count], kernel, described)
  moments = jax.eval_shape(lambda: quadratic.moments(inputs[:1], outputs[:1], kernel, described))
  one = (kernel, grid.Grid(*fitted[:2], jnp.int32(fitted.levels)), moments)
  many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), one)
  solve = adaround._solve.lower(described, adaround.SECOND_MOMENT, "plateau", 10, *many)
  held = trees.num_bytes((inputs, outputs))
  ours = held + max(_held(batch), _held(solve))
  state = 3 * trees.num_bytes(kernel)
  patches = PLAIN.batch_size * described.positions * described.kernel_shape[-1] * 4
  return ours, held + state + 3 * patches


def _held(lowered) -> int:
  """Arguments, results and temporaries of a compiled program."""
  analysis = lowered.compile().memory_analysis()
  return (
    analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
  )


def _digits_case(count):
  """Digits networks with random weights and smooth images."""
  rng = np.random.default_rng(0)
  model = convnet.ConvNet(num_classes=10)
  smooth = rng.normal(size=(count, 256, 8, 8, 1)).cumsum(axis=2).cumsum(axis=3)
  images = jnp.asarray(smooth / smooth.std(), jnp.float32)
  keys = jax.random.split(jax.random.key(0), count)
  variables = jax.jit(jax.vmap(lambda key: model.init(key, images[0, :1])))(keys)
  layers = units.layers(model, *trees.take((variables, images), 0))
  plans = [plan.make(layers, levels=levels) for levels in DIGITS_LEVELS]
  return model, variables, images, keys, plans


def _compare_batches(method, case, plain) -> dict:
  """Times of a method: all models and plans at once, one after the other, and the plain loop."""
  model, variables, images, keys, plans = case
  count = len(keys)

  def at_once():
    return method.quantize_stacked(keys, model, variables, images, plans=plans)[0]

  def one(m, p):
    part = jax.tree.map(lambda leaf: leaf[m : m + 1], (keys, variables, images))
    return method.quantize_stacked(part[0], model, *part[1:], plans=[plans[p]])[0]

  _, first = timed(at_once)
  _, together = timed(at_once)
  one(0, 0)
  few = min(count, 2)
  _, alone = timed(lambda: [one(m, p) for m in range(few) for p in range(len(plans))])
  return {
    "count": count,
    "compile": first.wall - together.wall,
    "together": together.scaled(1 / (count * len(plans))),
    "alone": alone.scaled(1 / (few * len(plans))),
    "plain": plain(),
  }


def _plain_layers(case, plain_steps) -> Times:
  """The plain loop over the layers of one network at one bit width."""
  model, variables, images, _, plans = case
  one, pictures = trees.take((variables, images), 0)
  total = Times(0.0, 0.0)
  for described in units.layers(model, one, pictures):
    (call,) = capture.calls(model, one, pictures, [described])[described.path]
    kernel = trees.get(one, described.kernel)
    fitted = grid.fit(kernel, levels=plans[0][described.path])

    def run(weights, nothing, inputs, described=described):
      del nothing
      if described.kind == "dense":
        return inputs @ weights
      return _convolve(described, inputs, weights)

    outputs = run(kernel, {}, call.inputs)
    problem = ({"kernel": kernel}, {"kernel": fitted}, {}, call.inputs, outputs)
    _, times = plain_reconstruct(run, *problem, plain_steps)
    total = Times(*map(sum, zip(total, times, strict=True)))
  return total.scaled(PLAIN.num_steps / plain_steps)


def _plain_units(case, plain_steps) -> Times:
  """The plain loop over the units of one network at one bit width."""
  model, variables, images, _, plans = case
  one, inputs = trees.take((variables, images), 0)
  one = fold_batchnorm.fold(model, one, inputs)
  total = Times(0.0, 0.0)
  for unit in units.chain(model, one, inputs):
    weights = {layer.path: trees.get(one, layer.kernel) for layer in unit.layers}
    grids = {path: grid.fit(kernel, levels=plans[0][path]) for path, kernel in weights.items()}
    outputs = units.run(model, one, inputs, unit.name)
    run = brecq.UnitRun(Hashable(model), unit, "native")
    _, times = plain_reconstruct(run, weights, grids, one, inputs, outputs, plain_steps)
    total = Times(*map(sum, zip(total, times, strict=True)))
    inputs = outputs
  return total.scaled(PLAIN.num_steps / plain_steps)


def _print_layer(name, row, plain_steps) -> None:
  complete = plain_steps >= PLAIN.num_steps
  note = "" if complete else f", scaled from {plain_steps} steps"
  ratios = [theirs / mine for theirs, mine in zip(row["plain"], row["ours"], strict=True)]
  print(f"{name} {SHAPES[name]}")
  print(f"  ours: {row['ours']}, {row['steps']} steps; {row['compile']:.1f} s more to compile")
  print(f"  plain loop, {PLAIN.num_steps} steps: {row['plain']}{note}")
  print(f"  ratio {ratios[0]:.0f} ({ratios[1]:.0f})")
  theirs = f"{row['plain_error']:.5g}" + ("" if complete else f" (after {plain_steps} steps only)")
  print(
    f"  rounded output error: nearest {row['nearest_error']:.5g}, "
    f"ours {row['error']:.5g}, plain {theirs}"
  )
  ours, plain = (size / 1e6 for size in row["bytes"])
  print(f"  {ours:.0f} MB, plain {plain:.0f} MB", flush=True)


def _print_models(name, row) -> None:
  def ratio(slow):
    wall, processor = (a / b for a, b in zip(slow, row["together"], strict=True))
    return f"ratio {wall:.1f} ({processor:.1f})"

  print(f"digits network by {name}, per model and bit width")
  print(
    f"  {row['count']} models under {len(DIGITS_LEVELS)} plans at once: {row['together']}; "
    f"{row['compile']:.1f} s to compile, once"
  )
  print(f"  one after the other: {row['alone']}; {ratio(row['alone'])}")
  print(
    f"  plain loop, {PLAIN.num_steps} steps, scaled: {row['plain']}; {ratio(row['plain'])}",
    flush=True,
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="bench quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--part", default="all", choices=("layers", "models", "brecq", "all"))
  parser.add_argument("--shapes", nargs="+", default=QUICK_SHAPES, choices=sorted(SHAPES))
  parser.add_argument("--levels", type=int, default=4)
  parser.add_argument("--models", type=int, default=16)
  parser.add_argument("--plain_steps", type=int, default=200, help="of 20 000 that are timed")
  return parser
