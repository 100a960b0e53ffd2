"""What a chip does with our programs, in one command of at most eight minutes.

    bash launch/run bench device [--peer train_torch.py] [--quick] [--minutes 8]

Measures, in the order of what they tell:
  ceilings   a large product of matrices, and a copy
  training   every number of models together and lowering, in bfloat16 and float32 (TF32 on a GPU)
  peer       a PyTorch trainer, if torch and --peer are there (see `bench train`)
  scoring, brecq, adaround, obc   as `bench compile` describes them
  conv       layers of ResNet-18 forward and backward, models one by one and four at once
  lira       the online attack
Beside every program stands the time that its bytes (by the compiled program, `_hlo.py`) take at
the speed of the copy, and its memory (`memory_analysis`) beside the most that the device held;
below training as chosen, the five instructions that take most of its time, by JAX's profiler.

Every row is kept in a file as soon as it is measured; the next start goes on from there. The last
lines are the rule that train.models_together="auto" and train.lowering="auto" should follow here,
beside the one they follow where they do not measure.
It imports nothing beyond JAX, Flax, Optax, NumPy and what these import.
"""

import argparse
import collections
import functools
import gzip
import importlib.util
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import _hlo as hlo
from launch.benchmarks import compile as programs
from launch.benchmarks import conv as layers
from launch.benchmarks import train
from launch.benchmarks._rows import Rows
from launch.benchmarks.compile import AS_CHOSEN, Case, Job
from ptq_jax.attack import lira
from ptq_jax.models import conv, flops, parallel

BIG, SMALL = ("resnet18", 64), ("convnet", 16)
QUICK_BIG, QUICK_SMALL = ("resnet8", 8), ("convnet", 8)

CONTROL = ("while", "conditional", "call")
"""Instructions whose time is that of others."""


def main(argv: list[str]) -> None:
  """Prints rows as they are measured, then the rule."""
  options = parser().parse_args(argv)
  device = jax.local_devices()[0]
  version = f"{device.device_kind}, JAX {jax.__version__}, {programs.sizes(options)}"
  rows, began, left = Rows(options.rows, version=version), time.monotonic(), 0
  print(version)
  for key, measure in measurements(options):
    row = rows.find(key)
    if row is None and time.monotonic() - began > 60 * options.minutes:
      left += 1
      continue
    if row is None:
      row = rows.add(key, without_room_none(measure))
    print(line(key, row, rows), flush=True)
  if left:
    print(
      f"{left} measurements are left after {options.minutes:g} minutes; the same command goes on."
    )
  for sentence in rule(rows, options):
    print(sentence)
  print(f"rows: {rows.path}")


def measurements(options: argparse.Namespace) -> list[tuple[tuple, Any]]:
  """(key, function that measures it), those first that tell most."""
  big, small = (QUICK_BIG, QUICK_SMALL) if options.quick else (BIG, SMALL)
  dtypes = ("float32",) if jax.default_backend() == "cpu" else ("bfloat16", "float32")
  size = 512 if options.quick else 8192
  found = [(("product", dtype), functools.partial(product, size, dtype)) for dtype in dtypes]
  found += [(("copy", ""), functools.partial(copy, 2**24 if options.quick else 2**30))]

  def program(part, network, together, lowering=AS_CHOSEN, dtype=dtypes[0]):
    job = Job(part, *network, together, lowering)
    of_type = argparse.Namespace(**{**vars(options), "dtype": dtype})
    found.append(((*job, dtype), functools.partial(run_program, job, of_type)))

  for dtype in dtypes:
    for network, together in ((big, 2), (small, 8)):
      program("training", network, 1, dtype=dtype)
      for lowering in conv.LOWERINGS:
        program("training", network, 2 if options.quick else together, lowering, dtype)
  if options.peer and importlib.util.find_spec("torch"):
    found += [(("peer", *one), functools.partial(peer, one, options)) for one in (big, small)]
  for part in ("scoring", "brecq", "adaround", "obc"):
    program(part, big, 1)
  shapes = layers.SHAPES["resnet8"][1:3] if options.quick else layers.SHAPES["resnet18"][1:]
  for shape in shapes:
    for count, lowering in ((1, "unrolled"), (4, "unrolled"), (4, "grouped")):
      key = ("conv", str(shape), count, lowering)
      found.append((key, functools.partial(layer, shape, count, lowering, dtypes[0], options)))
  found.append((("lira", "online"), functools.partial(attack, 2000 if options.quick else 50_000)))
  return found


def without_room_none(measure) -> dict:
  """What was measured; a row without numbers for a program that does not fit into memory."""
  try:
    return measure()
  except jax.errors.JaxRuntimeError as error:
    if not parallel.is_out_of_memory(error):
      raise
    return {"seconds": None}


def product(size: int, dtype: str) -> dict:
  """A product of square matrices: the ceiling of arithmetic."""
  x = jnp.ones((size, size), dtype)
  seconds = seconds_of(jax.jit(lambda x: x @ x), x)
  return {"seconds": seconds, "tflops": 2 * size**3 / seconds / 1e12}


def copy(num_bytes: int) -> dict:
  """An array read and written once: the ceiling of memory."""
  seconds = seconds_of(jax.jit(lambda x: x + 1), jnp.zeros(num_bytes // 4, jnp.float32))
  return {"seconds": seconds, "gigabytes_per_s": 2 * num_bytes / seconds / 1e9}


def run_program(job: Job, options: argparse.Namespace) -> dict:
  """Seconds of one step of one model, and what the program moves and holds."""
  case = programs.CASES[job.part](job, options)
  began = time.perf_counter()
  compiled = programs.lowered(case, job, jax.local_devices()[0]).compile()
  compile_s = time.perf_counter() - began
  call = caller(case, compiled)
  seconds = seconds_of(call) / case.steps / job.together
  memory = compiled.memory_analysis()
  program = hlo.of(compiled, unknown_trips=case.unknown_trips)
  held = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return {
    "seconds": seconds,
    "compile_s": compile_s,
    "moved_bytes": program.traffic().moved / case.steps / job.together,
    "kernels": program.traffic().kernels / case.steps / job.together,
    "reckoned_bytes": arguments - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
    "peak_bytes": held,  # of everything until now
    "flop": case.flop,
    "images_per_s": images_of(job, options) / seconds,
    "largest": largest(call) if job.part == "training" and job.lowering == AS_CHOSEN else [],
  }


def images_of(job: Job, options: argparse.Namespace) -> int:
  """Images of one step of one model."""
  return {"training": options.batch, "scoring": programs.SCORED}.get(job.part, 0)


def caller(case: Case, compiled) -> Callable[[], Any]:
  """Calls the program; what it gives back in place of what it was given is used again."""
  arguments = [jax.tree.map(filled, argument) for argument in case.arguments]

  def call():
    results = compiled(*arguments)
    for index in case.donated:
      arguments[index] = results[0] if type(results) is tuple else results
    return results

  return call


def largest(call: Callable[[], Any], count: int = 5) -> list[tuple[str, float]]:
  """The instructions that take most of the time of one call, and the share of each."""
  spent = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(call())
    for path in pathlib.Path(folder).rglob("*.trace.json.gz"):
      for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        name = event.get("args", {}).get("hlo_op", "")
        if name and not name.startswith(CONTROL):
          spent[name] += event["dur"]
  return [(name, time / spent.total()) for name, time in spent.most_common(count)]


def filled(described: jax.ShapeDtypeStruct) -> jax.Array:
  """An array as it might be: keys, zeros for whole numbers, a definite matrix or positive noise."""
  shape, dtype = described.shape, described.dtype
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return jax.random.split(jax.random.key(0), shape)
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.zeros(shape, dtype)
  noise = np.random.default_rng(0).uniform(0.01, 0.1, shape[-2:]).astype(np.float32)
  if len(shape) > 1 and shape[-1] == shape[-2]:
    noise = np.eye(shape[-1], dtype=np.float32) + noise @ noise.T / shape[-1]
  return jnp.broadcast_to(jnp.asarray(noise, dtype), shape) + jnp.zeros((), dtype)


def seconds_of(call, *arguments, at_least: float = 0.3) -> float:
  """Of one call, the first not counted."""
  jax.block_until_ready(call(*arguments))
  began, count = time.perf_counter(), 0
  while time.perf_counter() - began < at_least:
    jax.block_until_ready(call(*arguments))
    count += 1
  return (time.perf_counter() - began) / count


def peer(network: tuple[str, int], options: argparse.Namespace) -> dict:
  """Images per second of the PyTorch trainer, as users run it and tuned."""
  name, width = network
  flags = [f"--model={name}", f"--width={width}", f"--batch={options.batch}"]
  flags += [f"--peer={options.peer}", f"--size={options.size}"]
  rates = train.peers(train.parser().parse_args([*flags, f"--examples={options.batch * 64}"]))
  return {"seconds": options.batch / max(rates.values()), **rates}


def layer(shape, count: int, lowering: str, dtype: str, options: argparse.Namespace) -> dict:
  """A convolution forward and backward, of so many models."""
  settings = argparse.Namespace(models=count, dtype=dtype, seconds=0.3)
  milliseconds, gflops = layers.measure(shape, lowering, settings)
  return {"seconds": milliseconds / 1e3 / count, "tflops": gflops / 1e3}


def attack(num_examples: int) -> dict:
  """LiRA of one target against 64 shadows with two queries, on the device."""
  rng = np.random.default_rng(0)
  scores = jnp.asarray(rng.normal(size=(64, num_examples, 2)), jnp.float32)
  members = jnp.asarray(rng.random((64, num_examples)) < 0.5)
  run = jax.jit(lambda s, m: lira.online(s, m, s[0], variance="per_example"))
  return {"seconds": seconds_of(run, scores, members)}


def line(key: tuple, row: dict, rows: Rows) -> str:
  """A row as it is printed, beside the ceilings."""
  name = " ".join(str(part) for part in key if part != "")
  if row["seconds"] is None:
    return f"{name:<58} does not fit into memory"
  cells = [f"{name:<58}{1e3 * row['seconds']:11.3f} ms"]
  if row.get("images_per_s"):
    cells.append(f"{row['images_per_s']:9.0f} images/s")
  ceiling = (rows.find(("product", key[-1])) or {}).get("tflops")
  tflops = row.get("tflops") or (row.get("flop") or 0) / row["seconds"] / 1e12
  if tflops:
    cells.append(f"{tflops:8.3f} TFLOP/s" + (f" ({tflops / ceiling:.0%})" if ceiling else ""))
  if row.get("gigabytes_per_s"):
    cells.append(f"{row['gigabytes_per_s']:.0f} GB/s")
  speed = (rows.find(("copy", "")) or {}).get("gigabytes_per_s")
  if row.get("moved_bytes") and speed:
    cells.append(
      f"bytes alone {row['moved_bytes'] / speed / 1e6:.3f} ms, {row['kernels']:.0f} kernels"
    )
    held = f", device held {row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else ""
    cells.append(f"{row['reckoned_bytes'] / 1e9:.2f} GB{held}")
  rates = [f"{name} {rate:.0f} images/s" for name, rate in row.items() if "PyTorch" in name]
  shares = ", ".join(f"{name} {share:.0%}" for name, share in row.get("largest", ()))
  return "  ".join(cells + rates) + (f"\n  most of it: {shares}" if shares else "")


def rule(rows: Rows, options: argparse.Namespace) -> list[str]:
  """What is fastest for each network and type, beside what "auto" takes."""
  measured = {}
  for key, _ in measurements(options):
    row = rows.find(key)
    if key[0] == "training" and row and row["seconds"]:
      measured.setdefault((*key[1:3], key[-1]), {})[key[3:5]] = row["images_per_s"]
  sentences = []
  for (name, width, dtype), rates in measured.items():
    (together, lowering), best = max(rates.items(), key=lambda item: item[1])
    network = argparse.Namespace(model=name, width=width, dtype=dtype)
    flop = options.batch * flops.forward(
      train.make_model(network), image_shape=(options.size, options.size, 3)
    )
    share = max(count for count, _ in rates)
    auto = parallel.together(
      train.make_model(network),
      num_models=share,
      batch_shape=(options.batch, options.size, options.size, 3),
    )
    platform = jax.default_backend()  # a network's layers count as one, as large as all of them
    by_rule = conv.choose_lowering(platform=platform, num_models=auto, flop=flop, groups=1)
    of_auto = rates.get((auto, AS_CHOSEN if auto == 1 else by_rule))
    sentences.append(
      f"rule: {name} {width}, {dtype}, {flop:.1e} FLOP a batch forward, {share} models: "
      f"models_together={together} lowering={'auto' if lowering == AS_CHOSEN else lowering}; "
      f"auto's rule is models_together={auto}{'' if auto == 1 else f' lowering={by_rule}'}, "
      + (f"{of_auto / best:.2f} as fast" if of_auto else "not measured or without room")
    )
  return sentences


def parser() -> argparse.ArgumentParser:
  """The flags of this benchmark: those of `bench compile` that describe sizes, and its own."""
  found = argparse.ArgumentParser(
    prog="bench device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  found.add_argument("--quick", action="store_true", help="small networks, to try it on a CPU")
  found.add_argument("--minutes", type=float, default=7, help="after which nothing is begun")
  found.add_argument("--peer", help="path of the PyTorch script, see `bench train`")
  found.add_argument("--batch", type=int, default=128)
  found.add_argument("--size", type=int, default=32, help="of the square images")
  found.add_argument("--rows", default="runs/device.jsonl", help="file of the rows")
  found.set_defaults(dtype="auto", classes=10, topology="cpu")
  return found
