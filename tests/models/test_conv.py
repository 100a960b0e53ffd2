import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.models import call, conv
from tests import programs

GEOMETRIES = {
  "same": ((1, 1), "SAME", (1, 1), 1),
  "strided": ((2, 2), ((1, 1), (1, 1)), (1, 1), 1),
  "valid_dilated": ((1, 1), "VALID", (2, 2), 1),
  "grouped": ((1, 2), ((1, 0), (0, 1)), (1, 1), 2),
  "depthwise": ((2, 1), "SAME", (1, 2), 4),
  "cropped": ((1, 1), ((-1, 0), (2, -2)), (1, 1), 1),
  "nothing left": ((2, 1), ((-3, -2), (0, 0)), (1, 1), 4),
}


PRIMITIVE = "conv_general_dilated"


def arrays(groups, *, models=None):
  lead = () if models is None else (models,)
  images = jax.random.normal(jax.random.key(0), (*lead, 3, 7, 6, 4))
  kernel = jax.random.normal(jax.random.key(1), (*lead, 3, 3, 4 // groups, 8))
  return images, kernel


def convolve(function, images, kernel, geometry, **options):
  strides, padding, dilation, groups = geometry
  return function(
    images,
    kernel,
    strides,
    padding,
    rhs_dilation=dilation,
    dimension_numbers=conv.DIMENSION_NUMBERS,
    feature_group_count=groups,
    **options,
  )


def value_and_gradients(function, images, kernel, geometry, **options):
  """The convolution, and both gradients of a function of it that is not linear."""

  def objective(images, kernel):
    out = convolve(function, images, kernel, geometry, **options)
    return jnp.sum(jnp.sin(out) * jnp.linspace(-1, 1, out.size).reshape(out.shape)), out

  gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
  (_, out), gradients = gradient(images, kernel)
  return out, *gradients


def assert_close(ours, theirs):
  for mine, other in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_model_is_lax(name):
  images, kernel = arrays(GEOMETRIES[name][-1])
  run = functools.partial(value_and_gradients, geometry=GEOMETRIES[name])
  assert_close(
    *(
      jax.jit(functools.partial(run, function))(images, kernel)
      for function in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    )
  )


@pytest.mark.parametrize(
  ("shared", "lowering"),
  [("neither", lowering) for lowering in conv.LOWERINGS] + [("images", None), ("kernel", None)],
)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_vmap_is_a_loop_over_models(name, shared, lowering):
  images, kernel = arrays(GEOMETRIES[name][-1], models=3)
  images = images[0] if shared == "images" else images
  kernel = kernel[0] if shared == "kernel" else kernel
  axes = (None if shared == "images" else 0, None if shared == "kernel" else 0)
  run = functools.partial(
    value_and_gradients, conv.conv_general_dilated, geometry=GEOMETRIES[name], lowering=lowering
  )
  batched = jax.jit(jax.vmap(run, in_axes=axes))(images, kernel)
  alone = jax.jit(run)
  for model in range(3):
    one = alone(
      images if shared == "images" else images[model],
      kernel if shared == "kernel" else kernel[model],
    )
    assert_close([part[model] for part in batched], one)


@pytest.mark.parametrize("options", [{}, {"strides": 2, "padding": "CAUSAL", "kernel_dilation": 2},
                                     {"padding": ((2, 0),), "feature_group_count": 4}])  # fmt: skip
def test_one_axis(options):
  model, x = nn.Conv(8, 3, **options), jax.random.normal(jax.random.key(0), (2, 9, 4))
  variables = model.init(jax.random.key(1), x)
  run = functools.partial(loss, model)
  found, wanted = (
    jax.grad(functools.partial(run, apply), argnums=(0, 1))(variables, x)
    for apply in (call.apply, lambda model, *args: model.apply(*args))
  )
  assert_close(jax.tree.leaves(found), jax.tree.leaves(wanted))


def test_vmap_inside_vmap():
  images, kernel = arrays(1, models=4)
  images, kernel = (a.reshape(2, 2, *a.shape[1:]) for a in (images, kernel))
  run = functools.partial(
    value_and_gradients, conv.conv_general_dilated, geometry=GEOMETRIES["strided"]
  )
  nested = jax.jit(jax.vmap(jax.vmap(run)))(images, kernel)
  assert_close([part[1, 0] for part in nested], run(images[1, 0], kernel[1, 0]))


def test_no_grouped_convolution_is_left_on_a_cpu():
  images, kernel = arrays(1, models=3)
  run = functools.partial(
    value_and_gradients, conv.conv_general_dilated, geometry=GEOMETRIES["same"]
  )
  text = str(jax.make_jaxpr(jax.vmap(run))(images, kernel))
  assert "feature_group_count=3" not in text
  plain = functools.partial(
    value_and_gradients, jax.lax.conv_general_dilated, geometry=GEOMETRIES["same"]
  )
  assert "feature_group_count=3" in str(jax.make_jaxpr(jax.vmap(plain))(images, kernel))


def test_a_depthwise_one_is_products_on_a_cpu():
  images, kernel = arrays(4)
  run = functools.partial(value_and_gradients, geometry=GEOMETRIES["depthwise"])
  left = [
    programs.count(jax.make_jaxpr(functools.partial(run, function))(images, kernel), PRIMITIVE)
    for function in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
  ]
  assert left == [0, 3] or jax.default_backend() != "cpu"
  large = jnp.ones((9, 9, 1, 4))  # too many products to compile
  run = functools.partial(convolve, conv.conv_general_dilated, geometry=GEOMETRIES["depthwise"])
  assert programs.count(jax.make_jaxpr(run)(images, large), PRIMITIVE) == 1


def test_outside_of_jit_nothing_is_compiled_again(caplog):
  images, kernel = arrays(4)
  run = functools.partial(
    value_and_gradients, conv.conv_general_dilated, geometry=GEOMETRIES["depthwise"]
  )
  with jax.log_compiles():
    for compiled in (True, False):
      caplog.clear()
      run(images, kernel)
      assert any(each.message.startswith("Compiling ") for each in caplog.records) == compiled


def test_half_precision_is_summed_up_in_single():
  images, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in ((1, 8, 8, 2), (8, 8, 1, 2)))
  kernel = kernel.at[0, 0].set(256)
  out = convolve(conv.conv_general_dilated, images, kernel, ((1, 1), "VALID", (1, 1), 2))
  assert out.dtype == jnp.bfloat16
  assert (out == 320).all()  # 256 + 63, to the nearest; in bfloat16 256 + 1 is 256


class Stranger(nn.Module):
  """Convolutions that know nothing of ours: plain, strided, depthwise, dilated, of one axis."""

  convolution: Callable | None = None

  @nn.compact
  def __call__(self, images):
    plain = functools.partial(nn.Conv, conv_general_dilated=self.convolution)
    x = plain(4, (3, 3), padding="CIRCULAR")(images)
    x = plain(4, [3, 3], strides=(2, 2), padding=((1, 0), (0, 1)))(nn.relu(x))
    x = plain(8, (3, 3), feature_group_count=4, kernel_dilation=2)(nn.relu(x))
    x = nn.Conv(4, (2, 2), padding=1, input_dilation=2)(x)
    return nn.Dense(3)(nn.Conv(4, 3)(x.reshape(len(x), -1, 4)).mean(axis=1))


def stranger(convolution=None):
  """A model, variables of three, and images for each."""
  model = Stranger(convolution)
  images = jax.random.normal(jax.random.key(0), (3, 2, 8, 8, 3))
  return model, jax.vmap(model.init)(jax.random.split(jax.random.key(1), 3), images), images


def loss(model, apply, variables, images):
  return jnp.sum(jnp.sin(apply(model, variables, images)))


def test_models_of_others_use_it():
  model, variables, images = stranger()
  programs_of = [
    jax.jit(jax.vmap(jax.grad(functools.partial(loss, model, apply))))
    for apply in (call.apply, lambda model, *args: model.apply(*args))
  ]
  ours, theirs = (program(variables, images) for program in programs_of)
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
  ours, theirs = (str(program.trace(variables, images).jaxpr) for program in programs_of)
  assert theirs.count("feature_group_count=3") > ours.count("feature_group_count=3") == 3
  assert "feature_group_count=12" in theirs  # the depthwise one
  assert "feature_group_count=12" not in ours


def test_a_convolution_of_their_own_is_left_alone():
  own = functools.partial(jax.lax.conv_general_dilated)
  model, variables, images = stranger(own)
  run = jax.vmap(functools.partial(call.apply, model))
  assert "feature_group_count=12" in str(jax.make_jaxpr(run)(variables, images))


def test_models_that_take_derivatives_themselves_keep_theirs():
  class Slope(nn.Module):
    @nn.compact
    def __call__(self, images):
      layer = nn.Conv(3, (3, 3))
      layer(images)  # makes its parameters
      return jax.jvp(layer, (images,), (images,))[1].mean(axis=(1, 2))

  model, images = Slope(), jnp.ones((2, 4, 4, 1))
  variables = model.init(jax.random.key(0), images)
  found = jax.grad(functools.partial(loss, model, call.apply))(variables, images)
  wanted = jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, images))))(variables)
  assert_close(jax.tree.leaves(found), jax.tree.leaves(wanted))


def test_other_layouts_are_refused():
  images, kernel = arrays(1)
  with pytest.raises(ValueError, match="dimension_numbers must be"):
    conv.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=None)
  with pytest.raises(ValueError, match="lhs_dilation must be 1"):
    conv.conv_general_dilated(
      images, kernel, (1, 1), "VALID", (2, 2), dimension_numbers=conv.DIMENSION_NUMBERS
    )


def test_lowering_depends_on_platform_and_size():
  choose = functools.partial(conv.choose_lowering, num_models=8, groups=1)
  assert {choose(platform="cpu", flop=flop) for flop in (10**6, 10**7)} == {"patches"}
  assert choose(platform="cpu", flop=10**8) == "unrolled"
  assert {choose(platform="gpu", flop=flop) for flop in (10**6, 10**10)} == {"unrolled"}
  assert {choose(platform="tpu", flop=flop) for flop in (10**6, 10**10)} == {"grouped"}
  assert choose(platform="tpu", flop=10**6, num_models=1) == "unrolled"
  images, kernel = arrays(1)
  with pytest.raises(ValueError, match="lowering is 'fast'; choose one of unrolled"):
    conv.conv_general_dilated(images, kernel, (1, 1), "SAME", lowering="fast")


def test_lowered_as_overrules_the_choice_inside_and_only_there():
  images, kernel = arrays(1, models=3)

  def convolutions():
    run = functools.partial(convolve, conv.conv_general_dilated, geometry=GEOMETRIES["same"])
    return programs.count(jax.make_jaxpr(jax.vmap(run))(images, kernel), PRIMITIVE)

  chosen = convolutions()
  counts = []
  for lowering in conv.LOWERINGS:
    with conv.lowered_as(lowering):
      counts.append(convolutions())
      with conv.lowered_as(None):
        assert convolutions() == chosen
  assert counts == [3, 0, 1]
  with pytest.raises(RuntimeError), conv.lowered_as("grouped"):
    raise RuntimeError
  assert convolutions() == chosen
  with pytest.raises(ValueError, match="lowering is 'fast'; choose"), conv.lowered_as("fast"):
    pass


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
  known = conv.compiler_options.__wrapped__()
  assert known == (conv.EIGEN if jax.default_backend() == "cpu" else None)
  monkeypatch.setattr(conv, "EIGEN", {"xla_there_is_no_such_option": "1"})
  assert conv.compiler_options.__wrapped__() is None


def test_jit_compiles_once_and_keeps_static_and_donated_arguments():
  double = functools.partial(conv.jit, static_argnums=0, donate_argnums=1)(lambda n, x: n * x)
  x = jnp.ones(3)
  np.testing.assert_array_equal(double(2, x), [2, 2, 2])
  np.testing.assert_array_equal(double(2, jnp.ones(3)), [2, 2, 2])
  assert x.is_deleted()
  assert double.jitted()._cache_size() == 1
