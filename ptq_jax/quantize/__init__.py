"""Post-training quantization of weights: methods behind one signature.

Every module in `METHODS` has `quantize_params(key, model, variables, images, *, levels, ...)` for
one model and `quantize_stacked(keys, model, variables, images, *, plans, ...)` for many.
`quantize_stacked` here shares these many among the devices of a process.
"""

from collections.abc import Sequence
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.base import ArrayLike, Keys, Shaped, Variables
from ptq_jax.models import parallel
from ptq_jax.quantize import adaround, brecq, nearest, obc
from ptq_jax.quantize.plan import Plan, Record

METHODS = MappingProxyType({"nearest": nearest, "adaround": adaround, "brecq": brecq, "obc": obc})
"""Modules by the name that configs and result tables use."""

PER_MODEL = ("labels", "batchnorm_images")
"""Options of methods that have a model axis."""


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
  shared = {name: options.pop(name) for name in PER_MODEL if options.get(name) is not None}

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
  return together, [
    Record(each[0].name, *jax.tree.map(_on_host, *(record[1:] for record in each)))
    for each in zip(*records, strict=True)
  ]


def _on_host(*leaves):
  """Leaves [P, m, ...] of some models each, on any devices, as one [P, M, ...]."""
  return np.concatenate([np.asarray(leaf) for leaf in leaves], axis=1)
