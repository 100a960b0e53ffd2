"""Whether a model can be audited as a classifier, seen on random weights, before training."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ptq_jax import trees
from ptq_jax.base import PyTree, Shaped, Variables
from ptq_jax.models import call

NUM_EXAMPLES = 6
"""Examples that `check_classifier` takes."""

ROUNDING = 0.01
"""Share of the largest logit by which rounding, of bfloat16 too, may move one in another batch."""

TOLD_BY = ", ".join((*call.TRAINING, *call.EVALUATION))


def random_variables(model: nn.Module, examples: Shaped[np.ndarray, "n ..."]) -> Variables:
  """Variables of a model with random weights, the same at every call.

  Not fresh ones, which may be normalised already, and whose draws take long to compile.
  """
  rng = np.random.default_rng(0)
  found = jax.tree.map(_moved, dict(_statistics(call.Hashable(model), examples[:1])))
  shapes = jax.eval_shape(functools.partial(call.init, model), jax.random.key(0), examples[:1])

  def draw(leaf):
    spread = 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    values = (
      rng.normal(0, spread, leaf.shape) if len(leaf.shape) > 1 else 1 + rng.random(leaf.shape)
    )
    return values.astype(leaf.dtype)

  return {**found, "params": jax.tree.map(draw, shapes["params"])}


def _moved(leaf):
  """A statistic that is no longer what it begins with, often a neutral 1."""
  return leaf * 1.5 if jax.dtypes.issubdtype(leaf.dtype, np.floating) else leaf


@functools.partial(jax.jit, static_argnums=0)
def _statistics(model, examples):
  """What a model is initialised with beside its weights."""
  variables = call.init(model.module, jax.random.key(0), examples)
  return {name: tree for name, tree in variables.items() if name != "params"}


def check_classifier(
  model: nn.Module, examples: Shaped[np.ndarray, "n ..."], *, name: str
) -> list[str]:
  """Runs a model on random weights and looks at what it gives.

  Args:
    model: that gives [n, C], and may also be run in training mode.
    examples: `NUM_EXAMPLES` different ones, as the model gets them.
    name: of the model, for messages.
  Returns:
    Sentences on what is odd, though it may be meant: outputs that are never negative, or in half
    precision; batch statistics that training leaves as they are; Dropout that is off in training.
  Raises:
    ValueError: for outputs that are probabilities, or that depend on the rest of the batch.
  """
  variables = random_variables(model, examples)
  params = jax.tree.map(lambda leaf: -np.asarray(leaf), variables["params"])
  negated = {**variables, "params": params}
  batch, other = examples[[0, 1, 2, 3]], examples[[1, 0, 4, 5]]
  with jax.default_matmul_precision("highest"):
    run = functools.partial(_outputs, call.Hashable(model))
    outputs = run(variables, batch), run(variables, other), run(negated, batch)
    first, mixed, further = (np.asarray(each, np.float64) for each in outputs)
  every = np.concatenate([first, further[np.isfinite(further).all(axis=1)]])
  if not np.isfinite(first).all():
    return _idle(model, variables, batch, name)
  adding_up = (np.abs(every.sum(axis=1) - 1) < ROUNDING).all()
  if (every >= 0).all() and (every <= 1).all() and (adding_up or every.all()):
    end, which = ("softmax", ", which add up to 1") if adding_up else ("sigmoid", " from 0 to 1")
    raise ValueError(
      f"model {name} gives probabilities{which}; it must give logits: leave out the {end} at its "
      "end."
    )
  if np.abs(first[:2] - mixed[1::-1]).max() > ROUNDING * np.abs(first).max():
    raise ValueError(
      f"model {name} gives an example other logits when others are in its batch, in evaluation "
      "mode, too; it must look at every example alone: normalise by running averages then, and "
      "let no attention or mean run over the first axis."
    )
  odd = _idle(model, variables, batch, name)
  if outputs[0].dtype.itemsize < 4:
    odd.append(
      f"the logits of model {name} are {outputs[0].dtype}, so many examples have the same score; "
      "let its last layer compute in float32."
    )
  if (every >= 0).all() and every.any():
    odd.append(
      f"the logits of model {name} are never negative, as after a ReLU; leave it out at the end, "
      "or the classes that it sets to 0 cannot be told apart."
    )
  return odd


@functools.partial(jax.jit, static_argnums=0)
def _outputs(model, variables, examples):
  return call.apply(model.module, variables, examples)


def _idle(model, variables, batch, name) -> list[str]:
  """Sentences on batch statistics and Dropout that training does not use; nothing is computed."""
  off = []

  def note(next_function: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if isinstance(module, nn.Dropout) and context.method_name == "__call__" and module.rate > 0:
      given = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
      if module.deterministic if given is None else given:
        off.append(trees.join(module.path))
    return next_function(*args, **kwargs)

  def statistics(variables: PyTree) -> PyTree:
    with nn.intercept_methods(note):
      rngs, mutable = call.rngs(jax.random.key(0)), [key for key in variables if key != "params"]
      _, changed = call.apply(model, variables, batch, train=True, mutable=mutable, rngs=rngs)
    return trees.flatten(changed.get("batch_stats", {}))

  traced = jax.make_jaxpr(statistics, return_shape=True)(variables)
  given, outputs = set(map(id, traced[0].jaxpr.invars)), traced[0].jaxpr.outvars
  still = [path for path, var in zip(traced[1], outputs, strict=True) if id(var) in given]
  sentences = {
    "leaves these batch statistics as they began": still,
    "has Dropout that is off": list(dict.fromkeys(off)),
  }
  return [
    f"model {name} {what} in training: {', '.join(paths[:3])}{' and more' * (len(paths) > 3)}; if "
    f"that is not meant, let its __call__ have one of the arguments {TOLD_BY}, which tell it."
    for what, paths in sentences.items()
    if paths
  ]
