"""Networks of a finished audit, to be run."""

import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import models, storage, trees
from ptq_jax.audit.layout import is_sound, variant_name
from ptq_jax.base import Array, ArrayLike, Bool, Float, UInt8, Variables
from ptq_jax.data import augment
from ptq_jax.models import call
from ptq_jax.quantize import pack
from ptq_jax.report.records import Variant


@dataclasses.dataclass(frozen=True)
class Network:
  """One network of an audit in one variant; called with images it gives logits."""

  model: nn.Module
  variables: Variables
  members: Bool[np.ndarray, "E"]
  """Which examples of the pool it trained on."""
  mean: Float[np.ndarray, " c"]
  """Subtracted from images in [0, 1] before the model sees them."""
  std: Float[np.ndarray, " c"]
  """Then they are divided by this."""

  def __call__(self, images: UInt8[ArrayLike, "N H W c"]) -> Float[Array, "N C"]:
    """Logits of images as the audit's data has them."""
    return self._run(self.variables, jnp.asarray(images))

  @functools.cached_property
  def _run(self):
    def run(variables, images):
      scaled = augment.normalise(images, jnp.asarray(self.mean), jnp.asarray(self.std))
      return call.apply(self.model, variables, scaled)

    return jax.jit(run)


def load_quantized(
  workdir: pathlib.Path | str,
  variant: Variant | str,
  *,
  number: int = 0,
  group: str | None = None,
  model: Any = None,
) -> Network:
  """A quantized network of a finished audit.

  Args:
    workdir: of the audit.
    variant: as its folders are called, "obc-3-3" (method, levels, levels of the last layer).
    number: of the model, from 0.
    group: "shadows" or "targets"; None: the dedicated targets if there are some.
    model: what `audit.run` was given; None: the model that the config names.
  Raises:
    FileNotFoundError, ValueError: one sentence for a network that is not there, that had no finite
      scores in full precision, or that does not fit the model.
    storage.CorruptFileError: if its codes are damaged.
  """
  root = pathlib.Path(workdir)
  stored = storage.read_json(root / "config.json")
  if "images" not in stored:
    raise ValueError(f"{root} is of an older version; run its audit again, which makes it whole.")
  name = variant if isinstance(variant, str) else variant_name(variant)
  codes, position = _place(root, name, group, number)
  network = _model(model, stored)
  variables = trees.take(pack.unpack(pack.load(codes)), position)
  _require_fit(network, variables, stored["images"]["shape"])
  members = storage.load_arrays(root / "membership.npz")[codes.stem.partition("-")[0]][number]
  scale = (np.asarray(stored["images"][key], np.float32) for key in ("mean", "std"))
  return Network(network, variables, members, *scale)


def _place(root, name, group, number) -> tuple[pathlib.Path, int]:
  """The file of codes that holds a network, checked, and its place in it."""
  folder = root / "quantized" / name
  if not folder.is_dir():
    there = sorted(path.name for path in root.glob("quantized/*"))
    raise FileNotFoundError(f"{root} has no variant {name!r}; it has {', '.join(there) or 'none'}.")
  group = group or ("targets" if any(folder.glob("targets-*.npz")) else "shadows")
  for path in folder.glob(f"{group}-*.npz"):
    first, last = map(int, path.stem.split("-")[1:])
    if first <= number < last:
      scores = storage.load_arrays(root / "scores" / name / path.name)
      if storage.digest(path) != str(scores["codes"]):
        raise storage.CorruptFileError(f"{path} is damaged; run the audit again to make it anew.")
      full = storage.load_arrays(root / "scores" / "full_precision" / path.name)
      sound = is_sound(full["scores"])
      if not sound[number - first]:
        raise ValueError(f"{group} {number} was not quantized: its scores are not finite.")
      return path, int(sound[: number - first].sum())
  raise ValueError(f"{folder} has no network {number} among its {group}.")


def _model(model, stored):
  """The model that was given, or made from the config."""
  count = stored["images"]["num_classes"]
  if model is None:
    options = stored["config"]["model"]
    if "given" in options:
      raise ValueError(f"this audit was given its model, {options['name']}; give it again, model=.")
    return models.make(num_classes=count, **options)
  return model if isinstance(model, nn.Module) else models.make(model, num_classes=count)


def _require_fit(model, variables, image_shape):
  """Raises ValueError if the variables are not such as this model has."""
  init = functools.partial(call.init, model)
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  wanted = trees.flatten(jax.eval_shape(init, jax.random.key(0), image))
  stored = {path: leaf.shape for path, leaf in trees.flatten(variables).items()}
  own = {path: leaf.shape for path, leaf in wanted.items()}
  for path in sorted(stored.keys() | own.keys()):
    if stored.get(path) != own.get(path):
      raise ValueError(
        f"the model does not fit: {path} has shape {own.get(path)}, and {stored.get(path)} in the "
        "audit; give the model that was audited."
      )
