"""Quantized variables as a safetensors file, which other programs and languages read.

Layout of the format: 8 bytes with the length of a header, the header in JSON, the data. Per
quantized kernel at PATH, a path in the variables like "params/stem/conv/kernel", there are
"PATH.codes", "PATH.scale" and "PATH.zero_point"; all else is stored at its path as it is. Codes
are uint8: of up to 16 levels two 4-bit codes in a byte, in the order of the flattened kernel, the
first in the low half, the last half of an odd number 0; of more levels one to a byte, in the
kernel's shape. (`pack.save` also packs 2, 3 and 4 levels, into less.) The metadata's entry
"quantized" is JSON with, per kernel, shape, levels, bits of a code, dtype, group size (see
`pack.Kernel`), and the formula that gives a weight.
"""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from ptq_jax.quantize import pack
from ptq_jax.quantize.pack import Packed

DTYPES = {
  "bool": "BOOL",
  "bfloat16": "BF16",
  **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
  **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
  **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
"""Names of dtypes in the format."""

FORMULA = "(code - zero_point) * scale"
"""The weight of a code, in the dtype of the scale."""


def save(
  path: pathlib.Path | str, packed: Packed, *, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes one file, whole or not at all.

  NumPy reads it back so; the result has every leaf of the variables by its path, bit by bit
  (bfloat16 needs `import ml_dtypes`)::

    def load(path):
      data = np.fromfile(path, np.uint8)
      size = 8 + int(data[:8].view("<u8")[0])
      header, arrays = json.loads(data[8:size].tobytes()), {}
      quantized = json.loads(header.pop("__metadata__")["quantized"])
      for name, about in header.items():
        start, end = about["data_offsets"]
        kind, special = about["dtype"], {"BOOL": "?", "BF16": "bfloat16"}
        dtype = special.get(kind) or f"{kind[0].lower()}{int(kind[1:]) // 8}"
        arrays[name] = data[size + start : size + end].view(dtype).reshape(about["shape"])
      for name, about in quantized.items():
        codes, scale, zero = (arrays.pop(f"{name}.{p}") for p in ("codes", "scale", "zero_point"))
        if about["bits"] == 4:
          codes = np.stack([codes & 15, codes >> 4], axis=-1)
        codes = np.resize(codes, about["shape"])
        if rows := about["group_size"]:
          scale, zero = (np.repeat(part, rows, 0).reshape(codes.shape) for part in (scale, zero))
        arrays[name] = ((codes - zero.astype(scale.dtype)) * scale).astype(about["dtype"])
      return arrays

  Args:
    packed: of `pack.pack`.
    metadata: further entries of the header's metadata, text by name.
  Raises:
    ValueError: a leaf of a dtype that the format does not have, a metadata entry "quantized", or
      two arrays of one name.
  """
  metadata = dict(metadata or {})
  if "quantized" in metadata:
    raise ValueError('metadata must not have an entry "quantized"; the codes are described there.')
  facts = {path: _facts(kernel) for path, kernel in packed.kernels.items()}
  header: dict = {"__metadata__": metadata | {"quantized": json.dumps(facts)}}
  arrays, offset = _arrays(packed), 0
  for name, array in arrays.items():
    if str(array.dtype) not in DTYPES:
      raise ValueError(f"{name!r} is {array.dtype}, which safetensors do not have; leave it out.")
    span = [offset, offset + array.nbytes]
    shape = list(array.shape)
    header[name] = {"dtype": DTYPES[str(array.dtype)], "shape": shape, "data_offsets": span}
    offset = span[1]
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  parts = (len(text).to_bytes(8, "little"), text, *(a.tobytes() for a in arrays.values()))
  pack.write_whole(path, lambda file: file.writelines(parts))


def _facts(kernel) -> dict:
  """What a reader must know of a kernel."""
  facts = {name: getattr(kernel, name) for name in ("shape", "levels", "dtype", "group_size")}
  return facts | {"bits": 4 if kernel.levels <= 16 else 8, "weight": FORMULA}


def _codes(kernel) -> np.ndarray:
  """The codes of a kernel, two to a byte if they fit."""
  codes = pack.from_bytes(kernel.codes, math.prod(kernel.shape), levels=kernel.levels)
  if kernel.levels <= 16:
    return pack.to_bytes(codes, levels=16)
  return codes.astype(np.uint8).reshape(kernel.shape)


def _arrays(packed) -> dict[str, np.ndarray]:
  """All arrays by name, those of the widest dtypes first, so that every one is aligned."""
  found = dict(packed.rest)
  for path, kernel in packed.kernels.items():
    parts = {
      f"{path}.codes": _codes(kernel),
      f"{path}.scale": kernel.scale,
      f"{path}.zero_point": kernel.zero_point,
    }
    if parts.keys() & found.keys():
      raise ValueError(f"the variables have {sorted(parts.keys() & found.keys())[0]!r} already.")
    found |= parts
  arrays = {name: np.asarray(array) for name, array in found.items()}
  return dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
