"""The model axis over the devices of a process: each device has its own models, none talk.

A device mesh has one axis, "models". Functions written for one model are vmapped and, given a mesh,
split over it with `jax.shard_map`; results do not depend on how many devices there are.
"""

import concurrent.futures
import os
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq_jax import trees
from ptq_jax.base import PyTree
from ptq_jax.models import flops

AXIS = "models"

ALONE_FLOP = 3e8
"""Of a forward pass; on a CPU, models with more run one after the other."""


def mesh_for(num_models: int, *, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
  """A mesh of as many local devices as divide the number of models; None for a single one.

  Args:
    num_models: length of the model axis.
    devices: to choose from; None: all of this process.
  """
  devices = jax.local_devices() if devices is None else devices
  count = max(n for n in range(1, len(devices) + 1) if num_models % n == 0)
  if count == 1:
    return None
  types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((count,), (AXIS,), axis_types=types, devices=devices[:count])


def device_memory_bytes() -> int:
  """Memory of one local device; half of the machine's where the backend does not say (CPU)."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def shares(
  model: nn.Module, mesh: Mesh | None, *, num_models: int, batch_shape: Sequence[int]
) -> list[slice]:
  """Which of the stacked models should run at once, as slices: all, but on a CPU one by one.

  There, models with enough work for all cores gain nothing from company; alone they compile sooner
  and leave more to the cache (ResNet-8 trains 1.1 times as fast). Small ones share the overhead.

  Args:
    model: any Linen model.
    mesh: devices that share the models, if any.
    num_models: M.
    batch_shape: of the images of one model, [n, H, W, c].
  """
  together = [slice(0, num_models)]
  if jax.default_backend() != "cpu" or mesh is not None or num_models == 1:
    return together
  try:
    flop = batch_shape[0] * flops.forward(model, image_shape=tuple(batch_shape[1:]))
  except ValueError:  # layers that cannot be counted
    return together
  return together if flop < ALONE_FLOP else [slice(m, m + 1) for m in range(num_models)]


def over_models(
  function: Callable[..., PyTree], *, in_axes: Sequence[int | None], mesh: Mesh | None = None
) -> Callable[..., PyTree]:
  """`jax.vmap(function, in_axes)`, and each device of the mesh does its share of the models.

  Args:
    function: of one model.
    in_axes: 0 for arguments with a model axis, None for those that all models share.
    mesh: see `mesh_for`; None stays on one device.
  """
  return sharded(jax.vmap(function, in_axes=tuple(in_axes)), in_axes=in_axes, mesh=mesh)


def sharded(
  function: Callable[..., PyTree], *, in_axes: Sequence[int | None], mesh: Mesh | None = None
) -> Callable[..., PyTree]:
  """A function of stacked models; each device of the mesh calls it with its share of them.

  Args:
    function: of stacked models, to results stacked likewise.
    in_axes, mesh: as in `over_models`.
  """
  if mesh is None:
    return function
  specs = tuple(PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in in_axes)
  return jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
  )


def on_devices(
  function: Callable[..., PyTree], *stacked: PyTree, devices: Sequence[jax.Device] | None = None
) -> list[PyTree]:
  """Calls `function` once per device, with that device's share of the models, side by side.

  For work that Python steers (loops that stop early, a program per layer shape), which does not fit
  into one program over a mesh. Every device has a thread of its own; results stay in their order.

  Args:
    function: of stacked models; what it computes runs on the device where they lie.
    *stacked: trees with leading axis M, on the host or any device.
    devices: to share the models; None: all of this process.
  Returns:
    What each call returned, in the order of the models: one item per device that got any.
  """
  devices = jax.local_devices() if devices is None else devices
  num_models = trees.length(stacked)
  edges = np.linspace(0, num_models, min(len(devices), num_models) + 1).round().astype(int)

  def call(device, first, last):
    part = jax.tree.map(lambda leaf: leaf[first:last], stacked)
    with jax.default_device(device):
      return function(*jax.device_put(part, device))

  jobs = list(zip(devices, edges[:-1], edges[1:], strict=False))
  if len(jobs) == 1:
    return [call(*jobs[0])]
  with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
    return list(threads.map(lambda job: call(*job), jobs))


def place(tree: PyTree, mesh: Mesh | None, *, shared: bool = False) -> PyTree:
  """Puts stacked models on the mesh, or with `shared` a copy of the tree on each device."""
  if mesh is None:
    return jax.device_put(tree, jax.local_devices()[0])
  spec = PartitionSpec() if shared else PartitionSpec(AXIS)
  return jax.device_put(tree, NamedSharding(mesh, spec))
