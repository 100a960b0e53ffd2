"""Every check before anything is computed, and the opening of a workdir.

What can be known before training is refused before training: a setting that makes no sense, data or
a model that do not fit, a workdir of another audit. Nothing in the workdir changes then.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors

from ptq_jax import settings, storage
from ptq_jax.attack import guards, protocol
from ptq_jax.audit import measuring, quantizing, reporting, work
from ptq_jax.audit.layout import FULL_PRECISION, OPERATIONAL_OPTIONS, Audit
from ptq_jax.data import augment, batches
from ptq_jax.models import call, conv, parallel, tables
from ptq_jax.quantize import METHODS, capture, check_model, grid, options, plan
from ptq_jax.train import shadows

MODELS_DEDICATED, MODELS_LEAVE_ONE_OUT = 4, 6
"""Fewest shadows with which every example has two on each side: all there, or a pair left out."""

FOLDERS = ("locks", "scores", "quantized", "figures")
"""What is written below a workdir, beside the models."""

AUGMENTATIONS = ("train.augmentation", "queries.augmentation", "quantize.calibration_augmentation")
"""Settings that name augmentations."""

WORDS = (
  *AUGMENTATIONS, "data.columns", "quantize.methods", "quantize.overrides", "quantize.brecq.units",
  "attack.attacks",
)  # fmt: skip
"""Settings that are lists of words."""

ONCE = (
  "quantize.methods", "quantize.levels", "quantize.last_layer_levels",
  "quantize.sweep_last_layer_at", "attack.attacks", "attack.fprs",
)  # fmt: skip
"""Lists in which nothing may stand twice."""

MOST_RATE, MOST_RESAMPLES = 1000, 1_000_000
"""Largest learning rate, and number of resamples, that somebody may mean."""

MOST_UPDATES = 2**31 - 1
"""Of a model: they are counted in int32."""

GPU = pathlib.Path("/dev/nvidia0")
"""What Linux shows of the first NVIDIA GPU."""

CPU_CHUNK = 16
"""Most models at once on a CPU, where more cost compilation and gain nothing."""


def open_audit(
  config: settings.Config, root: pathlib.Path | str, *, trained: pathlib.Path | str | None = None,
  **more: Any,
) -> Audit:  # fmt: skip
  """Checks the whole config, then that the workdir is this audit's, and settles its work list.

  Args:
    config: of the audit.
    root: its workdir.
    trained: folder of the models; None: in the workdir. Several audits may share one.
    **more: further fields of `Audit`.
  Raises:
    ValueError: a value that makes no sense, or a workdir of another config (the keys are named).
    PermissionError, NotADirectoryError: a workdir that cannot be written.
  """
  jax.devices()  # where there is none, JAX says so, and no model is blamed below
  with work.pinned_randomness():
    settings.require_known_keys(config)
    root = storage.require_writable(root)
    trained = storage.require_writable(trained) if trained else root / "models"
    for folder in (trained, *(root / name for name in FOLDERS)):
      if os.path.lexists(folder):
        storage.require_writable(folder)
    audit = Audit(config, root, trained, **more)
    check(audit)
    require_own(audit)
    if sentence := unused_gpu():
      audit.say(sentence)
    if trained != root / "models" and work.read(trained) is None:
      audit.say(f"{trained} holds no models yet; they are trained there.")
    counts = {"shadows": config.train.models, "targets": config.train.targets}
    found = work.settle(
      trained,
      training=audit.training_settings,
      data=audit.dataset.fingerprint,
      counts=counts,
      pool_size=len(audit.dataset.train_labels),
      sizes=functools.partial(sizes, audit),
      say=audit.say,
    )
    vars(audit)["work"] = found
    if found.random != work.random_sample() and not computed(audit):
      raise ValueError(
        f"this JAX ({jax.__version__}) draws other random numbers than the one that began {root} "
        f"({found.versions.get('jax')}); go on with that one, or use another --workdir."
      )
    data = audit.dataset
    scale = {"mean": [*map(float, data.mean)], "std": [*map(float, data.std)]}
    described = {
      "config": audit.settled,
      "data": data.fingerprint,
      "images": {
        "shape": [*data.image_shape],
        "dtype": str(data.train_images.dtype),
        **data.sizes,
        **scale,
      },
    }
    if _read_config(root) != described:
      storage.write_json(root / "config.json", described)
    return audit


def unused_gpu() -> str | None:
  """A sentence if this machine has an NVIDIA GPU that JAX does not use, though nobody said so."""
  if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS") or not GPU.exists():
    return None
  return (
    "this machine has an NVIDIA GPU, but JAX computes on the CPU; install jax[cuda13] (bash "
    "launch/run does, with PTQ_JAX_EXTRA=cuda), or set JAX_PLATFORMS=cpu to say that it is meant."
  )


def _read_config(root):
  """What config.json holds; it is bookkeeping, and is made anew where it is damaged."""
  try:
    return storage.read_json(root / "config.json")
  except (FileNotFoundError, storage.CorruptFileError):
    return {}


def computed(audit: Audit) -> bool:
  """Whether all scores are there, so that no model has to be run."""
  return not audit.missing([FULL_PRECISION, *audit.variants()])


# ---- the workdir ----


def require_own(audit: Audit) -> None:
  """Raises ValueError, naming every key that differs and matters, if something was made otherwise.

  What may differ: names, places of data with the same contents, how work is divided, which
  variants are made, the attack; and settings on which nothing depends that is there.
  """
  stored = work.read(audit.trained)
  before, about = _read_config(audit.root).get("config"), []
  before = before if isinstance(before, dict) else {}
  if stored is not None:
    known = _younger(stored.training, audit.training_settings)
    about = list(settings.differences(known, audit.training_settings).values())
    if stored.data != audit.dataset.fingerprint and not about:
      sections = [{"data": each.get("data", {})} for each in (before, audit.settled)]
      changed = "; ".join(settings.differences(*sections).values()) if before else ""
      about = [changed or f"the {audit.config.data.name} data changed"]
  for key, clause in settings.differences(before, audit.settled).items():
    if before and key in settings.dotted(before) and _spoils(audit, key):
      about.append(clause)
  if about:
    raise ValueError(
      f"workdir {audit.root} belongs to another config: {'; '.join(about)}; use another --workdir "
      "or delete it."
    )


def _spoils(audit, key):
  """Whether scores or codes are there that depend on a key outside training."""
  section, _, name = key.partition(".")
  if section == "queries" and name != "batch_size":
    return any((audit.root / "scores").glob("*/*.npz"))
  free = ("methods", "levels", "last_layer_levels", "sweep_last_layer_at")
  if section != "quantize" or name in free or name.rpartition(".")[2] in OPERATIONAL_OPTIONS:
    return False
  method = name.partition(".")[0]
  pattern = f"{method}-*/*.npz" if method in METHODS else "*-*/*.npz"
  return any(any((audit.root / folder).glob(pattern)) for folder in ("scores", "quantized"))


def _younger(stored, current):
  """Stored settings, with the present value of keys that were unknown then."""
  known = {
    key: _younger(stored[key], value) if isinstance(value, dict) else stored[key]
    for key, value in current.items()
    if key in stored
  }
  return current | stored | known


# ---- how models are divided ----


def sizes(audit: Audit, num_models: int, begun: Sequence[work.Chunk] = ()) -> work.Sizes:
  """Models of a chunk and of a program: the config's numbers, or with "auto" so that all work.

  A chunk is what one process takes at once; all processes of `shard` should get some.
  """
  train, devices = audit.config.train, jax.local_devices()
  if train.models_per_chunk != "auto":
    share = min(train.models_per_chunk, num_models)
    if devices[0].platform != "cpu":  # whose virtual devices should change nothing
      share = -(-share // len(devices))
    return _sizes(audit, train.models_per_chunk, num_models, share, begun)
  at_most = -(-num_models // (len(devices) * audit.shard.count))
  if devices[0].platform == "cpu":
    at_most = min(at_most, CPU_CHUNK)
  found = shadows.largest_chunk(
    audit.recipe,
    num_examples=len(audit.dataset.train_labels),
    num_members=len(audit.dataset.train_labels) // 2,
    image_shape=audit.dataset.image_shape,
    memory_bytes=parallel.device_memory_bytes() * 9 // 10,
    at_most=at_most,
  )
  return _sizes(audit, found * len(devices), num_models, found, begun)


def _sizes(audit, per_chunk, num_models, share, begun):
  chosen = measuring.choose(audit, min(per_chunk, num_models), share=share, begun=begun)
  return work.Sizes(per_chunk, *chosen)


# ---- the settings ----


def check(audit: Audit) -> None:
  """Raises ValueError for the first setting that makes no sense."""
  config = audit.config
  check_values(config)
  if audit.given_data is None and not str(config.data.name).strip():
    raise ValueError("data.name is empty; use digits, npz, image_folder or a set's name.")
  reporting.check(config.report)
  _check_models(config)
  _check_quantize(audit)
  _check_data(audit)
  for note in audit.dataset.notes:
    audit.say(note)
  if sentence := guards.copies_in_test(audit.copies.cross_pairs, len(audit.dataset.test_labels)):
    audit.say(sentence)
  assert audit.recipe  # made here, so that a bad model or optimizer is known now
  _check_amount(audit)
  _check_model(audit)
  plans = audit.plans(audit.variants())
  if plans:
    quantize = config.quantize
    methods = [quantize[method] for method in quantize.methods if method in quantize]
    with quantizing.said_before():
      survey = check_model(
        audit.model,
        image_shape=audit.dataset.image_shape,
        tokens=audit.dataset.train_images[:1] if audit.dataset.kind == "tokens" else None,
        plans=plans,
        units=quantize.brecq.get("units") if "brecq" in quantize.methods else None,
        strict=any(section.get("strict") for section in methods),
      )
    if survey.kept:
      audit.say(capture.in_full_precision(survey.kept))
    for method in quantize.methods:
      plan.grid_options(audit.layers, plans, audit.method_options(method).get("grid_options"))
  if audit.num_views < config.queries.views:
    audit.say(
      f"queries.augmentation is empty, so all {config.queries.views} views (queries.views) of an "
      "example are the same; each is queried once."
    )
  members = len(audit.dataset.train_labels) // 2
  if config.quantize.calibration_size > members:
    audit.say(
      f"quantize.calibration_size is {config.quantize.calibration_size}, but a model has {members} "
      f"members; all of them calibrate it."
    )


def check_values(config: settings.Config, *, sections: Sequence[str] = ("",)) -> None:
  """Raises ValueError for the first setting whose value makes no sense, whatever the others are.

  Args:
    config: of an audit.
    sections: what its keys begin with; all of them, if not given.
  """
  defaults = settings.dotted(settings.plain(settings.audit_defaults()))
  for key, value in settings.dotted(settings.plain(config)).items():
    if value is None and defaults.get(key) is not None and key.startswith(tuple(sections)):
      raise ValueError(f"{key} is None; it needs a value, such as {defaults[key]!r}.")
  _check_types(config)
  for key, fits, demand in _ranges(config):
    value = settings.get(config, key)
    if key.startswith(tuple(sections)) and not fits(value):
      raise ValueError(f"{key} is {value!r}; it must be {demand}.")
  for name in config.attack.attacks:
    if name not in protocol.ATTACKS:
      raise ValueError(f"attack {name!r} is unknown; there are {', '.join(protocol.ATTACKS)}.")


def _check_types(config):
  """Numbers are no truth values, words are words, and nothing stands twice in a list."""
  defaults = settings.audit_defaults()
  given = settings.dotted(settings.plain(config))
  for key in settings.dotted(settings.plain(defaults)):
    *parents, name = key.split(".")
    kind = functools.reduce(settings.get, parents, defaults).get_type(name)
    if kind in (int, float) and isinstance(given.get(key), bool):
      raise ValueError(f"{key} is {given[key]}; it must be a number.")
  for key in WORDS:
    for word in given.get(key) or ():
      if not isinstance(word, str):
        raise ValueError(f"{key} has {word!r}; it must be a list of words.")
  for key in ONCE:
    for value in given[key]:
      if given[key].count(value) > 1:
        raise ValueError(f"{key} has {value!r} twice; name it once.")


def _check_amount(audit):
  """No more updates than can be counted, and no more scores than memory holds."""
  train, views, pool = audit.config.train, audit.config.queries.views, len(audit.dataset.train_ids)
  updates = train.epochs * batches.steps_per_epoch(pool // 2, batch_size=train.batch_size)
  if updates > MOST_UPDATES:
    raise ValueError(
      f"train.epochs is {train.epochs}, which is {updates} updates of a model; {MOST_UPDATES} are "
      "the most."
    )
  models = train.models + train.targets
  needed, there = 4 * models * pool * views, parallel.host_memory_bytes()
  if needed > there:
    raise ValueError(
      f"the scores of {models} models (train.models and train.targets) on {pool} examples in "
      f"queries.views={views} views take {needed / 1e9:.0f} GB, and this machine has "
      f"{there / 1e9:.0f} GB; take fewer."
    )


def _ranges(config) -> Iterator[tuple[str, Callable[[Any], bool], str]]:
  """Keys whose values must lie in a range, with the test and the range in words."""

  def division(*words):
    return lambda value: (
      value in words or (isinstance(value, int) and options.is_number(value) and value >= 1)
    )

  seeds = range(2**32)  # JAX would take others for one of these
  yield "seed", lambda v: isinstance(v, int) and v in seeds, "from 0 to 2**32 - 1"
  yield "train.models", *options.at_least(2)
  yield "train.targets", *options.at_least(0)
  for key in ("train.learning_rate", "train.muon.learning_rate"):
    yield key, *options.between(lambda v: 0 < v <= MOST_RATE, f"above 0 and at most {MOST_RATE}")
  yield "train.label_smoothing", *options.between(lambda v: 0 <= v < 1, "in [0, 1)")
  yield "train.checkpoint_minutes", *options.between(lambda v: v > 0, "above 0")
  demand = "a number of models, or auto for as many as fit"
  yield "train.models_per_chunk", division("auto"), demand
  demand = "a number of models, auto or measure"
  yield "train.models_together", division("auto", "measure"), demand
  lowerings = ("auto", "measure", *conv.LOWERINGS)
  yield "train.lowering", lambda v: v in lowerings, f"one of {', '.join(lowerings)}"
  yield "queries.views", *options.at_least(1)
  yield "queries.batch_size", *options.at_least(1)

  def counts(values):
    return all(isinstance(v, int) and grid.MIN_LEVELS <= v <= grid.MAX_LEVELS for v in values)

  for key in ("levels", "sweep_last_layer_at"):
    words = f"whole numbers from {grid.MIN_LEVELS} to {grid.MAX_LEVELS}"
    yield f"quantize.{key}", counts, words
  yield "quantize.calibration_size", *options.at_least(1)
  whom = ("members", "non_members")
  yield "quantize.calibrate_on", lambda v: v in whom, "'members' or 'non_members'"
  yield (
    "attack.resamples",
    *options.between(lambda v: 2 <= v <= MOST_RESAMPLES, f"2 to {MOST_RESAMPLES}"),
  )
  yield "attack.confidence", *options.between(lambda v: 0 < v < 1, "in (0, 1)")
  yield "attack.delta", *options.between(lambda v: 0 <= v < 1, "in [0, 1)")
  yield "attack.worst_classes", *options.at_least(0)
  yield "attack.exposed_share", *options.between(lambda v: 0 < v <= 1, "in (0, 1]")

  def rates(values):
    return len(values) > 0 and all(options.is_number(v) and 0 < v <= 1 for v in values)

  yield "attack.fprs", rates, "false-positive rates in (0, 1], at least one"
  yield "attack.attacks", lambda v: len(v) > 0, "at least one attack"
  for key in AUGMENTATIONS:
    augment.make(tuple(settings.get(config, key)))


def _check_models(config):
  """Enough shadows for two that trained on an example and two that did not."""
  models = config.train.models
  if models % 2:
    raise ValueError(
      f"train.models is {models}; models come in complementary pairs, so it must be even, for "
      f"example {models + 1}."
    )
  needed = MODELS_DEDICATED if config.train.targets else MODELS_LEAVE_ONE_OUT
  if models < needed:
    raise ValueError(
      f"train.models is {models}; LiRA needs two shadows that trained on an example and two "
      f"that did not, so here at least {needed} models."
    )


def _check_quantize(audit):
  """Methods, their options, and the precisions."""
  quantize = audit.config.quantize
  for method in quantize.methods:
    if method not in METHODS:
      raise ValueError(f"quantize.methods has {method!r}; choose among {', '.join(METHODS)}.")
    size = quantize.get(method, {}).get("calibration_size")
    if size is not None and not (isinstance(size, int) and 1 <= size <= quantize.calibration_size):
      raise ValueError(
        f"quantize.{method}.calibration_size is {size}; it must be in 1.."
        f"{quantize.calibration_size}, quantize.calibration_size."
      )
  if quantize.methods and not audit.variants():
    raise ValueError(
      "quantize.methods is given, but quantize.levels or quantize.last_layer_levels is empty, so "
      "nothing would be quantized; fill them, or leave quantize.methods empty."
    )
  for variant in audit.variants():
    for levels in (variant.levels, variant.last_layer_levels or 2):
      grid.check_levels(levels)
  for method in filter(settings.SETTINGS["quantize"].get, METHODS):  # a registered one has none
    options.check(method, settings.plain(quantize[method]), prefix=f"quantize.{method}.")


def _check_data(audit):
  """Examples of at least two classes, some to test on; no setting that only images have."""
  data = audit.dataset
  if data.kind != "images":
    for key in AUGMENTATIONS:
      if settings.get(audit.config, key):
        names = ", ".join(settings.get(audit.config, key))
        raise ValueError(
          f"{key} is {names}, but {data.name} holds {data.kind}; only images can be augmented: "
          "leave it empty."
        )
  for key in AUGMENTATIONS:
    for name, pixels in augment.make(tuple(settings.get(audit.config, key))).steps:
      if pixels and max(pixels) >= min(data.image_shape[:2]):
        raise ValueError(
          f"{key} has {name}{max(pixels)}, which moves images of shape {data.image_shape} out of "
          "their frame; take fewer pixels than a side has."
        )
  if audit.config.report.show_images:
    reporting.require_images(data)
  for split, labels in (("pool", data.train_labels), ("test split", data.test_labels)):
    if len(np.unique(labels)) < 2:
      raise ValueError(
        f"the {split} of {data.name} has examples of one class only; a classifier needs two."
      )
  for method in dict.fromkeys(audit.config.quantize.methods):
    audit.method_options(method)


def _check_model(audit):
  """That the model takes the inputs and gives a number for each class, in both of its modes."""
  data, name = audit.dataset, audit.config.model.name
  images = data.fed(2)

  def traced(function, *arguments, mode=""):
    try:
      return jax.eval_shape(function, *arguments)
    except errors.ModifyScopeVariableError as error:
      raise ValueError(
        f"model {name} changes its statistics in evaluation mode, too; give its BatchNorm "
        "use_running_average=not train, with `train` an argument of the model's __call__."
      ) from error
    except Exception as error:  # whatever a model of the user's raises
      reason = " ".join(str(error).split())[:300]
      hint = {"vectors": " (mlp takes vectors)", "tokens": " (transformer takes tokens)"}
      raise ValueError(
        f"model {name} cannot take {data.kind} of shape {data.image_shape}{mode}"
        f"{hint.get(data.kind, '')}: {type(error).__name__}: {reason}"
      ) from error

  variables = traced(functools.partial(call.init, audit.model), jax.random.key(0), images)
  for train, mode in ((False, ""), (True, " in training")):
    run = functools.partial(_run, audit.model, train)
    logits = traced(run, variables, images, mode=mode)
    if getattr(logits, "shape", None) != (2, data.num_classes):
      raise ValueError(
        f"model {name} gives {getattr(logits, 'shape', logits)} for 2 {data.kind} of "
        f"{data.num_classes} classes{mode}; it must give logits (2, {data.num_classes})."
      )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
      raise ValueError(
        f"model {name} gives {logits.dtype}{mode}; logits must be floating-point numbers."
      )
  needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
  if needed > (there := parallel.host_memory_bytes()):
    raise ValueError(
      f"model {name} takes {needed / 1e9:.0f} GB, and this machine has {there / 1e9:.0f} GB; make "
      "it smaller."
    )
  if data.kind == "tokens":
    splits = (data.train_images, data.test_images)
    tables.require_rows(audit.model, variables, np.stack([split.max(axis=0) for split in splits]))
  scale_up = "; scale them up with data.image_size" if data.kind == "images" else ""
  for layer in audit.layers:
    if not all((*layer.input_shape, *layer.output_shape)):
      raise ValueError(
        f"{data.kind} of shape {data.image_shape} are too small for model {name}: nothing is left "
        f"of them at {layer.path}{scale_up}."
      )
  for note in audit.notes_on_model:
    audit.say(note)


def _run(model, train, variables, images):
  """Logits of a model in one of its modes."""
  if not train:
    return call.apply(model, variables, images)
  mutable = [collection for collection in variables if collection != "params"]
  rngs = call.rngs(jax.random.key(0))
  return call.apply(model, variables, images, train=True, mutable=mutable, rngs=rngs)[0]


def verify(audit: Audit) -> list[str]:
  """One sentence for everything in a workdir that is missing or not as it was written."""
  found = []
  for chunk in audit.work.chunks:
    with storage.Checkpoints(audit.model_directory(chunk) / "trained") as trained:
      if not trained.steps():
        found.append(f"models of {chunk.name} are not trained.")
      for step in trained.steps():
        try:
          trained.check(step)
        except storage.CorruptFileError as error:
          found.append(f"checkpoint {trained.directory / str(step)} is damaged ({error}).")
    for variant in [FULL_PRECISION, *audit.variants()]:
      problem = audit.problem(variant, chunk)
      if problem is not None:
        found.append(problem or f"{audit.scores_path(variant, chunk)} is missing.")
  return found + audit.manifest.verify()
