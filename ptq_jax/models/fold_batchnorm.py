"""Folds batch normalisation into the layer before it: one affine map instead of two.

In evaluation mode BN(x) = scale * (x - mean) / sqrt(var + eps) + bias is affine per channel. The
factor moves into the kernel; the BN that stays only adds a bias. The tree keeps its shape, so the
same model runs the folded variables.
"""

import collections
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params

from ptq_jax import trees
from ptq_jax.base import ArrayLike, Shaped, Variables
from ptq_jax.models import call

TOLERANCE = 1e-3
"""Of the outputs, relative to their size, when a folding is tried."""


def fold(model: nn.Module, variables: Variables, images: Shaped[ArrayLike, "n ..."]) -> Variables:
  """Variables of the same tree, dtypes and function, with batch normalisation folded.

  Each kernel (and bias) of a layer followed by a BN is multiplied by scale / sqrt(var + eps) of
  its channel. That BN gets scale 1, mean 0, variance 1 - eps and as its bias what is left to add
  (a BN without a bias gets it as a negative mean). BNs that follow no layer alone stay, and so do
  those whose folding changes what the model gives for an image.

  Args:
    model: any Linen model with nn.BatchNorm; written for one model, vmap over stacked variables.
    images: a batch; the first is what foldings are tried on, unless it is traced.
  """
  return apply(variables, _that_hold(model, variables, images))


def fold_stacked(
  model: nn.Module, variables: Variables, images: Shaped[ArrayLike, "M n ..."]
) -> Variables:
  """`fold` of models stacked along a first axis; the foldings are tried on the first model."""
  found = _that_hold(model, trees.take(variables, 0), images[0])
  return jax.jit(jax.vmap(functools.partial(apply, found=found)))(variables)


def apply(variables: Variables, found: Mapping[str, tuple[str, float]]) -> Variables:
  """Folds the pairs of layer and BN that `pairs` gives."""
  flat = trees.flatten(variables)
  changed = {}
  for layer, (norm, epsilon) in found.items():
    changed |= _folded(flat, layer, norm, epsilon)
  return trees.replace(variables, changed)


def pairs(
  model: nn.Module, variables: Variables, images: Shaped[ArrayLike, "n ..."]
) -> dict[str, tuple[str, float]]:
  """Layer path -> (path, epsilon) of the BN that alone consumes the layer's output.

  The model is traced, never run: layer outputs and BN inputs are tagged with names, and a pair is
  an output tag whose only consumer is a BN's input tag. Layer and BN each run exactly once, and
  are not stacked by `nn.vmap` or `nn.scan`.
  """
  epsilons: dict[str, float] = {}
  runs: collections.Counter[str] = collections.Counter()
  active: list[str] = []

  def tag(next_function, args, kwargs, context):
    module, path = context.module, trees.join(context.module.path)
    if context.method_name != "__call__" or path in active:
      return next_function(*args, **kwargs)
    runs[path] += 1
    active.append(path)
    x = args[0] if args else kwargs.get("x")
    if isinstance(module, nn.BatchNorm) and x is not None and _is_foldable(module, x, args, kwargs):
      epsilons[path] = module.epsilon
      x = checkpoint_name(x, f"into {path}")
      args, kwargs = (x, *args[1:]), {name: kwargs[name] for name in kwargs if name != "x"}
    outputs = next_function(*args, **kwargs)
    active.pop()
    if isinstance(module, nn.Conv | nn.Dense):
      return checkpoint_name(outputs, f"out of {path}")
    return outputs

  def run(variables, images):
    with nn.intercept_methods(tag):
      return call.apply(model, variables, images)

  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), (variables, images)
  )
  closed = jax.make_jaxpr(run)(*shapes)
  sizes = {path: leaf.shape for path, leaf in trees.flatten(shapes[0]).items()}
  return {
    layer: (norm, epsilons[norm])
    for layer, norm in _tagged_pairs(closed.jaxpr)
    if runs[layer] == 1 == runs[norm] and len(sizes[f"batch_stats/{norm}/var"]) == 1
  }


def _that_hold(model, variables, images):
  """The pairs whose folding leaves the model's outputs for an image as they are."""
  found = pairs(model, variables, images)
  if not found or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((variables, images))):
    return found
  image, run = jnp.asarray(images[:1]), jax.jit(functools.partial(call.apply, model))
  expected = jax.device_get(run(variables, image))

  def holds(some):
    folded = jax.jit(functools.partial(apply, found=some))(variables)
    given = jax.device_get(run(folded, image))
    return all(
      np.linalg.norm(np.ravel(a - b)) <= TOLERANCE * (1e-6 + np.linalg.norm(np.ravel(b)))
      for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True)
    )

  if holds(found):
    return found
  return {layer: norm for layer, norm in found.items() if holds({layer: norm})}


def _is_foldable(module, x, args, kwargs) -> bool:
  """Whether a BN normalises the last axis by its running statistics, and nothing more."""
  running = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
  if running is None:
    running = module.use_running_average
  axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
  return bool(running) and len(axes) == 1 and axes[0] in (-1, x.ndim - 1)


def _tagged_pairs(jaxpr):
  """(layer, norm) wherever a layer's tagged output goes into a tagged BN and nowhere else."""
  produced, consumers = {}, {}
  for equation in jaxpr.eqns:
    for variable in equation.invars:
      if not isinstance(variable, Literal):
        consumers.setdefault(variable, []).append(_tag(equation))
    if _tag(equation).startswith("out of "):
      produced[equation.outvars[0]] = _tag(equation).removeprefix("out of ")
    for inner in jaxprs_in_params(equation.params):
      yield from _tagged_pairs(inner)
  outputs = [variable for variable in jaxpr.outvars if not isinstance(variable, Literal)]
  for variable, layer in produced.items():
    tags = consumers.get(variable, [])
    if len(tags) == 1 and tags[0].startswith("into ") and variable not in outputs:
      yield layer, tags[0].removeprefix("into ")


def _tag(equation) -> str:
  """The name that `checkpoint_name` gave, or nothing."""
  return equation.params["name"] if equation.primitive.name == "name" else ""


def _folded(flat, layer: str, norm: str, epsilon: float) -> dict:
  """The leaves that change when one BN is folded into one layer."""
  statistics = {name: flat[f"batch_stats/{norm}/{name}"] for name in ("mean", "var")}
  scale, bias = (f"params/{norm}/{name}" for name in ("scale", "bias"))
  factor = flat.get(scale, 1.0) / jnp.sqrt(statistics["var"] + epsilon)
  rest = flat.get(bias, 0.0) - statistics["mean"] * factor
  changed = {
    path: flat[path] * factor.reshape((1,) * (jnp.ndim(flat[path]) - 1) + (-1,))
    for path in (f"params/{layer}/kernel", f"params/{layer}/bias")
    if path in flat
  }
  changed[f"batch_stats/{norm}/mean"] = jnp.zeros_like(rest) if bias in flat else -rest
  changed[f"batch_stats/{norm}/var"] = jnp.full_like(rest, 1 - epsilon)
  if bias in flat:
    changed[bias] = rest
  if scale in flat:
    changed[scale] = jnp.ones_like(rest)
  return {path: leaf.astype(flat[path].dtype) for path, leaf in changed.items()}
