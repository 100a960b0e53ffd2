"""Folds batch normalisation into the layer before it: one affine map instead of two.

In evaluation mode BN(x) = scale * (x - mean) / sqrt(var + eps) + bias is affine per channel. The
factor moves into the kernel; the BN that stays only adds a bias. The tree keeps its shape, so the
same model runs the folded variables.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params

from ptq_jax import trees
from ptq_jax.base import ArrayLike, Shaped, Variables


def fold(model: nn.Module, variables: Variables, images: Shaped[ArrayLike, "n ..."]) -> dict:
  """Variables of the same tree, dtypes and function, with batch normalisation folded.

  Each kernel (and bias) of a layer followed by a BN is multiplied by scale / sqrt(var + eps) of
  its channel. That BN gets scale 1, mean 0, variance 1 - eps and as its bias what is left to add
  (a BN without a bias gets it as a negative mean). BNs that follow no layer alone stay.

  Args:
    model: any Linen model with nn.BatchNorm; written for one model, vmap over stacked variables.
    images: a batch; only its shape matters.
  """
  flat = trees.flatten(variables)
  for layer, (norm, epsilon) in pairs(model, variables, images).items():
    flat |= _folded(flat, layer, norm, epsilon)
  return trees.unflatten(flat)


def pairs(
  model: nn.Module, variables: Variables, images: Shaped[ArrayLike, "n ..."]
) -> dict[str, tuple[str, float]]:
  """Layer path -> (path, epsilon) of the BN that alone consumes the layer's output.

  The model is traced, never run: layer outputs and BN inputs are tagged with names, and a pair is
  an output tag whose only consumer is a BN's input tag.
  """
  epsilons: dict[str, float] = {}

  def tag(next_function, args, kwargs, context):
    module, path = context.module, trees.SEPARATOR.join(context.module.path)
    if context.method_name != "__call__":
      return next_function(*args, **kwargs)
    if isinstance(module, nn.BatchNorm) and _is_foldable(module, args, kwargs):
      epsilons[path] = module.epsilon
      return next_function(checkpoint_name(args[0], f"into {path}"), *args[1:], **kwargs)
    outputs = next_function(*args, **kwargs)
    if isinstance(module, nn.Conv | nn.Dense):
      return checkpoint_name(outputs, f"out of {path}")
    return outputs

  def run(variables, images):
    with nn.intercept_methods(tag):
      return model.apply(variables, images, train=False)

  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), (variables, images)
  )
  closed = jax.make_jaxpr(run)(*shapes)
  return {layer: (norm, epsilons[norm]) for layer, norm in _tagged_pairs(closed.jaxpr)}


def _is_foldable(module, args, kwargs) -> bool:
  """Whether a BN normalises the last axis by its running statistics."""
  running = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
  if running is None:
    running = module.use_running_average
  axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
  last = args[0].ndim - 1 if args else None
  return bool(running) and len(axes) == 1 and axes[0] in (-1, last)


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
