"""Models of others: what once went wrong without a word, each as small as it gets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

from ptq_jax import trees
from ptq_jax.models import fold_batchnorm, units
from ptq_jax.quantize import METHODS, adaround, batchnorm, brecq, check_model, pack
from tests import fresh

QUICK = {
  "nearest": {},
  "adaround": {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 1},
  "brecq": {"schedule": brecq.SCHEDULE._replace(num_steps=10, batch_size=4)},
  "obc": {},
}
KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), jnp.float32)


def quantized(name, model, variables, images=IMAGES, levels=4, **options):
  """One model by a method, quickly."""
  return METHODS[name].quantize_params(
    KEY, model, variables, images, levels=levels, **QUICK[name], **options
  )


class Around(nn.Module):
  """A plain convolution, layers to be tried side by side, and a classifier."""

  tried: dict  # per name a class and its options

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.relu(nn.Conv(4, (3, 3), name="plain")(images))
    parts = [layer(**options, name=name)(x) for name, (layer, options) in self.tried.items()]
    means = [part.reshape(len(x), -1, part.shape[-1]).mean(axis=1) for part in parts]
    return nn.Dense(3, name="head")(jnp.concatenate(means, axis=1))


def around(layer, **options):
  """A model with one layer to be tried, and its variables."""
  model = Around({"odd": (layer, options)})
  return model, fresh.variables(model, IMAGES)


class StandardizedConv(nn.Conv):
  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    if name != "kernel":
      return value
    mean, std = (f(value, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.std))
    return (value - mean) / (std + 1e-5)


class CenteredConv(nn.Conv):
  @nn.compact
  def __call__(self, inputs):
    return super().__call__(inputs - inputs.mean())


def doubled(*args, **kwargs):
  return 2 * jax.lax.dot_general(*args, **kwargs)


def rounded(images, kernel, *args, **kwargs):
  return jax.lax.conv_general_dilated(images, jnp.round(kernel * 64) / 64, *args, **kwargs)


CONV = {"features": 4, "kernel_size": (3, 3)}
NOT_ITS_KERNEL = {
  "standardized": (StandardizedConv, CONV),
  "centered": (CenteredConv, CONV),
  "custom dot_general": (nn.Dense, {"features": 4, "dot_general": doubled}),
  "custom convolution": (nn.Conv, CONV | {"conv_general_dilated": rounded}),
}


@pytest.mark.parametrize("case", NOT_ITS_KERNEL)
def test_a_kernel_that_is_not_what_is_applied_is_refused(case):
  layer, options = NOT_ITS_KERNEL[case]
  model, variables = around(layer, **options)
  for name in METHODS:
    with pytest.raises(ValueError, match="'odd' does not give its inputs times its kernel"):
      quantized(name, model, variables)


def test_a_refused_layer_may_stay_in_full_precision():
  model, variables = around(StandardizedConv, **CONV)
  result, info = quantized("nearest", model, variables, levels={"odd": None, "*": 4})
  np.testing.assert_array_equal(
    result["params"]["odd"]["kernel"], variables["params"]["odd"]["kernel"]
  )
  assert [int(record.grids[record.name].levels) for record in info] == [4, 0, 4]


@pytest.mark.parametrize("wrapper", [nn.SpectralNorm, nn.WeightNorm])
def test_a_normalised_kernel_is_refused_by_name(wrapper):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      options = {"update_stats": train} if wrapper is nn.SpectralNorm else {}
      x = wrapper(nn.Dense(4, name="odd"))(images.mean((1, 2)), **options)
      return nn.Dense(3, name="head")(x)

  variables = fresh.variables(Model(), IMAGES)
  kernel = "params/odd/kernel"  # at first it is normalised already
  variables = trees.replace(variables, {kernel: 3 * trees.get(variables, kernel)})
  for name in METHODS:
    with pytest.raises(ValueError, match="layer 'odd'"):
      quantized(name, Model(), variables)
  result, _ = quantized("obc", Model(), variables, levels={"head": 4, "*": None})
  assert jax.tree.structure(result) == jax.tree.structure(variables)


def test_layers_in_a_loop_stay_in_full_precision():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      rows = nn.RNN(nn.SimpleCell(4), name="loop")(images.mean(-1))
      column = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
      one = nn.Dense(4, name="one")
      x = column(4, name="column")(rows).mean(1)
      x = one(x) if self.is_initializing() else jax.vmap(one)(x)
      return nn.Dense(3, name="head")(x)

  variables = fresh.variables(Model(), IMAGES)
  kernels = {"SimpleCell_0/i": [8, 4], "SimpleCell_0/h": [4, 4], "column": [4, 4], "one": [4, 4]}
  with pytest.warns(UserWarning, match="stay in full precision") as told:
    result, info = quantized("nearest", Model(), variables)
  assert [record.name for record in info if record.grids[record.name].levels] == ["head"]
  for path, shape in kernels.items():
    assert f"'{path}/kernel' {shape}" in str(told[0].message)
    kernel = f"params/{path}/kernel"
    np.testing.assert_array_equal(trees.get(result, kernel), trees.get(variables, kernel))
  assert str(told[0].message).count("it runs in a loop or a map") == 1


def test_numbers_too_large_to_be_squared_are_refused():
  model, variables = around(nn.Conv, **CONV)
  huge = jax.tree.map(lambda leaf: 1e20 * leaf, variables)
  with pytest.raises(ValueError, match="'plain' are not finite or too large to be squared"):
    quantized("nearest", model, huge)
  with pytest.raises(ValueError, match="too large to be squared"):
    quantized("nearest", model, variables, IMAGES.at[3].multiply(1e20))


def test_variables_that_are_mapped_are_refused_in_one_sentence():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      squashed = nn.map_variables(
        nn.Dense, "params", lambda v: jax.tree.map(jnp.tanh, v), init=True
      )
      return nn.Dense(3, name="head")(squashed(4, name="odd")(images.mean((1, 2))))

  with pytest.raises(ValueError, match=r"Model cannot be quantized.*map_variables"):
    quantized("nearest", Model(), fresh.variables(Model(), IMAGES))


class SharedNorm(nn.Module):
  """One normalisation behind two layers."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = nn.BatchNorm(use_running_average=True, epsilon=1.0)
    return norm(nn.Dense(2, name="a")(x)) + norm(nn.Dense(2, name="b")(x))


class TwiceInARow(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    norm = nn.BatchNorm(use_running_average=True, epsilon=0.5)
    return norm(norm(nn.Dense(2, name="a")(x)))


class AlsoOnTheInput(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    norm = nn.BatchNorm(use_running_average=True, epsilon=0.5)
    return norm(nn.Dense(x.shape[-1], name="a")(x)) + norm(x)


class ReadElsewhere(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    dense = nn.Dense(2, name="a")
    y = dense(x)
    return nn.BatchNorm(use_running_average=True, epsilon=0.5)(y) + y


class LayerTwice(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    dense = nn.Dense(2, name="a")
    return nn.BatchNorm(use_running_average=True, epsilon=0.5)(dense(x)) + dense(2 * x)


class TiedKernel(nn.Module):
  """The kernel is read by something that is no call of the layer."""

  @nn.compact
  def __call__(self, x, train=False):
    dense = nn.Dense(2, name="a")
    y = nn.BatchNorm(use_running_average=True, epsilon=0.5)(dense(x))
    return y + dense.variables["params"]["kernel"].sum()


class Odd(nn.Module):
  """All of these side by side."""

  @nn.compact
  def __call__(self, x, train=False):
    kinds = (SharedNorm, TwiceInARow, AlsoOnTheInput, ReadElsewhere, LayerTwice, TiedKernel)
    return jnp.concatenate([kind(name=kind.__name__)(x) for kind in kinds], axis=1)


def test_folding_keeps_the_function_of_odd_models():
  model = Odd()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), jnp.float32)
  rng = np.random.default_rng(2)
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(0.5 + rng.uniform(size=leaf.shape), leaf.dtype),
    fresh.variables(model, x),
  )
  folded = fold_batchnorm.fold(model, variables, x)
  jax.tree.map(np.testing.assert_array_equal, folded, variables)
  result, _ = quantized("brecq", model, variables, x, levels=256)
  run = jax.jit(model.apply)
  before, after = (run(each, x) for each in (variables, result))
  np.testing.assert_allclose(after, before, rtol=0.05, atol=0.05)


class Plain(nn.Module):
  """A convolution, a normalisation, a dense layer; names and dtypes to choose."""

  names: tuple = ("conv", "norm", "head")
  dtype: object = jnp.float32
  norm: bool = True
  momentum: float = 0.9

  @nn.compact
  def __call__(self, images, train: bool = False):
    conv, norm, head = self.names
    x = nn.Conv(4, (3, 3), strides=2, param_dtype=self.dtype, name=conv)(images)
    if self.norm:
      options = {"momentum": self.momentum, "param_dtype": self.dtype, "name": norm}
      x = nn.BatchNorm(use_running_average=not train, **options)(x=x)
    x = nn.relu(x).mean(axis=(1, 2))
    return nn.Dense(3, param_dtype=self.dtype, name=head)(x)


ODD_TREES = {
  "an empty collection": (Plain(norm=False), lambda v: {**v, "batch_stats": {}}),
  "a FrozenDict, names with slashes": (Plain(names=("a/b", "a/b/c", "~1/~")), freeze),
  "a FrozenDict inside, another collection": (
    Plain(),
    lambda v: {
      **v, "params": freeze(v["params"]), "cache": {"x/y": {"z": jnp.ones(2)}, "w": {}},
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["nearest", "brecq"])  # each layer alone, and unit by unit
@pytest.mark.parametrize("case", ODD_TREES)
def test_the_tree_that_comes_back_is_the_tree_that_went_in(case, name):
  model, change = ODD_TREES[case]
  variables = change(fresh.variables(model, IMAGES))
  result, info = quantized(name, model, variables)
  assert jax.tree.structure(result) == jax.tree.structure(variables)
  assert type(result) is type(variables)
  for path, leaf in trees.flatten(variables).items():
    assert trees.get(result, path).dtype == leaf.dtype
  grids = {path: grid for record in info for path, grid in record.grids.items()}
  unpacked = pack.unpack(pack.pack(result, grids))
  plain = FrozenDict(result).unfreeze()
  assert jax.tree.structure(unpacked) == jax.tree.structure(plain)
  jax.tree.map(np.testing.assert_array_equal, unpacked, plain)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_momentum_is_that_of_the_module(momentum):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      return nn.BatchNorm(use_running_average=not train, momentum=momentum, name="norm")(x)

  images = jnp.asarray(np.random.default_rng(0).normal(0, 10**3.5, (400, 3)), jnp.float32)
  variables = fresh.variables(Model(), images)
  found = batchnorm.estimate(KEY, Model(), variables, images)["batch_stats"]["norm"]
  exact = np.asarray(images, np.float64)
  np.testing.assert_allclose(found["var"], exact.var(axis=0), rtol=1e-5)
  np.testing.assert_allclose(found["mean"], exact.mean(axis=0), rtol=1e-5, atol=0.1)


def test_a_norm_that_runs_twice_gets_the_average_of_both():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      norm = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")
      return norm(x) + norm(3 * x)

  images = jnp.asarray(np.random.default_rng(0).normal(2, 1, (50, 3)), jnp.float32)
  found = batchnorm.estimate(KEY, Model(), fresh.variables(Model(), images), images)["batch_stats"][
    "norm"
  ]
  mean = np.asarray(images).mean(axis=0)
  np.testing.assert_allclose(found["mean"], (0.5 * mean + 3 * mean) / 1.5, rtol=1e-5)


def test_a_scanned_norm_gets_the_statistics_of_each_turn():
  class Turn(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
      return nn.BatchNorm(use_running_average=not self.train, name="norm")(x) ** 2, None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      turns = nn.scan(Turn, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)
      return turns(train, name="turns")(x, None)[0]

  images = np.random.default_rng(0).normal(2, 1, (50, 3)).astype(np.float32)
  variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fresh.variables(Model(), images))
  found = batchnorm.estimate(KEY, Model(), variables, jnp.asarray(images))["batch_stats"]["turns"]
  scale, bias = (np.float32(variables["params"]["turns"]["norm"][n][0]) for n in ("scale", "bias"))
  second = (scale * (images - images.mean(0)) / images.std(0) + bias) ** 2
  assert found["norm"]["mean"].dtype == jnp.bfloat16
  for x, mean, var in zip(
    (images, second), found["norm"]["mean"], found["norm"]["var"], strict=True
  ):
    np.testing.assert_allclose(np.float32(mean), x.mean(0), rtol=0.01)
    np.testing.assert_allclose(np.float32(var), x.var(0), rtol=0.01)


def test_one_image_leaves_statistics_without_a_variance_alone():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      x = nn.Dense(4, name="dense")(images.mean(axis=(1, 2)))
      return nn.Dense(3, name="head")(nn.BatchNorm(use_running_average=not train, name="norm")(x))

  variables = fresh.variables(Model(), IMAGES)
  with pytest.warns(UserWarning, match="gives 'norm' a single value per channel"):
    result, _ = quantized("obc", Model(), variables, IMAGES[:1], levels=16)
  jax.tree.map(np.testing.assert_array_equal, result["batch_stats"], variables["batch_stats"])
  full, found = (Model().apply(v, IMAGES) for v in (variables, result))
  assert jnp.abs(found).max() < 2 * jnp.abs(full).max()


def test_images_that_do_not_differ_leave_statistics_alone():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
      return nn.BatchNorm(use_running_average=not train, name="norm")(x)

  images = jnp.asarray([[0.3, -7.0, 0.0]] * 20)
  variables = fresh.variables(Model(), images)
  with pytest.warns(UserWarning, match="give 'norm' no variance in any channel"):
    found = batchnorm.estimate(KEY, Model(), variables, images)
  jax.tree.map(np.testing.assert_array_equal, found, variables)
  found = batchnorm.estimate(KEY, Model(), variables, images.at[0, 0].set(0.4))
  np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], [0.305, -7, 0], rtol=1e-5)


def test_labels_of_one_model():
  model = Plain(norm=False)
  variables = fresh.variables(model, IMAGES)
  labels = jnp.arange(6) % 3
  one, _ = quantized("brecq", model, variables, loss="fisher", labels=labels)
  two, _ = quantized("brecq", model, variables, loss="fisher", labels=labels[None])
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (np.zeros(4, int), "one for each of 6 images"),
    (np.zeros(6), "labels must be integers"),
    (np.array([0, 1, 2, 50, 0, 1]), r"in \[0, 3\), the classes of the model; got 0 to 50"),
    (np.array([0, 1, 2, -1, 0, 1]), "got -1 to 2"),
  ],
)
@pytest.mark.parametrize("loss", ["fisher", "mse"])
def test_labels_that_fit_nothing_are_refused(labels, message, loss):
  model = Plain()
  with pytest.raises(ValueError, match=message):
    quantized("brecq", model, fresh.variables(model, IMAGES), loss=loss, labels=jnp.asarray(labels))


class Attentive(nn.Module):
  """Layers of many kinds, and a weight of none."""

  @nn.compact
  def __call__(self, images, train: bool = False):
    x = nn.Conv(8, (4, 4), strides=4, name="patch")(images).reshape(len(images), -1, 8)
    x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 8))
    x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
    x = nn.ConvTranspose(1, (1,), name="up")(x)
    x = x + nn.Embed(5, 1, name="table")(jnp.arange(x.shape[1]) % 5)[None]
    return nn.DenseGeneral(3, axis=(1, 2), name="head")(x)


@pytest.fixture(scope="module")
def attentive():
  return Attentive(), fresh.variables(Attentive(), IMAGES)


LAYERS = ("patch", "attention/query", "attention/key", "attention/value", "attention/out",
          "up", "table", "head")  # fmt: skip


@pytest.mark.parametrize("name", ["brecq", "obc"])  # unit by unit, and each layer alone
def test_every_weight_is_quantized_or_listed(name, attentive):
  model, variables = attentive
  with pytest.warns(UserWarning, match=r"stay in full precision: 'position' \[1, 4, 8\]"):
    result, info = quantized(name, model, variables)
  grids = {path: grid for record in info for path, grid in record.grids.items()}
  assert set(grids) == {*LAYERS, "position"}
  assert int(grids["position"].levels) == 0
  for layer in units.layers(model, variables, IMAGES):
    kernel = trees.get(result, layer.kernel)
    assert not np.array_equal(kernel, trees.get(variables, layer.kernel)), layer.path
    columns = np.transpose(kernel, layer.axes).reshape(layer.num_rows, -1).T
    assert max(len(np.unique(column)) for column in columns) <= 4
  np.testing.assert_array_equal(result["params"]["position"], variables["params"]["position"])
  for record in info:
    assert record.error_after <= record.error_before
  packed = pack.pack(result, grids)
  jax.tree.map(np.testing.assert_array_equal, pack.unpack(packed), result)
  size = pack.size(packed)
  weights = sum(np.prod(layer.kernel_shape) for layer in units.layers(model, variables, IMAGES))
  assert size.num_weights == weights + 4 * 8
  assert size.full_kernels == 4 * 4 * 8


def test_strict_refuses_what_stays_in_full_precision(attentive):
  model, variables = attentive
  for name in METHODS:
    with pytest.raises(ValueError, match="strict=True all weights must be quantized, but not 'pos"):
      quantized(name, model, variables, strict=True)


GEOMETRIES = {
  "keyword argument": (nn.Conv, CONV),
  "input_dilation None": (nn.Conv, CONV | {"input_dilation": None}),
  "input_dilation": (nn.Conv, CONV | {"input_dilation": 2, "padding": 2}),
  "negative padding": (nn.Conv, CONV | {"padding": ((-1, 0), (0, 0))}),
  "circular": (nn.Conv, CONV | {"padding": "CIRCULAR", "kernel_dilation": 2}),
  "reflect": (nn.Conv, CONV | {"padding": "REFLECT", "kernel_size": (2, 4)}),
  "depthwise": (nn.Conv, CONV | {"features": 8, "feature_group_count": 4}),
  "transposed": (nn.ConvTranspose, CONV | {"strides": (2, 3), "kernel_dilation": (1, 2)}),
  "transposed valid": (nn.ConvTranspose, CONV | {"strides": (5, 1), "padding": "VALID"}),
  "transposed padded": (nn.ConvTranspose, CONV | {"strides": (2, 2), "padding": ((1, 2), (0, 1))}),
  "einsum": (nn.Einsum, {"shape": (2, 4, 5), "einsum_str": "nhwc,kcd->nkdhw"}),
  "einsum inside": (nn.Einsum, {"shape": (8, 4, 5), "einsum_str": "nhwc,wcd->nhd"}),
  "general": (nn.DenseGeneral, {"features": (2, 3), "axis": (-1, -3)}),
  "half precision": (nn.Conv, CONV | {"dtype": jnp.bfloat16}),
}


def test_layers_of_any_geometry():
  """The check before everything compares each layer with its rows times its kernel."""
  model = Around(GEOMETRIES)
  variables = fresh.variables(model, IMAGES)
  result, info = quantized("nearest", model, variables, levels=3)
  records = {record.name: record for record in info}
  assert records.keys() == {"plain", *GEOMETRIES, "head"}
  for name in GEOMETRIES:
    assert 0 < records[name].error_after <= records[name].error_before, name
    kernels = (tree["params"][name]["kernel"] for tree in (result, variables))
    assert not np.array_equal(*kernels), name


@pytest.mark.parametrize(("case", "name"), [("transposed", "obc"), ("einsum inside", "adaround")])
def test_odd_geometries_by_other_methods(case, name):
  layer, options = GEOMETRIES[case]
  model, variables = around(layer, **options)
  result, info = quantized(name, model, variables, levels={"odd": 3, "*": None})
  record = next(record for record in info if record.name == "odd")
  assert 0 < record.error_after <= record.error_before
  assert not np.array_equal(*(tree["params"]["odd"]["kernel"] for tree in (result, variables)))


def test_time_folded_into_the_batch_is_measured_alike():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      x = images.reshape(-1, 8, 3)  # rows of an image are examples of their own
      x = nn.Dense(5, name="rows")(x)
      return nn.Dense(3, name="head")(x.reshape(len(images), 8, 8, 5).mean(axis=(1, 2)))

  variables = fresh.variables(Model(), IMAGES)
  levels = {"rows": 4, "*": None}
  first = {name: quantized(name, Model(), variables, levels=levels)[1][0] for name in METHODS}
  for record in first.values():
    np.testing.assert_allclose(record.error_before, first["nearest"].error_before, rtol=1e-3)


def test_a_shared_layer_has_one_set_of_codes():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      shared = nn.Conv(3, (3, 3), name="shared")
      x = nn.relu(shared(nn.relu(shared(images))[:, ::2]))
      return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))

  variables = fresh.variables(Model(), IMAGES)
  for name in ("brecq", "obc"):  # unit by unit, and each layer alone
    result, info = quantized(name, Model(), variables, levels={"shared": 4, "*": None})
    kernel = result["params"]["shared"]["kernel"]
    assert max(len(np.unique(kernel[..., k])) for k in range(3)) <= 4
    assert all(record.error_after <= record.error_before for record in info)


def test_a_shared_layer_is_calibrated_on_the_inputs_of_all_its_calls():
  """The same images as one call of twice as many examples give the same codes."""

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      dense = nn.Dense(4, name="dense")
      return dense(images.mean(axis=(1, 2))) + dense(images[:, 0, 0] ** 3)

  class Once(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      rows = jnp.stack([images.mean(axis=(1, 2)), images[:, 0, 0] ** 3], axis=1)
      return nn.Dense(4, name="dense")(rows).sum(axis=1)

  variables = fresh.variables(Twice(), IMAGES)
  for name in ("adaround", "obc"):
    (twice, (record,)), (once, (other,)) = (
      quantized(name, model, variables) for model in (Twice(), Once())
    )
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    np.testing.assert_allclose(record.error_after, other.error_after, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_images_in_bytes_are_refused(name, dtype):
  model = Plain()
  with pytest.raises(ValueError, match=r"normalised: data\.augment\.normalise"):
    quantized(name, model, fresh.variables(model, IMAGES), jnp.ones((4, 8, 8, 3), dtype))


def test_tokens_are_no_bytes():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens, train: bool = False):
      return nn.Dense(3, name="head")(nn.Embed(7, 4, name="table")(tokens).mean(axis=1))

  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (12, 5)), jnp.int32)
  result, info = quantized("adaround", Model(), fresh.variables(Model(), tokens), tokens)
  assert [record.name for record in info] == ["table", "head"]
  assert info[0].error_after > 0
  assert len(np.unique(result["params"]["table"]["embedding"][:, 0])) <= 4


def test_what_would_be_refused_is_refused_before_training():
  model, _ = around(nn.Conv, **CONV)
  survey = check_model(model, image_shape=(8, 8, 3), units=("odd",))
  assert [layer.path for layer in survey.layers] == ["plain", "odd", "head"]
  with pytest.raises(ValueError, match="unit 'tail' matches no module"):
    check_model(model, image_shape=(8, 8, 3), units=("tail",))
  standardized, _ = around(StandardizedConv, **CONV)
  with pytest.raises(ValueError, match="layer 'odd' does not give"):
    check_model(standardized, image_shape=(8, 8, 3))
  plan = {"plain": 4, "odd": None, "head": 4}
  assert len(check_model(standardized, image_shape=(8, 8, 3), plans=[plan]).layers) == 3

  class Normalised(nn.Module):
    @nn.compact
    def __call__(self, images, train: bool = False):
      return nn.WeightNorm(nn.Dense(4, name="odd"))(images.mean((1, 2)))

  with pytest.raises(ValueError, match="layer 'odd'"):
    check_model(Normalised(), image_shape=(8, 8, 3))
  with pytest.raises(ValueError, match="strict=True"):
    check_model(Attentive(), image_shape=(8, 8, 3), strict=True)
