"""Quantized variables as integer codes in as few bytes as they need, and as one file.

2 levels take 1 bit, 3 levels a fifth of a byte (3^5 = 243 <= 256), 4 levels 2 bits, up to 16 levels
4 bits, up to 256 a byte. `unpack` gives back the exact same variables, bit by bit: packing checks
that every weight is `grid.dequantize` of its code.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import ArrayLike, Int, UInt8, Variables
from ptq_jax.quantize import grid as grids
from ptq_jax.quantize.grid import Grid
from ptq_jax.quantize.plan import Record

FORMAT = 1
"""Version of the file format."""

TRITS = 3 ** np.arange(5)
"""Weights of the five codes in a byte of three levels."""


class Kernel(NamedTuple):
  """The kernel of one layer as codes; of one model, or of models stacked along leading axes."""

  codes: UInt8[np.ndarray, " bytes"]
  """Codes in the order of the flattened kernel; see `to_bytes`."""
  scale: np.ndarray
  """Broadcastable against the kernel, float; with groups of inputs, one row per group, see
  `group_size`."""
  zero_point: np.ndarray
  """As the scale, in the smallest integer type that holds it; a float for two levels."""
  levels: int
  shape: tuple[int, ...]
  dtype: str
  """Of the weights."""
  group_size: int = 0
  """Not 0: so many rows of the kernel share a row [channels] of scale and zero point, where the
  kernel's axes are flattened to rows and channels."""


@dataclasses.dataclass(frozen=True)
class Packed:
  """Quantized variables: codes where there are some, everything else as it is."""

  kernels: Mapping[str, Kernel]
  """By path of the kernel in the variables, "params/stem/conv/kernel"."""
  rest: Mapping[str, np.ndarray]
  """Leaves in full precision, by path."""
  full: tuple[str, ...] = ()
  """Paths of those among them that are weights: a grid of 0 levels says so."""
  empty: tuple[str, ...] = ()
  """Paths of collections without a leaf."""


class Size(NamedTuple):
  """True bytes of packed variables, of all models in it together."""

  codes: int
  grids: int
  """Scales and zero points."""
  full_kernels: int
  """Kernels that stay in full precision."""
  other: int
  """Biases, batch normalisation and whatever else is no kernel."""
  num_weights: int
  """Entries of all kernels, quantized or not."""

  @property
  def total(self) -> int:
    """All bytes."""
    return self.codes + self.grids + self.full_kernels + self.other

  @property
  def bits_per_weight(self) -> float:
    """Bits that the kernels take with their grids, per weight."""
    return 8 * (self.codes + self.grids + self.full_kernels) / max(self.num_weights, 1)


def pack(variables: Variables, grids_by_layer: Mapping[str, Grid]) -> Packed:
  """Codes of quantized variables.

  Args:
    variables: of one model, or stacked along leading axes.
    grids_by_layer: by path of the layer, "stem/conv", or of the parameter; scale and zero point
      broadcastable against the kernel, levels one number (or an array of equal ones), 0 for full
      precision.
      `grids_of(records)` of a method's records.
  Raises:
    ValueError: a layer that is not there, levels that differ, or a kernel that is not on its grid.
  """
  leaves = trees.flatten(variables)
  kernels, full = {}, []
  for layer, grid in grids_by_layer.items():
    path = _parameter(layer, leaves)
    levels = np.unique(np.asarray(grid.levels))
    if len(levels) != 1:
      raise ValueError(f"layer {layer!r} has grids of {levels.tolist()} levels; pack them apart.")
    if levels[0]:
      kernels[path] = _pack_kernel(path, leaves[path], grid._replace(levels=int(levels[0])))
    else:
      full.append(path)
  rest = {path: np.asarray(leaf) for path, leaf in leaves.items() if path not in kernels}
  return Packed(kernels, rest, tuple(full), tuple(trees.empty(variables)))


def _parameter(layer, leaves) -> str:
  """Path of a layer's weights, or of a parameter, in the variables."""
  places = [f"params/{layer}/kernel", f"params/{layer}/embedding", f"params/{layer}"]
  for path in places:
    if path in leaves:
      return path
  raise ValueError(f"there is a grid for layer {layer!r}, but no {places[0]!r} in the variables.")


def unpack(packed: Packed) -> Variables:
  """The variables that were packed, bit by bit, as nested dicts of JAX arrays."""
  kernels = {path: _unpack_kernel(k) for path, k in packed.kernels.items()}
  leaves = jax.device_put(kernels | dict(packed.rest))
  return trees.unflatten(leaves | {path: {} for path in packed.empty})


def split(packed: Packed, belongs: Callable[[str], bool]) -> tuple[Packed, Packed]:
  """The part of packed variables at paths of which `belongs` is true, and the rest."""

  def part(wanted):
    kernels = {path: k for path, k in packed.kernels.items() if belongs(path) == wanted}
    rest = {path: leaf for path, leaf in packed.rest.items() if belongs(path) == wanted}
    return Packed(kernels, rest, tuple(path for path in packed.full if path in rest))

  return part(wanted=True), part(wanted=False)


def same(first: Packed, second: Packed) -> bool:
  """Whether two are equal, codes, grids and everything else, bit by bit."""
  a, b = to_arrays(first), to_arrays(second)
  return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def size(packed: Packed) -> Size:
  """True bytes, without the few of the file format."""
  full = [
    leaf
    for path, leaf in packed.rest.items()
    if path in packed.full or path.endswith(("/kernel", "/embedding"))
  ]
  kernels = packed.kernels.values()
  return Size(
    codes=sum(kernel.codes.nbytes for kernel in kernels),
    grids=sum(kernel.scale.nbytes + kernel.zero_point.nbytes for kernel in kernels),
    full_kernels=sum(leaf.nbytes for leaf in full),
    other=sum(leaf.nbytes for leaf in packed.rest.values()) - sum(leaf.nbytes for leaf in full),
    num_weights=sum(math.prod(k.shape) for k in kernels) + sum(leaf.size for leaf in full),
  )


def save(
  path: pathlib.Path | str,
  quantized: Packed | Variables,
  records: Sequence[Record] | None = None,
) -> None:
  """Writes one .npz file, whole or not at all.

  Args:
    quantized: of `pack`; or the variables that a method returned, together with its `records`.
  Raises:
    ValueError: variables without records, Packed with them, or what `pack` refuses.
  """
  if isinstance(quantized, Packed) != (records is None):
    raise ValueError("save needs either the result of pack, or variables and their records.")
  packed = quantized if records is None else pack(quantized, grids_of(records))
  write_whole(path, lambda file: np.savez(file, **to_arrays(packed)))


def grids_of(records: Sequence[Record]) -> dict[str, Grid]:
  """The grids of all layers, as `pack` takes them, from the records of a method."""
  return {path: grid for record in records for path, grid in record.grids.items()}


def write_whole(path: pathlib.Path | str, write: Callable[[BinaryIO], None]) -> None:
  """Lets `write` write a file that appears at `path` only when it is on the disk as a whole."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("wb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def load(path: pathlib.Path | str) -> Packed:
  """Reads what `save` wrote.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged or not such a file.
  """
  with _readable(path), np.load(path, allow_pickle=False) as file:
    return from_arrays({name: file[name] for name in file.files})


def to_arrays(packed: Packed) -> dict[str, np.ndarray]:
  """Packed variables as named plain arrays, for an .npz file of one's own."""
  arrays, index = {}, {"format": FORMAT, "kernels": {}, "rest": {}}
  index |= {"full": packed.full, "empty": packed.empty}
  for path, kernel in packed.kernels.items():
    arrays |= {f"{path}:{name}": getattr(kernel, name) for name in ("codes", "scale", "zero_point")}
    facts = ("levels", "shape", "dtype", "group_size")
    index["kernels"][path] = {name: getattr(kernel, name) for name in facts}
  for path, leaf in packed.rest.items():
    arrays[path] = _plain(leaf)
    index["rest"][path] = str(leaf.dtype)
  return arrays | {"index": np.array(json.dumps(index))}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Packed:
  """Inverse of `to_arrays`.

  Raises:
    ValueError: if something is missing or does not fit.
  """
  if "index" not in arrays:
    raise ValueError("these arrays are no packed variables: there is no index.")
  index = json.loads(str(arrays["index"]))
  if index.get("format") != FORMAT:
    raise ValueError(f"packed variables of format {index.get('format')}; this reads {FORMAT}.")
  try:
    kernels = {
      path: Kernel(
        *(arrays[f"{path}:{name}"] for name in ("codes", "scale", "zero_point")),
        facts["levels"],
        tuple(facts["shape"]),
        facts["dtype"],
        facts.get("group_size", 0),
      )
      for path, facts in index["kernels"].items()
    }
    rest = {path: arrays[path].view(jnp.dtype(dtype)) for path, dtype in index["rest"].items()}
  except KeyError as missing:
    raise ValueError(f"the packed variables lack {missing}.") from missing
  for path, kernel in kernels.items():
    if len(kernel.codes) != num_code_bytes(math.prod(kernel.shape), levels=kernel.levels):
      raise ValueError(f"the codes of {path!r} have {len(kernel.codes)} bytes, which do not fit.")
  return Packed(kernels, rest, tuple(index.get("full", ())), tuple(index.get("empty", ())))


def num_code_bytes(num_weights: int, *, levels: int) -> int:
  """Bytes that `to_bytes` makes of so many codes."""
  grids.check_levels(levels)
  return math.ceil(num_weights / (5 if levels == 3 else 8 // _bits(levels)))


def to_bytes(codes: Int[ArrayLike, "..."], *, levels: int) -> UInt8[np.ndarray, " bytes"]:
  """Codes in [0, levels), flattened, several to a byte, the first in the lowest digits.

  Raises:
    ValueError: codes outside [0, levels).

  >>> to_bytes(np.array([1, 2, 0, 0, 1, 2]), levels=3)  # 1 + 2 * 3 + 1 * 81, and 2
  array([88,  2], dtype=uint8)
  """
  flat = np.asarray(codes).reshape(-1)
  if flat.size and (flat.min() < 0 or flat.max() >= levels):
    raise ValueError(f"codes must be in [0, {levels}), got {flat.min()} to {flat.max()}.")
  weights = _digits(levels)
  filled = np.zeros(num_code_bytes(flat.size, levels=levels) * len(weights), np.uint16)
  filled[: flat.size] = flat
  return (filled.reshape(-1, len(weights)) @ weights.astype(np.uint16)).astype(np.uint8)


def from_bytes(
  packed: UInt8[np.ndarray, " bytes"], num_weights: int, *, levels: int
) -> Int[np.ndarray, " num_weights"]:
  """Inverse of `to_bytes`.

  Raises:
    ValueError: too few or too many bytes, or a byte that no codes give.
  """
  expected = num_code_bytes(num_weights, levels=levels)
  if len(packed) != expected:
    raise ValueError(
      f"{num_weights} codes of {levels} levels need {expected} bytes, got {len(packed)}."
    )
  base = 3 if levels == 3 else 2 ** _bits(levels)
  codes = packed.astype(np.int32)[:, None] // _digits(levels) % base
  codes = codes.reshape(-1)[:num_weights].astype(np.int32)
  if codes.size and (codes.max() >= levels or (levels == 3 and packed.max() >= 3**5)):
    raise ValueError(f"the bytes hold codes outside [0, {levels}); they are damaged.")
  return codes


def _bits(levels: int) -> int:
  """Bits of a code, dividing 8."""
  return next(bits for bits in (1, 2, 4, 8) if levels <= 2**bits)


def _digits(levels: int) -> np.ndarray:
  """What a one is worth at each place of a byte."""
  return TRITS if levels == 3 else 2 ** np.arange(0, 8, _bits(levels))


def _pack_kernel(path: str, weights, grid: Grid) -> Kernel:
  """Codes of one kernel."""
  weights, scale, zero_point = (np.asarray(part) for part in (weights, *grid[:2]))
  first = np.round(zero_point)
  steps = np.round(weights.astype(scale.dtype) / scale + (zero_point - first)) + first
  codes = np.clip(steps, 0, grid.levels - 1).astype(np.int32)
  if (zero_point == np.round(zero_point)).all():
    ends = zero_point.min(), zero_point.max()
    zero_point = zero_point.astype(np.result_type(*(np.min_scalar_type(int(e)) for e in ends)))
  (scale, zero_point), group_size = _shortened((scale, zero_point), weights.shape)
  kernel = Kernel(
    to_bytes(codes, levels=grid.levels),
    scale,
    zero_point,
    grid.levels,
    weights.shape,
    str(weights.dtype),
    group_size,
  )
  bits = f"u{weights.dtype.itemsize}"
  same = _unpack_kernel(kernel).view(bits) == weights.view(bits)
  if not same.all():
    raise ValueError(
      f"{np.sum(~same)} of {weights.size} weights of {path!r} are not on the grid; "
      "pack what a quantizer returned, with the grids in its records."
    )
  return kernel


def _unpack_kernel(kernel: Kernel) -> np.ndarray:
  """Weights of one kernel: `grid.dequantize` on the host, where no shape has to be compiled."""
  codes = from_bytes(kernel.codes, math.prod(kernel.shape), levels=kernel.levels)
  scale, zero_point = kernel.scale, kernel.zero_point
  if kernel.group_size:
    scale, zero_point = (
      np.repeat(part, kernel.group_size, axis=0).reshape(kernel.shape)
      for part in (scale, zero_point)
    )
  weights = codes.reshape(kernel.shape).astype(scale.dtype) - zero_point.astype(scale.dtype)
  return (weights * scale).astype(jnp.dtype(kernel.dtype))


def _shortened(parts, shape):
  """Scale and zero point with one row where neighbouring rows of the kernel share it: (parts, rows
  that do). Parts that are not of the kernel's shape stay, with 0."""
  if shape != parts[0].shape or shape != parts[1].shape:
    return parts, 0
  best, size = parts, 0
  for axis in range(1, len(shape)):
    rows = [part.reshape(math.prod(shape[:axis]), -1) for part in parts]
    changes = np.flatnonzero(sum((row[1:] != row[:-1]).any(axis=1) for row in rows)) + 1
    shared = int(np.gcd.reduce([len(rows[0]), *changes]))
    if len(rows[0]) // shared * rows[0].shape[1] < best[0].size:
      best, size = tuple(row[::shared] for row in rows), shared
  return best, size


def _plain(leaf: np.ndarray) -> np.ndarray:
  """The array in a dtype that .npz knows: bfloat16 and its like as unsigned integers."""
  return leaf.view(f"u{leaf.dtype.itemsize}") if leaf.dtype.kind == "V" else leaf


@contextlib.contextmanager
def _readable(path) -> Iterator[None]:
  """Turns every way in which reading a damaged file fails into one ValueError."""
  try:
    yield
  except FileNotFoundError:
    raise
  except (zipfile.BadZipFile, ValueError, EOFError, OSError, TypeError) as error:
    raise ValueError(f"{path} is no readable file of packed variables ({error}).") from error
