"""What a model is made of: layers in execution order, and the units that BRECQ reconstructs.

Layers are found by Flax method interception, so any Linen model will do. A layer is a matrix: its
kernel has axes that are summed over and axes of output channels, and what it gives is rows of its
input times that matrix plus a bias. Convolutions (grouped, dilated, transposed, of any number of
axes), Dense, DenseGeneral, the projections of attention, Einsum and Embed are described so. What
cannot be is listed by name and stays in full precision.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import tracers

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Variables
from ptq_jax.models import call

WHOLE_MODEL = ""
"""Name of the only unit of a model that is not cut."""

KINDS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed)
"""Modules whose calls are those of layers."""

NUM_IMAGES = 31
"""Images of an abstract forward pass: a number that tells an axis of images from others."""

OUTPUTS = "unit_outputs"
"""Name of the Flax collection that carries a submodule's outputs out of the forward pass."""

MAX_TABLE = 4096
"""Rows of the largest table of an embedding that is quantized; a Hessian has as many."""


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer as a matrix. Hashable: may be a static argument of jit."""

  path: str
  """Module path, "blocks_0/conv1"; the kernel is at "params/blocks_0/conv1/kernel"."""
  kind: str
  """"conv" (transposed ones too), "dense" (any product over axes of the input) or "embed"."""
  kernel_shape: tuple[int, ...]
  """Flax layout: [*window, inputs / groups, outputs] or [inputs, outputs]."""
  strides: tuple[int, ...] = ()
  """One per window axis; empty for a dense layer, as the next two."""
  padding: tuple[tuple[int, int], ...] = ()
  """Pixels before and after, per window axis: "SAME" and the like are resolved. May be negative."""
  kernel_dilation: tuple[int, ...] = ()
  feature_group_count: int = 1
  input_shape: tuple[int, ...] = ()
  """Shape of one example's input, no batch axis."""
  output_shape: tuple[int, ...] = ()
  """Shape of one example's output, no batch axis."""
  input_dilation: tuple[int, ...] = ()
  """One per window axis; empty: 1."""
  padding_mode: str = "zeros"
  """What the padding holds: "zeros", "wrap" or "reflect"."""
  parameter: str = "kernel"
  """Name of the matrix among the layer's parameters."""
  outputs: tuple[int, ...] = (-1,)
  """Axes of the kernel that are output channels, in the order in which the output has them."""
  contracted: tuple[int, ...] = (-1,)
  """Axes of a dense layer's input that are summed over, in the order of the kernel's other axes."""
  output_axes: tuple[int, ...] = (-1,)
  """Axes of the output that `outputs` become."""
  also: tuple["Layer", ...] = ()
  """The further calls of a layer that runs more than once: the same kernel, other inputs."""
  by_image: bool = True
  """Whether the first axis of inputs and outputs runs over images (or parts of them)."""

  @property
  def kernel(self) -> str:
    """Path of the kernel in the variables."""
    return f"params/{self.path}/{self.parameter}"

  @property
  def unnamed(self) -> "Layer":
    """The layer without its path: equal layers then share what is compiled for one."""
    return dataclasses.replace(self, path="")

  @property
  def geometries(self) -> tuple["Layer", ...]:
    """One record per call of the layer."""
    return (self, *self.also)

  @property
  def positions(self) -> int:
    """Rows of one example, of all calls: how often the kernel is applied."""
    return sum(g.num_outputs // self.num_columns for g in self.geometries)

  @property
  def num_outputs(self) -> int:
    """Entries of one example's output."""
    return math.prod(self.output_shape)

  @property
  def axes(self) -> tuple[int, ...]:
    """Axes of the kernel, those that are summed over first, then the output channels."""
    count = len(self.kernel_shape)
    outputs = tuple(axis % count for axis in self.outputs)
    return (*(axis for axis in range(count) if axis not in outputs), *outputs)

  @property
  def num_columns(self) -> int:
    """Output channels, of all groups."""
    return math.prod(self.kernel_shape[axis] for axis in self.outputs)

  @property
  def num_rows(self) -> int:
    """Inputs of one output: rows of the matrix of one group."""
    return math.prod(self.kernel_shape) // max(self.num_columns, 1)

  @property
  def grid_shape(self) -> tuple[int, ...]:
    """Shape of one number per output channel that broadcasts against the kernel."""
    count = len(self.kernel_shape)
    outputs = {axis % count for axis in self.outputs}
    return tuple(size if i in outputs else 1 for i, size in enumerate(self.kernel_shape))


class Kept(NamedTuple):
  """A parameter with two or more axes that stays in full precision."""

  path: str
  """In the parameters, "encoder/position"."""
  shape: tuple[int, ...]
  reason: str
  """Why, as the end of a sentence."""


class Survey(NamedTuple):
  """What a model holds."""

  layers: tuple[Layer, ...]
  """In execution order."""
  kept: tuple[Kept, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
  """A part of the model that runs alone and holds some of its layers. Hashable."""

  name: str
  """Of a link of a chain; path of a submodule; or `WHOLE_MODEL`."""
  layers: tuple[Layer, ...]
  """In execution order."""
  images: jax.ShapeDtypeStruct | None = None
  """Of a unit that is a submodule of a model that is no chain: a batch of the model's images."""
  parts: int = 1
  """Likewise: entries of the first axis of the unit's inputs per image."""
  others: tuple[tuple[str, jax.ShapeDtypeStruct], ...] = ()
  """Likewise: variables of the model that the unit does not use."""


def survey(
  model: nn.Module, variables: Variables, images: ArrayLike | jax.ShapeDtypeStruct
) -> Survey:
  """Every layer of a Linen model in execution order, and the parameters that are no layer's.

  The model runs abstractly: nothing is computed, and arrays may be `jax.ShapeDtypeStruct`.

  Args:
    variables: of one model.
    images: a batch, as the model takes it; only its shape and dtype matter.
  Raises:
    ValueError: the images do not fit the model; no layer at all.
  """
  leaves, tree = jax.tree.flatten(jax.tree.map(_abstract, (variables, images)))
  return _survey(call.Hashable(model), tree, tuple(leaves))


def _abstract(leaf) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


@functools.lru_cache(maxsize=64)
def _survey(hashable, tree, leaves) -> Survey:
  """`survey` of a model, and of variables and images as a flat tree of shapes."""
  model, (variables, images) = hashable.module, tree.unflatten(leaves)
  found: dict[str, list[Layer | str]] = {}
  modules: dict[str, str] = {}
  active: list[type] = []  # classes of the modules whose calls are running
  began: list[Any] = []  # the trace of the model's own call
  inside: set[str] = set()  # layers that run in another one
  shapes = {path: np.shape(leaf) for path, leaf in trees.flatten(variables).items()}

  def note(module, path, inputs, outputs, options):
    found.setdefault(path, []).append(
      _describe(module, path, inputs.shape, outputs.shape, shapes, options)
    )
    if tracers.current_trace() != began[0] and nn.WeightNorm not in active:  # that is refused
      inside.add(path)

  def name(next_function, args, kwargs, context):
    modules[trees.join(context.module.path)] = type(context.module).__name__
    if isinstance(context.module, nn.Embed) and context.method_name == "attend":
      path = trees.join(context.module.path)
      found.setdefault(path, []).append("also read by attend()")
    if not began:
      began.append(tracers.current_trace())
    active.append(type(context.module))
    try:
      return next_function(*args, **kwargs)
    finally:
      active.pop()

  with nn.intercept_methods(name), nn.intercept_methods(observer(note)):
    _run_abstractly(model, variables, images)
  hidden = inside - _seen(model, variables, images) if inside else inside
  layers, reasons = [], {}
  for path, described in found.items():
    reason = next((each for each in described if isinstance(each, str)), None)
    if reason is None and path in hidden:
      reason = HIDDEN
    first, *also = described
    if reason is None:
      layers.append(dataclasses.replace(first, also=tuple(also)))
    else:
      reasons[path] = reason
  if not layers:
    own = "it is a layer itself, put it into a module, as in nn.Sequential([model])"
    why = [f"{path!r}: {reason}" if path else own for path, reason in reasons.items()]
    because = f" ({'; '.join(why)})" if why else ""
    raise ValueError(f"{type(model).__name__} has no layer that can be quantized{because}.")
  return Survey(tuple(layers), tuple(_kept(layers, reasons, modules, shapes)))


def _seen(model, variables, images) -> set[str]:
  """Layers whose calls can be watched from outside; all that run, if the model resists."""
  found: set[str] = set()

  def sow(module, path, *_):
    found.add(path)
    if may_sow(module):
      module.sow(OUTPUTS, "calls", 0)

  try:
    with nn.intercept_methods(observer(sow)):
      _, sown = _run_abstractly(model, variables, images, mutable=[OUTPUTS])
  except ValueError:  # nn.map_variables takes it for an initialisation
    return found
  flat = trees.flatten(sown)
  return {path for path in found if f"{OUTPUTS}/{path}/calls" in flat}


def may_sow(module: nn.Module) -> bool:
  """Whether what a module sows gets out: not from inside `jax.vmap` and the like, used as such."""
  return module.scope.trace_level == tracers.current_trace()


def layers(
  model: nn.Module, variables: Variables, images: ArrayLike | jax.ShapeDtypeStruct
) -> list[Layer]:
  """The layers of `survey`, in execution order."""
  return list(survey(model, variables, images).layers)


Interceptor = Callable[..., Any]
"""What `flax.linen.intercept_methods` takes."""


def observer(note: Callable[..., None]) -> Interceptor:
  """Calls `note(module, path, inputs, outputs, options)` for each call of a layer.

  A layer that calls itself (a subclass its base) counts once, with what goes in and comes out at
  the outermost.
  """
  active: list[str] = []

  def observe(next_function, args, kwargs, context):
    module, path = context.module, trees.join(context.module.path)
    if context.method_name != "__call__" or not isinstance(module, KINDS) or path in active:
      return next_function(*args, **kwargs)
    active.append(path)
    try:
      outputs = next_function(*args, **kwargs)
    finally:
      active.pop()
    inputs = args[0] if args else kwargs["inputs"]
    note(module, path, inputs, outputs, {**dict(enumerate(args[1:], 1)), **kwargs})
    return outputs

  return observe


def chain(
  model: nn.Module,
  variables: Variables,
  images: ArrayLike | jax.ShapeDtypeStruct,
  *,
  units: Sequence[str] | None = None,
) -> list[Unit]:
  """The units of a model in order, each with its layers; see `survey` for arguments and errors.

  Args:
    units: patterns of module paths (`fnmatch`), "stem", "blocks_*": each module that matches is a
      unit; layers outside are units of their own. None: what the model's own `units()` names
      (with `run_unit(x, name, train)`, as all of our zoo have); otherwise the children of the
      top module, or the whole model as one unit where these cannot run alone.
  Raises:
    ValueError: a pattern without a match, a module that cannot run alone, a layer in no unit.
  """
  all_layers = layers(model, variables, images)
  if units is None and has_units(model):
    return _own_chain(model, all_layers)
  modules = _modules(model, variables, images)
  if units is None:
    children = [trees.join(trees.names(path)[:1]) for path in modules]
    try:
      return _cut(modules, variables, images, all_layers, children)
    except ValueError:
      return [Unit(WHOLE_MODEL, tuple(all_layers))]
  chosen = []
  for pattern in units:
    matches = fnmatch.filter(modules, pattern)
    if not matches:
      raise ValueError(f"unit {pattern!r} matches no module; there are {list(modules)}.")
    chosen += matches
  return _cut(modules, variables, images, all_layers, chosen)


def layer_by_layer(chain: Sequence[Unit]) -> bool:
  """Whether a chain has several units, and each of them is but a layer."""
  found = [(unit.name, [layer.path for layer in unit.layers]) for unit in chain if unit.layers]
  return len(found) > 1 and all(paths == [name] for name, paths in found)


def has_units(model: nn.Module) -> bool:
  """Whether the model names its units and runs one alone."""
  return hasattr(model, "units") and hasattr(model, "run_unit")


def in_last(model: nn.Module, path: str) -> bool:
  """Whether a leaf of the variables is the last unit's; always, if the model names no units."""
  return not has_units(model) or trees.names(path)[1] == model.units()[-1]


def split(model: nn.Module, variables: Variables) -> tuple[Variables, Variables]:
  """Variables of all units but the last, and of the last; see `in_last`."""
  body, head = (
    {path: leaf for path, leaf in trees.flatten(variables).items() if in_last(model, path) == last}
    for last in (False, True)
  )
  return trees.unflatten(body), trees.unflatten(head)


def run(
  model: nn.Module,
  variables: Variables,
  inputs: Array,
  unit: str | Unit,
  interceptor: Interceptor | None = None,
  **options,
) -> Any:
  """Runs one unit of one model in evaluation mode: its input in, its output out.

  Args:
    variables: of the model; those of the unit are enough.
    unit: or its name, for a link of a chain and the whole model.
    interceptor: for what runs inside the unit, the unit itself included.
    **options: of `flax.linen.Module.apply`; with `mutable` the changed collections come, too.
  """
  name = unit if isinstance(unit, str) else unit.name
  inner = contextlib.nullcontext() if interceptor is None else nn.intercept_methods(interceptor)
  if name == WHOLE_MODEL:
    with inner:
      return call.apply(model, variables, inputs, **options)
  if isinstance(unit, str) or unit.images is None:
    with inner:
      return model.apply(variables, inputs, name, train=False, method="run_unit", **options)
  flat = trees.flatten(variables)
  absent = {p: jnp.zeros(leaf.shape, leaf.dtype) for p, leaf in unit.others if p not in flat}
  images = jnp.zeros((len(inputs) // unit.parts, *unit.images.shape[1:]), unit.images.dtype)
  mutable = [OUTPUTS, *options.pop("mutable", ())]

  def feed(next_function, args, kwargs, context):
    if not _is_call_of(name, context):
      return next_function(*args, **kwargs)
    if args:
      outputs = next_function(inputs, *args[1:], **kwargs)
    else:
      outputs = next_function(**{**kwargs, next(iter(kwargs)): inputs})
    context.module.sow(OUTPUTS, "outputs", outputs)
    return outputs

  with nn.intercept_methods(feed), inner:  # the first one entered is the outermost
    whole = trees.unflatten(flat | absent)
    _, changed = call.apply(model, whole, images, mutable=mutable, **options)
  outputs = trees.get(changed, f"{OUTPUTS}/{name}/outputs")[0]
  if len(mutable) == 1:
    return outputs
  return outputs, {key: tree for key, tree in changed.items() if key != OUTPUTS}


def inputs_of(model: nn.Module, variables: Variables, images: Array, unit: Unit) -> Array:
  """What goes into a unit that is a submodule when the model gets images."""

  def note(next_function, args, kwargs, context):
    if _is_call_of(unit.name, context):
      context.module.sow(OUTPUTS, "inputs", args[0] if args else next(iter(kwargs.values())))
    return next_function(*args, **kwargs)

  with nn.intercept_methods(note):
    _, sown = call.apply(model, variables, images, mutable=[OUTPUTS])
  return trees.get(sown, f"{OUTPUTS}/{unit.name}/inputs")[0]


def logits_from(
  model: nn.Module, variables: Variables, outputs: Array, images: Array, unit: Unit
) -> Array:
  """What the model gives for images if a unit that is a submodule gave these outputs."""

  def replace(next_function, args, kwargs, context):
    return outputs if _is_call_of(unit.name, context) else next_function(*args, **kwargs)

  with nn.intercept_methods(replace):
    return call.apply(model, variables, images)


def _is_call_of(name, context) -> bool:
  return context.method_name == "__call__" and trees.join(context.module.path) == name


def _own_chain(model, all_layers) -> list[Unit]:
  """The links that a model names itself."""
  members: dict[str, list[Layer]] = {name: [] for name in model.units()}
  for layer in all_layers:
    owner = trees.names(layer.path)[0]
    if owner not in members:
      raise ValueError(f"layer {layer.path!r} belongs to none of the units {list(members)}.")
    members[owner].append(layer)
  return [Unit(name, tuple(inside)) for name, inside in members.items()]


class _Module(NamedTuple):
  """What a trace saw of one module."""

  calls: int
  layers: dict[str, int]
  """Calls of layers inside, by path."""
  parts: int
  obstacle: str | None
  """Why it cannot run alone."""


def _modules(model, variables, images) -> dict[str, _Module]:
  """Modules in the order in which they run first, by path, but for the top one."""
  seen: dict[str, _Module] = {}
  active: list[str] = []

  def watch(next_function, args, kwargs, context):
    path = trees.join(context.module.path)
    if context.method_name != "__call__" or not context.module.path or path in active:
      return next_function(*args, **kwargs)
    seen.setdefault(path, _Module(0, {}, 1, None))
    if isinstance(context.module, KINDS):
      for owner in {*active, path}:
        inside = seen[owner].layers
        inside[path] = inside.get(path, 0) + 1
    active.append(path)
    outputs = next_function(*args, **kwargs)
    active.pop()
    first, *others = [*args, *kwargs.values()] or [None]
    module = seen[path]._replace(calls=seen[path].calls + 1)
    if module.calls > 1:
      module = module._replace(obstacle="it runs more than once")
    elif not _is_array(first) or not _is_array(outputs) or any(map(_is_array, others)):
      module = module._replace(obstacle="it needs one array as input and one as output")
    elif np.ndim(first) == 0 or first.shape[0] % NUM_IMAGES or not first.shape[0]:
      module = module._replace(obstacle="the first axis of its input is not that of the images")
    else:
      module = module._replace(parts=first.shape[0] // NUM_IMAGES)
    seen[path] = module
    return outputs

  with nn.intercept_methods(watch):
    _run_abstractly(model, variables, images)
  return seen


def _is_array(value) -> bool:
  return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))


def _cut(modules, variables, images, all_layers, chosen) -> list[Unit]:
  """Units of the chosen modules; layers outside are units of their own."""
  outermost = [path for path in chosen if not any(path.startswith(f"{other}/") for other in chosen)]
  members: dict[str, list[Layer]] = {}
  for layer in all_layers:
    owners = [p for p in outermost if f"{layer.path}/".startswith(f"{p}/")]
    members.setdefault(owners[0] if owners else layer.path, []).append(layer)
  batch = jax.ShapeDtypeStruct(np.shape(images), jnp.result_type(images.dtype))
  cut = []
  for path, inside in members.items():
    module = modules.get(path) or _Module(0, {}, 1, "it is no Linen module")
    obstacle = module.obstacle
    for layer in inside:
      if module.layers.get(layer.path) != len(layer.geometries):
        obstacle = f"layer {layer.path!r} also runs outside of it"
    if obstacle:
      raise ValueError(f"{path!r} cannot be a unit of its own: {obstacle}.")
    others = tuple(
      (name, jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype))
      for name, leaf in trees.flatten(variables).items()
      if not f"{trees.join(trees.names(name)[1:])}/".startswith(f"{path}/")
    )
    cut.append(Unit(path, tuple(inside), batch, module.parts, others))
  return cut


def _run_abstractly(model, variables, images, **options):
  """What `call.apply` gives on shapes, with misfits told in one sentence."""
  shape = (NUM_IMAGES, *np.shape(images)[1:]) if np.ndim(images) else ()
  batch = jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(images.dtype))
  try:
    return jax.eval_shape(lambda v, x: call.apply(model, v, x, **options), variables, batch)
  except (nn.module.errors.FlaxError, TypeError, IndexError, AssertionError) as error:
    reason = str(error).split(" (https://")[0] or type(error).__name__
    raise ValueError(
      f"inputs of shape {np.shape(images)} do not fit {type(model).__name__}: {reason}"
    ) from error


def _describe(module, path, inputs, outputs, shapes, options) -> Layer | str:
  """The record of a layer that was called with these shapes, or why it has none."""
  parameter = "embedding" if isinstance(module, nn.Embed) else "kernel"
  kernel = shapes.get(f"params/{path}/{parameter}")
  if kernel is None:
    return "its parameters stand elsewhere"
  if not math.prod(kernel):
    return "it has no weights"
  by_image = inputs[0] % NUM_IMAGES == 0 == outputs[0] % NUM_IMAGES and inputs[0] * outputs[0] > 0
  geometry = {
    "kernel_shape": kernel,
    "input_shape": _of_one(inputs, by_image),
    "output_shape": _of_one(outputs, by_image),
    "by_image": bool(by_image),
  }
  if isinstance(module, nn.Conv | nn.ConvTranspose):
    found = _conv(module, path, kernel, inputs)
  elif isinstance(module, nn.Embed):
    found = _embed(kernel)
  elif isinstance(module, nn.Einsum):
    found = _einsum(options.get("einsum_str", options.get(1, module.einsum_str)), inputs, kernel)
  else:
    found = _dense(module, inputs, kernel)
  return found if isinstance(found, str) else Layer(path, **geometry, **found)


HIDDEN = "it runs in a loop or a map (nn.RNN, nn.scan, jax.vmap), where its inputs cannot be seen"
LIFTED = "it is scanned or vmapped, or its kernel has another shape than that of such a layer"


def _conv(module, path, kernel, inputs) -> dict | str:
  """The part of a `Layer` that a convolution needs, or why it cannot be one."""
  window = per_axis(module.kernel_size, 1)
  if len(inputs) < len(window) + 2:
    raise ValueError(
      f"layer {path!r} gets an input of shape {inputs}; it needs one batch axis, "
      f"{len(window)} spatial axes and one axis of channels."
    )
  transposed = isinstance(module, nn.ConvTranspose)
  groups = 1 if transposed else module.feature_group_count
  if module.mask is not None:
    return "it has a mask"
  if transposed and (module.transpose_kernel or module.padding == "CIRCULAR"):
    return "it is a ConvTranspose with transpose_kernel or circular padding"
  if kernel != (*window, inputs[-1] // groups, module.features):
    return LIFTED
  strides, dilation = (
    per_axis(value, len(window)) for value in (module.strides, module.kernel_dilation)
  )
  reach, spatial = extents(window, dilation), inputs[-1 - len(window) : -1]
  found = {"kind": "conv", "kernel_dilation": dilation, "feature_group_count": groups}
  if transposed:
    padding = _transposed_pads(module.padding, spatial, reach, strides)
    return found | {"strides": (1,) * len(window), "padding": padding, "input_dilation": strides}
  mode = (
    {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(module.padding, "zeros")
    if isinstance(module.padding, str)
    else "zeros"
  )
  input_dilation = per_axis(module.input_dilation, len(window))
  dilated = [(size - 1) * d + 1 for size, d in zip(spatial, input_dilation, strict=True)]
  if mode == "zeros":
    padding = pads(module.padding, dilated, reach, strides)
  else:
    padding = tuple(((extent - 1) // 2, extent // 2) for extent in reach)
    if any(d != 1 for d in input_dilation):
      return f"it has {module.padding} padding of a dilated input"
  return found | {
    "strides": strides,
    "padding": padding,
    "input_dilation": input_dilation if any(d != 1 for d in input_dilation) else (),
    "padding_mode": mode,
  }


def _transposed_pads(padding, spatial, reach, strides):
  """Padding of the dilated input of a ConvTranspose, as `jax.lax.conv_transpose` has it."""
  if not isinstance(padding, str):
    return pads(padding, spatial, reach, strides)
  found = []
  for extent, stride in zip(reach, strides, strict=True):
    total = extent + stride - 2
    if padding.upper() == "SAME":
      before = extent - 1 if stride > extent - 1 else -(-total // 2)
    else:
      total, before = total + max(extent - stride, 0), extent - 1
    found.append((before, total - before))
  return tuple(found)


def _dense(module, inputs, kernel) -> dict | str:
  """The part of a `Layer` that Dense or DenseGeneral needs, or why it cannot be one."""
  if isinstance(module, nn.Dense):
    return {"kind": "dense"} if kernel == (inputs[-1], module.features) else LIFTED
  axes, features, batch = (
    (value,) if isinstance(value, int) else tuple(value)
    for value in (module.axis, module.features, module.batch_dims)
  )
  axes = tuple(sorted(axis % len(inputs) for axis in axes))
  if batch or 0 in axes:
    return "it has batch_dims, or sums over the first axis"
  if kernel != (*(inputs[axis] for axis in axes), *features):
    return LIFTED
  last = tuple(range(-len(features), 0))
  contracted = (-1,) if axes == (len(inputs) - 1,) else axes
  return {"kind": "dense", "outputs": last, "contracted": contracted, "output_axes": last}


def _einsum(equation, inputs, kernel) -> dict | str:
  """The part of a `Layer` that an Einsum needs, or why it cannot be one."""
  if equation is None or "." in equation:
    return f"its equation is {equation}"
  left, right, out = equation.replace(" ", "").replace(",", " ").replace("->", " ").split(" ")
  summed = [axis for axis in right if axis not in out]
  free = [axis for axis in left if axis not in right]
  channels = [axis for axis in out if axis in right]
  plain = (
    set(summed) <= set(left)
    and not set(channels) & set(left)
    and free == [axis for axis in out if axis not in right]
    and free[:1] == [left[0]]
    and channels
    and all(len(set(axes)) == len(axes) for axes in (left, right, out))
    and (len(left), len(right)) == (len(inputs), len(kernel))
  )
  if not plain:
    return f"its equation {equation} is no product of a matrix with rows of the input"
  return {
    "kind": "dense",
    "outputs": tuple(right.index(axis) for axis in channels),
    "contracted": tuple(left.index(axis) for axis in summed),
    "output_axes": tuple(out.index(axis) for axis in channels),
  }


def _embed(table) -> dict | str:
  """The part of a `Layer` that an Embed needs, or why it cannot be one."""
  if len(table) != 2:
    return LIFTED
  if table[0] > MAX_TABLE:
    return f"it is a table of more than {MAX_TABLE} rows"
  return {"kind": "embed", "parameter": "embedding"}


def _of_one(shape, by_image) -> tuple[int, ...]:
  """The shape of one example's part of inputs or outputs."""
  if by_image:
    parts = shape[0] // NUM_IMAGES
    return shape[1:] if parts == 1 else (parts, *shape[1:])
  return (max(1, math.prod(shape[:-1]) // NUM_IMAGES), *shape[-1:])


def _kept(layers, reasons, modules, shapes) -> Iterator[Kept]:
  """Parameters with two or more axes that are no layer's kernel, nor called a bias."""
  known = {layer.kernel for layer in layers}
  for path, shape in shapes.items():
    _, *owner, leaf = trees.names(path)
    if not path.startswith("params/") or path in known or leaf == "bias" or len(shape) < 2:
      continue
    module = trees.join(owner)
    if module in reasons:
      reason = reasons[module]
    elif module in modules:
      reason = f"it is a parameter of {modules[module]}, not of a layer"
    else:
      reason = "no layer that is known runs under this name"
    yield Kept(trees.join([*owner, leaf]), shape, reason)


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
