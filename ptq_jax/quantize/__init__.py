"""Post-training quantization of weights: methods behind one signature.

Every module in `METHODS` has `quantize_params(key, model, variables, images, *, levels, ...)` for
one model and `quantize_stacked(keys, model, variables, images, *, plans, ...)` for many.
`quantize_stacked` here shares these many among the devices of a process.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import ArrayLike, Int, Keys, Shaped, Variables
from ptq_jax.models import checks, parallel
from ptq_jax.models import units as model_units
from ptq_jax.models.units import Survey
from ptq_jax.quantize import adaround, brecq, capture, nearest, obc, walk
from ptq_jax.quantize.plan import Plan, Record, Records

_METHODS: dict[str, Any] = {"nearest": nearest, "adaround": adaround, "brecq": brecq, "obc": obc}

METHODS = MappingProxyType(_METHODS)
"""Modules by the name that configs and result tables use; `register` adds one."""


def register(name: str, method: Any) -> None:
  """Adds a quantizer of your own to `METHODS`, for `quantize.methods` of an audit, too.

  Most are a function of one layer's weights: give it to `nearest.each_layer`, which does the rest.

  Args:
    name: one word; results are shown under it. What an audit made under a name it does not make
      anew when your code changes.
    method: a module, or any object with functions `quantize_params` and `quantize_stacked`; see
      those of `nearest`.
  Raises:
    ValueError: for a name that is taken by another method or is no word, or a missing function.
  """
  if not name.isidentifier() or name == "none":
    raise ValueError(f"a method cannot be called {name!r}; use one word of letters and digits.")
  if _METHODS.get(name, method) is not method:
    raise ValueError(f"there is a method {name!r} already; use another name.")
  for function in ("quantize_params", "quantize_stacked"):
    if not callable(getattr(method, function, None)):
      raise ValueError(f"method {name!r} has no function {function}; see quantize.nearest.")
  _METHODS[name] = method


def quantize_stacked(
  method: str,
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  plans: Sequence[Plan],
  devices: Sequence[jax.Device] | None = None,
  **options,
) -> tuple[Variables, list[Record]]:
  """A method's `quantize_stacked` with the models shared among devices, which do not communicate.

  Args:
    method: a key of `METHODS`.
    keys, model, variables, images, plans: of the method's `quantize_stacked`.
    devices: None: all of this process. A single one gets the call as it is.
    **options: of the method's `quantize_stacked`.
  Returns:
    Variables [P, M, ...], on the first device, and one record per layer or unit with arrays [P, M].
  """
  shared = {name: options.pop(name) for name in walk.PER_MODEL if options.get(name) is not None}

  def quantize(keys, variables, images, shared):
    run = METHODS[method].quantize_stacked
    return run(keys, model, variables, images, plans=plans, **shared, **options)

  parts = parallel.on_devices(quantize, keys, variables, images, shared, devices=devices)
  if len(parts) == 1:
    return parts[0]
  variables, records = zip(*parts, strict=True)
  first = jax.tree.leaves(variables[0])[0].device
  together = jax.tree.map(
    lambda *leaves: jnp.concatenate(leaves, axis=1), *jax.device_put(variables, first)
  )
  return together, Records(
    Record(each[0].name, *jax.tree.map(_on_host, *(record[1:] for record in each)))
    for each in zip(*records, strict=True)
  )


def check_model(
  model: nn.Module,
  *,
  image_shape: Sequence[int],
  tokens: Int[np.ndarray, "1 L"] | None = None,
  plans: Sequence[Plan] | None = None,
  strict: bool = False,
  units: Sequence[str] | None = None,
) -> Survey:
  """What a model holds, once it is known that every method can quantize it; before any training.

  The model runs once, with random weights and on one random image.

  Args:
    model: any Linen model, see `models.call`.
    image_shape: of one image, [H, W, c], or of what else the model takes.
    tokens: one example of a model that takes token ids; None: a random image will do.
    plans: levels per layer, see `plan.make`; None: all layers are quantized.
    strict, units: as the methods take them.
  Raises:
    ValueError: what the methods would refuse, see `capture.check` and `models.units.chain`.
  """
  rng = np.random.default_rng(0)
  image = np.asarray(rng.normal(size=(1, *image_shape)), np.float32) if tokens is None else tokens
  variables = checks.random_variables(model, image)
  stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], variables)
  survey = capture.check(model, stacked, image[None], plans=plans, strict=strict)
  model_units.chain(model, variables, image, units=units)
  return survey


def _on_host(*leaves):
  """Leaves [P, m, ...] of some models each, on any devices, as one [P, M, ...]."""
  return np.concatenate([np.asarray(leaf) for leaf in leaves], axis=1)
