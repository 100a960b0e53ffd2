"""Wide ResNets: published sizes, a plain forward pass beside them, folding, quantizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import models, trees
from ptq_jax.models import chain, fold_batchnorm, wide_resnet
from ptq_jax.quantize import METHODS

TINY = models.make("wide_resnet", num_classes=4, depth=10, widen_factor=2, width=2)
FORWARD = jax.jit(TINY.apply)
PARAMETERS = {  # 36.5 M and 1.47 M in the literature; to the last one in the common ports
  ("wide_resnet28_10", 10): 36_479_194,
  ("wide_resnet28_10", 100): 36_536_884,
  ("wide_resnet28_2", 10): 1_467_610,
}


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(1), (12, 6, 6, 3))


def draw(model, images):
  """Variables of a network whose normalisations all do something."""
  rng = np.random.default_rng(0)
  shapes = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), images))
  leaves = {}
  for path, leaf in shapes.items():
    if path.endswith(("scale", "var")):
      leaves[path] = rng.uniform(0.5, 2, leaf.shape)
    else:
      leaves[path] = rng.normal(0, np.prod((1, *leaf.shape[:-1])) ** -0.5, leaf.shape)
  return trees.unflatten({path: leaf.astype(np.float32) for path, leaf in leaves.items()})


@pytest.fixture(scope="module")
def variables(images):
  return draw(TINY, images)


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_number_of_parameters(name, classes):
  model = models.make(name, num_classes=classes)
  drawn = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(drawn["params"])) == PARAMETERS[name, classes]


def plain_forward(variables, x):
  """The network of the paper's table 1 with one block per stage, written out."""
  leaves = trees.flatten(variables)

  def convolve(x, path, stride=1):
    kernel = leaves[f"params/{path}/kernel"]
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def norm_relu(x, path):
    mean, var = (leaves[f"batch_stats/{path}/bn/{name}"] for name in ("mean", "var"))
    scale, bias = (leaves[f"params/{path}/bn/{name}"] for name in ("scale", "bias"))
    affine = scale / jnp.sqrt(var + 1e-5)
    return jnp.maximum(x * affine[None, None, None] + (bias - mean * affine)[None, None, None], 0)

  x = convolve(x, "stem/conv")
  for i in range(3):
    stride = 1 if i == 0 else 2
    active = norm_relu(x, f"blocks_{i}/norm1")
    y = convolve(active, f"blocks_{i}/conv1", stride)
    y = convolve(norm_relu(y, f"blocks_{i}/norm2"), f"blocks_{i}/conv2")
    x = convolve(active, f"blocks_{i}/shortcut", stride) + y
  x = norm_relu(x, "head/norm").mean((1, 2))
  head = variables["params"]["head"]["classifier"]
  return x @ head["kernel"] + head["bias"][None]


def test_forward_pass_is_the_paper_s(variables, images):
  expected = jax.jit(plain_forward)(variables, images)
  np.testing.assert_allclose(FORWARD(variables, images), expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_keeps_its_shape_adds_its_input(images):
  model = models.make("wide_resnet", num_classes=2, depth=16, widen_factor=1)
  drawn = jax.eval_shape(model.init, jax.random.key(0), images)
  projected = [name for name, unit in drawn["params"].items() if "shortcut" in unit]
  assert projected == ["blocks_2", "blocks_4"]  # the first blocks of stages 2 and 3


def test_folding_keeps_the_function_and_the_normalisations_of_sums(variables, images):
  pairs = fold_batchnorm.pairs(TINY, variables, images)
  assert {layer: norm for layer, (norm, _) in pairs.items()} == {
    "stem/conv": "blocks_0/norm1/bn"
  } | {f"blocks_{i}/conv1": f"blocks_{i}/norm2/bn" for i in range(3)}
  folded = fold_batchnorm.fold(TINY, variables, images)
  before, after = trees.flatten(variables), trees.flatten(folded)
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert {path for path in changed if path.endswith("kernel")} == {
    f"params/{layer}/kernel" for layer in pairs
  }
  assert not [path for path in changed if "blocks_1/norm1" in path or "head" in path]
  np.testing.assert_allclose(
    FORWARD(folded, images), FORWARD(variables, images), rtol=1e-3, atol=1e-4
  )


def test_a_stem_that_also_feeds_a_shortcut_is_not_folded(images):
  narrow = models.make("wide_resnet", num_classes=2, depth=10, widen_factor=1)
  drawn = jax.eval_shape(narrow.init, jax.random.key(0), images)
  assert "stem/conv" not in fold_batchnorm.pairs(narrow, drawn, images)


class Short(chain.Chain):
  """One block only, for images of 4 channels: its convolutions of equal shape share programs."""

  num_blocks = 1

  def setup(self):
    self.stem = wide_resnet.Stem(4)
    self.blocks = [wide_resnet.PreActivationBlock(4)]
    self.head = wide_resnet.Head(3)


@pytest.mark.parametrize("method", ["adaround", "brecq", "obc"])
def test_quantizers_run_on_its_units(method, images, key):
  model, images = Short(), np.concatenate([images, images[..., :1]], axis=-1)
  quantized, info = METHODS[method].quantize_params(
    key, model, draw(model, images), images, levels=4
  )
  for path, leaf in trees.flatten(quantized).items():
    if path.endswith("kernel"):
      channels = np.asarray(leaf).reshape(-1, leaf.shape[-1]).T
      assert max(len(np.unique(channel)) for channel in channels) <= 4, path
  before, after = (np.array([getattr(r, f"error_{w}") for r in info]) for w in ("before", "after"))
  assert (after <= before).all()
  assert after.sum() < before.sum()


def test_wrong_depth_is_refused():
  with pytest.raises(ValueError, match=r"model\.depth is 20; a wide ResNet has 6 n \+ 4 layers"):
    models.make("wide_resnet", num_classes=2, depth=20)
