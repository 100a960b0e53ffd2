"""Quantization of all models of an audit with every method at every precision.

Each model is calibrated on its own members. Writes the scores of each variant (accuracy and what
happened to each unit with them) and the integer codes. A run that was stopped goes on with the
first method of the first chunk that is not complete.
"""

import contextlib
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import storage, trees
from ptq_jax.audit import training, work
from ptq_jax.audit.events import Stage
from ptq_jax.audit.layout import FULL_PRECISION, Audit, is_sound, model_digest
from ptq_jax.audit.work import Chunk
from ptq_jax.data import augment
from ptq_jax.models import units
from ptq_jax.quantize import METHODS, brecq, capture, pack, quantize_stacked
from ptq_jax.report.records import Variant

QUANTIZING = 2 / 3
"""Of the work for a variant, for the estimate of the time left; the rest is scoring."""


def quantize(audit: Audit) -> list[str]:
  """Quantizes what is missing and nobody else is at; returns who is at the rest, in words."""
  chunks, variants, busy = audit.own_chunks(), audit.variants(), []
  pending = {
    chunk: [variant for variant in variants if audit.pending(variant, chunk, audit.say)]
    for chunk in chunks
  }
  total = sum(len(chunk) for chunk in chunks) * len(variants)
  left = sum(len(chunk) * len(missing) for chunk, missing in pending.items())
  if not left:
    return []
  stage = audit.stage("quantize", total, done=total - left)
  with audit.timed("quantize"), said_before(), stage:
    for chunk in (chunk for chunk in chunks if pending[chunk]):
      try:
        with audit.locked(chunk):
          missing = [variant for variant in variants if audit.pending(variant, chunk)]
          stage.skip(len(chunk) * (len(pending[chunk]) - len(missing)))
          if missing:
            quantize_chunk(audit, chunk, missing, stage)
      except work.Busy as owner:
        busy.append(f"{chunk.name}: {owner}")
  return busy


def quantize_chunk(audit: Audit, chunk: Chunk, variants: list[Variant], stage: Stage) -> None:
  """Quantizes the models of one chunk, method by method, and writes their scores and codes.

  Raises:
    FileNotFoundError: if they are not trained.
    ValueError: if none of them is sound.
  """
  path = audit.scores_path(FULL_PRECISION, chunk)
  if not path.exists():
    raise FileNotFoundError(f"{path} is missing; run bash launch/run train_shadows first.")
  variables = training.train_chunk(audit, chunk, audit.stage("train_shadows", 0))
  arrays = storage.load_arrays(path)
  if str(arrays["model"]) != model_digest(variables):  # they had to be trained again
    audit.save_scores({FULL_PRECISION: pack.pack(variables, {})}, chunk, variables)
    arrays = storage.load_arrays(path)
  sound = is_sound(arrays["scores"])
  if not sound.any():
    raise ValueError(f"no model of {chunk.name} has finite weights; train with a smaller rate.")
  used = trees.take(variables, sound)
  ids, images = calibration(audit, chunk)
  images = trees.take(images, np.flatnonzero(sound))
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    group_key(audit, chunk, "quantize"), chunk.ids[sound]
  )
  for method in dict.fromkeys(variant.method for variant in variants):
    mine = [variant for variant in variants if variant.method == method]
    options = audit.method_options(method)
    size = options.pop("calibration_size")
    if options.get("batchnorm") == "all":
      options["batchnorm_images"] = drawn_images(audit, chunk, "batchnorm", "all", size)[1][sound]
    portions = Portions(
      stage, QUANTIZING * len(chunk) * len(mine), int(sound.sum()), f"{chunk.name}, {method}"
    )
    if "progress" in inspect.signature(METHODS[method].quantize_stacked).parameters:
      options["progress"] = portions
    quantized, info = quantize_stacked(
      method, keys, audit.model, used, images[:, :size], plans=audit.plans(mine), **options
    )
    portions.end()
    packed, more = {}, {}
    for index, variant in enumerate(mine):
      grids = {
        path: trees.take(grid, index) for record in info for path, grid in record.grids.items()
      }
      packed[variant] = pack.pack(trees.take(quantized, index), grids)
      with storage.replacing(audit.quantized_path(variant, chunk)) as temporary:
        pack.save(temporary, packed[variant])
      more[variant] = {"calibration": ids[:, :size], **unit_arrays(info, index)}
    for alike in same_body(audit, packed):
      audit.save_scores(alike, chunk, variables, sound=sound, more=more)
      stage.advance((1 - QUANTIZING) * len(chunk) * len(alike), f"{chunk.name}, {method}")


@contextlib.contextmanager
def said_before() -> Iterator[None]:
  """Inside, what a method warns about is not shown if `preflight` has told it in a sentence."""
  with warnings.catch_warnings():
    for sentence in (capture.KEPT, brecq.LAYER_BY_LAYER):
      warnings.filterwarnings("ignore", re.escape(sentence))
    yield


class Portions:
  """Tells a stage how far a quantizer is, which runs in a thread for every device."""

  def __init__(self, stage: Stage, amount: float, num_models: int, note: str):
    self._stage, self._amount, self._note = stage, amount, note
    self._threads = min(len(jax.local_devices()), num_models)
    self._shares: dict[int, float] = {}
    self._told = 0.0
    self._lock = threading.Lock()

  def __call__(self, name: str, done: int, total: int) -> None:
    """What a quantizer calls after every layer or unit, see `plan.Progress`."""
    with self._lock:
      self._shares[threading.get_ident()] = done / total
      self._tell(sum(self._shares.values()) / self._threads, f"{self._note} {name}")

  def end(self) -> None:
    """All is quantized, whether the quantizer said so or not."""
    self._tell(1.0, self._note)

  def _tell(self, share, note):
    before, self._told = self._told, max(self._told, min(share, 1.0))
    self._stage.advance(self._amount * (self._told - before), note)


def same_body(audit: Audit, packed: dict[Variant, pack.Packed]) -> list[dict[Variant, pack.Packed]]:
  """Variants grouped so that those of a group differ in the last unit only."""
  groups: list[tuple[pack.Packed, dict[Variant, pack.Packed]]] = []
  for variant, one in packed.items():
    _, body = pack.split(one, functools.partial(units.in_last, audit.model))
    for known, group in groups:
      if pack.same(known, body):
        group[variant] = one
        break
    else:
      groups.append((body, {variant: one}))
  return [group for _, group in groups]


def calibration(audit: Audit, chunk: Chunk) -> tuple[np.ndarray, jax.Array]:
  """Positions int[m, n] and normalised images float[m, n, H, W, c] that calibrate each model."""
  quantize = audit.config.quantize
  size = min(quantize.calibration_size, len(audit.dataset.train_labels) // 2)
  return drawn_images(audit, chunk, "calibration", quantize.calibrate_on, size)


def drawn_images(
  audit: Audit, chunk: Chunk, stream: str, whom: str, count: int
) -> tuple[np.ndarray, jax.Array]:
  """Images for each model of a chunk, drawn from its "members", its "non_members", or "all".

  Returns:
    Positions in the pool int[m, count], and the images augmented and normalised.
  """
  quantize, data = audit.config.quantize, audit.dataset
  rows = audit.members[chunk.group][chunk.first : chunk.last]
  eligible = {"members": rows, "non_members": ~rows, "all": np.ones_like(rows)}[whom]
  settled = {
    "count": count,
    "augmentation": augment.make(tuple(quantize.calibration_augmentation)),
    "mean": audit.recipe.mean,
    "std": audit.recipe.std,
  }
  key, images = group_key(audit, chunk, stream), jnp.asarray(data.train_images)
  drawn = [
    _draw(jax.random.fold_in(key, number), jnp.asarray(row), images, **settled)
    for number, row in zip(chunk.ids, eligible, strict=True)
  ]
  positions, pixels = zip(*drawn, strict=True)
  return np.stack(positions), jnp.stack(pixels)


@functools.partial(jax.jit, static_argnames=("count", "augmentation", "mean", "std"))
def _draw(key, row, images, *, count, augmentation, mean, std):
  choose, alter = jax.random.split(key)
  order = jax.random.permutation(choose, len(row))
  first = jnp.argsort(~row[order], stable=True)[:count]
  positions = order[first]
  keys = jax.random.split(alter, count)
  chosen = jax.vmap(augmentation)(keys, images[positions])
  return positions, augment.normalise(chosen, jnp.array(mean), jnp.array(std))


def group_key(audit: Audit, chunk: Chunk, stream: str) -> jax.Array:
  """The key of a stream for shadows or for targets; folded with a model's number by the caller."""
  return jax.random.fold_in(audit.key(stream), list(audit.members).index(chunk.group))


def unit_arrays(info, index: int) -> dict[str, np.ndarray]:
  """What happened to each unit under plan `index`, as arrays [units, m]."""
  arrays = {"unit_names": np.array([record.name for record in info])}
  for field in ("error_before", "error_after", "steps", "seconds"):
    arrays[f"unit_{field}"] = np.stack([np.asarray(getattr(r, field))[index] for r in info])
  return arrays
