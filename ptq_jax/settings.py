"""From flags and config files to named arguments, and from exceptions to one sentence.

The only module of the package that knows absl and ml_collections.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

Config = config_dict.ConfigDict

USER_ERROR, FAILURE = 2, 1
"""Exit codes: what the user can repair, and what went wrong while running.

Stopped by a signal, a launcher exits with 128 and the signal's number, as shells do.
"""

USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)


def audit_defaults() -> Config:
  """Every setting of an audit with its default; a config file changes some and returns it."""
  return config_dict.create(
    name="audit",
    seed=0,
    data=dict(
      name="digits",  # digits, npz, tiny_imagenet, image_folder, or a name of TensorFlow Datasets
      data_dir=config_dict.placeholder(str),  # of TensorFlow Datasets
      path=config_dict.placeholder(str),  # of npz, tiny_imagenet and image_folder
      cache_dir=config_dict.placeholder(str),  # of decoded images; beside the data if not given
      pool_size=config_dict.placeholder(int),  # the whole training split if not given
      test_size=config_dict.placeholder(int),
      image_size=config_dict.placeholder(int),
    ),
    model=dict(name="convnet"),  # of ptq_jax.models.ZOO or "package.module:factory"; its options
    train=dict(
      models=16,  # shadows, even
      targets=0,  # 0: every model is target once, the others are its shadows
      epochs=40,
      batch_size=64,
      optimizer="sgd",  # or muon: it for kernels of convolutions, SGD for the rest
      muon=dict(learning_rate=0.05, weight_decay=0.05, momentum=0.9),
      learning_rate=0.1,
      momentum=0.9,
      nesterov=False,
      weight_decay=5e-4,
      schedule="cosine",
      label_smoothing=0.0,
      augmentation=(),  # flip, crop4, shift1, ...
      # At once: a number, or "auto" for as many as fit. Memory only: no result depends on it.
      models_per_chunk=config_dict.FieldReference("auto", field_type=object),
      lowering="auto",  # of many models' convolutions: also measure, unrolled, patches, grouped
      checkpoint_minutes=5.0,
    ),
    queries=dict(
      views=2,  # augmented queries of each example, the same for every model
      augmentation=(),
      batch_size=500,
    ),
    quantize=dict(
      methods=("nearest", "adaround", "brecq", "obc"),
      levels=(3, 4, 16),
      last_layer_levels=("same",),  # "same", "usual" (256 beside 3), a number, or "full" precision
      sweep_last_layer_at=(),  # levels with which every precision of the last layer is tried
      overrides=(),  # levels by path pattern, such as ("stem/*=256",)
      calibration_size=512,
      calibration_augmentation=(),
      calibrate_on="members",  # or "non_members" of each model
      nearest=config_dict.ConfigDict(),  # further arguments of the method's quantize_stacked
      adaround=config_dict.ConfigDict(),
      brecq=config_dict.ConfigDict(),
      obc=config_dict.ConfigDict(),
    ),
    attack=dict(
      attacks=("lira_online", "lira_online_pooled", "lira_offline", "loss_threshold"),  # main first
      fprs=(0.01, 0.001, 0.0001, 0.00001),
      resamples=1000,  # of the bootstrap
      confidence=0.95,
      exposed_share=0.01,  # of the pool: the set of most exposed examples that is compared
    ),
  )


def launch(
  run: Callable[..., None],
  *,
  config: str,
  workdir: str,
  description: str,
  options: Mapping[str, str] | None = None,
) -> None:
  """A launcher's `main`: parses the flags, calls `run(config, workdir, **options)`, sets the code.

  Args:
    run: one stage, or all of them.
    config: the default of --config, a path.
    workdir: the default of --workdir.
    description: what `--help` says first.
    options: help texts of further flags by name; their values are strings, or None.
  """
  options = options or {}
  for name, text in options.items():
    flags.DEFINE_string(name, None, text)
  values, where, debug = _define_flags(config, workdir)
  if {"--help", "-h", "-help"} & set(sys.argv[1:]):
    print(_help(description, flags.FLAGS["config"].value, options))
    sys.exit(0)

  def main(arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # absl's default also shows JAX's notes to itself
    try:
      if len(arguments) > 1:
        raise ValueError(f"{arguments[1]!r} is not a flag; flags start with --, see --help.")
      use_compilation_cache(flags.FLAGS.compilation_cache)
      _join_processes()
      chosen = {name: flags.FLAGS[name].value for name in options}
      run(_checked(values.value), pathlib.Path(where.value), **chosen)
    except Stopped as stopped:
      _say(f"stopped by {stopped}; the same command goes on from what is saved.", 0)
      sys.exit(128 + stopped.number)
    except Exception as error:
      if debug.value:
        raise
      sys.exit(_explain(error))

  app.run(main, flags_parser=_parse)


class Stopped(KeyboardInterrupt):
  """The user or the machine's scheduler asked the program to stop."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


def _stop(number, _frame):
  raise Stopped(number)


@contextlib.contextmanager
def stops_deferred() -> Iterator[Callable[[], Stopped | None]]:
  """Inside, a first Ctrl-C or SIGTERM does not raise: the function yielded returns it instead.

  So a loop can save its state at the next good moment and raise then. A second one raises at once.
  """
  asked: list[Stopped] = []

  def remember(number, frame):
    if asked:
      _stop(number, frame)
    asked.append(Stopped(number))

  before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield lambda: asked[0] if asked else None
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _join_processes():
  """Joins the other processes of a distributed run, if the flags say that there are any."""
  import jax

  values = {
    name: flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id")
  }
  if not flags.FLAGS.distributed and values["coordinator"] is None:
    return
  missing = [name for name, value in values.items() if value is None]
  if values["coordinator"] is not None and missing:
    raise ValueError(f"--coordinator also needs --{missing[0]}.")
  try:
    jax.distributed.initialize(
      values["coordinator"],
      values["num_processes"],
      values["process_id"],
      shutdown_timeout_seconds=7 * 24 * 3600,  # the first process attacks while others wait
    )
  except (RuntimeError, ValueError) as error:
    raise RuntimeError(
      f"the processes could not find each other ({str(error).splitlines()[0]}); give "
      "--coordinator=HOST:PORT --num_processes=N --process_id=I."
    ) from error


def _define_flags(config, workdir):
  """--config, --workdir and the rest; overrides of --config are read already here."""
  try:
    values = config_flags.DEFINE_config_file(
      "config", config, "Python file with get_config(arg=''); FILE.py:ARG passes it ARG."
    )
  except _BAD_CONFIG as error:
    sys.exit(_say(_unknown_key(sys.argv, config) or _unreadable(error), USER_ERROR))
  where = flags.DEFINE_string("workdir", workdir, "Where everything is written, and resumed from.")
  debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
  flags.DEFINE_string("compilation_cache", None, "Folder of JAX's compilation cache ('' for none).")
  flags.DEFINE_bool("distributed", False, "Share the models with other processes that SLURM, Open"
                    " MPI or a TPU pod started; all need the same --workdir.")  # fmt: skip
  flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, when nothing started them.")
  flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are.")
  flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
  return values, where, debug


def _help(description, config, options):
  """What --help prints: the purpose, the flags, every key of the config with its default."""
  own = ("config", "workdir", *options, "debug", "compilation_cache", "distributed",
         "coordinator", "num_processes", "process_id")  # fmt: skip
  lines = [f"  --{name}: {flags.FLAGS[name].help}" for name in own]
  keys = _dotted(plain(config)) if isinstance(config, Config) else {}
  lines += ["", "Keys of the config, as --config.KEY=VALUE, with the values of this --config:"]
  lines += [f"  {key} = {value!r}" for key, value in keys.items()]
  return "\n".join([description.strip(), "", "Flags:", *lines])


def use_compilation_cache(directory: str | None) -> None:
  """Lets JAX keep compiled programs between runs, in the user's cache folder by default.

  An environment variable JAX_COMPILATION_CACHE_DIR has the last word.
  """
  import jax

  if directory is None:
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "ptq_jax", "jax"))
  if directory:
    jax.config.update("jax_compilation_cache_dir", directory)
    # Small programs too: there are hundreds, and to read one takes a fraction of compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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


def fingerprint(value: Any) -> str:
  """Sixteen hexadecimal digits that change with any value in a config."""
  return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
  """Dotted keys whose values differ, each with both values.

  >>> differences({"train": {"epochs": 3, "seed": 1}}, {"train": {"epochs": 4, "seed": 1}})
  ['train.epochs is 4, was 3']
  """
  old, new = _dotted(stored), _dotted(current)
  found = []
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key):
      found.append(f"{key} is {new.get(key, 'absent')}, was {old.get(key, 'absent')}")
  return found


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


def completed(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  """A stored config with the default of every key that it lacks: those younger than it.

  >>> completed({"train": {"epochs": 3}}, {"train": {"epochs": 40, "momentum": 0.9}})
  {'train': {'epochs': 3, 'momentum': 0.9}}
  """
  own = {
    key: completed(value, defaults.get(key, {})) if isinstance(value, Mapping) else value
    for key, value in stored.items()
  }
  return {**defaults, **own}


def _dotted(mapping, prefix=""):
  flat = {}
  for key, value in mapping.items():
    if isinstance(value, Mapping):
      flat |= _dotted(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


_BAD_CONFIG = (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError)


def _parse(arguments):
  """absl's parser, with one sentence instead of a traceback."""
  try:
    return flags.FLAGS(arguments)
  except flags.Error as error:
    line = str(error).strip().splitlines()[-1]  # what a config file raised comes with a traceback
    sys.exit(_say(f"{line.removeprefix('ValueError: ').rstrip('.')}; see --help.", USER_ERROR))
  except _BAD_CONFIG as error:
    default = flags.FLAGS["config"].default
    sys.exit(_say(_unknown_key(arguments, default) or _unreadable(error), USER_ERROR))


def _unreadable(error):
  return f"the config could not be read: {' '.join(str(error).split())}"


def _unknown_key(arguments, default):
  """Names the first --config.key that the config file does not define."""
  file = _path_of(arguments, default)
  try:
    known = _dotted(plain(load(file)))
  except Exception:
    return None
  for argument in arguments:
    if argument.startswith("--config."):
      key = argument.removeprefix("--config.").partition("=")[0]
      if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
        return f"the config has no key {key!r}; {hint}"
  return None


def load(path: str) -> Config:
  """The config of a file, "path/to/file.py" or "path/to/file.py:argument".

  Raises:
    FileNotFoundError: if there is no such file.
  """
  file, _, argument = str(path).partition(":")
  if not pathlib.Path(file).is_file():
    raise FileNotFoundError(f"--config {file} does not exist; the shipped ones are in configs/.")
  spec = importlib.util.spec_from_file_location("ptq_jax_config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument else module.get_config()


def _checked(config):
  """The config, or the reason why its file could not be read."""
  if not isinstance(config, Config):
    load(_path_of(sys.argv, flags.FLAGS["config"].default))  # raises the reason, if it can
    raise ValueError("--config must name a file whose get_config() returns a ConfigDict.")
  return config


def _path_of(arguments, default):
  """What --config says, before flags are parsed."""
  for argument, following in zip(arguments, [*arguments[1:], default], strict=True):
    if argument.startswith("--config="):
      return argument.partition("=")[2]
    if argument == "--config":
      return following
  return default


def _explain(error):
  """One sentence on stderr and an exit code for an exception."""
  message = error.args[0] if isinstance(error, KeyError) and error.args else error
  lines = str(message).splitlines()
  if isinstance(error, USER_ERRORS) and lines:
    return _say(" ".join(lines), USER_ERROR)
  place = traceback.extract_tb(error.__traceback__)[-1]
  what = f"{type(error).__name__}: {lines[0] if lines else ''}"
  if isinstance(error, OSError):
    return _say(what, FAILURE)
  where = f"{pathlib.Path(place.filename).name}:{place.lineno}"
  return _say(f"{what} (at {where}; --debug shows all). What is saved is kept.", FAILURE)


def _say(sentence, code):
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  return code
