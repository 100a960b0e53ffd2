"""safetensors: read back by the loader that the documentation shows, and what is refused."""

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
  text = textwrap.dedent(safetensors.save.__doc__.split("::\n\n")[1].split("  Args:")[0])
  scope = {"np": np, "json": json}
  exec(text, scope)
  return scope["load"]


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
  data = path.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  about = header.pop("__metadata__")
  assert size % 8 == 0
  assert about.pop("made by") == "a test"
  kernel = "params/conv/kernel"
  assert json.loads(about["quantized"]) == {
    kernel: {"levels": 4, "dtype": "float32", "group_size": 0}
  }
  codes = header[f"{kernel}.codes"]
  assert (codes["dtype"], codes["shape"]) == ("U8", [3, 3, 2, 5])
  begin, end = codes["data_offsets"]
  stored = np.frombuffer(data[8 + size + begin : 8 + size + end], np.uint8).reshape(3, 3, 2, 5)
  fitted = grids["conv"]._replace(levels=4)
  np.testing.assert_array_equal(stored, grid.codes(variables["params"]["conv"]["kernel"], fitted))
  spans = [each["data_offsets"] for each in header.values()]
  assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
  assert spans[-1][1] == len(data) - 8 - size
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
