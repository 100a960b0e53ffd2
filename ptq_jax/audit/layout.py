"""One audit: its config brought to life, and what lies where in its workdir.

    config.json         the config and the fingerprint of the data, to recognise a foreign workdir;
                        how inputs are normalised, to run its networks
    membership.npz      shadows bool[M, E] and targets bool[T, E]: who trained on what
    models/             (or --models) work.json and membership.npz, see `work`; CHUNK/trained and
                        CHUNK/training have Orbax checkpoints of a chunk's models, stacked, and
                        CHUNK/metrics.jsonl their loss and accuracy by epoch
    scores/VARIANT/     CHUNK.npz: scores float32[m, E, V], accuracy on test images and on the own
                        members [m], size of those models
    quantized/VARIANT/  CHUNK.npz: their integer codes, grids and full-precision rest
    results.jsonl ...   what `attacking` and `reporting` make of the scores; manifest.json has the
                        SHA-256 of each of these files
    locks/              who is at what

A chunk is a run of models trained together, "shadows-00000-00016"; a variant is a way of storing
them, "full_precision" or "adaround-3-256". Both are the units in which work is done and resumed.
Every file of scores says by which settings it was made and has the checksum of the codes that
belong to it. What is missing, damaged or made by other settings is computed anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import models, settings, storage
from ptq_jax.attack import confidence
from ptq_jax.audit import events, work
from ptq_jax.audit.work import Chunk, Work
from ptq_jax.data import augment, batches, duplicates, load
from ptq_jax.metrics import leakage
from ptq_jax.models import call, checks, conv, flops, predict, units
from ptq_jax.quantize import METHODS, brecq, pack, plan
from ptq_jax.report.records import Variant
from ptq_jax.train import fit, optimizer

FULL_PRECISION = Variant("none", None, None)

OPERATIONAL = ("models", "targets", "models_per_chunk", "models_together", "cache_dir",
               "checkpoint_minutes")  # fmt: skip
"""Settings of training on which no model depends, or which the work list keeps."""

OPERATIONAL_OPTIONS = ("memory_bytes", "strict")
"""Options of methods on which no result depends."""

ALL_INPUTS = "all"
"""Says in a config "one scale for all inputs", None in Python."""


@dataclasses.dataclass(frozen=True)
class Audit:
  """One audit: its config and its workdir. Open it with `preflight.open_audit`."""

  config: settings.Config
  root: pathlib.Path
  trained: pathlib.Path
  """Folder of the models."""
  shard: work.Shard = work.WHOLE
  """Which part of the work is this process's."""
  listener: events.Listener = events.silent
  given_data: load.Dataset | None = None
  """Instead of what the config names."""
  given_model: object = None
  """Likewise."""

  # ---- the config brought to life ----

  @functools.cached_property
  def dataset(self) -> load.Dataset:
    return self.given_data or load.load(**settings.named(self.config.data))

  @functools.cached_property
  def copies(self) -> duplicates.Duplicates:
    """Exact copies in the data."""
    data = self.dataset
    return duplicates.count(
      data.train_images, data.train_labels, data.test_images, data.test_labels
    )

  @functools.cached_property
  def model(self):
    if self.given_model is not None:
      return self.given_model
    options = settings.named(self.config.model, "name")
    return models.make(self.config.model.name, **self.dataset.sizes, **options)

  @functools.cached_property
  def notes_on_model(self) -> list[str]:
    """Sentences on what is odd in the model; one that cannot be audited is a ValueError."""
    data = self.dataset
    number = np.arange(checks.NUM_EXAMPLES)
    examples = np.random.default_rng(0).normal(size=(len(number), *data.image_shape))
    examples = examples.astype(np.float32)
    if data.kind == "tokens":
      examples = data.train_images[number % len(data.train_images)]
    notes = checks.check_classifier(self.model, examples, name=self.config.model.name)
    if any(variant.method == "brecq" for variant in self.variants()):
      wanted = self.config.quantize.brecq.units
      chain = units.chain(self.model, *self._variables_and_example(), units=wanted)
      notes += [brecq.LAYER_BY_LAYER] if units.layer_by_layer(chain) else []
    return notes

  @functools.cached_property
  def settled(self) -> dict:
    """The config as JSON, with what model.dtype="auto" means here: models depend on it."""
    config = settings.plain(self.config)
    if "dtype" in config["model"]:
      config["model"]["dtype"] = models.compute_dtype(config["model"]["dtype"])
    return config

  @functools.cached_property
  def training_settings(self) -> dict:
    """The settings that models depend on, as JSON."""
    train = {k: v for k, v in self.settled["train"].items() if k not in OPERATIONAL}
    return {
      "seed": self.config.seed,
      "pool_size": len(self.dataset.train_labels),
      "model": self.settled["model"],
      "train": train,
    }

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
      dtype=str(data.train_images.dtype),
    )

  @property
  def training_images(self) -> int:
    """Images that all models train on, repetitions counted."""
    train, pool = self.config.train, len(self.dataset.train_labels)
    steps = batches.steps_per_epoch(pool // 2, batch_size=train.batch_size)
    return (train.models + train.targets) * train.epochs * steps * train.batch_size

  @property
  def training_flop(self) -> int:
    """Of training all models from scratch.

    Raises:
      ValueError: for layers that cannot be counted.
    """
    data = self.dataset
    dtype = data.fed(1).dtype
    image = flops.training(self.model, image_shape=data.image_shape, dtype=dtype)
    return self.training_images * image

  @functools.cached_property
  def layers(self) -> list[units.Layer]:
    """Layers of the model in execution order."""
    return units.layers(self.model, *self._variables_and_example())

  def _variables_and_example(self):
    """Shapes of the model's variables, and what it takes."""
    example = self.dataset.fed(1)
    init = functools.partial(call.init, self.model)
    return jax.eval_shape(init, jax.random.key(0), example), example

  def method_options(self, method: str) -> dict:
    """Options of a method's `quantize_stacked`, and how many images calibrate it."""
    section = self.config.quantize.get(method, settings.Config())  # a registered one has none
    size = self.config.quantize.calibration_size
    options = settings.arguments(METHODS[method].quantize_stacked, section, "calibration_size")
    if isinstance(sizes := options.get("grid_options", {}).get("group_size"), tuple):
      key = f"quantize.{method}.grid_options.group_size"
      options["grid_options"]["group_size"] = parse_patterns(sizes, key, ALL_INPUTS)
    members = len(self.dataset.train_labels) // 2
    return options | {"calibration_size": min(section.get("calibration_size") or size, members)}

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

  def plans(self, variants: Sequence[Variant]) -> list[plan.Plan]:
    """Levels per layer of each variant."""
    overrides = parse_patterns(self.config.quantize.overrides, "quantize.overrides", plan.FULL)
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
    return work.key(self.config.seed, stream)

  # ---- the work list ----

  @functools.cached_property
  def work(self) -> Work:
    """What there is to train; `preflight.open_audit` puts it here."""
    raise AttributeError("this audit was not opened; use preflight.open_audit.")

  @property
  def members(self) -> Mapping[str, np.ndarray]:
    """bool[M, E] of the shadows and bool[T, E] of the dedicated targets, by group."""
    return self.work.members

  def own_chunks(self) -> list[Chunk]:
    """The chunks that this process trains and quantizes."""
    return self.shard.of(self.work.chunks)

  def locked(self, chunk: Chunk):
    """Holds a chunk, so that no other process of this audit works on it.

    Raises:
      work.Busy: if one does.
    """
    return work.locked(self.root / "locks" / chunk.name, wait=False)

  def models_locked(self, chunk: Chunk, say: Callable[[str], None]):
    """Holds a chunk's models, which audits may share; says so if it waits for another audit."""

    def waiting(owner):
      say(f"waiting for the models of {chunk.name}, which {owner} has for another audit.")

    return work.locked(self.trained / "locks" / chunk.name, waiting=waiting)

  def model_directory(self, chunk: Chunk) -> pathlib.Path:
    return self.trained / chunk.name

  # ---- scores and codes ----

  def scores_path(self, variant: Variant, chunk: Chunk) -> pathlib.Path:
    return self.root / "scores" / variant_name(variant) / f"{chunk.name}.npz"

  def quantized_path(self, variant: Variant, chunk: Chunk) -> pathlib.Path:
    return self.root / "quantized" / variant_name(variant) / f"{chunk.name}.npz"

  def stamp(self, variant: Variant) -> str:
    """Changes with every setting that the scores of a variant depend on."""
    config = self.settled
    found = [self.work.stamp, self.num_views, config["queries"]["augmentation"]]
    if variant != FULL_PRECISION:
      shared = ("overrides", "calibration_size", "calibration_augmentation", "calibrate_on")
      quantize = {key: config["quantize"][key] for key in shared}
      options = settings.dotted(config["quantize"].get(variant.method, {}))
      options = {k: v for k, v in options.items() if k not in OPERATIONAL_OPTIONS}
      found += [list(variant), quantize, options]
    return settings.fingerprint(found)

  def problem(self, variant: Variant, chunk: Chunk) -> str | None:
    """Why the chunk's scores and codes in this variant cannot be used; None if they can.

    "" if there are none yet; else a sentence.
    """
    path, codes = self.scores_path(variant, chunk), self.quantized_path(variant, chunk)
    try:
      arrays = storage.load_arrays(path)
    except FileNotFoundError:
      return ""
    except storage.CorruptFileError as error:
      return str(error)
    if str(arrays.get("stamp")) != self.stamp(variant) or len(arrays["scores"]) != len(chunk):
      return f"{path} was made with other settings."
    if variant != FULL_PRECISION and str(arrays["model"]) != self._trained_model(chunk):
      return f"{path} was made from other models."
    if "codes" in arrays:
      if not codes.exists():
        return f"{codes} is missing."
      if storage.digest(codes) != str(arrays["codes"]):
        return f"{codes} is damaged."
    return None

  def _trained_model(self, chunk):
    """The digest of a chunk's models by its scores in full precision."""
    with contextlib.suppress(FileNotFoundError, storage.CorruptFileError):
      return str(storage.load_arrays(self.scores_path(FULL_PRECISION, chunk))["model"])

  def pending(self, variant: Variant, chunk: Chunk, say=None) -> bool:
    """Whether the chunk's scores in this variant are still to be computed."""
    problem = self.problem(variant, chunk)
    if problem and say:
      say(f"{problem.rstrip('.')}; computing it anew.")
    return problem is not None

  @property
  def num_views(self) -> int:
    """Queries of each example; without augmentation all views would be the same."""
    return self.config.queries.views if self.config.queries.augmentation else 1

  @property
  def _predictors(self):
    """Scores and correctness on the fixed views of the pool, and correctness on test images."""
    queries, recipe = self.config.queries, self.recipe
    return _predictors(
      call.Hashable(self.model),
      recipe.mean,
      recipe.std,
      self.config.seed,
      self.num_views,
      tuple(queries.augmentation),
    )

  def save_scores(
    self,
    packed: Mapping[Variant, pack.Packed],
    chunk: Chunk,
    variables,
    *,
    sound=None,
    more: Mapping[Variant, Mapping[str, np.ndarray]] | None = None,
  ) -> None:
    """Runs packed models over the pool's views and the test images, and writes what comes out.

    Args:
      packed: the models of the chunk in variants that differ in the last unit only.
      chunk: which models.
      variables: all models of the chunk as they were trained.
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
    members = self.members[chunk.group][chunk.first : chunk.last][sound]
    for (variant, one), pool, correct in zip(packed.items(), of_pool, of_test, strict=True):
      scores, fitted = pool[..., 0], leakage.member_accuracy(pool[..., 1] > 0, members)
      size, codes = pack.size(one), self.quantized_path(variant, chunk)
      storage.save_arrays(
        self.scores_path(variant, chunk),
        scores=spread(scores.astype(np.float32), sound),
        accuracy=spread(correct.mean(axis=(1, 2)), sound),
        member_accuracy=spread(fitted, sound),
        bits_per_weight=np.full(len(chunk), size.bits_per_weight),
        size_kb=np.full(len(chunk), size.total / sound.sum() / 1000),
        stamp=self.stamp(variant),
        model=model_digest(variables),
        code=settings.code_version("models", "quantize", "attack/confidence"),
        **({} if variant == FULL_PRECISION else {"codes": storage.digest(codes)}),
        **(more or {}).get(variant, {}),
      )

  def missing(self, variants: Iterable[Variant]) -> list[pathlib.Path]:
    """Score files that are not there yet."""
    paths = (self.scores_path(v, chunk) for v in variants for chunk in self.work.chunks)
    return [path for path in paths if not path.exists()]

  def load_scores(self, variant: Variant, group: str) -> dict[str, np.ndarray]:
    """The sound models of a group in one variant, in the order of their numbers.

    Raises:
      FileNotFoundError: if some are missing, with the stage that makes them.
    """
    arrays = self._all_scores(variant, group)
    return {name: array[self.sound[group]] for name, array in arrays.items()}

  def _all_scores(self, variant, group):
    parts = []
    for chunk in self.work.chunks:
      path = self.scores_path(variant, chunk)
      if chunk.group == group:
        if not path.exists():
          stage = "train_shadows" if variant == FULL_PRECISION else "quantize"
          raise FileNotFoundError(f"{path} is missing; run bash launch/run {stage} first.")
        parts.append(storage.load_arrays(path))
    names = [
      name for name, array in parts[0].items() if len(np.shape(array)) and "unit_" not in name
    ]
    if not all("member_accuracy" in part for part in parts):  # an earlier version did not count it
      names = [name for name in names if name != "member_accuracy"]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}

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

  # ---- what else is in the workdir ----

  @functools.cached_property
  def manifest(self) -> "Manifest":
    """Of what attacking and reporting write."""
    return Manifest(self.root)

  def stage(self, name: str, total: float | int, *, done: float | int = 0) -> events.Stage:
    """Tells the listener of this audit what is done."""
    return events.Stage(self.listener, name, total, done=done)

  def say(self, sentence: str) -> None:
    """Tells the listener a sentence."""
    self.listener(events.Event("", sentence=sentence))

  def seconds(self) -> dict[str, float]:
    """Time that each stage has taken, over all runs; bookkeeping that may be lost."""
    try:
      found = storage.read_json(self.root / "seconds.json")
    except (FileNotFoundError, storage.CorruptFileError):
      return {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}

  @contextlib.contextmanager
  def timed(self, stage: str):
    """Adds its duration to the stage's, also when it is interrupted."""
    start = time.monotonic()
    try:
      yield
    finally:
      with work.locked(self.root / "locks" / "seconds"):
        total = self.seconds()
        total[stage] = round(total.get(stage, 0.0) + time.monotonic() - start, 2)
        storage.write_json(self.root / "seconds.json", total)


class Manifest:
  """The SHA-256 of files in a folder, and what they were made from, in manifest.json."""

  def __init__(self, root: pathlib.Path):
    self._root, self._path = root, root / "manifest.json"

  def record(self, what: str, source: str, paths: Iterable[pathlib.Path]) -> None:
    """Writes down that these files were made from something, under a name."""
    files = {str(path.relative_to(self._root)): storage.digest(path) for path in paths}
    document = self._read() | {what: {"source": source, "files": files}}
    storage.write_json(self._path, document)

  def problem(self, what: str, source: str) -> str | None:
    """Why files have to be made; None if all are there as they were made, from this source.

    "" if they were never made; else a sentence.
    """
    entry = self._read().get(what)
    if entry is None:
      return ""
    if entry["source"] != source:
      return f"{what} of {self._root} was made from other inputs or by another version."
    for name, digest in entry["files"].items():
      path = self._root / name
      if not path.is_file():
        return f"{path} is missing."
      if storage.digest(path) != digest:
        return f"{path} is not as it was written."
    return None

  def files(self, what: str) -> list[str]:
    """What was written under a name, relative to the folder."""
    return list(self._read().get(what, {"files": {}})["files"])

  def verify(self) -> list[str]:
    """A sentence for each group of files that is not as it was written."""
    found = [self.problem(what, entry["source"]) for what, entry in self._read().items()]
    return [problem for problem in found if problem]

  def require_same(self, what: str, path: pathlib.Path) -> None:
    """Raises CorruptFileError if a file was recorded and is not as it was written."""
    digest = self._read().get(what, {"files": {}})["files"].get(path.name)
    if digest is not None and digest != storage.digest(path):
      raise storage.CorruptFileError(
        f"{path} is not as it was written; run bash launch/run {what} again to make it anew."
      )

  def _read(self):
    with contextlib.suppress(FileNotFoundError, storage.CorruptFileError):
      found = storage.read_json(self._path)
      return {
        what: entry
        for what, entry in found.items()
        if isinstance(entry, dict) and isinstance(entry.get("files"), dict) and "source" in entry
      }
    return {}


@functools.lru_cache(maxsize=1)
def _predictors(model, mean, std, seed, num_views, augmentation):
  """Of all audits in this process that differ in nothing of this, so that they share programs."""
  key, augmentation = work.key(seed, "queries"), augment.make(augmentation)

  def views(images, positions):
    augmented = augment.views(key, images, positions, num_views=num_views, augment=augmentation)
    return augment.normalise(augmented, jnp.array(mean), jnp.array(std))

  def plain(images, positions):
    del positions
    return augment.normalise(images[None], jnp.array(mean), jnp.array(std))

  def score_and_correct(logits, labels):
    pair = confidence.logit_scaled(logits, labels), predict.is_correct(logits, labels)
    return jnp.stack(pair, axis=-1)

  return (
    predict.Predictor(model.module, prepare=views, reduce=score_and_correct),
    predict.Predictor(model.module, prepare=plain, reduce=predict.is_correct),
  )


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
  return _optimizer(train.optimizer, steps_per_epoch=steps_per_epoch, **chosen)


@functools.lru_cache
def _optimizer(name, **options):
  """One and the same for equal settings, so that audits in one process share their programs."""
  return optimizer.OPTIMIZERS[name](**options)


def model_digest(variables) -> str:
  """Changes with any bit of stacked models."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(variables):
    found.update(np.ascontiguousarray(leaf))
  return found.hexdigest()


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


def parse_patterns(texts: Sequence[str], key: str, none: str) -> dict[str, int | None]:
  """Numbers by path pattern from "pattern=number", or None from "pattern=WORD".

  Args:
    key: of the config, for the message.
    none: the word.
  Raises:
    ValueError: for another form.
  """
  found = {}
  for text in texts:
    pattern, _, value = str(text).rpartition("=")
    if not pattern or not (value.isdecimal() or value == none):
      raise ValueError(f"{key} has {text!r}; write 'pattern=number' or 'pattern={none}'.")
    found[pattern] = None if value == none else int(value)
  return found
