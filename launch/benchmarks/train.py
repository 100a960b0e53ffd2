"""Our trainer beside a PyTorch trainer of one model after another, on the same shapes.

    bash launch/run bench train --model resnet8 --width 16 --models 4 --peer train_torch.py

Both train on random pixels: this measures speed alone. The peer is a script that takes --models,
--epochs, --batch, --examples, --size, --stages, --width, --loader and prints a JSON line with
"images_per_s"; it runs before and after ours, in the same process group of cores, once as users run
it (--loader dataloader) and once tuned (--loader tensor; on a GPU also --amp, --channels-last,
--compile). It has ResNets alone; for the convnet its function `resnet` is replaced by the same
network in PyTorch. Without --peer only ours is measured.
"""

import argparse
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import models
from ptq_jax.data import augment, membership
from ptq_jax.models import conv, flops, parallel
from ptq_jax.train import fit, optimizer, shadows

STAGES = {"resnet8": "1,1,1", "resnet20": "3,3,3", "resnet18": "2,2,2,2", "convnet": "1"}
"""What the peer calls our models."""

CONVNET_PEER = """
import importlib.util, sys
from torch import nn

def convnet(stages, width, classes, channels=3):
  widths = [channels, width, 2 * width, 4 * width]
  layers = []
  for i in range(3):
    convolution = nn.Conv2d(widths[i], widths[i + 1], 3, 2 if i else 1, 1, bias=False)
    layers += [convolution, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
  head = nn.Linear(widths[-1], classes)
  return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("peer", sys.argv[0])
peer = sys.modules["peer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)
peer.resnet = convnet
peer.main()
"""
"""Runs the peer with the plain convolutional network that `models.convnet` is."""

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "TPU v4": 275, "TPU v5": 197, "TPU v6": 918}
"""Dense bf16 peak of a chip, from the makers' data sheets."""


def main(argv: list[str]) -> None:
  """Prints images per second, ratios, TFLOP/s and the share of the chip's peak."""
  options = parser().parse_args(argv)
  device = jax.local_devices()[0]
  what = f"{options.models} x {options.model}, width {options.width}, {options.size}x{options.size}"
  how = f"batch {options.batch}, {options.dtype}, {device.device_kind}, JAX {jax.__version__}"
  print(f"{what}, {how}, convolutions {options.lowering or 'as chosen'}")
  before = peers(options)
  rate, seconds = ours(options)
  after = peers(options)
  flop = flops.training(make_model(options), image_shape=(options.size, options.size, 3))
  tflops = rate * flop / 1e12
  peak = next((v for name, v in PEAK_TFLOPS.items() if name in device.device_kind), None)
  share = f", {tflops / peak:.0%} of the bf16 peak" if peak else ""
  print(f"{'ptq_jax':<22} {rate:10.0f} images/s  {tflops:.3f} TFLOP/s{share}")
  print(f"{'':<22} first epoch, with compilation: {seconds:.1f} s")
  for name, first in before.items():
    theirs = (first + after[name]) / 2
    both = f"({first:.0f} before ours, {after[name]:.0f} after)"
    print(f"{name:<22} {theirs:10.0f} images/s  {both}: ours is {rate / theirs:.2f} times as fast")


def parser() -> argparse.ArgumentParser:
  """The flags of this benchmark."""
  flags = argparse.ArgumentParser(
    prog="bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--model", default="resnet8", choices=sorted(models.ZOO))
  flags.add_argument("--width", type=int, default=16)
  flags.add_argument("--models", type=int, default=4, help="trained at once, even")
  flags.add_argument("--size", type=int, default=32, help="of the square images")
  flags.add_argument("--batch", type=int, default=128)
  flags.add_argument("--examples", type=int, default=4096, help="pool; each model trains on half")
  flags.add_argument("--epochs", type=int, default=2, help="measured, after one that warms up")
  flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  flags.add_argument(
    "--lowering", choices=conv.LOWERINGS, help="of the convolutions; else as chosen"
  )
  flags.add_argument("--peer", help="path of the PyTorch script")
  return flags


def make_model(options):
  """The network that is trained."""
  return models.make(options.model, num_classes=10, width=options.width, dtype=options.dtype)


def ours(options) -> tuple[float, float]:
  """Images per second over all models, and the seconds of the first epoch."""
  rng = np.random.default_rng(0)
  shape = (options.examples, options.size, options.size, 3)
  images = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
  labels = jnp.asarray(rng.integers(0, 10, options.examples, dtype=np.int32))
  rows = membership.paired(
    jax.random.key(0), num_models=options.models, num_examples=options.examples
  )
  members = jnp.asarray(membership.members_of(rows))
  steps, epochs = members.shape[1] // options.batch, 1 + options.epochs
  recipe = fit.Recipe(
    model=make_model(options),
    optimizer=optimizer.sgd(learning_rate=0.1, epochs=epochs, steps_per_epoch=steps),
    augmentation=augment.make(("flip", "crop4")),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    batch_size=options.batch,
    lowering=options.lowering,
  )
  keys = shadows.model_keys(jax.random.key(1), jnp.arange(options.models))
  states = shadows.init(keys, recipe, image_shape=shape[1:])
  marks = [time.perf_counter()]
  for epoch in shadows.epochs(
    states,
    keys,
    recipe,
    images,
    labels,
    members,
    first=0,
    last=epochs,
    mesh=parallel.mesh_for(options.models),
  ):
    jax.block_until_ready(epoch.metrics)
    marks.append(time.perf_counter())
  images_seen = options.epochs * steps * options.batch * options.models
  return images_seen / (marks[-1] - marks[1]), marks[1] - marks[0]


def peers(options) -> dict[str, float]:
  """Images per second of the peer, as users run it and tuned."""
  if not options.peer:
    return {}
  common = {
    "models": 2, "epochs": 1, "batch": options.batch, "examples": options.examples,
    "size": options.size, "stages": STAGES[options.model], "width": options.width,
  }  # fmt: skip
  arguments = [f"--{name}={value}" for name, value in common.items()]
  tuned = ["--loader=tensor"]
  if jax.default_backend() == "gpu":
    tuned += ["--amp", "--channels-last", "--compile"]
  workers = ["--workers=2"] if jax.default_backend() == "cpu" else []
  script = [options.peer] if options.model != "convnet" else ["-c", CONVNET_PEER, options.peer]
  return {
    "PyTorch, DataLoader": run_peer([*script, *arguments, *workers]),
    "PyTorch, tuned": run_peer([*script, *arguments, *tuned]),
  }


def run_peer(command: list[str]) -> float:
  """Images per second that a Python program prints."""
  done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"the peer failed: {done.stderr.strip().splitlines()[-1]}")
  return json.loads(done.stdout.splitlines()[-1])["images_per_s"]
