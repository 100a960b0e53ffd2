"""From the command line to a config, and from exceptions to one sentence: what absl does not do."""

import ast
import os
import pathlib
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from ptq_jax import settings, storage
from ptq_jax.audit import stopping, work

USER_ERROR, FAILURE = 2, 1
"""Exit codes: what the user can repair, and what went wrong while running.

Stopped by a signal, a launcher exits with 128 and the signal's number, as shells do.
"""

USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)

BAD_CONFIG = (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError)

FLAGS = {
  "workdir": "Where everything is written, and resumed from; {} if not given.",
  "models": "Folder of the trained models, if not WORKDIR/models; several audits may share one.",
  "shard": "I/N: do part I of N of the models, from 0/N on; auto: as a scheduler's variables say.",
  "compilation_cache": "Folder of JAX's compilation cache ('' for none).",
}


def launch(
  run: Callable[..., None],
  *,
  description: str,
  config: str = "configs/digits.py",
  workdir: str | None = None,
  options: Mapping[str, str] | None = None,
  switches: Mapping[str, str] | None = None,
  several: Mapping[str, str] | None = None,
) -> None:
  """A launcher's `main`: parses the flags, calls `run(config, workdir, **options)`, sets the code.

  Args:
    run: one stage, or all of them; its config is a ConfigDict, its workdir a path, and it gets the
      flags `models` and `shard` as keywords, too.
    description: what `--help` says first.
    config: the default of --config, a path.
    workdir: the default of --workdir; None: runs/NAME with the name of the config's file.
    options: help texts of further flags by name; their values are strings, or None.
    switches: likewise of flags that are true or false.
    several: likewise of at most one flag that takes all words that belong to no flag: a list.
  """
  options, switches, several = options or {}, switches or {}, several or {}
  for name, text in FLAGS.items():
    text = text.format(workdir or "runs/NAME of --config=NAME.py")
    flags.DEFINE_string(name, workdir if name == "workdir" else None, text)
  for name, text in options.items():
    flags.DEFINE_string(name, None, text)
  for name, text in switches.items():
    flags.DEFINE_bool(name, False, text)
  for name, text in several.items():
    flags.DEFINE_multi_string(name, None, text)
  debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
  default = settings.shipped(_base(sys.argv, config))
  values = _define_config(default)
  if {"--help", "-h", "-help"} & set(sys.argv[1:]):
    print(_help(description, flags.FLAGS["config"].value, (*options, *switches, *several)))
    sys.exit(0)

  @stopping.raised()
  def main(arguments: Sequence[str]) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal of ASCII gets question marks, no crash
    sys.stderr.reconfigure(errors="replace")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # absl's default also shows JAX's notes to itself
    try:
      chosen = {n: flags.FLAGS[n].value for n in ("models", *options, *switches, *several)}
      for name in several:
        if chosen[name]:
          chosen[name] += arguments[1:]
          arguments = arguments[:1]
      if len(arguments) > 1:
        raise ValueError(f"{arguments[1]!r} is not a flag; flags start with --, see --help.")
      shard = work.parse_shard(flags.FLAGS.shard)
      gpus = work.own_gpus()
      if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
      use_compilation_cache(flags.FLAGS.compilation_cache)
      where = flags.FLAGS.workdir
      if where is None:
        where = os.path.join("runs", pathlib.Path(_path_of(sys.argv, default).split(":")[0]).stem)
      run(_checked(values.value), pathlib.Path(where) if where else "", shard=shard, **chosen)
    except stopping.Stopped as stopped:
      _say(f"stopped by {stopped}; the same command goes on from what is saved.", 0)
      sys.exit(128 + stopped.number)
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
      if debug.value:
        raise
      sys.exit(_explain(error))

  app.run(main, flags_parser=_parse)


def _base(arguments, default):
  """The config for these arguments if they name none: own data and models have one of their own."""
  own = tuple(f"--config.{key}=" for key in ("data.name", "model.name"))
  return "configs/own.py" if any(a.startswith(own) for a in arguments) else default


def given(name: str) -> bool:
  """Whether a flag stands on the command line."""
  return flags.FLAGS[name].present > 0


def overridden() -> list[str]:
  """Keys of the config that stand on the command line."""
  given = (a.removeprefix("--config.") for a in _ARGUMENTS[1:] if a.startswith("--config."))
  return [argument.partition("=")[0] for argument in given]


def command_line() -> str:
  """How this program was called."""
  return shlex.join(["python", "-m", f"launch.{pathlib.Path(_ARGUMENTS[0]).stem}", *_ARGUMENTS[1:]])


def use_compilation_cache(directory: str | None) -> None:
  """Lets JAX keep compiled programs between runs, in the user's cache folder by default.

  An environment variable JAX_COMPILATION_CACHE_DIR has the last word.
  """
  import jax

  if directory is None:
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(storage.user_cache() / "jax"))
  if directory:
    jax.config.update("jax_compilation_cache_dir", directory)
    # Small programs too: there are hundreds, and to read one takes a fraction of compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _define_config(default):
  """--config; overrides of it are read already here.

  Options of models and methods are taken out and set later: absl's flags know only keys that the
  config has already.
  """
  for argument in _ARGUMENTS[1:]:
    key, equals, text = argument.removeprefix("--config.").partition("=")
    opened = key.startswith(tuple(f"{section}." for section in settings.OPEN_SECTIONS))
    if argument.startswith("--config.") and equals and opened and key != "model.name":
      _OPEN[key] = _literal(text)
      sys.argv.remove(argument)
  for index, argument in enumerate(sys.argv):  # shipped configs are known from any folder
    if argument.startswith("--config="):
      sys.argv[index] = f"--config={settings.shipped(argument.partition('=')[2])}"
    elif sys.argv[index - 1] == "--config":
      sys.argv[index] = settings.shipped(argument)
  try:
    return config_flags.DEFINE_config_file(
      "config", default, "Python file with get_config(arg=''); FILE.py:ARG passes it ARG."
    )
  except BAD_CONFIG as error:
    sys.exit(_say(_unknown_key(sys.argv, default) or _unreadable(error), USER_ERROR))


_ARGUMENTS = tuple(sys.argv)
"""The command line as it was given."""

_OPEN: dict[str, object] = {}
"""Values of --config.KEY in open sections, by key."""


def _literal(text):
  """The value that a flag's text means: a Python literal, a truth, or the text itself."""
  words = {"true": True, "false": False}
  try:
    return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _help(description, config, own):
  """What --help prints: the purpose, the flags, every key of the config with value and meaning."""
  names = ("config", *FLAGS, *own, "debug")
  lines = [f"  --{name}: {flags.FLAGS[name].help}" for name in names]
  keys = settings.dotted(settings.plain(config)) if isinstance(config, settings.Config) else {}
  meanings = settings.descriptions()
  lines += ["", "Keys of the config, as --config.KEY=VALUE, with the values of this --config:"]
  for key, value in keys.items():
    meaning = f"  ({meanings[key]})" if meanings.get(key) else ""
    lines.append(f"  {key} = {value!r}{meaning}")
  return "\n".join([description.strip(), "", "Flags:", *lines])


def _parse(arguments):
  """absl's parser, with one sentence instead of a traceback."""
  try:
    return flags.FLAGS(arguments)
  except flags.Error as error:
    line = str(error).strip().splitlines()[-1]  # what a config file raised comes with a traceback
    sys.exit(_say(f"{line.removeprefix('ValueError: ').rstrip('.')}; see --help.", USER_ERROR))
  except BAD_CONFIG as error:
    default = flags.FLAGS["config"].default
    sys.exit(_say(_unknown_key(arguments, default) or _unreadable(error), USER_ERROR))


def _unreadable(error):
  return f"the config could not be read: {' '.join(str(error).split())}"


def _unknown_key(arguments, default):
  """Names the first --config.key that the config file does not define."""
  try:
    known = settings.dotted(settings.plain(settings.load(_path_of(arguments, default))))
  except ValueError as error:
    return str(error)
  except Exception:
    return None
  for argument in arguments:
    if argument.startswith("--config."):
      key = argument.removeprefix("--config.").partition("=")[0]
      if key not in known:
        return settings.unknown_key(key)
  return None


def _checked(config):
  """The config with the options of open sections, or the reason why it could not be read."""
  if not isinstance(config, settings.Config):
    settings.load(_path_of(sys.argv, flags.FLAGS["config"].default))  # raises the reason, if it can
    raise ValueError("--config must name a file whose get_config() returns a ConfigDict.")
  for key, value in _OPEN.items():
    *parents, name = key.split(".")
    section = config
    for parent in parents:
      if parent not in section:
        section[parent] = settings.Config()
      section = section[parent]
    section[name] = value
  settings.require_known_keys(config)
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
  if isinstance(error, OSError):
    return _say(f"{type(error).__name__}: {lines[0] if lines else ''}", FAILURE)
  if isinstance(error, RuntimeError | AssertionError) and _no_backend(error):
    return _say(
      f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}; unset it, or "
      "install JAX for that device.",
      USER_ERROR,
    )
  place = traceback.extract_tb(error.__traceback__)[-1]
  what = f"{type(error).__name__}: {lines[0] if lines else ''}"
  where = f"{pathlib.Path(place.filename).name}:{place.lineno}"
  return _say(f"{what} (at {where}; --debug shows all). What is saved is kept.", FAILURE)


def _no_backend(error):
  """Whether an exception comes from JAX looking for a device."""
  frames = traceback.extract_tb(error.__traceback__)
  return any(pathlib.Path(frame.filename).name == "xla_bridge.py" for frame in frames)


def _say(sentence, code):
  print(f"error: {sentence}", file=sys.stderr, flush=True)
  return code
