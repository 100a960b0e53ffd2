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
from ptq_jax.base import Array, ArrayLike, Bool, Float, Shaped, Variables, is_traced
from ptq_jax.data import augment, inputs
from ptq_jax.models import call, tables
from ptq_jax.quantize import pack
from ptq_jax.report.records import Variant


@dataclasses.dataclass(frozen=True)
class Network:
  """One network of an audit in one variant; called with inputs it gives logits."""

  model: nn.Module
  variables: Variables
  members: Bool[np.ndarray, "E"]
  """Which examples of the pool it trained on."""
  mean: Float[np.ndarray, " c"]
  """Subtracted from pixels in [0, 1], or from features, before the model sees them."""
  std: Float[np.ndarray, " c"]
  """Then they are divided by this."""
  takes: jax.ShapeDtypeStruct
  """One input as the audit's data has it: uint8 images, float32 vectors or int32 token ids."""

  def __call__(self, images: Shaped[ArrayLike, "N ..."]) -> Float[Array, "N C"]:
    """Logits of inputs as the audit's data has them.

    Raises:
      ValueError: for inputs of another kind or shape, and for token ids that the model has no row
        for.
    """
    dtype = inputs.kept_dtype(images)
    if dtype != self.takes.dtype or images.shape[1:] != self.takes.shape:
      raise ValueError(
        f"this network takes {inputs.kind(self.takes.dtype)}, {self.takes.dtype} "
        f"{['N', *self.takes.shape]}, as its audit did; got {images.dtype} {list(images.shape)}."
      )
    if inputs.kind(dtype) == "tokens" and not is_traced(images):
      inputs.require_ids(np.asarray(images), "the tokens")
      tables.require_rows(self.model, self.variables, np.asarray(images, dtype))
    return self._run(self.variables, jnp.asarray(images, dtype))

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
  if not isinstance(workdir, str | pathlib.Path):
    raise ValueError(f"workdir is a {type(workdir).__name__}; give the folder of an audit.")
  root = pathlib.Path(workdir).expanduser()
  if not (root / "config.json").is_file():
    raise FileNotFoundError(f"{root} holds no audit: it has no config.json.")
  stored = storage.read_json(root / "config.json")
  if "images" not in stored:
    raise ValueError(f"{root} is of an older version; run its audit again, which makes it whole.")
  name = variant if isinstance(variant, str) else variant_name(variant)
  codes, position = _place(root, name, group, number)
  network = _model(model, stored)
  variables = trees.take(pack.unpack(pack.load(codes)), position)
  _require_fit(network, variables, _takes(stored))
  members = storage.load_arrays(root / "membership.npz")[codes.stem.partition("-")[0]][number]
  scale = (np.asarray(stored["images"][key], np.float32) for key in ("mean", "std"))
  return Network(network, variables, members, *scale, _takes(stored))


def _takes(stored) -> jax.ShapeDtypeStruct:
  """One input as the audit's data has it."""
  about = stored["images"]
  return jax.ShapeDtypeStruct(tuple(about["shape"]), np.dtype(about.get("dtype", "uint8")))


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
  sizes = {name: stored["images"].get(name) for name in ("num_classes", "num_tokens")}
  if model is None:
    options = stored["config"]["model"]
    if "given" in options:
      raise ValueError(f"this audit was given its model, {options['name']}; give it again, model=.")
    return models.make(**sizes, **options)
  return model if isinstance(model, nn.Module) else models.make(model, **sizes)


def _require_fit(model, variables, takes):
  """Raises ValueError if the variables are not such as this model has."""
  init = functools.partial(call.init, model)
  image = jax.ShapeDtypeStruct((1, *takes.shape), inputs.fed_dtype(takes.dtype))
  wanted = trees.flatten(jax.eval_shape(init, jax.random.key(0), image))
  stored = {path: leaf.shape for path, leaf in trees.flatten(variables).items()}
  own = {path: leaf.shape for path, leaf in wanted.items()}
  for path in sorted(stored.keys() | own.keys()):
    if stored.get(path) != own.get(path):
      raise ValueError(
        f"the model does not fit: {path} has shape {own.get(path)}, and {stored.get(path)} in the "
        "audit; give the model that was audited."
      )
