"""OBC with blocked elimination against plain rank-1 updates, layer by layer.

    python -m launch.bench obc [--shapes ROWSxCOLUMNS ...] [--levels N] [--repeats N] [--models N]

The plain versions keep one inverse Hessian per row of the weights and subtract a rank-1 matrix from
each after every weight: once array by array in NumPy, as the public OBC code does in PyTorch, and
once as a single compiled loop, which XLA fuses into one pass over the inverses per weight. All
start from the same inverse. Compilation is shown apart; MB are those of the inverses and factors
held at once, plain and ours. Near ties may go either way in float32: "same" is the share of equal
codes. The default shapes are a layer of ResNet-18 and those of the digits network. --models N also
quantizes N such layers, with different weights and Hessians, in one call.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.quantize import grid, hessian, obc
from ptq_jax.quantize.grid import Grid

SHAPES = ((64, 576), (16, 9), (16, 144), (32, 288))
"""(rows, columns): outputs, and inputs of one output."""


def main(argv: list[str]) -> None:
  """Prints a table of `run`."""
  flags = _parser().parse_args(argv)
  shapes = [tuple(map(int, text.split("x"))) for text in flags.shapes]
  print(f"{flags.levels} levels; {jax.devices()[0].device_kind}, JAX {jax.__version__}")
  heads = ("layer", "models", "NumPy s", "one jit s", "ours s", "ratios", "compile s", "MB", "same")
  print("".join(f"{head:>14}" for head in heads))
  for row in run(
    shapes=shapes, levels=flags.levels, repeats=flags.repeats, models=(1, flags.models)
  ):
    cells = (
      f"{row['rows']} x {row['columns']}",
      str(row["models"]),
      f"{row['array_seconds']:.4f}",
      f"{row['plain_seconds']:.4f}",
      f"{row['seconds']:.4f}",
      f"{row['array_ratio']:.1f} {row['ratio']:.1f}",
      f"{row['compile_seconds']:.1f}",
      f"{row['plain_bytes'] / 1e6:.0f} -> {row['bytes'] / 1e6:.0f}",
      f"{row['same_codes']:.4f}",
    )
    print("".join(f"{cell:>14}" for cell in cells), flush=True)


def run(*, shapes=SHAPES, levels=4, repeats=3, models=(1,)) -> list[dict]:
  """Measures every shape for every number of models; the fastest of the repeats counts.

  Returns:
    One dict per measurement: seconds of the plain versions ("array", "plain") and of ours, and how
    often ours goes into theirs. Plain seconds of several models are those of one, multiplied.
  """
  records = []
  for rows, columns in shapes:
    one = _Case(1, rows, columns, levels)
    plain_compile, plain_seconds, expected = _timed(one.plain, repeats)
    _, array_seconds, _ = _timed(one.arrays, 1)
    for count in dict.fromkeys(models):
      case = one if count == 1 else _Case(count, rows, columns, levels)
      compile_seconds, seconds, found = _timed(case.ours, repeats)
      same = np.mean(case.codes(found)[:rows] == one.codes(expected))
      records.append(
        {
          "rows": rows,
          "columns": columns,
          "models": count,
          "levels": levels,
          "array_seconds": array_seconds * count,
          "plain_seconds": plain_seconds * count,
          "seconds": seconds,
          "array_ratio": array_seconds * count / seconds,
          "ratio": plain_seconds * count / seconds,
          "plain_compile_seconds": plain_compile,
          "compile_seconds": compile_seconds,
          "plain_bytes": 4 * rows * columns**2,
          "bytes": case.bytes_at_once(),
          "same_codes": float(same),
        }
      )
  return records


class _Case:
  """Layers with correlated inputs: weights, grids and inverse Hessians. The first is always one."""

  def __init__(self, count, rows, columns, levels):
    parts = [_layer(rows, columns, seed) for seed in range(count)]
    weights, hessians = (np.stack(part) for part in zip(*parts, strict=True))
    inverses = [hessian.inverse(one) for one in hessians]
    self.inverse = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inverses)
    self.weights = jnp.asarray(weights.reshape(-1, columns))
    fitted = grid.fit(self.weights.T, levels=levels)
    self.grid = Grid(fitted.scale.T, fitted.zero_point.T, jnp.full((count * rows, 1), levels))
    self.owner = jnp.repeat(jnp.arange(count, dtype=jnp.int32), rows)

  def ours(self):
    return obc.quantize_rows(self.weights, self.inverse, self.owner, self.grid)

  def plain(self):
    return rank_one_updates(self.weights, self.inverse.matrix[0], self.grid)

  def arrays(self):
    return rank_one_arrays(
      np.array(self.weights), np.array(self.inverse.matrix[0]), *map(np.asarray, self.grid)
    )

  def codes(self, found):
    return np.asarray(grid.codes(found, self.grid))

  def bytes_at_once(self):
    rows, columns = self.weights.shape
    at_once = obc.rows_at_once(rows, columns, self.weights.dtype, obc.default_memory_bytes())
    return at_once * obc.bytes_per_row(columns, self.weights.dtype)


@jax.jit
def rank_one_updates(weights, inverse, fitted):
  """OBC as the paper writes it, all rows side by side: [rows, D] from one inverse [D, D]."""
  rows, columns = weights.shape
  each = jnp.arange(rows)

  def step(_, carry):
    w, matrices, left = carry
    rounded = grid.nearest(w, fitted)
    squared = jnp.square(w - rounded)
    diagonal = jnp.diagonal(matrices, axis1=1, axis2=2)
    outlier = left & (squared > 0.25 * jnp.square(fitted.scale))
    by_score = jnp.argmin(jnp.where(left, squared / diagonal, jnp.inf), axis=1)
    by_error = jnp.argmax(jnp.where(left, squared, -1), axis=1)
    j = jnp.where(outlier.any(1), by_error, by_score)
    column, d = matrices[each, j], matrices[each, j, j]
    moved = w - column * ((w[each, j] - rounded[each, j]) / d)[:, None]
    w = jnp.where(left, moved, w).at[each, j].set(rounded[each, j])
    scaled = column / jnp.sqrt(d)[:, None]
    return w, matrices - scaled[:, :, None] * scaled[:, None, :], left.at[each, j].set(False)

  start = (weights, jnp.tile(inverse, (rows, 1, 1)), jnp.ones(weights.shape, bool))
  return jax.lax.fori_loop(0, columns, step, start)[0]


def rank_one_arrays(weights, inverse, scale, zero_point, levels):
  """The same in NumPy: [rows, D] from one inverse [D, D]."""
  rows, columns = weights.shape
  each, matrices = np.arange(rows), np.repeat(inverse[None], rows, axis=0)
  left = np.ones(weights.shape, bool)
  for _ in range(columns):
    steps = np.clip(np.round(weights / scale) + zero_point, 0, levels - 1)
    rounded = (steps - zero_point) * scale
    squared = np.where(left, np.square(weights - rounded), 0)
    diagonal = np.where(left, np.diagonal(matrices, axis1=1, axis2=2), 1)
    by_score = np.where(left, squared / diagonal, np.inf).argmin(axis=1)
    is_outlier = (squared > 0.25 * np.square(scale)).any(axis=1)
    j = np.where(is_outlier, squared.argmax(axis=1), by_score)
    column, d = matrices[each, j], matrices[each, j, j]
    moved = weights - column * ((weights[each, j] - rounded[each, j]) / d)[:, None]
    weights = np.where(left, moved, weights)
    weights[each, j], left[each, j] = rounded[each, j], False
    scaled = column / np.sqrt(d)[:, None]
    matrices -= scaled[:, :, None] * scaled[:, None, :]
  return weights


@functools.cache
def _layer(rows, columns, seed):
  """Weights [rows, columns] and the Hessian of mixed, rectified inputs."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns)
  inputs = np.maximum(rng.normal(size=(4 * columns, columns)) @ mixing + 0.2, 0)
  return rng.normal(0, 0.05, (rows, columns)).astype(np.float32), 2 * inputs.T @ inputs / len(
    inputs
  )


def _timed(function, repeats):
  """(seconds of compilation, seconds of the fastest of the repeats, result)."""

  def once():
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result

  first, result = once()
  fastest = min(once()[0] for _ in range(repeats))
  return first - fastest, fastest, result


def _parser():
  parser = argparse.ArgumentParser(
    prog="bench obc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{d}" for rows, d in SHAPES])
  parser.add_argument("--levels", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
  parser.add_argument("--models", type=int, default=1, help="also so many layers in one call")
  return parser
