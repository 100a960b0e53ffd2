"""Packed codes: bytes and back, true sizes, files whole or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.quantize import grid, pack, plan
from ptq_jax.quantize.grid import Grid


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16, 17, 200, 256])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 1001])
def test_bytes_and_back(levels, count):
  codes = np.random.default_rng(0).integers(0, levels, count)
  packed = pack.to_bytes(codes, levels=levels)
  assert packed.dtype == np.uint8
  assert len(packed) == pack.num_code_bytes(count, levels=levels)
  np.testing.assert_array_equal(pack.from_bytes(packed, count, levels=levels), codes)


@pytest.mark.parametrize(
  ("levels", "expected"), [(2, 250), (3, 400), (4, 500), (5, 1000), (16, 1000), (17, 2000)]
)
def test_number_of_bytes(levels, expected):
  assert pack.num_code_bytes(2000, levels=levels) == expected


@pytest.mark.parametrize(
  ("codes", "levels", "expected"),
  [
    ([1, 0, 3, 2, 1], 4, [1 + 3 * 16 + 2 * 64, 1]),
    ([2, 2, 2, 2, 2], 3, [242]),
    ([15, 1], 16, [31]),
  ],
)
def test_known_bytes(codes, levels, expected):
  np.testing.assert_array_equal(pack.to_bytes(np.array(codes), levels=levels), expected)


def test_bad_bytes():
  with pytest.raises(ValueError, match=r"codes must be in \[0, 3\), got 0 to 3"):
    pack.to_bytes(np.array([0, 3]), levels=3)
  with pytest.raises(ValueError, match="10 codes of 3 levels need 2 bytes, got 3"):
    pack.from_bytes(np.zeros(3, np.uint8), 10, levels=3)
  for byte, levels in ((243, 3), (0xF5, 5), (0x77, 6), (200, 200)):
    with pytest.raises(ValueError, match="damaged"):
      pack.from_bytes(np.array([byte], np.uint8), 1, levels=levels)


def model(levels, dtype=np.float32, models=(), include_zero=True):
  """Variables and grids of one quantized model, or of several along leading axes."""
  rng = np.random.default_rng(0)

  def quantize(kernel):
    fitted = grid.fit(kernel, levels=levels, include_zero=include_zero)
    return grid.nearest(kernel, fitted).astype(dtype), fitted

  kernel = jnp.asarray(rng.normal(0.1, 0.3, (*models, 3, 3, 2, 5)), jnp.float32)
  for _ in models:
    quantize = jax.vmap(quantize, out_axes=(0, Grid(0, 0, None)))
  kernel, fitted = quantize(kernel)
  variables = {
    "params": {
      "conv": {"kernel": kernel, "bias": rng.normal(size=(*models, 5)).astype(np.float32)},
      "head": {"kernel": jnp.asarray(rng.normal(size=(*models, 5, 3)), dtype)},
    },
    "batch_stats": {"bn": {"mean": jnp.zeros((*models, 5))}},
  }
  unquantized = Grid(np.ones((*models, 1, 3)), np.zeros((*models, 1, 3)), np.zeros(models, int))
  levels = np.full(models, levels) if models else levels
  return variables, {"conv": fitted._replace(levels=levels), "head": unquantized}


def test_variables_and_records_are_saved_in_one_call(tmp_path):
  variables, grids = model(3)
  numbers = (np.zeros(()),) * 4
  records = [plan.Record(path, *numbers, {path: one}) for path, one in grids.items()]
  pack.save(tmp_path / "model.npz", variables, records)
  loaded = pack.load(tmp_path / "model.npz")
  assert loaded.kernels.keys() == {"params/conv/kernel"}
  assert loaded.full == ("params/head/kernel",)
  assert_same(pack.unpack(loaded), variables)
  for wrong in ((variables,), (loaded, records)):
    with pytest.raises(ValueError, match="either the result of pack, or variables and their rec"):
      pack.save(tmp_path / "other.npz", *wrong)


def assert_same(found, variables):
  found, variables = trees.flatten(found), trees.flatten(variables)
  assert found.keys() == variables.keys()
  for path, leaf in variables.items():
    assert found[path].dtype == leaf.dtype
    assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


@pytest.mark.parametrize("models", [(), (2,), (2, 3)])
@pytest.mark.parametrize("include_zero", [True, False])
@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
def test_files_give_back_the_exact_variables(tmp_path, levels, include_zero, models):
  variables, grids = model(levels, models=models, include_zero=include_zero)
  pack.save(tmp_path / "new" / "model.npz", pack.pack(variables, grids))
  loaded = pack.load(tmp_path / "new" / "model.npz")
  assert loaded.kernels["params/conv/kernel"].levels == levels
  assert_same(pack.unpack(loaded), variables)
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.npz"]


def test_parts_and_equality():
  variables, grids = model(4)
  packed = pack.pack(variables, grids)
  conv, rest = pack.split(packed, lambda path: "conv" in path)
  assert (list(conv.kernels), list(conv.rest)) == (["params/conv/kernel"], ["params/conv/bias"])
  assert not rest.kernels
  together = trees.flatten(pack.unpack(conv)) | trees.flatten(pack.unpack(rest))
  assert_same(trees.unflatten(together), variables)
  assert pack.same(packed, pack.pack(variables, grids))
  assert not pack.same(packed, conv)
  for path in ("params/conv/kernel", "params/conv/bias", "batch_stats/bn/mean"):
    leaf = trees.get(variables, path)
    altered = jnp.roll(leaf, 1, axis=0) if path.endswith("kernel") else leaf + 1
    assert not pack.same(packed, pack.pack(trees.replace(variables, {path: altered}), grids))


def test_half_precision(tmp_path):
  variables, grids = model(256, dtype=jnp.bfloat16)
  pack.save(tmp_path / "model.npz", pack.pack(variables, grids))
  assert_same(pack.unpack(pack.load(tmp_path / "model.npz")), variables)


@pytest.mark.parametrize(("levels", "code_bytes"), [(3, 18), (4, 23), (16, 45), (256, 90)])
def test_sizes(levels, code_bytes):
  size = pack.size(pack.pack(*model(levels)))
  assert size.codes == code_bytes  # 90 weights
  assert size.grids == 5 * 4 + 5  # float32 scales, uint8 zero points
  assert size.full_kernels == 15 * 4
  assert size.other == 5 * 4 + 5 * 4
  assert size.total == size.codes + 25 + 60 + 40
  assert size.num_weights == 90 + 15
  assert size.bits_per_weight == pytest.approx(8 * (code_bytes + 25 + 60) / 105)


def test_file_is_about_as_big_as_its_content(tmp_path):
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(300, 400)).astype(np.float32)
  fitted = grid.fit(kernel, levels=3)
  variables = {"params": {"head": {"kernel": grid.nearest(kernel, fitted)}}}
  packed = pack.pack(variables, {"head": fitted})
  pack.save(tmp_path / "model.npz", packed)
  assert pack.size(packed).bits_per_weight < 1.75
  assert (tmp_path / "model.npz").stat().st_size < pack.size(packed).total + 2000


def test_refuses_what_is_not_on_its_grid():
  variables, grids = model(4)
  kernel = variables["params"]["conv"]["kernel"]
  variables["params"]["conv"]["kernel"] = kernel.at[0, 0, 0, 0].add(1e-6)
  with pytest.raises(ValueError, match="1 of 90 weights of 'params/conv/kernel' are not on the"):
    pack.pack(variables, grids)


def test_refuses_wrong_grids():
  variables, grids = model(4)
  with pytest.raises(ValueError, match="there is a grid for layer 'stem'"):
    pack.pack(variables, {"stem": grids["conv"]})
  mixed = grids["conv"]._replace(levels=np.array([4, 3]))
  with pytest.raises(ValueError, match=r"grids of \[3, 4\] levels; pack them apart"):
    pack.pack(variables, {"conv": mixed})


def test_damaged_files(tmp_path):
  path = tmp_path / "model.npz"
  with pytest.raises(FileNotFoundError):
    pack.load(path)
  packed = pack.pack(*model(3))
  pack.save(path, packed)
  whole = path.read_bytes()
  middle = whole.index(packed.kernels["params/conv/kernel"].codes.tobytes())
  for damaged in (
    b"",
    b"not a zip file",
    whole[: len(whole) // 2],
    whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
  ):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model\.npz is no readable file of packed variables"):
      pack.load(path)


def test_incomplete_arrays():
  arrays = pack.to_arrays(pack.pack(*model(3)))
  with pytest.raises(ValueError, match="there is no index"):
    pack.from_arrays({})
  without = {name: array for name, array in arrays.items() if name != "params/conv/bias"}
  with pytest.raises(ValueError, match="lack 'params/conv/bias'"):
    pack.from_arrays(without)
  short = arrays | {"params/conv/kernel:codes": arrays["params/conv/kernel:codes"][:-1]}
  with pytest.raises(ValueError, match="17 bytes, which do not fit"):
    pack.from_arrays(short)
  later = arrays | {"index": np.array('{"format": 2}')}
  with pytest.raises(ValueError, match="format 2; this reads 1"):
    pack.from_arrays(later)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "model.npz"
  pack.save(path, pack.pack(*model(3)))
  before = path.read_bytes()

  def fail(file, **arrays):
    file.write(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match="disk full"):
    pack.save(path, pack.pack(*model(4)))
  assert path.read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 1
