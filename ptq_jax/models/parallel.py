"""The model axis over the devices of a process: each device has its own models, none talk.

A device mesh has one axis, "models". Functions written for one model are vmapped and, given a mesh,
split over it with `jax.shard_map`; results do not depend on how many devices there are.
"""

import concurrent.futures
import os
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq_jax import trees
from ptq_jax.base import PyTree
from ptq_jax.models import flops

AXIS = "models"

ALONE_FLOP = 3e8
"""Of a forward pass of a batch; on a CPU, models with more run one after the other."""

ACCELERATOR_ALONE_FLOP = 2e10
"""The same on an accelerator: between ResNet-20 of width 16 and ResNet-8 of width 64, batch 128."""

MOST_TOGETHER = 8
"""Models of a program on an accelerator: eight times 16 channels fill the 128 lanes of a TPU, and a
program with a convolution per model takes longer to compile with every model."""


def mesh_for(num_models: int, *, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
  """A mesh of all local devices, but no more than there are models; None for a single one.

  Where the devices do not divide the models, `place` repeats the last model; drop what comes out
  beyond `num_models`.

  Args:
    num_models: length of the model axis.
    devices: to choose from; None: all of this process.
  """
  devices = jax.local_devices() if devices is None else devices
  count = min(len(devices), num_models)
  if count == 1:
    return None
  types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((count,), (AXIS,), axis_types=types, devices=devices[:count])


def rounds(num_models: int, *, together: int, mesh: Mesh | None) -> list[slice]:
  """Which models go to the devices at once, `together` to each; the last round may be smaller.

  >>> rounds(5, together=2, mesh=None)
  [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
  """
  size = together * (mesh.size if mesh else 1)
  return [slice(m, min(m + size, num_models)) for m in range(0, num_models, size)]


def device_memory_bytes() -> int:
  """Memory of one local device; half of the machine's where the backend does not say (CPU)."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  return host_memory_bytes() // 2


def host_memory_bytes() -> int:
  """Memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether less work at once may succeed."""
  return "RESOURCE_EXHAUSTED" in str(error)


def together(
  model: nn.Module,
  *,
  num_models: int,
  batch_shape: Sequence[int],
  dtype: np.dtype | str = "float32",
  devices: int = 1,
) -> int:
  """How many of the models should share a program on a device: all, but big ones none.

  A big model alone has enough work for the whole device: it compiles once, holds one model's
  activations, and nothing is gained by company. Measured on a CPU, where ResNet-8 trains 1.1 times
  as fast so. On accelerators read from compiled programs (`bench compile`, BUILD_NOTES.md): for an
  H100 models together move as many bytes each as one alone, whatever their size, but in fewer
  kernels, 15 instead of 68 for a small network whose kernels are shorter than their launch; on a
  TPU small models move half as much together, big ones a quarter more.

  Args:
    model: any Linen model.
    num_models: M.
    batch_shape: of the images of one model, [n, H, W, c], or of what else it takes.
    dtype: of that: integers for token ids.
    devices: that share the models.
  Returns:
    Models of one program on one device; on an accelerator at most `MOST_TOGETHER`, evenly cut.
  """
  share, on_cpu = -(-num_models // devices), jax.default_backend() == "cpu"
  if num_models == 1 or (on_cpu and devices > 1):
    return share
  try:
    count, *shape = batch_shape
    flop = count * flops.forward(model, image_shape=tuple(shape), dtype=dtype)
  except ValueError:  # layers that cannot be counted
    flop = 0
  if flop >= (ALONE_FLOP if on_cpu else ACCELERATOR_ALONE_FLOP):
    return 1
  return share if on_cpu else -(-share // -(-share // MOST_TOGETHER))


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


def place(tree: PyTree, mesh: Mesh | None, *, shared: bool = False, at_least: int = 0) -> PyTree:
  """Puts stacked models on the mesh, or with `shared` a copy of the tree on each device.

  Args:
    tree: stacked models, or anything to be shared.
    mesh: see `mesh_for`.
    shared: whether every device gets all of it.
    at_least: of so many models; the last one is repeated as often as needed for that, and for a
      multiple of the number of devices.
  """
  count = mesh.size if mesh else 1
  if not shared:
    num_models = trees.length(tree)
    missing = max(at_least, -(-num_models // count) * count) - num_models
    if missing:
      tree = jax.tree.map(lambda leaf: _repeat_last(leaf, missing), tree)
  if mesh is None:
    return jax.device_put(tree, jax.local_devices()[0])
  spec = PartitionSpec() if shared else PartitionSpec(AXIS)
  return jax.device_put(tree, NamedSharding(mesh, spec))


def _repeat_last(leaf, times):
  """The leaf with its last row repeated; on the host where it lies there."""
  numpy = np if isinstance(leaf, np.ndarray) else jnp
  return numpy.concatenate([leaf, *[leaf[-1:]] * times])
