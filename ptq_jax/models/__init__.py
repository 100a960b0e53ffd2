"""Classifiers in Flax Linen: logits = model.apply(variables, images), or vectors, or token ids."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from ptq_jax.models import convnet, from_nnx, mlp, resnet, transformer, vit, wide_resnet

ZOO = {
  "convnet": convnet.ConvNet,
  "mlp": mlp.mlp,
  "resnet8": resnet.resnet8,
  "resnet18": resnet.resnet18,
  "resnet20": resnet.resnet20,
  "resnet34": resnet.resnet34,
  "resnet50": resnet.resnet50,
  "transformer": transformer.Transformer,
  "vit": vit.ViT,
  "wide_resnet": wide_resnet.WideResNet,
  "wide_resnet28_2": wide_resnet.wide_resnet28_2,
  "wide_resnet28_10": wide_resnet.wide_resnet28_10,
}


def make(
  name: str | Callable, *, num_classes: int, num_tokens: int | None = None, **options
) -> nn.Module:
  """A model of the zoo by its name, or your own as "package.module:factory".

  Args:
    name: a key of `ZOO`; or a function that takes `num_classes` and `options`, and `rngs` if it
      makes a `flax.nnx.Module`; or where to find one.
    num_classes: C.
    num_tokens: of data of token ids, one more than the largest: the option `vocabulary` of a model
      that has it and is not given it.
    **options: of the model, such as `width`; `dtype` may be "auto", see `compute_dtype`.
  Raises:
    ValueError: for an unknown name, a factory that cannot be imported, an unknown option, or one of
      the zoo that is too small.
  """
  text = name if isinstance(name, str) else ""
  factory = name if callable(name) else _import(name) if ":" in text else ZOO.get(text)
  if isinstance(factory, nnx.Module):
    raise ValueError(
      f"the model is a {type(factory).__name__} that is made already; give its class, or a "
      "function of num_classes and rngs that makes one."
    )
  if not callable(factory):
    raise ValueError(
      f"model.name is {name!r}; use one of {sorted(ZOO)} or your own as 'package.module:factory'."
    )
  of_class = isinstance(factory, type) and issubclass(factory, nnx.Module)
  accepted = inspect.signature(factory.__init__ if of_class else factory).parameters
  unknown = sorted(set(options) - set(accepted))
  if unknown and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
    known = sorted(set(accepted) - {"num_classes", "parent", "name"})
    raise ValueError(f"model {name!r} has no option {unknown[0]!r}; it has {known}.")
  if "vocabulary" in accepted and "vocabulary" not in options:
    if num_tokens is not None:
      options["vocabulary"] = num_tokens
    elif accepted["vocabulary"].default is inspect.Parameter.empty:
      raise ValueError(f"model {name!r} takes token ids (it has a vocabulary); these are none.")
  for option, value in options.items():
    least = 0 if option == "depth" else 1  # without blocks a transformer is a bag of tokens
    if text in ZOO and type(value) is int and value < least:
      raise ValueError(f"model.{option} is {value}; it must be at least {least}.")
  if "dtype" in options:
    options["dtype"] = compute_dtype(options["dtype"])
  if "rngs" in accepted:  # flax.nnx
    return from_nnx.adapt(factory, num_classes=num_classes, **options)
  try:
    model = factory(num_classes=num_classes, **options)
  except Exception as error:  # whatever a factory of the user's raises
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(
      f"model {name!r} cannot be made with num_classes={num_classes}: {reason}"
    ) from error
  if not isinstance(model, nn.Module):
    raise ValueError(
      f"{name!r} made a {type(model).__name__}, not a flax.linen.Module; a factory of a "
      "flax.nnx.Module takes rngs."
    )
  return model


def compute_dtype(dtype: Any) -> Any:
  """The dtype itself; for "auto" bfloat16 on an accelerator and float32 on a CPU, as strings.

  Only activations and convolutions take it: parameters, statistics and the loss stay float32.
  """
  if isinstance(dtype, str) and dtype == "auto":
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return dtype


def _import(name):
  module, _, attribute = name.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"model.name is {name!r}, which cannot be imported: {error}.") from error
