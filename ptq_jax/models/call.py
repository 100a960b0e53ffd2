"""How to call a Linen model in training and in evaluation mode, whatever it names the difference.

A model says with the arguments of its `__call__` how it wants to be told: `train`, `training` and
`is_training` are True while it trains; `deterministic` and `use_running_average` are False then.
A model with none of them is called with its images alone.
"""

import inspect

import flax.linen as nn
from flax import nnx

from ptq_jax.base import Array, ArrayLike, Key, PyTree, Shaped, Variables
from ptq_jax.models import conv

TRAINING = ("train", "training", "is_training")
"""Arguments that are True while a model trains."""

EVALUATION = ("deterministic", "use_running_average")
"""Arguments that are False while a model trains."""


def mode(model: nn.Module | nnx.Module, *, train: bool) -> dict[str, bool]:
  """The arguments that put a model into training or evaluation mode.

  >>> import flax.linen as nn
  >>> mode(nn.Dropout(0.5), train=True), mode(nn.Dense(3), train=True)
  ({'deterministic': False}, {})
  """
  accepted = inspect.signature(type(model).__call__).parameters
  return {name: train for name in TRAINING if name in accepted} | {
    name: not train for name in EVALUATION if name in accepted
  }


def apply(
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "n ..."],
  *,
  train: bool = False,
  **options,
) -> PyTree:
  """`model.apply` in evaluation mode, or with `train` in training mode, see also `conv.adopter`.

  Args:
    **options: of `flax.linen.Module.apply`, such as `mutable`.
  Returns:
    The logits, or logits and changed collections where `mutable` asks for them.
  """
  with nn.intercept_methods(conv.adopter()):
    return model.apply(variables, images, **mode(model, train=train), **options)


def init(model: nn.Module, key: Key, images: Shaped[Array, "n ..."]) -> Variables:
  """Fresh variables of a model, for images of this shape."""
  return model.init(key, images, **mode(model, train=False))


def rngs(key: Key) -> dict[str, Key]:
  """Randomness for a call in training mode: dropout's key, and "params", from which Flax takes
  keys of any other name (`make_rng`)."""
  return {"dropout": key, "params": key}


class Hashable:
  """A Linen module as a static argument of jit, even if its fields cannot be hashed."""

  def __init__(self, module: nn.Module):
    self.module = module

  def __hash__(self) -> int:
    return hash(type(self.module))

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Hashable):
      return NotImplemented
    if self.module is other.module:
      return True
    try:
      return bool(self.module == other.module)
    except ValueError:  # fields that are arrays have no single truth value
      return False
