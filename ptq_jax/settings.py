"""Every setting of an audit with its default and meaning; configs to plain values and back."""

import ast
import copy
import difflib
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict

Config = config_dict.ConfigDict


class Optional:
  """A setting that is None unless a value of this type is given."""

  def __init__(self, kind: type):
    self.kind = kind


AUTO = config_dict.FieldReference("auto", field_type=object)


def _schedule(num_steps, learning_rate, weight, decay_rates):
  """Settings of a `quantize.reconstruct.Schedule`."""
  return {
    "num_steps": (num_steps, "most steps for a unit"),
    "learning_rate": (learning_rate, "of Adam, for the rounding variables"),
    "weight": (weight, "of the rounding term, lambda"),
    "batch_size": (32, "examples of a step; the second-moment form has no batches"),
    "warmup": (0.2, "share of the steps without the rounding term, in [0, 1)"),
    "beta_start": (20.0, "exponent of the rounding term after the warm-up"),
    "beta_end": (2.0, "and at the end"),
    "decay_rates": (decay_rates, "of Adam's two averages, in [0, 1)"),
  }


_EVERY_METHOD = {
  "calibration_size": (
    Optional(int),
    "members that calibrate this method; quantize.calibration_size if not given",
  ),
  "grid_options": {
    "symmetric": (False, "whether the grid is symmetric about zero"),
    "search": ("mse", "for the scale: mse tries 80 cuts of the range, minmax takes all of it"),
    "norm": (2.4, "power of the error that the search minimises"),
    "include_zero": (True, "whether zero is always a level"),
    "group_size": (
      Optional(object),
      "inputs of an output with one scale, all of them if not given; or sizes by path pattern: "
      "('head/*=all', '*=64')",
    ),
  },
  "memory_bytes": (Optional(int), "what is computed at once; half of what is free if not given"),
  "strict": (False, "refuse a model with weights that stay in full precision"),
}
_STOP = ("plateau", "plateau ends when every weight has decided, never takes all steps")

SETTINGS: dict[str, Any] = {
  "name": ("audit", "what the report calls this audit"),
  "seed": (0, "of all randomness"),
  "data": {
    "name": (
      "digits",
      "digits, npz (images, vectors or token ids), tiny_imagenet, image_folder, hf_disk (a folder "
      "of Hugging Face's datasets), package.module:function (two sources of yours, of grain or "
      "array_record, say), or a set of TensorFlow Datasets",
    ),
    "data_dir": (Optional(str), "folder of TensorFlow Datasets; its own default if not given"),
    "path": (Optional(str), "of npz, tiny_imagenet, image_folder and hf_disk; of a function"),
    "columns": (
      Optional(tuple),
      "of hf_disk, of a function: INPUT,LABEL; by their types if not given",
    ),
    "cache_dir": (Optional(str), "of decoded images; beside the data if not given"),
    "pool_size": (
      Optional(int),
      "examples to draw members from; all training examples if not given",
    ),
    "test_size": (Optional(int), "test examples; all if not given"),
    "image_size": (Optional(int), "side in pixels to scale images to; as they are if not given"),
  },
  "model": {
    "name": (
      "convnet",
      "of ptq_jax.models.ZOO (mlp for vectors, transformer for tokens), or package.module:factory; "
      "its options beside it",
    ),
  },
  "train": {
    "models": (16, "shadows, even: pairs trained on complementary halves of the pool"),
    "targets": (0, "dedicated targets; 0: every model is target once, the others its shadows"),
    "epochs": (40, "passes over a model's members"),
    "batch_size": (64, "examples of a step"),
    "optimizer": ("sgd", "sgd, or muon: it for kernels of convolutions, SGD for the rest"),
    "muon": {
      "learning_rate": (0.05, "of kernels of convolutions, with train.optimizer=muon"),
      "weight_decay": (0.05, "likewise"),
      "momentum": (0.9, "likewise"),
    },
    "learning_rate": (0.1, "highest of the schedule"),
    "momentum": (0.9, "of SGD"),
    "nesterov": (False, "whether momentum looks ahead"),
    "weight_decay": (5e-4, "on all parameters"),
    "schedule": ("cosine", "of the learning rate: cosine, triangular or constant"),
    "label_smoothing": (0.0, "in [0, 1)"),
    "augmentation": (
      (),
      "of training images: flip, crop4, shift1, ...; vectors and tokens have none",
    ),
    "models_per_chunk": (AUTO, "models of one folder and one process: a number, or auto"),
    "models_together": (
      AUTO,
      "models of one program on one device: a number, auto or measure, see train.lowering",
    ),
    "lowering": (
      "auto",
      "of many models' convolutions: unrolled, patches or grouped; measure: what is fastest in "
      "real steps, with models_together unless that is a number; auto: a rule, but measure where "
      "training on an accelerator is reckoned to take ten minutes or more",
    ),
    "cache_dir": (
      Optional(str),
      "of what was measured; ~/.cache/ptq_jax/measured if not given, '' for none",
    ),
    "checkpoint_minutes": (5.0, "between checkpoints"),
  },
  "queries": {
    "views": (1, "augmented queries of each example, the same for every model"),
    "augmentation": ((), "of queries, as train.augmentation"),
    "batch_size": (500, "examples scored at once"),
  },
  "quantize": {
    "methods": (("nearest", "adaround", "brecq", "obc"), "of ptq_jax.quantize.METHODS"),
    "levels": ((3, 4, 16), "of the grid, 2 to 256: 3 is written 1.58 bit"),
    "last_layer_levels": (("same",), "same, usual (256 beside 3), a number, or full precision"),
    "sweep_last_layer_at": ((), "levels with which every precision of the last layer is tried"),
    "overrides": ((), "levels by path pattern, such as ('stem/*=256',)"),
    "calibration_size": (512, "members that calibrate a model; at most all of them"),
    "calibration_augmentation": ((), "of calibration images, as train.augmentation"),
    "calibrate_on": ("members", "members or non_members of each model"),
    "nearest": _EVERY_METHOD,
    "adaround": _EVERY_METHOD
    | {
      "form": ("auto", "second_moment, mini_batch (the paper's), or auto: the cheaper of the two"),
      "stop": _STOP,
      "second_moment": _schedule(400, 0.2, 0.01, (0.8, 0.9)),
      "mini_batch": _schedule(20_000, 1e-3, 1e-3, (0.9, 0.999)),
      "sweeps": (10, "most passes over the weights after the second-moment form"),
    },
    "brecq": _EVERY_METHOD
    | {
      "units": (Optional(tuple), "patterns of module paths; the model's own if not given"),
      "loss": ("mse", "mse, or fisher: outputs of a unit weighed by the squared gradient"),
      "form": ("auto", "mini_batch (the paper's), or auto: AdaRound's form where a unit allows it"),
      "stop": _STOP,
      "schedule": _schedule(400, 0.2, 0.1, (0.8, 0.9)),
    },
    "obc": _EVERY_METHOD
    | {
      "damping": (0.0, "share by which the diagonal of the Hessian grows, at first"),
      "batchnorm": ("members", "whose examples give the statistics anew: members, all or none"),
      "block_size": (Optional(int), "columns between updates of the others; by size if not given"),
    },
  },
  "attack": {
    "attacks": (
      # With few shadows a variance per example is a coarse guess; the pooled one is steady.
      (
        "lira_online_pooled",
        "lira_online_shrunk",
        "lira_online",
        "lira_offline_pooled",
        "rmia_online",
        "loss_threshold",
      ),
      "of ptq_jax.attack.protocol.ATTACKS; the first is the main one",
    ),
    "fprs": ((0.01, 0.001, 0.0001, 0.00001), "false-positive rates, in (0, 1]"),
    "resamples": (1000, "of the bootstrap"),
    "confidence": (0.95, "of intervals, in (0, 1)"),
    "delta": (1e-5, "at which epsilon is bounded, in [0, 1)"),
    "worst_classes": (3, "so many classes that leak most are named"),
    "exposed_share": (0.01, "of the pool: the set of most exposed examples that is compared"),
  },
  "report": {
    "show_images": (
      False,
      "whether the most exposed training images, personal data perhaps, are written and shown",
    ),
    "figures": (True, "whether figures are drawn; without them there are tables and the page"),
  },
}
"""Default and meaning of every key; those of a method are the defaults of its function (tested)."""

OPEN_SECTIONS = ("model",)
"""Sections that take further keys: options of a model's factory."""


def audit_defaults() -> Config:
  """Every setting of an audit with its default; a config file changes some and returns it.

  An unknown key is refused, but in `OPEN_SECTIONS`.
  """
  config = config_dict.create(**_map_settings(SETTINGS, lambda default, _: _field(default)))
  config.lock()
  for name in OPEN_SECTIONS:
    get(config, name).unlock()
  return config


def descriptions() -> dict[str, str]:
  """What every key means, by dotted key."""
  return dotted(_map_settings(SETTINGS, lambda _, text: text))


def _map_settings(settings, function):
  return {
    key: _map_settings(value, function) if isinstance(value, dict) else function(*value)
    for key, value in settings.items()
  }


def _field(default):
  if isinstance(default, Optional):
    return config_dict.placeholder(default.kind)
  return copy.copy(default) if isinstance(default, config_dict.FieldReference) else default


def get(config: Config | Mapping[str, Any], key: str) -> Any:
  """The value or section at a dotted key."""
  for part in key.split("."):
    config = config[part]
  return config


def shipped(path: str) -> str:
  """The path of a config; a file that is not there is looked for among the shipped ones.

  Those are known by their name, "smoke", and as "configs/smoke.py" from any folder.
  """
  file, colon, argument = str(path).partition(":")
  root = pathlib.Path(__file__).resolve().parents[1]
  for known in (root / file, root / "configs" / f"{file}.py"):
    if file and not pathlib.Path(file).is_file() and known.is_file():
      return f"{known}{colon}{argument}"
  return str(path)


def load(path: str) -> Config:
  """The config of a file, "path/to/file.py" or "path/to/file.py:argument", or of a shipped name.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file that sets an unknown key or gives no config, or whose imports fail.
  """
  file, _, argument = shipped(path).partition(":")
  if not pathlib.Path(file).is_file():
    folder = pathlib.Path(__file__).resolve().parents[1] / "configs"
    names = sorted(found.stem for found in folder.glob("*.py") if found.stem != "protocols")
    raise FileNotFoundError(f"--config {file} does not exist; shipped ones are {', '.join(names)}.")
  spec = importlib.util.spec_from_file_location("ptq_jax_config", file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
  except (AttributeError, KeyError, ImportError, SyntaxError, TypeError) as error:
    locked = re.search(r'Key "(\w+)" does not exist and cannot be added', str(error))
    reason = unknown_key(locked[1]) if locked else " ".join(f"{error}.".split())
    raise ValueError(f"--config {file} could not be read: {reason}") from error
  if not isinstance(config, Config):
    raise ValueError(f"--config {file} must return a ConfigDict from get_config().")
  require_known_keys(config)
  return config


def require_known_keys(config: Config) -> None:
  """Raises ValueError for the first key that no audit has; options of models and methods may be."""
  known = dotted(plain(audit_defaults()))
  for key in dotted(plain(config)):
    if key not in known and not key.startswith(tuple(f"{name}." for name in OPEN_SECTIONS)):
      raise ValueError(unknown_key(key))


def plain(config: Any) -> Any:
  """A config as dicts, lists and numbers, the way JSON gives it back."""
  if isinstance(config, Config | Mapping):
    return {key: plain(config[key]) for key in config}
  if isinstance(config, list | tuple):
    return [plain(value) for value in config]
  return config


def named(section: Config, *leave_out: str) -> dict[str, Any]:
  """A section of a config as keyword arguments; lists become tuples, so that they are hashable."""
  chosen = {key: value for key, value in section.items() if key not in leave_out}
  return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in chosen.items()}


def arguments(function: Callable, section: Config, *leave_out: str) -> dict[str, Any]:
  """A section of a config as keyword arguments of a function, checked against its signature.

  A subsection changes the fields that it names of the record which is the argument's default; where
  the default is no record, the subsection becomes a dict.

  Raises:
    ValueError: for an argument or a field that does not exist.
  """
  name = function.__module__.rpartition(".")[2]
  defaults = {
    parameter.name: parameter.default
    for parameter in inspect.signature(function).parameters.values()
    if parameter.default is not parameter.empty
  }
  chosen = named(section, *leave_out)
  _require_known(chosen, defaults, name)
  for key, value in chosen.items():
    if isinstance(value, Config):
      fields, default = named(value), defaults[key]
      if hasattr(default, "_replace"):
        _require_known(fields, default._fields, f"{name}.{key}")
      chosen[key] = default._replace(**fields) if hasattr(default, "_replace") else fields
  return chosen


def _require_known(chosen, known, name):
  """Raises ValueError for the first key that is not known."""
  for key in chosen:
    if key not in known:
      raise ValueError(f"{name} has no option {key!r}; it has {', '.join(known)}.")


def of_results(config: Config | Mapping[str, Any]) -> dict[str, Any]:
  """A config as JSON without what results do not depend on: how they are reported."""
  return {key: value for key, value in plain(config).items() if key != "report"}


def fingerprint(value: Any) -> str:
  """Sixteen hexadecimal digits that change with any value in a config."""
  return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


SOURCES = (".py", ".jinja", ".css", ".js", ".mplstyle")
"""Endings of the files that a version of the code covers."""


def code_version(*parts: str) -> str:
  """Sixteen hexadecimal digits that change with the source of parts of this package.

  Args:
    *parts: modules or folders of the package, such as "attack".
  """
  root, found = pathlib.Path(__file__).parent, hashlib.sha256()
  for part in parts:
    folder, file = root / part, root / f"{part}.py"
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [file]:
      if path.suffix not in SOURCES:
        continue
      found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return found.hexdigest()[:16]


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
  """Dotted keys whose values differ, each with a clause that names both values.

  >>> differences({"train": {"epochs": 3, "seed": 1}}, {"train": {"epochs": 4, "seed": 1}})
  {'train.epochs': 'train.epochs is 4, was 3'}
  """
  old, new = dotted(stored), dotted(current)
  return {
    key: f"{key} is {new.get(key, 'absent')}, was {old.get(key, 'absent')}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  }


def parse_arg(arg: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """Reads the argument of a config file, `--config=configs/x.py:method=brecq,levels=4`.

  >>> parse_arg("levels=4", {"levels": 3, "method": "obc"})
  {'levels': 4, 'method': 'obc'}

  Raises:
    ValueError: for a key that `defaults` does not have, or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, arg.split(",")):
    key, equals, text = item.partition("=")
    if key not in defaults or not equals:
      raise ValueError(f"config argument {item!r} is not one of {sorted(defaults)} as key=value.")
    kind = type(defaults[key])
    try:
      values[key] = ast.literal_eval(text) if kind is bool else kind(text)
    except (ValueError, SyntaxError) as error:
      raise ValueError(f"config argument {key} needs a {kind.__name__}, got {text!r}.") from error
  return values


def dotted(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values of nested mappings by dotted key.

  >>> dotted({"train": {"epochs": 3}, "seed": 0})
  {'train.epochs': 3, 'seed': 0}
  """
  flat = {}
  for key, value in mapping.items():
    if isinstance(value, Mapping):
      flat |= dotted(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def unknown_key(key: str) -> str:
  """The sentence about a key that there is not, with the one that was probably meant."""
  known = list(dotted(plain(audit_defaults())))
  if "." in key:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  else:
    names = {name.rpartition(".")[2]: name for name in known}
    names |= {name.partition(".")[0]: name.partition(".")[0] for name in known}
    close = [names[name] for name in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
  hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
  return f"the config has no key {key!r}; {hint}"
