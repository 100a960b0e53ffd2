"""Which lowering of a convolution is fastest when every model has its own kernel and images.

    bash launch/run bench conv [--models 8] [--dtype bfloat16] [--shapes resnet18]

Forward and backward together, as in training, for the layer shapes of a network: "unrolled" (a
convolution per model), "patches" (batched matrix products), "grouped" (what `jax.vmap` does by
itself), and JAX's own convolution, which knows nothing of models. `models.conv.choose_lowering`
follows these numbers.
"""

import argparse
import functools
import time

import jax

from ptq_jax.models import conv

SHAPES = {  # images per model, height and width, channels in and out, kernel, stride(, groups)
  "digits": [(64, 8, 1, 16, 3, 1), (64, 8, 16, 32, 3, 2), (64, 4, 32, 64, 3, 2)],
  "resnet8": [
    (128, 32, 3, 16, 3, 1), (128, 32, 16, 16, 3, 1), (128, 32, 16, 32, 3, 2),
    (128, 16, 32, 32, 3, 1), (128, 32, 16, 32, 1, 2), (128, 8, 64, 64, 3, 1),
  ],
  "resnet18": [
    (128, 32, 3, 64, 3, 1), (128, 32, 64, 64, 3, 1), (128, 32, 64, 128, 3, 2),
    (128, 16, 128, 128, 3, 1), (128, 8, 256, 256, 3, 1), (128, 4, 512, 512, 3, 1),
  ],
  "grouped": [
    (32, 8, 32, 32, 3, 1, 32), (32, 32, 64, 64, 3, 1, 64), (32, 32, 64, 64, 3, 2, 64),
    (32, 16, 128, 128, 5, 1, 128), (32, 16, 64, 64, 3, 1, 16), (32, 16, 64, 64, 3, 1, 2),
  ],
}  # fmt: skip


def main(argv: list[str]) -> None:
  """Prints milliseconds and GFLOP/s of each lowering for each shape."""
  flags = argparse.ArgumentParser(
    prog="bench conv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--models", type=int, default=8)
  flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  flags.add_argument("--shapes", default="resnet8", choices=sorted(SHAPES))
  flags.add_argument("--seconds", type=float, default=1.0, help="per measurement")
  options = flags.parse_args(argv)
  device = jax.local_devices()[0].device_kind
  print(f"{options.models} models, {options.dtype}, {device}, JAX {jax.__version__}")
  columns = (*conv.LOWERINGS, "jax.lax")
  print(f"{'images, size, in, out, kernel, stride':<40}" + "".join(f"{c:>26}" for c in columns))
  for shape in SHAPES[options.shapes]:
    cells = [measure(shape, column, options) for column in columns]
    print(f"{shape!s:<40}" + "".join(f"{ms:10.2f} ms {gflops:7.0f} GF/s" for ms, gflops in cells))


def measure(shape, lowering: str, options) -> tuple[float, float]:
  """Milliseconds and GFLOP/s of forward and backward of all models."""
  n, size, depth, features, window, stride, groups = (*shape, 1)[:7]
  out = -(-size // stride)
  pad = ((window // 2, window // 2),) * 2
  keys = jax.random.split(jax.random.key(0), 3)
  draw = functools.partial(jax.random.normal, dtype=options.dtype)
  images = draw(keys[0], (options.models, n, size, size, depth))
  kernels = draw(keys[1], (options.models, window, window, depth // groups, features))
  cotangents = draw(keys[2], (options.models, n, out, out, features))

  def convolve(images, kernel):
    function = jax.lax.conv_general_dilated
    if lowering in conv.LOWERINGS:
      function = functools.partial(conv.conv_general_dilated, lowering=lowering)
    return function(
      images,
      kernel,
      (stride, stride),
      pad,
      dimension_numbers=conv.DIMENSION_NUMBERS,
      feature_group_count=groups,
    )

  @functools.partial(jax.jit, compiler_options=conv.compiler_options())
  def step(images, kernels, cotangents):
    outputs, backward = jax.vjp(jax.vmap(convolve), images, kernels)
    return outputs, backward(cotangents)

  jax.block_until_ready(step(images, kernels, cotangents))
  start, count = time.perf_counter(), 0
  while time.perf_counter() - start < options.seconds:
    jax.block_until_ready(step(images, kernels, cotangents))
    count += 1
  seconds = (time.perf_counter() - start) / count
  flop = 3 * 2 * options.models * n * out * out * window * window * depth // groups * features
  return 1e3 * seconds, flop / seconds / 1e9
