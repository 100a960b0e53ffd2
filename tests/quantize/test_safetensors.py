"""safetensors: read back by the loader that the documentation shows, and what is refused."""

import inspect
import json
import textwrap

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (NumPy knows "bfloat16" then)
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.quantize import grid, pack, safetensors


def documented_loader():
  """The function `load` in the text of `safetensors.save`."""
  text = textwrap.dedent(inspect.getdoc(safetensors.save).split("::\n\n")[1].split("Args:")[0])
  scope = {"np": np, "json": json}
  exec(text, scope)
  return scope["load"]


def parts_of(path):
  """The header and the data of a file."""
  data = path.read_bytes()
  size = int.from_bytes(data[:8], "little")
  assert size % 8 == 0
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def quantized(levels, dtype=np.float32, group_size=None):
  """Variables of a convolution, a layer in full precision and odd leaves; the grids."""
  rng = np.random.default_rng(levels)
  kernel = jnp.asarray(rng.normal(0.1, 0.3, (3, 3, 2, 5)), jnp.float32)
  fitted = grid.fit(kernel, levels=levels, group_size=group_size)
  variables = {
    "params": {
      "conv": {"kernel": grid.nearest(kernel, fitted).astype(dtype), "bias": np.ones(5, dtype)},
      "head": {"kernel": jnp.asarray(rng.normal(size=(5, 3)), dtype)},
    },
    "state": {"on": np.array([True, False, True]), "count": np.int32(7), "none": np.zeros((0, 2))},
  }
  return variables, {"conv": fitted}


def test_every_number_of_levels_comes_back(tmp_path):
  """An odd number of codes, every code there is, zero points at both ends and between."""
  rng, variables, grids = np.random.default_rng(0), {"params": {}}, {}
  for levels in range(grid.MIN_LEVELS, grid.MAX_LEVELS + 1):
    zero = rng.integers(0, levels, 3) if levels > 2 else np.array([0.5, 0.3, 1.0])
    fitted = grid.Grid(rng.random((1, 3), np.float32) + 0.1, zero.astype(np.float32)[None], levels)
    codes = np.resize(rng.permutation(levels), (len(range(0, levels, 2)) | 1, 3))
    kernel = (codes.astype(np.float32) - fitted.zero_point) * fitted.scale
    variables["params"][f"of{levels}"] = {"kernel": kernel}
    grids[f"of{levels}"] = fitted
  path, packed = tmp_path / "model.safetensors", pack.pack(variables, grids)
  safetensors.save(path, packed)
  found = documented_loader()(path)
  for name, kernel in trees.flatten(variables).items():
    assert found[name].shape == kernel.shape
    assert found[name].tobytes() == kernel.tobytes(), name
  header, _ = parts_of(path)
  for name, kernel in packed.kernels.items():
    begin, end = header[f"{name}.codes"]["data_offsets"]
    num = int(np.prod(kernel.shape))
    assert end - begin == (num if kernel.levels > 16 else (num + 1) // 2)
    assert kernel.levels < 5 or end - begin == kernel.codes.nbytes  # bits per weight count these


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize(("levels", "group_size"), [(2, None), (3, 6), (16, 1), (256, None)])
def test_the_documented_loader_gives_every_leaf_back(tmp_path, levels, group_size, dtype):
  variables, grids = quantized(levels, dtype, group_size)
  path = tmp_path / "model.safetensors"
  safetensors.save(path, pack.pack(variables, grids), metadata={"made by": "a test"})
  found, expected = documented_loader()(path), trees.flatten(variables)
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    leaf = np.asarray(leaf)
    assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape)
    assert found[name].tobytes() == leaf.tobytes(), name


def test_the_layout_is_that_of_the_format(tmp_path):
  """Little-endian length, JSON padded to 8 bytes, offsets without gaps, every array aligned."""
  variables, grids = quantized(4)
  path = tmp_path / "model.safetensors"
  safetensors.save(path, pack.pack(variables, grids), metadata={"made by": "a test"})
  header, data = parts_of(path)
  about = header.pop("__metadata__")
  assert about.pop("made by") == "a test"
  kernel = "params/conv/kernel"
  assert json.loads(about["quantized"]) == {
    kernel: {
      "shape": [3, 3, 2, 5],
      "levels": 4,
      "dtype": "float32",
      "group_size": 0,
      "bits": 4,
      "weight": "(code - zero_point) * scale",
    }
  }
  codes = header[f"{kernel}.codes"]
  assert (codes["dtype"], codes["shape"]) == ("U8", [45])
  begin, end = codes["data_offsets"]
  stored = np.frombuffer(data[begin:end], np.uint8)
  fitted = grids["conv"]._replace(levels=4)
  expected = np.ravel(grid.codes(variables["params"]["conv"]["kernel"], fitted))
  np.testing.assert_array_equal(stored, expected[::2] + 16 * expected[1::2])
  spans = [each["data_offsets"] for each in header.values()]
  assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
  assert spans[-1][1] == len(data)
  for each in header.values():
    width = 1 if each["dtype"] in ("BOOL", "U8") else int(each["dtype"][1:]) // 8
    assert each["data_offsets"][0] % width == 0


def test_what_cannot_be_stored_is_named(tmp_path):
  path, (variables, grids) = tmp_path / "model.safetensors", quantized(4)
  packed = pack.pack(variables, grids)
  with pytest.raises(ValueError, match='metadata must not have an entry "quantized"'):
    safetensors.save(path, packed, metadata={"quantized": "no"})
  waves = trees.unflatten({**trees.flatten(variables), "state/wave": np.ones(2, complex)})
  with pytest.raises(ValueError, match="'state/wave' is complex128, which safetensors"):
    safetensors.save(path, pack.pack(waves, grids))
  twice = trees.unflatten({**trees.flatten(variables), "params/conv/kernel.scale": np.ones(2)})
  with pytest.raises(ValueError, match=r"have 'params/conv/kernel\.scale' already"):
    safetensors.save(path, pack.pack(twice, grids))
  assert not list(tmp_path.iterdir())
