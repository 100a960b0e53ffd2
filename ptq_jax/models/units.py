"""What a model is made of: layers in execution order, and the chain of units of a zoo model.

Layers are found by Flax method interception, so any Linen model will do. Units are the blocks that
BRECQ reconstructs; a model that names none counts as one unit, itself.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Variables

WHOLE_MODEL = ""
"""Name of the only unit of a model that has no `units()`."""


@dataclasses.dataclass(frozen=True)
class Layer:
  """One Conv or Dense layer. Hashable: may be a static argument of jit."""

  path: str
  """Module path, "blocks_0/conv1"; the kernel is at "params/blocks_0/conv1/kernel"."""
  kind: str
  """"conv" or "dense"."""
  kernel_shape: tuple[int, ...]
  """Flax layout: [*window, inputs / groups, outputs] or [inputs, outputs]."""
  strides: tuple[int, ...] = ()
  """One per window axis; empty for a dense layer, as the next two."""
  padding: tuple[tuple[int, int], ...] = ()
  """Zeros before and after, per window axis: "SAME" and the like are resolved."""
  kernel_dilation: tuple[int, ...] = ()
  feature_group_count: int = 1
  input_shape: tuple[int, ...] = ()
  """Shape of one example's input, no batch axis."""
  output_shape: tuple[int, ...] = ()
  """Shape of one example's output, no batch axis."""

  @property
  def kernel(self) -> str:
    """Path of the kernel in the variables."""
    return f"params/{self.path}/kernel"

  @property
  def positions(self) -> int:
    """Output pixels of one example: how often the kernel is applied."""
    return math.prod(self.output_shape[:-1])


@dataclasses.dataclass(frozen=True)
class Unit:
  """A part of the model that runs alone and holds some of its layers. Hashable."""

  name: str
  """Name of the submodule, or `WHOLE_MODEL`."""
  layers: tuple[Layer, ...]
  """In execution order."""


def layers(
  model: nn.Module, variables: Variables, images: ArrayLike | jax.ShapeDtypeStruct
) -> list[Layer]:
  """Every Conv and Dense layer of a Linen model, in execution order.

  The model runs abstractly: nothing is computed, and arrays may be `jax.ShapeDtypeStruct`.

  Args:
    variables: of one model.
    images: a batch for `model.apply(variables, images, train=False)`; only its shape matters.
  Raises:
    ValueError: the images do not fit the model; a layer runs twice (shared weights); another
      layer with a matrix of weights (transposed convolution, embedding, attention) is in the way.
  """
  found: dict[str, Layer] = {}
  modules: dict[str, str] = {}
  shapes = {path: np.shape(leaf) for path, leaf in trees.flatten(variables).items()}

  def observe(next_function, args, kwargs, context):
    module, path = context.module, trees.SEPARATOR.join(context.module.path)
    modules[path] = type(module).__name__
    outputs = next_function(*args, **kwargs)
    if context.method_name == "__call__" and isinstance(module, nn.Conv | nn.Dense):
      _check_plain(module, path, found, shapes)
      inputs = args[0] if args else kwargs["inputs"]
      found[path] = _describe(module, path, inputs.shape, outputs.shape, shapes)
    return outputs

  with nn.intercept_methods(observe):
    _run_abstractly(model, variables, images)
  _check_nothing_missed(found, modules, shapes)
  if not found:
    raise ValueError(f"{type(model).__name__} has no Conv or Dense layer to quantize.")
  return list(found.values())


def chain(
  model: nn.Module, variables: Variables, images: ArrayLike | jax.ShapeDtypeStruct
) -> list[Unit]:
  """The units of a model in order, each with its layers; see `layers` for arguments and errors.

  A model with methods `units()` and `run_unit(x, name, train)`, as all of our zoo have, is the
  chain it says. Any other model is one unit that takes images and gives logits.
  """
  all_layers = layers(model, variables, images)
  if not has_units(model):
    return [Unit(WHOLE_MODEL, tuple(all_layers))]
  members: dict[str, list[Layer]] = {name: [] for name in model.units()}
  for layer in all_layers:
    owner = layer.path.split(trees.SEPARATOR)[0]
    if owner not in members:
      raise ValueError(f"layer {layer.path!r} belongs to none of the units {list(members)}.")
    members[owner].append(layer)
  return [Unit(name, tuple(inside)) for name, inside in members.items()]


def has_units(model: nn.Module) -> bool:
  """Whether the model names its units and runs one alone."""
  return hasattr(model, "units") and hasattr(model, "run_unit")


def in_last(model: nn.Module, path: str) -> bool:
  """Whether a leaf of the variables is the last unit's; always, if the model names no units."""
  return not has_units(model) or path.split(trees.SEPARATOR)[1] == model.units()[-1]


def split(model: nn.Module, variables: Variables) -> tuple[Variables, Variables]:
  """Variables of all units but the last, and of the last; see `in_last`."""
  body, head = (
    {path: leaf for path, leaf in trees.flatten(variables).items() if in_last(model, path) == last}
    for last in (False, True)
  )
  return trees.unflatten(body), trees.unflatten(head)


def run(model: nn.Module, variables: Variables, inputs: Array, name: str) -> Array:
  """Runs one unit of one model in evaluation mode: its input in, the next unit's input out."""
  if name == WHOLE_MODEL:
    return model.apply(variables, inputs, train=False)
  return model.apply(variables, inputs, name, train=False, method="run_unit")


def _run_abstractly(model, variables, images):
  """`model.apply` on shapes, with misfits told in one sentence."""
  try:
    jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
  except (nn.module.errors.FlaxError, TypeError, IndexError, AssertionError) as error:
    reason = str(error).split(" (https://")[0] or type(error).__name__
    raise ValueError(
      f"images of shape {np.shape(images)} do not fit {type(model).__name__}: {reason}"
    ) from error


def _check_plain(module, path, found, shapes):
  """Raises unless the layer is one kernel applied once, as nn.Conv and nn.Dense do it."""
  if path in found:
    raise ValueError(
      f"layer {path!r} runs more than once; shared weights cannot be quantized layer by layer."
    )
  standard = nn.Conv if isinstance(module, nn.Conv) else nn.Dense
  if type(module).__call__ is not standard.__call__:
    raise _unsupported(path, type(module).__name__)
  if isinstance(module, nn.Dense):
    return
  padding = module.padding
  if isinstance(padding, str) and padding.upper() not in ("SAME", "VALID", "CAUSAL"):
    raise ValueError(f"layer {path!r} has {padding} padding; only zero padding is supported.")
  if module.mask is not None or np.any(np.asarray(module.input_dilation) != 1):
    raise ValueError(f"layer {path!r} has a mask or a dilated input, which is not supported.")


def _describe(module, path, input_shape, output_shape, shapes) -> Layer:
  """The record of a layer that was called with these shapes."""
  kernel_shape = shapes[f"params/{path}/kernel"]
  if isinstance(module, nn.Dense):
    expected = (input_shape[-1], module.features)
    if kernel_shape != expected:
      raise _unsupported(path, "lifted (scanned or vmapped) Dense")
    return Layer(
      path, "dense", kernel_shape, input_shape=input_shape[1:], output_shape=output_shape[1:]
    )
  window = per_axis(module.kernel_size, 1)
  groups = module.feature_group_count
  if kernel_shape != (*window, input_shape[-1] // groups, module.features):
    raise _unsupported(path, "lifted (scanned or vmapped) Conv")
  if len(input_shape) != len(window) + 2:
    raise ValueError(
      f"layer {path!r} gets an input of shape {input_shape}; it needs one batch axis, "
      f"{len(window)} spatial axes and one axis of channels."
    )
  strides, dilation = (
    per_axis(value, len(window)) for value in (module.strides, module.kernel_dilation)
  )
  padding = pads(module.padding, input_shape[1:-1], extents(window, dilation), strides)
  return Layer(
    path,
    "conv",
    kernel_shape,
    strides,
    padding,
    dilation,
    groups,
    input_shape[1:],
    output_shape[1:],
  )


def per_axis(value: int | Sequence[int] | None, num_axes: int) -> tuple[int, ...]:
  """An option of nn.Conv, one number or one per window axis, as one per window axis; None is 1."""
  if value is None:
    return (1,) * num_axes
  return (value,) * num_axes if isinstance(value, int) else tuple(int(v) for v in value)


def extents(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
  """Pixels from one end of a dilated window to the other, per axis."""
  return [(size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)]


def pads(
  padding: str | int | Sequence[int | tuple[int, int]],
  spatial: Sequence[int],
  window_extents: Sequence[int],
  strides: Sequence[int],
) -> tuple[tuple[int, int], ...]:
  """Zeros before and after each spatial axis, from `padding` as nn.Conv takes it.

  Raises:
    ValueError: for an unknown word, or numbers that do not fit the axes.
  """
  if isinstance(padding, str):
    if padding.upper() == "CAUSAL" and len(spatial) == 1:
      return ((window_extents[0] - 1, 0),)
    if padding.upper() not in ("SAME", "VALID"):
      raise ValueError(f'padding must be "SAME", "VALID" or numbers, got {padding!r}.')
    pairs = jax.lax.padtype_to_pads(spatial, window_extents, strides, padding.upper())
  else:
    each = (padding,) * len(spatial) if isinstance(padding, int) else tuple(padding)
    if len(each) != len(spatial):
      raise ValueError(f"padding {padding!r} must have one entry per axis of {tuple(spatial)}.")
    pairs = [(p, p) if isinstance(p, int) else p for p in each]
  return tuple((int(low), int(high)) for low, high in pairs)


def _check_nothing_missed(found: Mapping[str, Layer], modules: Mapping[str, str], shapes) -> None:
  """Raises if a parameter with two or more axes belongs to no known layer."""
  kernels = {layer.kernel for layer in found.values()}
  for leaf, shape in shapes.items():
    if not leaf.startswith("params/") or leaf in kernels or sum(size > 1 for size in shape) < 2:
      continue
    path = trees.SEPARATOR.join(leaf.split(trees.SEPARATOR)[1:-1])
    if path in modules:
      raise _unsupported(path, modules[path])
    raise ValueError(f"parameter {leaf!r} is not used when the model runs; remove it.")


def _unsupported(path: str, kind: str) -> ValueError:
  return ValueError(
    f"layer {path or 'the model itself'!r} is a {kind}, which cannot be quantized: "
    "only nn.Conv and nn.Dense are supported."
  )
