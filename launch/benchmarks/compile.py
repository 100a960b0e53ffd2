"""What the compiler of a chip makes of our programs, on a machine without that chip.

    bash launch/run bench compile --topology v5e:2x2      a TPU: needs libtpu (the extra "tpu")
    bash launch/run bench compile --topology h100         an NVIDIA GPU: needs JAX's CUDA plugin
    bash launch/run bench compile --topology cpu          this machine

Training, scoring, BRECQ, AdaRound and OBC are compiled, not run, for several numbers of models
together in a program and lowerings of their convolutions. A row is printed when it is made and kept
in a file, from which the next start goes on. Columns, per step of one model:

moved    bytes through the memory beside the chip, in `copies` the part that only copies,
         transposes, pads or concatenates. Read from the optimised program (`_hlo.py`), every
         loop counted as often as it runs; arrays that the compiler keeps on the chip move nothing.
kernels  instructions that move anything: on a GPU each is a launch.
memory   milliseconds that `moved` takes at the chip's bandwidth: no step can be faster.
optimal  milliseconds by the compiler's own model of the chip: on a TPU, and where no loop runs
         inside a step (it counts a loop once).
share    of the bf16 peak, if a step took the longer of these two; at most all of it, where the
         arithmetic takes longer than either (a network whose arrays stay on the chip).

Models one after the other cost as often what one costs: the rows with 1 together. A step is an
update in training, a batch of 500 images in scoring, one of the steps on 32 images in BRECQ, a
whole layer in AdaRound (400 steps at most) and OBC.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from launch.benchmarks import _hlo as hlo
from launch.benchmarks._rows import Rows
from ptq_jax import models
from ptq_jax.attack import confidence
from ptq_jax.data import augment
from ptq_jax.models import conv, flops, fold_batchnorm, predict, units
from ptq_jax.quantize import adaround, brecq, capture, grid, hessian, obc, quadratic, reconstruct
from ptq_jax.train import fit, optimizer, shadows

AS_CHOSEN = "as chosen"

POOL, CALIBRATION, SCORED, STEPS = 50_000, 1024, 500, 50

REMEDY = (
  "For a TPU install libtpu (PTQ_JAX_EXTRA=tpu bash launch/run bench compile ..., or pip install"
  " 'jax[tpu]'), for a GPU jax-cuda12-plugin and jax-cuda12-pjrt; --topology cpu needs nothing."
)


class Chip(NamedTuple):
  """From the makers' data sheets."""

  platform: str
  tflops: float  # dense bf16
  gigabytes_per_s: float
  gigabytes: float


CHIPS = {
  "v4": Chip("tpu", 275, 1228, 32),
  "v5e": Chip("tpu", 197, 819, 16),
  "v5p": Chip("tpu", 459, 2765, 95),
  "v6e": Chip("tpu", 918, 1640, 32),
  "a100": Chip("cuda", 312, 2039, 80),
  "h100": Chip("cuda", 989, 3352, 80),
  "h200": Chip("cuda", 989, 4800, 141),
}

GPUS = {  # cores, compute capability, shared memory of a core and a block, level 2 cache, GHz, name
  "a100": (108, 8, 167936, 166912, 41943040, 1.41, "NVIDIA A100-SXM4-80GB"),
  "h100": (132, 9, 233472, 232448, 52428800, 1.98, "NVIDIA H100 80GB HBM3"),
  "h200": (132, 9, 233472, 232448, 62914560, 1.98, "NVIDIA H200"),
}

WITHOUT_A_TPU = {  # libtpu asks the cloud's metadata server for these otherwise
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


class Job(NamedTuple):
  """One program."""

  part: str
  model: str
  width: int
  together: int
  lowering: str = AS_CHOSEN


class Case(NamedTuple):
  """A function to compile, its arguments, and what one call of it does."""

  function: Any
  arguments: tuple
  donated: tuple[int, ...] = ()
  steps: int = 1  # of each model
  flop: float | None = None  # of one step of one model; None: not counted
  unknown_trips: int = 1  # of a loop whose length the program does not tell


def main(argv: list[str]) -> None:
  """Prints a row per program, and how many are left when the time is over."""
  options = parser().parse_args(argv)
  try:
    device, chip = target(options.topology)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    print(f"error: {str(error).splitlines()[0]} {REMEDY}", file=sys.stderr)
    sys.exit(2)
  version = f"{device.device_kind}, JAX {jax.__version__}, {sizes(options)}"
  path = options.rows or f"runs/compile-{options.topology.replace(':', '-')}.jsonl"
  rows, began, left = Rows(path, version=version), time.monotonic(), 0
  print(f"compiled for {version} on {os.cpu_count()} cores\n{HEAD}")
  for job in jobs(options):
    row = rows.find(job)
    if row is None and time.monotonic() - began > 60 * options.minutes:
      left += 1
      continue
    print(line(job, row or rows.add(job, measure(job, device, chip, options))), flush=True)
  if left:
    print(f"{left} programs are left after {options.minutes} minutes; the same command goes on.")
  print(f"rows: {path}")


def sizes(options: argparse.Namespace) -> str:
  """What the rows of a file have in common besides the compiler."""
  return f"{options.dtype}, batch {options.batch}, {options.size}x{options.size}"


def target(topology: str) -> tuple[jax.Device, Chip | None]:
  """A device to compile for, and what is known of the chip.

  Raises:
    RuntimeError, NotImplementedError: where JAX has no compiler for it.
    ValueError: for an unknown topology.
  """
  if topology == "cpu":
    return jax.local_devices(backend="cpu")[0], None
  chip = CHIPS.get(topology.split(":")[0])
  if chip is None:
    raise ValueError(f"--topology is {topology!r}; use cpu, or a chip of {', '.join(CHIPS)}.")
  if chip.platform == "tpu":
    os.environ.update({name: os.environ.get(name, WITHOUT_A_TPU[name]) for name in WITHOUT_A_TPU})
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  else:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the libraries are not needed to compile
    found = topologies.get_topology_desc(
      topology, platform="cuda", target_config=gpu_config(topology, chip), topology="1x1x1"
    )
  return found.devices[0], chip


def gpu_config(name: str, chip: Chip) -> str:
  """XLA's description of a GPU, as `GpuTargetConfigProto` in text."""
  cores, capability, core_memory, block_memory, cache, clock, kind = GPUS[name]
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {block_memory}
      shared_memory_per_core: {core_memory} core_count: {cores}
      fpus_per_core: {64 if capability == 8 else 128}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {chip.gigabytes_per_s * 10**9:.0f} l2_cache_size: {cache}
      clock_rate_ghz: {clock} device_memory_size: {chip.gigabytes * 10**9:.0f}
      cuda_compute_capability {{ major: {capability} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
    device_description_str: "{kind}"
  """


def jobs(options: argparse.Namespace) -> list[Job]:
  """What is compiled, the programs that take longest last: a convolution per model."""
  big, small = (options.model, options.width), ("convnet", 16)
  lowerings = (AS_CHOSEN,) if options.quick else options.lowerings
  found = [
    Job("training", *network, together, lowering)
    for network, counts in ((big, options.together), (small, (1, 4)))
    for together in counts
    for lowering in (lowerings if together > 1 else (AS_CHOSEN,))
  ]
  found += [
    Job(part, *big, together)
    for part in CASES
    if part != "training"
    for together in options.together
  ]
  found = [job for job in found if job.part in options.parts]
  return sorted(found, key=lambda job: (job.lowering == "unrolled", job.together))


def measure(job: Job, device: jax.Device, chip: Chip | None, options: argparse.Namespace) -> dict:
  """Compiles one program and reads what it will do."""
  with described_as(device):
    case = CASES[job.part](job, options)
    began = time.monotonic()
    compiled = lowered(case, job, device).compile()
  seconds = time.monotonic() - began
  program = hlo.of(compiled, unknown_trips=case.unknown_trips)
  runs = case.steps * job.together
  traffic, memory = program.traffic().times(1 / runs), compiled.memory_analysis()
  optimal = None
  if chip and chip.platform == "tpu" and len(program.loops()) <= (case.steps > 1):
    optimal = (compiled.cost_analysis() or {}).get("optimal_seconds")
    optimal = optimal and optimal / job.together
  fastest = chip and max(traffic.moved / chip.gigabytes_per_s / 1e9, optimal or 0)
  return {
    "compile_s": seconds,
    "program_bytes": memory.generated_code_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "moved_bytes": traffic.moved,
    "copied_bytes": traffic.copied,
    "kernels": traffic.kernels,
    "flop": case.flop,
    "memory_s": chip and traffic.moved / chip.gigabytes_per_s / 1e9,
    "optimal_s": optimal,
    "share_of_peak": share_of_peak(case.flop, fastest, chip) if chip and case.flop else None,
  }


def share_of_peak(flop: float, seconds: float, chip: Chip) -> float:
  """What of the arithmetic that a chip could do in this time is done, if it can be done in it."""
  return flop / max(seconds * chip.tflops * 1e12, flop)


@contextlib.contextmanager
def described_as(device: jax.Device) -> Iterator[None]:
  """Inside, code that asks where it runs is told of the device that is compiled for."""
  platform = {"cuda": "gpu"}.get(device.platform, device.platform)
  with mock.patch.object(jax, "default_backend", return_value=platform):
    yield


def lowered(case: Case, job: Job, device: jax.Device):
  """The traced program of a case, on its way to the device."""
  place = SingleDeviceSharding(device)
  options = conv.compiler_options() if device.platform == "cpu" else None
  jitted = jax.jit(
    case.function,
    donate_argnums=case.donated,
    compiler_options=options,
    in_shardings=place,
    out_shardings=place,
  )
  with conv.lowered_as(None if job.lowering == AS_CHOSEN else job.lowering):
    return jitted.lower(*case.arguments)


def network(job: Job, options: argparse.Namespace):
  """A model, its image shape, and its variables stacked."""
  size = (options.size, options.size, 3)
  model = models.make(job.model, num_classes=options.classes, width=job.width, dtype=options.dtype)
  one = jax.eval_shape(model.init, jax.random.key(0), array(1, *size))
  return model, size, stacked(one, job.together)


def training(job: Job, options: argparse.Namespace) -> Case:
  """Updates of some models, from a pool on the device."""
  model, size, _ = network(job, options)
  recipe = fit.Recipe(
    model,
    optimizer.sgd(learning_rate=0.1, epochs=10, steps_per_epoch=STEPS),
    augment.make(("flip", "crop4")),
    (0.5,) * 3,
    (0.25,) * 3,
    options.batch,
    lowering=None if job.lowering == AS_CHOSEN else job.lowering,
  )
  keys = keys_of(job.together)
  init = functools.partial(fit.init, recipe=recipe, image_shape=size)
  steps = 1 if jax.default_backend() == "cpu" else STEPS
  arguments = (
    jax.eval_shape(jax.vmap(init), keys),
    keys,
    array(POOL, math.prod(size), dtype=jnp.uint8),
    array(POOL, dtype=jnp.int32),
    array(job.together, steps, options.batch, dtype=jnp.int32),
  )
  flop = options.batch * flops.training(model, image_shape=size)
  run = functools.partial(shadows._run.__wrapped__, recipe, None, size)
  return Case(run, arguments, (0,), steps, flop)


def scoring(job: Job, options: argparse.Namespace) -> Case:
  """A batch of images through all units but the last."""
  model, size, variables = network(job, options)
  run = predict.Predictor(
    model,
    prepare=lambda images, positions: images[None].astype(jnp.float32),
    reduce=confidence.logit_scaled,
  )
  body, _ = units.split(model, variables)
  arguments = (body, array(SCORED, *size, dtype=jnp.uint8), array(SCORED, dtype=jnp.int32))
  flop = SCORED * flops.forward(model, image_shape=size)
  return Case(functools.partial(run._run_body.__wrapped__, None), arguments, flop=flop)


def brecq_steps(job: Job, options: argparse.Namespace) -> Case:
  """Steps on the first unit with more than one layer, or else on the first."""
  model, size, variables = network(job, options)
  images = array(32, *size)
  fold = functools.partial(fold_batchnorm.fold, model)
  folded = jax.eval_shape(fold, unstacked(variables), images)
  chain = units.chain(model, folded, images)
  position = next((i for i, unit in enumerate(chain) if len(unit.layers) > 1), 0)
  unit, inputs = chain[position], images
  for before in chain[:position]:
    inputs = forward(model, folded, inputs, before)
  targets = forward(model, folded, inputs, unit)
  lowering, _, steps = brecq._execution(unit, jax.default_backend())
  run = brecq.UnitRun(capture.Hashable(model), unit, lowering)
  weights = {layer.path: array(*layer.kernel_shape) for layer in unit.layers}
  scales = {path: array(1, 1, 1, kernel.shape[-1]) for path, kernel in weights.items()}
  fitted = {path: grid.Grid(s, s, array(dtype=jnp.int32)) for path, s in scales.items()}
  calibration = (
    array(CALIBRATION, *part.shape[1:], dtype=part.dtype) for part in (inputs, targets)
  )
  problems = stacked(
    reconstruct.Problem(weights, fitted, brecq._of_unit(folded, unit), *calibration), job.together
  )
  start = functools.partial(reconstruct._start, brecq.SCHEDULE)
  state = jax.eval_shape(start, problems.weights, problems.grids)
  advance = functools.partial(reconstruct._advance.__wrapped__, run, brecq.SCHEDULE, steps)
  arguments = (problems, keys_of(job.together), state, array(dtype=jnp.int32))
  flop = 2 * 3 * brecq.SCHEDULE.batch_size * sum(map(flops.of_layer, unit.layers))
  return Case(advance, arguments, (2,), steps, flop)


def adaround_layer(job: Job, options: argparse.Namespace) -> Case:
  """All steps and sweeps of the network's largest layer, from its second moments."""
  layer = largest_layer(job, options)
  D, K = layer.num_rows, layer.num_columns
  schedule = adaround.SECOND_MOMENT
  solve = functools.partial(
    quadratic.solve, schedule=schedule, stop="plateau", sweeps=adaround.SWEEPS
  )

  def run(weights, scale, moments):
    return jax.vmap(lambda w, s, m: solve(w, grid.Grid(s, s, 4), m))(weights, scale, moments)

  moments = quadratic.Moments(array(1, D, D), array(1, D, K), array())
  arguments = stacked((array(1, D, K), array(1, 1, K), moments), job.together)
  trips = max(schedule.num_steps // quadratic.CHECK_EVERY, adaround.SWEEPS)
  flop = 2 * D * D * K * (schedule.num_steps + adaround.SWEEPS)
  return Case(run, arguments, flop=flop, unknown_trips=trips)


def obc_layer(job: Job, options: argparse.Namespace) -> Case:
  """All columns of the network's largest layer."""
  layer = largest_layer(job, options)
  D, rows = layer.num_rows, layer.num_columns * job.together
  chip = CHIPS.get(options.topology.split(":")[0])
  memory = int(chip.gigabytes * 1e9) // 4 if chip else obc.default_memory_bytes()

  def run(weights, matrix, owner, scale):
    inverse = hessian.Inverse(matrix, jnp.zeros(len(matrix)))
    fitted = grid.Grid(scale, scale, jnp.full_like(owner, 4)[:, None])
    return obc.quantize_rows(weights, inverse, owner, fitted, memory_bytes=memory)

  arguments = (
    array(rows, D),
    array(job.together, D, D),
    array(rows, dtype=jnp.int32),
    array(rows, 1),
  )
  return Case(run, arguments)


CASES = {
  "training": training,
  "scoring": scoring,
  "brecq": brecq_steps,
  "adaround": adaround_layer,
  "obc": obc_layer,
}


def forward(model, variables, inputs, unit):
  """Shapes of a unit's outputs."""
  return jax.eval_shape(lambda v, x: units.run(model, v, x, unit.name), variables, inputs)


def largest_layer(job: Job, options: argparse.Namespace) -> units.Layer:
  """The layer with the most weights."""
  model, size, variables = network(job, options)
  layers = units.layers(model, unstacked(variables), array(1, *size))
  return max(layers, key=lambda layer: layer.num_rows * layer.num_columns)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  """An array that is only described."""
  return jax.ShapeDtypeStruct(shape, dtype)


def stacked(tree: Any, count: int) -> Any:
  """Descriptions of so many of a tree."""
  return jax.tree.map(lambda leaf: array(count, *leaf.shape, dtype=leaf.dtype), tree)


def unstacked(tree: Any) -> Any:
  """Descriptions of the first."""
  return jax.tree.map(lambda leaf: array(*leaf.shape[1:], dtype=leaf.dtype), tree)


def keys_of(count: int) -> jax.ShapeDtypeStruct:
  """Descriptions of keys."""
  return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))


HEAD = (
  f"{'part':<9}{'model':<15}{'together':>9}  {'lowering':<10}{'compile s':>10}{'program MB':>11}"
  f"{'temp GB':>9}{'moved GB':>10}{'copies':>8}{'kernels':>9}{'memory ms':>11}{'optimal ms':>11}"
  f"{'share':>7}"
)


def line(job: Job, row: dict) -> str:
  """A row as it is printed."""
  cells = [f"{job.part:<9}{f'{job.model} {job.width}':<15}{job.together:>9}  {job.lowering:<10}"]
  cells += [f"{row['compile_s']:10.1f}{row['program_bytes'] / 1e6:11.1f}"]
  cells += [f"{row['temporary_bytes'] / 1e9:9.3f}{row['moved_bytes'] / 1e9:10.3f}"]
  cells += [f"{row['copied_bytes'] / max(row['moved_bytes'], 1):8.0%}{row['kernels']:9.0f}"]
  cells += [f"{1e3 * row[name]:11.3f}" if row[name] else f"{'-':>11}" for name in TIMES]
  return "".join(cells) + (f"{row['share_of_peak']:7.0%}" if row["share_of_peak"] else f"{'-':>7}")


TIMES = ("memory_s", "optimal_s")


def parser() -> argparse.ArgumentParser:
  """The flags of this benchmark."""
  found = argparse.ArgumentParser(
    prog="bench compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  found.add_argument("--topology", default="v5e:2x2", help=f"cpu, or one of {', '.join(CHIPS)}")
  found.add_argument("--model", default="resnet18", choices=sorted(models.ZOO))
  found.add_argument("--width", type=int, default=64)
  found.add_argument("--size", type=int, default=32, help="of the square images")
  found.add_argument("--classes", type=int, default=10)
  found.add_argument("--batch", type=int, default=128)
  found.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
  found.add_argument("--together", type=int, nargs="+", default=[1, 2], help="models in a program")
  found.add_argument("--lowerings", nargs="+", default=conv.LOWERINGS, choices=conv.LOWERINGS)
  found.add_argument("--parts", nargs="+", default=list(CASES), choices=list(CASES))
  found.add_argument("--quick", action="store_true", help="convolutions as chosen only")
  found.add_argument("--minutes", type=float, default=14, help="after which none is begun")
  found.add_argument("--rows", help="file of the rows; default runs/compile-TOPOLOGY.jsonl")
  return found
