"""What goes into a layer and what comes out of it, for any Linen model, in bounded memory.

`calls` is a pure function of one model and one batch: inside jit, XLA removes whatever part of the
forward pass the asked-for layers do not need; vmap it over stacked models. `stream` runs it batch
by batch and hands on only what a function makes of each layer's input, so sums over the
calibration set (second moments, Hessians) never hold its activations.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, PyTree, Shaped, Variables
from ptq_jax.models import conv, parallel, units
from ptq_jax.models.call import Hashable
from ptq_jax.models.units import Kept, Layer, Survey, Unit
from ptq_jax.quantize import plan
from ptq_jax.quantize.layer import kernel_matrix, output_rows, patch_size, patches, without_bias
from ptq_jax.quantize.plan import Plan

COLLECTION = "captured"
"""Name of the Flax collection that carries layer inputs and outputs out of the forward pass."""

CPU_BATCH_BYTES = 2**26


class Call(NamedTuple):
  """One layer's call on a batch."""

  inputs: Float[Array, "n ..."]
  """[n, *spatial, channels] of a conv, [n, ..., features] of a dense layer."""
  outputs: Float[Array, "n ..."]
  """What the layer gave, its bias included."""


def calls(
  model: nn.Module,
  variables: Variables,
  images: Shaped[Array, "n ..."],
  layers: Sequence[Layer],
  *,
  unit: str | Unit = units.WHOLE_MODEL,
) -> dict[str, tuple[Call, ...]]:
  """Inputs and outputs of some layers in one forward pass of one model.

  Args:
    images: a batch; for a unit, a batch of that unit's inputs.
    layers: all inside the unit.
  Returns:
    Per path, in the order of `layers`, a `Call` for each of the layer's geometries.
  Raises:
    ValueError: a layer that does not run, or inside of something that hides it.
  """
  wanted = {layer.path for layer in layers}

  def sow(module, path, inputs, outputs, options):
    del options
    if path in wanted and units.may_sow(module):
      module.sow(COLLECTION, "call", (inputs, outputs))

  options = {"interceptor": units.observer(sow), "mutable": [COLLECTION]}
  _, sown = units.run(model, variables, images, unit, **options)
  found, hidden = {}, []
  for layer in layers:
    node = sown.get(COLLECTION, {})
    for name in trees.names(layer.path):
      node = node.get(name, {})
    found[layer.path] = tuple(Call(*one) for one in node.get("call", ()))
    if len(found[layer.path]) != len(layer.geometries):
      hidden.append(layer)
  if hidden:
    first, *more = hidden
    others = f" (and {len(more)} more layers)" if more else ""
    raise ValueError(
      f"layer {first.path!r} shows {len(found[first.path])} of its {len(first.geometries)} calls"
      f"{others}; inside a transform such as WeightNorm or RNN it cannot be quantized. "
      f"{_to_keep(hidden)}"
    )
  return found


def _to_keep(layers: Sequence[Layer]) -> str:
  """How to leave layers as they are."""
  names = "".join(f'"{layer.path}": None, ' for layer in layers)
  what = "it" if len(layers) == 1 else "them"
  return f'To keep {what} in full precision give levels={{{names}"*": ...}}.'


def stream(
  function: Callable[[Layer, Array], PyTree],
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "n ..."],
  layers: Sequence[Layer],
  *,
  batch_size: int | None = None,
) -> Iterator[dict[str, Any]]:
  """Per batch of images, `function(layer, inputs)` of every layer, computed in one forward pass.

  Compiled once per function, model, layers and batch shape: pass a module-level function.

  Args:
    function: pure, of one geometry of a layer and its inputs [n, ...]; returns any pytree of
      arrays, which is added up over the calls of a layer that runs more than once.
    variables: of one model.
    batch_size: images at once; None lets the patches of the largest layer fill `batch_bytes()`.
  Yields:
    dict from layer path to the function's result.
  """
  batch_size = batch_size or images_at_once(layers)
  for batch in batches(images, batch_size):
    yield _reduced_calls(function, Hashable(model), tuple(layers), variables, batch)


def batch_bytes() -> int:
  """What the patches of one batch may take, when nothing else is asked for.

  64 MiB on a CPU, to stay near its caches; elsewhere a 64th of the memory, to fill the chip.
  """
  if jax.default_backend() == "cpu":
    return CPU_BATCH_BYTES
  return max(CPU_BATCH_BYTES, parallel.device_memory_bytes() // 64)


def images_at_once(layers: Sequence[Layer], *, memory_bytes: int | None = None) -> int:
  """How many images may run at once so that the patches of the largest layer fit the bytes.

  Args:
    memory_bytes: None: `batch_bytes()`.
  """
  memory_bytes = batch_bytes() if memory_bytes is None else memory_bytes
  return max(1, memory_bytes // (4 * max(map(patch_size, layers))))


def batches(images: Shaped[ArrayLike, "n ..."], batch_size: int) -> Iterator[Array]:
  """Consecutive batches of nearly equal size, at most `batch_size`; at most two distinct sizes."""
  for start, end in edges(len(images), batch_size):
    yield jax.device_put(images if end - start == len(images) else images[start:end])


def edges(length: int, batch_size: int) -> Iterator[tuple[int, int]]:
  """Where each of the `batches` begins and ends."""
  count = math.ceil(length / batch_size)
  return itertools.pairwise(round(i * length / count) for i in range(count + 1))


def check(
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan] | None = None,
  strict: bool = False,
) -> Survey:
  """Layers of stacked models, once models, plans and calibration images pass every check.

  Every layer that some plan quantizes is run once, on one image of the first model, and must give
  what its rows times its kernel say.

  Args:
    variables: stacked, leaves [M, ...].
    images: [M, n, ...], for each model its own.
    plans: None: all layers are checked.
    strict: refuse a model with weights that stay in full precision; otherwise they are warned of.
  Raises:
    ValueError: inside of jit or vmap; no image; a model axis that differs; images in bytes; shapes
      that the model does not take; values that are not finite; a plan that does not fit; a layer
      whose output is not its kernel's.
  """
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((variables, images))):
    raise ValueError(
      "quantizers compile programs of their own and cannot run inside jax.jit, vmap or grad; call "
      "them outside (quantize_stacked takes many models at once)."
    )
  _check_images(variables, images)
  one, example = one_of(variables, images)
  survey = units.survey(model, one, example)
  _check_dtype(images.dtype, survey)
  for chosen in plans or ():
    plan.check(chosen, survey.layers)
  flat = trees.flatten(variables)
  images_finite, *leaves_finite = _finite(images, list(flat.values()))
  if not images_finite:
    raise ValueError(
      "calibration images hold NaN or infinite values, or such that are too large to be squared."
    )
  for path, finite in zip(flat, leaves_finite, strict=True):
    if not finite:
      raise ValueError(f"{path!r} holds NaN or infinite values; was the model trained?")
  _report_kept(survey.kept, strict)
  quantized = [
    layer
    for layer in survey.layers
    if plans is None or any(chosen[layer.path] is not None for chosen in plans)
  ]
  if quantized:
    _check_applied(model, trees.take(variables, 0), np.asarray(images[0, :1]), quantized)
  return survey


def one_of(variables, images) -> tuple[Variables, jax.ShapeDtypeStruct]:
  """Shapes of one model and its images, of stacked ones."""
  one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables)
  return one, jax.ShapeDtypeStruct(np.shape(images)[1:], images.dtype)


def _check_images(variables, images) -> None:
  """Raises ValueError unless there are images for each model."""
  num_models = trees.length(variables)
  if np.ndim(images) < 2 or np.shape(images)[0] != num_models:
    raise ValueError(
      f"calibration images must be [models, n, ...] with {num_models} models, as the variables; "
      f"got shape {np.shape(images)}."
    )
  if np.shape(images)[1] == 0:
    raise ValueError("the calibration set is empty; give at least one image per model.")


def _check_dtype(dtype, survey) -> None:
  """Raises ValueError for images in bytes; a model with an embedding may read integers."""
  whole = not jnp.issubdtype(dtype, jnp.floating)
  embeds = any(layer.kind == "embed" for layer in survey.layers)
  embeds |= any(trees.names(kept.path)[-1] == "embedding" for kept in survey.kept)
  if whole and not embeds:
    raise ValueError(
      f"calibration images are {dtype}; give them as the model was trained on them, in floating "
      "point and normalised: data.augment.normalise(images, mean, std)."
    )


def _report_kept(kept, strict) -> None:
  """Warns of weights that stay in full precision, or refuses them."""
  if not kept:
    return
  if strict:
    raise ValueError(f"with strict=True all weights must be quantized, but not {_listed(kept)}.")
  warnings.warn(in_full_precision(kept), stacklevel=4)


KEPT = "these weights stay in full precision: "


def in_full_precision(kept: Sequence[Kept]) -> str:
  """A sentence on the weights that are not quantized, and why."""
  return f"{KEPT}{_listed(kept)}."


def _listed(kept):
  reasons = dict.fromkeys(k.reason for k in kept)
  alike = [[k for k in kept if k.reason == reason] for reason in reasons]
  return "; ".join(
    f"{', '.join(f'{k.path!r} {list(k.shape)}' for k in some)}, {some[0].reason}" for some in alike
  )


def _check_applied(model, variables, image, layers) -> None:
  """Raises ValueError for a layer that gives not its kernel times its inputs."""
  if jnp.issubdtype(image.dtype, jnp.floating):  # a black image would show nothing
    rng = np.random.default_rng(0)
    spread = 0.1 * (np.std(np.asarray(image, np.float64)) or 1.0)
    image = image + rng.normal(0, spread, image.shape).astype(image.dtype)
  try:
    with jax.default_matmul_precision("highest"):
      found = jax.device_get(_mismatches(Hashable(model), tuple(layers), variables, image))
  except nn.module.errors.FlaxError as error:
    reason = str(error).split(" (https://")[0]
    raise ValueError(
      f"{type(model).__name__} cannot be quantized, for it does not run while its layers are "
      f"watched (nn.map_variables is a known reason): {reason}."
    ) from error
  huge = [layer.path for layer in layers if np.isnan(found[layer.path][0])]
  if huge:
    raise ValueError(
      f"the inputs or outputs of layer {huge[0]!r} are not finite or too large to be squared in "
      "float32; are the calibration images normalised as in training?"
    )
  wrong = [layer for layer in layers if not found[layer.path][0] <= found[layer.path][1]]
  if wrong:
    first, *more = wrong
    others = f" (and {len(more)} more layers)" if more else ""
    raise ValueError(
      f"layer {first.path!r}{others} does not give its inputs times its kernel plus its bias; they "
      f"are off by {found[first.path][0]:.1e} of the size of the products. A kernel that is changed"
      f" before it is applied cannot be quantized. {_to_keep(wrong)}"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mismatches(model, layers, variables, image):
  """Per layer path, how far outputs are from rows times kernel, relatively, and what is allowed.

  NaN where these are too large for their squares.
  """
  captured = calls(model.module, variables, image, layers)
  found = {}
  for layer in layers:
    kernel = trees.get(variables, layer.kernel)
    errors, sizes = 0.0, 0.0
    for geometry, one in zip(layer.geometries, captured[layer.path], strict=True):
      rows = patches(one.inputs, geometry)
      wide = jnp.promote_types(jnp.promote_types(rows.dtype, kernel.dtype), jnp.float32)
      matrix, rows = kernel_matrix(kernel.astype(wide), layer), rows.astype(wide)
      result = one.outputs.astype(wide)
      given = output_rows(without_bias(variables, geometry, result), geometry)
      sizes += jnp.sum((jnp.abs(rows) @ jnp.abs(matrix)) ** 2) + jnp.sum(result**2)
      if given.shape != (*rows.shape[:2], matrix.shape[2]):
        errors = jnp.inf
        continue
      errors += jnp.sum((rows @ matrix - given) ** 2)
    dtypes = (leaf.dtype for leaf in (kernel, *one) if jnp.issubdtype(leaf.dtype, jnp.floating))
    coarsest = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    tolerance = 4 * coarsest if coarsest > 1e-4 else 100 * coarsest
    sizes = jnp.where(jnp.isfinite(sizes), jnp.maximum(sizes, 1e-30), jnp.nan)
    found[layer.path] = jnp.sqrt(errors / sizes), tolerance
  return found


@functools.partial(conv.jit, static_argnums=(0, 1, 2))
def _reduced_calls(function, model, layers, variables, images):
  captured = calls(model.module, variables, images, layers)
  return {layer.path: over_calls(function, layer, captured[layer.path]) for layer in layers}


def over_calls(function, layer: Layer, captured: Sequence[Call]) -> PyTree:
  """`function(geometry, inputs)` added up over the calls of a layer."""
  pairs = zip(layer.geometries, captured, strict=True)
  parts = [function(geometry, one.inputs) for geometry, one in pairs]
  return functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)


@jax.jit
def _finite(images, leaves):
  """Whether the sum of the images' squares is finite, and of each leaf whether all of it is."""
  wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))
  return [jnp.isfinite(jnp.sum(wide**2)), *(jnp.isfinite(leaf).all() for leaf in leaves)]
