"""Models of `flax.nnx` as Linen modules, so that everything here works on them, too.

`adapt` wraps an nnx model, or a factory of one. Its `nnx.Param`s are the collection "params" and
its `nnx.BatchStat`s "batch_stats", by the path of attributes ("blocks/0/conv"). Linear, Conv,
LinearGeneral, Embed, BatchNorm and Dropout run as their Linen counterparts on these variables,
which is how layers are found and observed; everything else runs as it is.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from ptq_jax import trees
from ptq_jax.base import PyTree, Variables
from ptq_jax.models import call

Model = nn.Module | nnx.Module
"""What the quantizers take."""

COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
"""Linen's name of each kind of nnx variable that belongs to a model."""


class FromNNX(nn.Module):
  """An nnx model as a Linen module, see `adapt`."""

  make: Callable[[jax.Array], nnx.Module]
  """An nnx model from a key; hashable."""

  def __call__(self, images, train: bool = False):
    """What the nnx model gives, in training or evaluation mode."""
    if self.is_initializing():
      graph, *states, rest = _split(self.make(self.make_rng("params")))
      for collection, state in zip(COLLECTIONS, states, strict=True):
        for path, variable in nnx.to_flat_state(state):
          *owners, name = map(str, path)
          _scope(self.scope, owners).put_variable(collection, name, variable[...])
    else:
      graph, *states, rest = _split(self.make(jax.random.key(0)))
    flat = trees.flatten(self.variables)
    states = [
      _filled(state, {p: flat[trees.join([name, *trees.names(p)])] for p in _paths(state)})
      for name, state in zip(COLLECTIONS, states, strict=True)
    ]
    model = nnx.merge(graph, *states, rest)
    model.train() if train else model.eval()
    for path, module in list(nnx.iter_graph(model)):
      kind = LINEN.get(type(module))
      if kind is not None:
        subclass, counterpart = kind
        object.__setattr__(module, "__class__", subclass)
        scope = _scope(self.scope, [str(part) for part in path])
        object.__setattr__(module, "as_linen", functools.partial(counterpart, scope=scope))
    return model(images, **call.mode(model, train=train))


def adapt(model: nnx.Module | Callable[..., nnx.Module], **options: Any) -> FromNNX:
  """A Linen module that runs an nnx model.

  Args:
    model: the model itself, or a hashable factory that takes `rngs`; only the latter can be
      initialised anew.
    **options: of the factory, hashable.
  """
  if isinstance(model, nnx.Module):
    return FromNNX(_Given(model))
  return FromNNX(_Factory(model, tuple(sorted(options.items()))))


def variables_of(state: Mapping) -> dict[str, PyTree]:
  """Linen's variables of an nnx state."""
  found = {name: {} for name in COLLECTIONS}
  for path, variable in nnx.to_flat_state(state):
    for name, kind in COLLECTIONS.items():
      if isinstance(variable, kind):
        found[name][trees.join(path)] = jnp.asarray(variable[...])
  return {name: trees.unflatten(leaves) for name, leaves in found.items() if leaves}


def state_with(state: Mapping, variables: Variables) -> Any:
  """The nnx state with the values of Linen's variables."""
  flat = trees.flatten(variables)
  changed = []
  for path, variable in nnx.to_flat_state(state):
    for name, kind in COLLECTIONS.items():
      if isinstance(variable, kind):
        variable = variable.replace(flat[trees.join([name, *path])])
    changed.append((path, variable))
  return nnx.from_flat_state(changed)


class _Given:
  """Gives one nnx model, whatever the key; equal to itself alone."""

  def __init__(self, model):
    self.graph, self.state = nnx.split(model)

  def __call__(self, key):
    del key
    return nnx.merge(self.graph, self.state)


class _Factory(NamedTuple):
  """Makes an nnx model from a key."""

  factory: Callable[..., nnx.Module]
  options: tuple[tuple[str, Any], ...]

  def __call__(self, key):
    return self.factory(**dict(self.options), rngs=nnx.Rngs(key))


def _split(model):
  return nnx.split(model, *COLLECTIONS.values(), ...)


def _paths(state) -> list[str]:
  return [trees.join(path) for path, _ in nnx.to_flat_state(state)]


def _filled(state, values):
  """A state with other values, by path."""
  flat = nnx.to_flat_state(state)
  return nnx.from_flat_state([(path, v.replace(values[trees.join(path)])) for path, v in flat])


def _scope(scope, names):
  for name in names:
    scope = scope.push(name, reuse=True)
  return scope


def _observed(kind):
  """A subclass that runs as its Linen counterpart."""

  def run(self, inputs, *args, out_sharding=None, **kwargs):
    del out_sharding  # of no use within one device
    return self.as_linen(self, inputs, *args, **kwargs)

  return type(kind.__name__, (kind,), {"__call__": run})


def _options(module, *names) -> dict[str, Any]:
  return {name: getattr(module, name) for name in names}


def _linear(module, inputs, *, scope):
  shared = _options(module, "dtype", "param_dtype", "precision", "dot_general")
  return nn.Dense(module.out_features, module.use_bias, **shared, parent=scope)(inputs)


def _conv(module, inputs, *, scope):
  shared = _options(
    module, "kernel_size", "strides", "padding", "input_dilation", "kernel_dilation",
    "feature_group_count", "use_bias", "mask", "dtype", "param_dtype", "precision",
    "conv_general_dilated",
  )  # fmt: skip
  return nn.Conv(module.out_features, **shared, parent=scope)(inputs)


def _linear_general(module, inputs, *, scope):
  shared = _options(module, "axis", "use_bias", "dtype", "param_dtype", "precision")
  batch = tuple(module.batch_axis)
  return nn.DenseGeneral(module.out_features, batch_dims=batch, **shared, parent=scope)(inputs)


def _embed(module, inputs, *, scope):
  shared = _options(module, "num_embeddings", "features", "dtype", "param_dtype")
  return nn.Embed(**shared, parent=scope)(inputs)


def _batchnorm(module, x, *, scope, use_running_average=None, mask=None):
  if use_running_average is None:
    use_running_average = module.use_running_average
  shared = _options(
    module, "axis", "momentum", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale"
  )
  return nn.BatchNorm(use_running_average, **shared, parent=scope)(x, mask=mask)


def _dropout(module, inputs, *, scope, deterministic=None, rngs=None):
  del rngs
  if deterministic is None:
    deterministic = module.deterministic
  return nn.Dropout(module.rate, module.broadcast_dims, deterministic, parent=scope)(inputs)


LINEN = {
  kind: (_observed(kind), counterpart)
  for kind, counterpart in (
    (nnx.Linear, _linear),
    (nnx.Conv, _conv),
    (nnx.LinearGeneral, _linear_general),
    (nnx.Embed, _embed),
    (nnx.BatchNorm, _batchnorm),
    (nnx.Dropout, _dropout),
  )
}
"""By kind of nnx module, the class that takes its place and how it runs in Linen."""
