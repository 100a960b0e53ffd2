"""Models of `flax.nnx` as Linen modules, so that everything here works on them, too.

`adapt` wraps an nnx model, or a factory of one. Its `nnx.Param`s are the collection "params" and
its `nnx.BatchStat`s "batch_stats", by the path of attributes ("blocks/0/conv"). Linear, Conv,
ConvTranspose, LinearGeneral, Einsum, Embed, BatchNorm and Dropout run as their Linen counterparts
on these variables, which is how layers are found and observed; everything else runs as it is, and
so do these within `nnx.scan`, `nnx.vmap` and other transforms, or with options that Linen lacks.
In training, streams of random numbers start from the step's key.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import tracers

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
      _filled(state, lambda path, _, name=name: flat[trees.join([name, *path])])
      for name, state in zip(COLLECTIONS, states, strict=True)
    ]
    rest = _filled(rest, lambda _, variable: variable[...])  # may be changed where it was made only
    model = nnx.merge(graph, *states, rest)
    model.train() if train else model.eval()
    parts = [(tuple(map(str, path)), part) for path, part in nnx.iter_graph(model)]
    streams = [part for _, part in parts if isinstance(part, nnx.RngStream)]
    if streams and train and self.has_rng("dropout"):
      keys = jax.random.split(self.make_rng("dropout"), len(streams))
      for stream, key in zip(streams, keys, strict=True):
        stream.key[...] = key
    before = [(path, part, part[...]) for path, part in parts if isinstance(part, nnx.Variable)]
    for path, part in parts:
      _run_as_linen(part, self.scope, path)
    outputs = model(images, **call.mode(model, train=train))
    for path, variable, value in before:
      if variable[...] is not value:
        self._keep(path, variable, train)
    return outputs

  def _keep(self, path, variable, train):
    """Takes over what the model itself has changed.

    Raises:
      ValueError: for weights; for batch statistics in evaluation mode; in training for all but
        these and random numbers.
    """
    *owners, name = path
    if isinstance(variable, nnx.Param):
      raise ValueError(
        f"the model itself changes its weights {trees.join(path)!r} when it is called, as "
        "nnx.SpectralNorm does; such a model is not supported."
      )
    if isinstance(variable, nnx.BatchStat):
      if not self.is_mutable_collection("batch_stats"):
        raise ValueError(
          f"the model changes its batch statistics {trees.join(path)!r} in evaluation mode, too; "
          f"let its __call__ have one of the arguments {', '.join(call.TRAINING)}, which tell it."
        )
      _scope(self.scope, owners).put_variable("batch_stats", name, variable[...])
    elif train and not isinstance(variable, nnx.RngState | nnx.Intermediate):
      raise ValueError(
        f"the model itself changes {trees.join(path)!r} in training, which would be lost, for it "
        f"is of nnx's kind {type(variable).__name__}; make it an nnx.BatchStat."
      )


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


def _filled(state, value_of):
  """A state of new variables with the values `value_of(path, variable)`."""
  flat = nnx.to_flat_state(state)
  return nnx.from_flat_state([(path, v.replace(value_of(path, v))) for path, v in flat])


def _scope(scope, names):
  for name in names:
    scope = scope.push(name, reuse=True)
  return scope


def _run_as_linen(module, scope, path) -> None:
  """Makes a module of a kind that Linen has run as that on the variables at its path."""
  kind = LINEN.get(type(module))
  if kind is not None and kind[1].fits(module):
    subclass, counterpart = kind
    changes = {
      "__class__": subclass,
      "as_linen": functools.partial(counterpart, scope=_scope(scope, path)),
      "trace": tracers.current_trace(),
    }
    for name, value in changes.items():
      object.__setattr__(module, name, value)


def _observed(kind):
  """A subclass that runs as its Linen counterpart, but within a transform as it is."""

  def run(self, inputs, *args, out_sharding=None, **kwargs):
    del out_sharding  # of no use within one device
    if tracers.current_trace() != self.trace:
      return kind.__call__(self, inputs, *args, **kwargs)
    return self.as_linen(self, inputs, *args, **kwargs)

  return type(kind.__name__, (kind,), {"__call__": run})


class _Counterpart(NamedTuple):
  """How a kind of nnx module runs in Linen."""

  run: Callable[..., Any]
  """Of the module, its inputs, Linen's options and what else it is called with."""
  options: tuple[str, ...]
  """Attributes of the module that Linen gets under the same name."""

  def __call__(self, module, inputs, *args, scope, **kwargs):
    options = {name: getattr(module, name) for name in self.options}
    return self.run(module, inputs, options | {"parent": scope}, *args, **kwargs)

  def fits(self, module) -> bool:
    """Whether whatever else the module could be made with is as usual."""
    parameters = inspect.signature(type(module).__init__).parameters
    return all(
      getattr(module, name, given.default) == given.default
      for name, given in parameters.items()
      if given.default is not given.empty and name not in {*self.options, *HANDLED}
    )


HANDLED = ("use_running_average", "deterministic", "rngs", "batch_axis", "bias_shape")
"""Options of nnx modules that a `_Counterpart` looks at by itself."""


def _linear(module, inputs, options):
  return nn.Dense(module.out_features, **options)(inputs)


def _conv(module, inputs, options):
  return nn.Conv(module.out_features, module.kernel_size, **options)(inputs)


def _conv_transpose(module, inputs, options):
  return nn.ConvTranspose(module.out_features, module.kernel_size, **options)(inputs)


def _linear_general(module, inputs, options):
  batch = tuple(module.batch_axis)
  return nn.DenseGeneral(module.out_features, batch_dims=batch, **options)(inputs)


def _einsum(module, inputs, options, einsum_str=None):
  equation = module.einsum_str if einsum_str is None else einsum_str
  return nn.Einsum(
    module.kernel_shape, equation, use_bias=module.bias_shape is not None, **options
  )(inputs)


def _embed(module, inputs, options):
  return nn.Embed(module.num_embeddings, module.features, **options)(inputs)


def _batchnorm(module, x, options, use_running_average=None, mask=None):
  if use_running_average is None:
    use_running_average = module.use_running_average
  return nn.BatchNorm(use_running_average, **options)(x, mask=mask)


def _dropout(module, inputs, options, deterministic=None, rngs=None):
  del rngs
  if deterministic is None:
    deterministic = module.deterministic
  return nn.Dropout(module.rate, deterministic=deterministic, **options)(inputs)


_TYPES = ("dtype", "param_dtype")
_LAYER = ("use_bias", "precision", *_TYPES)
_CONV = (*_LAYER, "strides", "padding", "kernel_dilation", "input_dilation",
         "feature_group_count", "mask", "conv_general_dilated")  # fmt: skip

LINEN = {
  kind: (_observed(kind), _Counterpart(run, options))
  for kind, run, options in (
    (nnx.Linear, _linear, (*_LAYER, "dot_general")),
    (nnx.Conv, _conv, _CONV),
    (
      nnx.ConvTranspose,
      _conv_transpose,
      (*_LAYER, "strides", "padding", "kernel_dilation", "mask", "transpose_kernel"),
    ),
    (nnx.LinearGeneral, _linear_general, (*_LAYER, "axis")),
    (nnx.Einsum, _einsum, ("precision", *_TYPES)),
    (nnx.Embed, _embed, _TYPES),
    (
      nnx.BatchNorm,
      _batchnorm,
      (*_TYPES, "axis", "momentum", "epsilon", "use_bias", "use_scale", "use_fast_variance"),
    ),
    (nnx.Dropout, _dropout, ("broadcast_dims", "rng_collection")),
  )
}
"""By kind of nnx module, the class that takes its place and how it runs in Linen."""
