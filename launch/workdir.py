"""What an audit is made of and where it lies: the config brought to life, and its workdir.

    config.json         the config and the fingerprint of the data, to recognise a foreign workdir
    membership.npz      members bool[M, E], target_members bool[T, E]
    models/CHUNK/       Orbax checkpoints of some models, stacked
    scores/VARIANT/     CHUNK.npz: scores float32[m, E, V], test accuracy[m], size of those models
    quantized/VARIANT/  CHUNK.npz: their integer codes, grids and full-precision rest
    lowering-I.json     how process I computes convolutions, if train.lowering="measure"
    results.jsonl ...   what `attack` and `report` make of the scores

A chunk is a run of models trained together, "shadows-00000-00016"; a variant is a way of storing
them, "full_precision" or "adaround-3-256". Both are the units in which work is done and resumed.
"""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import models, settings, storage
from ptq_jax.attack import confidence, protocol
from ptq_jax.data import augment, batches, load, membership
from ptq_jax.models import conv, parallel, predict, units
from ptq_jax.quantize import METHODS, grid, pack, plan
from ptq_jax.report.records import Variant
from ptq_jax.train import fit, optimizer, shadows

FULL_PRECISION = Variant("none", None, None)

MODELS_DEDICATED, MODELS_LEAVE_ONE_OUT = 4, 6
"""Fewest shadows with which every example has two on each side: all there, or a pair left out."""

CPU_CHUNK = 16
"""Most models at once on a CPU, where more cost compilation and gain nothing."""

MAY_GROW = ("train.models", "train.targets")
MAY_CHANGE = (
  "name",
  "train.models_per_chunk",
  "train.lowering",
  "train.checkpoint_minutes",
  "queries.batch_size",
  "quantize.methods",
  "quantize.levels",
  "quantize.last_layer_levels",
  "quantize.sweep_last_layer_at",
)
"""Keys whose change neither spoils nor mixes up what a workdir holds; nor do the attack's."""


@dataclasses.dataclass(frozen=True, order=True)
class Chunk:
  """Models `first` to `last` (exclusive) of a group, "shadows" or "targets"."""

  group: str
  first: int
  last: int

  @property
  def name(self) -> str:
    return f"{self.group}-{self.first:05d}-{self.last:05d}"

  @property
  def ids(self) -> np.ndarray:
    return np.arange(self.first, self.last)

  def __len__(self) -> int:
    return self.last - self.first


@dataclasses.dataclass(frozen=True)
class Audit:
  """One audit: its config and its workdir. Open it with `open_audit`."""

  config: settings.Config
  root: pathlib.Path

  @functools.cached_property
  def dataset(self) -> load.Dataset:
    return load.load(**settings.named(self.config.data))

  @functools.cached_property
  def model(self):
    options = settings.named(self.config.model, "name")
    return models.make(self.config.model.name, num_classes=self.dataset.num_classes, **options)

  @functools.cached_property
  def settled(self) -> dict:
    """The config as JSON, with what model.dtype="auto" means here: models depend on it."""
    config = settings.plain(self.config)
    if "dtype" in config["model"]:
      config["model"]["dtype"] = models.compute_dtype(config["model"]["dtype"])
    return config

  @functools.cached_property
  def recipe(self) -> fit.Recipe:
    """How every model is trained."""
    train, data = self.config.train, self.dataset
    steps = batches.steps_per_epoch(len(data.train_labels) // 2, batch_size=train.batch_size)
    return fit.Recipe(
      model=self.model,
      optimizer=make_optimizer(train, steps_per_epoch=steps),
      augmentation=augment.make(tuple(train.augmentation)),
      mean=tuple(map(float, data.mean)),
      std=tuple(map(float, data.std)),
      batch_size=train.batch_size,
      label_smoothing=train.label_smoothing,
      lowering=train.lowering if train.lowering in conv.LOWERINGS else None,
    )

  def check(self) -> None:
    """Raises ValueError for the first setting that makes no sense, before anything is computed."""
    rows, quantize, attack = self.members["shadows"], self.config.quantize, self.config.attack
    members = rows.sum(axis=1).min()
    assert self.recipe  # made here, so that a bad model or optimizer is known now
    needed = MODELS_DEDICATED if "targets" in self.members else MODELS_LEAVE_ONE_OUT
    if len(rows) < needed:
      raise ValueError(
        f"train.models is {len(rows)}; LiRA needs two shadows that trained on an example and two "
        f"that did not, so here at least {needed} models."
      )
    for augmentation in (self.config.queries.augmentation, quantize.calibration_augmentation):
      augment.make(tuple(augmentation))
    if self.config.queries.views < 1:
      raise ValueError(f"queries.views is {self.config.queries.views}; it must be at least 1.")
    for variant in self.variants():
      if variant.method not in METHODS:
        raise ValueError(
          f"quantize.methods has {variant.method!r}; choose among {', '.join(METHODS)}."
        )
      for levels in (variant.levels, variant.last_layer_levels or 2):
        grid.check_levels(levels)
    lowering = self.config.train.lowering
    if lowering not in ("auto", "measure", *conv.LOWERINGS):
      raise ValueError(
        f"train.lowering is {lowering!r}; choose auto, measure, {', '.join(conv.LOWERINGS)}."
      )
    chunk = self.config.train.models_per_chunk
    if chunk != "auto" and (not isinstance(chunk, int) or chunk < 1):
      raise ValueError(
        f"train.models_per_chunk is {chunk!r}; give a number of models, or auto for as many as fit."
      )
    if not 1 <= quantize.calibration_size <= members:
      raise ValueError(
        f"quantize.calibration_size is {quantize.calibration_size}; a model has {members} members, "
        f"so it must be in 1..{members}."
      )
    for method in dict.fromkeys(variant.method for variant in self.variants()):
      size = self.method_options(method)["calibration_size"]
      if not 1 <= size <= quantize.calibration_size:
        raise ValueError(
          f"quantize.{method}.calibration_size is {size}; it must be in 1.."
          f"{quantize.calibration_size}, quantize.calibration_size."
        )
    if quantize.calibrate_on not in ("members", "non_members"):
      raise ValueError(
        f"quantize.calibrate_on is {quantize.calibrate_on!r}; use 'members' or 'non_members'."
      )
    for name in attack.attacks:
      if name not in protocol.ATTACKS:
        raise ValueError(f"attack {name!r} is unknown; there are {', '.join(protocol.ATTACKS)}.")
    self.plans(self.variants())
    for fpr in attack.fprs:
      if not 0 < fpr <= 1:
        raise ValueError(f"attack.fprs has {fpr}; a false-positive rate is in (0, 1].")

  def method_options(self, method: str) -> dict:
    """Options of a method's `quantize_stacked`, and how many images calibrate it."""
    section, size = self.config.quantize[method], self.config.quantize.calibration_size
    options = settings.arguments(METHODS[method].quantize_stacked, section, "calibration_size")
    return options | {"calibration_size": section.get("calibration_size", size)}

  @functools.cached_property
  def layers(self) -> list[units.Layer]:
    """Layers of the model in execution order."""
    images = jax.ShapeDtypeStruct((1, *self.dataset.image_shape), jnp.float32)
    return units.layers(
      self.model, jax.eval_shape(self.model.init, jax.random.key(0), images), images
    )

  def plans(self, variants: Sequence[Variant]) -> list[plan.Plan]:
    """Levels per layer of each variant."""
    overrides = parse_overrides(self.config.quantize.overrides)
    return [
      plan.make(
        self.layers,
        levels=variant.levels,
        last_layer_levels=variant.last_layer_levels or plan.FULL,
        overrides=overrides,
      )
      for variant in variants
    ]

  def key(self, stream: str) -> jax.Array:
    """The key of one stream of randomness of this audit."""
    streams = ("membership", "shadows", "target_membership", "targets", "queries", "calibration",
               "quantize", "bootstrap", "batchnorm")  # fmt: skip
    return jax.random.fold_in(jax.random.key(self.config.seed), streams.index(stream))

  @functools.cached_property
  def members(self) -> dict[str, np.ndarray]:
    """bool[M, E] of the shadows and bool[T, E] of the dedicated targets, by group."""
    pool = len(self.dataset.train_labels)
    train = self.config.train
    found = {
      "shadows": membership.paired(
        self.key("membership"), num_models=train.models, num_examples=pool
      )
    }
    if train.targets:
      found["targets"] = membership.random_halves(
        self.key("target_membership"), num_models=train.targets, num_examples=pool
      )
    return {group: np.asarray(rows) for group, rows in found.items()}

  def chunks(self) -> list[Chunk]:
    """All models in chunks: those begun before as they were, the rest cut by the config's size.

    Raises:
      ValueError: if the workdir has more models than the config.
    """
    return [
      chunk
      for group, rows in self.members.items()
      for chunk in _cover(group, len(rows), self._begun(group), size=lambda: self.chunk_size)
    ]

  @functools.cached_property
  def chunk_size(self) -> int:
    """Models that train at once: the config's number, or with "auto" as many as fit."""
    size = self.config.train.models_per_chunk
    if size != "auto":
      return size
    devices = jax.local_devices()
    most = max(len(rows) for rows in self.members.values())
    if devices[0].platform == "cpu":
      most = min(most, CPU_CHUNK)
    found = shadows.largest_chunk(
      self.recipe,
      num_examples=len(self.dataset.train_labels),
      num_members=len(self.dataset.train_labels) // 2,
      image_shape=self.dataset.image_shape,
      memory_bytes=parallel.device_memory_bytes() * 9 // 10,
      at_most=-(-most // len(devices)),
    )
    return found * len(devices)

  def own_chunks(self) -> list[Chunk]:
    """The chunks that this process trains and quantizes: its share of all."""
    return self.chunks()[jax.process_index() :: jax.process_count()]

  def wait_for_others(self, variants: Sequence[Variant]) -> None:
    """Until the other processes have written their scores."""
    paths = [self.scores_path(variant, chunk) for variant in variants for chunk in self.chunks()]
    while jax.process_count() > 1 and not all(path.exists() for path in paths):
      time.sleep(1)

  def _begun(self, group):
    pattern = re.compile(rf"{group}-(\d+)-(\d+)")
    names = [path.name for path in (self.root / "models").glob(f"{group}-*")]
    matches = [match for match in map(pattern.fullmatch, names) if match]
    return sorted(Chunk(group, int(match[1]), int(match[2])) for match in matches)

  def variants(self) -> list[Variant]:
    """Every quantized variant that the config asks for, once, in its order."""
    quantize = self.config.quantize
    found = [
      Variant(method, levels, last_layer_levels(last, levels))
      for method in quantize.methods
      for levels in quantize.levels
      for last in quantize.last_layer_levels
    ]
    found += [
      Variant(method, levels, None if last == plan.FULL else last)
      for method in quantize.methods
      for levels in quantize.sweep_last_layer_at
      for last in plan.LAST_LAYER_SWEEP
    ]
    return list(dict.fromkeys(found))

  def model_directory(self, chunk: Chunk) -> pathlib.Path:
    return self.root / "models" / chunk.name

  def scores_path(self, variant: Variant, chunk: Chunk) -> pathlib.Path:
    return self.root / "scores" / variant_name(variant) / f"{chunk.name}.npz"

  def quantized_path(self, variant: Variant, chunk: Chunk) -> pathlib.Path:
    return self.root / "quantized" / variant_name(variant) / f"{chunk.name}.npz"

  def pending(self, variant: Variant, chunk: Chunk) -> bool:
    """Whether the chunk's scores in this variant are still to be computed."""
    path = self.scores_path(variant, chunk)
    if not path.exists():
      return True
    try:
      storage.load_arrays(path)
    except storage.CorruptFileError:
      print(f"{path} is corrupt; computing it anew.", flush=True)
      path.unlink()
      return True
    return False

  @functools.cached_property
  def _predictors(self):
    """Attack scores on the fixed views of the pool, and correctness on the test images."""
    mean, std = jnp.asarray(self.dataset.mean), jnp.asarray(self.dataset.std)
    queries, key = self.config.queries, self.key("queries")
    augmentation = augment.make(tuple(queries.augmentation))

    def views(images, positions):
      augmented = augment.views(
        key, images, positions, num_views=queries.views, augment=augmentation
      )
      return augment.normalise(augmented, mean, std)

    def plain(images, positions):
      del positions
      return augment.normalise(images[None], mean, std)

    return (
      predict.Predictor(self.model, prepare=views, reduce=confidence.logit_scaled),
      predict.Predictor(self.model, prepare=plain, reduce=predict.is_correct),
    )

  def save_scores(
    self,
    packed: Mapping[Variant, pack.Packed],
    chunk: Chunk,
    *,
    sound=None,
    more: Mapping[Variant, Mapping[str, np.ndarray]] | None = None,
  ) -> None:
    """Runs packed models over the pool's views and the test images, and writes what comes out.

    Args:
      packed: the models of the chunk in variants that differ in the last unit only.
      sound: which models of the chunk the packed ones are; the scores of others are NaN.
      more: arrays that go into the file of a variant as they are.
    """
    data, batch_size = self.dataset, self.config.queries.batch_size
    parts = [
      pack.split(one, functools.partial(units.in_last, self.model)) for one in packed.values()
    ]
    body, heads = pack.unpack(parts[0][1]), [pack.unpack(head) for head, _ in parts]
    of_pool, of_test = (
      run.with_heads(body, heads, images, labels, batch_size=batch_size)
      for run, images, labels in zip(
        self._predictors,
        (data.train_images, data.test_images),
        (data.train_labels, data.test_labels),
        strict=True,
      )
    )
    sound = np.ones(len(chunk), bool) if sound is None else sound
    for (variant, one), scores, correct in zip(packed.items(), of_pool, of_test, strict=True):
      size = pack.size(one)
      storage.save_arrays(
        self.scores_path(variant, chunk),
        scores=spread(scores.astype(np.float32), sound),
        accuracy=spread(correct.mean(axis=(1, 2)), sound),
        bits_per_weight=np.full(len(chunk), size.bits_per_weight),
        size_kb=np.full(len(chunk), size.total / sound.sum() / 1000),
        **(more or {}).get(variant, {}),
      )

  def load_scores(self, variant: Variant, group: str) -> dict[str, np.ndarray]:
    """The sound models of a group in one variant, in the order of their numbers.

    Raises:
      FileNotFoundError: if some are missing, with the stage that makes them.
    """
    arrays = self._all_scores(variant, group)
    return {name: array[self.sound[group]] for name, array in arrays.items()}

  def _all_scores(self, variant, group):
    parts = []
    for chunk in self.chunks():
      path = self.scores_path(variant, chunk)
      if chunk.group == group:
        if not path.exists():
          stage = "train_shadows" if variant == FULL_PRECISION else "quantize"
          raise FileNotFoundError(f"{path} is missing; run bash launch/run {stage} first.")
        parts.append(storage.load_arrays(path))
    return {
      name: np.concatenate([part[name] for part in parts])
      for name in parts[0]
      if not name.startswith("unit_")
    }

  @functools.cached_property
  def sound(self) -> dict[str, np.ndarray]:
    """Which models of each group to attack and attack with, bool, by group.

    A model whose training ended in numbers that are not finite is left out, and among shadows the
    one trained on the complement with it: pairs are what makes leave-one-out fair.
    """
    found = {}
    for group in self.members:
      finite = is_sound(self._all_scores(FULL_PRECISION, group)["scores"])
      paired = group == "shadows"
      found[group] = finite.reshape(-1, 2).all(axis=1).repeat(2) if paired else finite
    return found

  @functools.cached_property
  def sound_members(self) -> dict[str, np.ndarray]:
    """`members` of the sound models."""
    return {group: rows[self.sound[group]] for group, rows in self.members.items()}

  def add_seconds(self, stage: str, seconds: float) -> None:
    """Adds to the time that a stage has taken, over all runs; the first process keeps the books."""
    if jax.process_index():
      return
    total = self.seconds()
    storage.write_json(
      self.root / "seconds.json", total | {stage: round(total.get(stage, 0.0) + seconds, 2)}
    )

  def seconds(self) -> dict[str, float]:
    """Time that each stage has taken, over all runs."""
    path = self.root / "seconds.json"
    return storage.read_json(path) if path.exists() else {}

  def timed(self, stage: str):
    """A context manager that adds its duration to the stage's, also when it is interrupted."""
    return _Timed(self, stage)


class _Timed:
  def __init__(self, audit, stage):
    self._audit, self._stage = audit, stage

  def __enter__(self):
    self._start = time.monotonic()

  def __exit__(self, *exception):
    self._audit.add_seconds(self._stage, time.monotonic() - self._start)


def open_audit(config: settings.Config, root: pathlib.Path) -> Audit:
  """Checks the whole config before anything is computed, and that the workdir belongs to it.

  Raises:
    ValueError: a value that makes no sense, or a workdir of another config (the keys are named).
    PermissionError, NotADirectoryError: a workdir that cannot be written.
  """
  root = storage.require_writable(root)
  audit = Audit(config, root)
  audit.check()
  path = root / "config.json"
  if path.exists():
    stored = storage.read_json(path)
    stored["config"] = settings.completed(
      stored["config"], settings.plain(settings.audit_defaults())
    )
    refuse_other_config(root, stored["config"], audit.settled)
  if path.exists() and stored["data"] != audit.dataset.fingerprint:
    raise ValueError(
      f"the {config.data.name} data changed since {root} was begun; use another --workdir."
    )
  current = {"config": audit.settled, "data": audit.dataset.fingerprint}
  if jax.process_index() == 0 and (not path.exists() or stored != current):
    rows = audit.members
    storage.save_arrays(
      root / "membership.npz",
      members=rows["shadows"],
      target_members=rows.get("targets", np.zeros((0, rows["shadows"].shape[1]), bool)),
    )
    storage.write_json(path, current)
  return audit


def make_optimizer(train: settings.Config, *, steps_per_epoch: int):
  """The optimizer that the config's section `train` describes."""
  options = ("epochs", "learning_rate", "momentum", "nesterov", "weight_decay", "schedule")
  chosen = {name: train[name] for name in options}
  if train.optimizer not in optimizer.OPTIMIZERS:
    raise ValueError(
      f"train.optimizer is {train.optimizer!r}; choose one of {', '.join(optimizer.OPTIMIZERS)}."
    )
  if train.optimizer == "muon":
    chosen["kernels"] = optimizer.Muon(**train.muon)
  return optimizer.OPTIMIZERS[train.optimizer](steps_per_epoch=steps_per_epoch, **chosen)


def refuse_other_config(root: pathlib.Path, stored: dict, current: dict) -> None:
  """Raises ValueError, naming the first key that differs and matters."""
  quantized = any((root / "quantized").glob("*/*.npz"))
  for difference in settings.differences(stored, current):
    key = difference.split(" ")[0]
    section = key.partition(".")[0]
    if key in MAY_CHANGE or section == "attack" or (section == "quantize" and not quantized):
      continue
    if key in MAY_GROW:
      group, _, name = key.partition(".")
      if current[group][name] >= stored[group][name]:
        continue
    raise ValueError(
      f"workdir {root} belongs to another config: {difference}; use another --workdir or delete it."
    )


def is_sound(scores: np.ndarray) -> np.ndarray:
  """Which of m models have finite scores [m, E, V] throughout, bool[m]."""
  return np.isfinite(scores).all(axis=(1, 2))


def spread(rows: np.ndarray, sound: np.ndarray) -> np.ndarray:
  """Rows of the sound models at their places among all, NaN at the others'."""
  full = np.full((len(sound), *rows.shape[1:]), np.nan, rows.dtype)
  full[sound] = rows
  return full


def last_layer_levels(last: int | str, levels: int) -> int | None:
  """What a value of quantize.last_layer_levels means: None is full precision."""
  if last == "same":
    return levels
  if last == "usual":  # of arXiv 2512.15335
    return 256 if levels == 3 else levels
  if last == "full":
    return None
  if isinstance(last, int):
    return last
  raise ValueError(
    f"quantize.last_layer_levels has {last!r}; use a number of levels, 'same', 'usual' or 'full'."
  )


def variant_name(variant: Variant) -> str:
  """The name of a variant's folders."""
  if variant.method == "none":
    return "full_precision"
  last = "full" if variant.last_layer_levels is None else variant.last_layer_levels
  return f"{variant.method}-{variant.levels}-{last}"


def parse_overrides(texts) -> dict[str, int | None]:
  """Levels by path pattern from "pattern=levels" or "pattern=full".

  Raises:
    ValueError: for another form.
  """
  overrides = {}
  for text in texts:
    pattern, _, levels = text.rpartition("=")
    if not pattern or not (levels.isdigit() or levels == plan.FULL):
      raise ValueError(
        f"quantize.overrides has {text!r}; write 'pattern=levels' or 'pattern=full'."
      )
    overrides[pattern] = None if levels == plan.FULL else int(levels)
  return overrides


def _cover(group, count, begun, *, size):
  """Chunks that cover 0 .. count: the ones begun, and new ones in the gaps."""
  if begun and begun[-1].last > count:
    raise ValueError(
      f"the workdir has {begun[-1].last} {group} but the config asks for {count}; a finished audit "
      "can be extended, not shrunk: use another --workdir."
    )
  chunks, position = [], 0
  for known in [*begun, Chunk(group, count, count)]:
    if position < known.first:
      for first in range(position, known.first, size()):
        chunks.append(Chunk(group, first, min(first + size(), known.first)))
    chunks.append(known)
    position = known.last
  return [chunk for chunk in chunks if len(chunk)]
