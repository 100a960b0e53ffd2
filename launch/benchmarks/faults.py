"""Damages every file of a finished workdir in every way, and says what becomes of it.

    bash launch/run bench faults [--config configs/smoke.py] [--config.KEY=VALUE ...]

Each file, but the locks, is deleted, emptied, halved, has a bit flipped, is zeroed, or holds other
JSON; then the audit runs again in this process, on a copy. "made good" means that it ran
to its end with every score and result as before; "named" that it ended with a sentence and changed
nothing. Then reads and writes fail on purpose (I/O error, too many open files, no space, no
memory). Exits with 1 if anything ends otherwise.
"""

import argparse
import collections
import contextlib
import errno
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np

from launch import progress, sweep
from ptq_jax import audit, settings, storage
from ptq_jax.audit import events

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
  "deleted": lambda data: None,
  "empty": lambda data: b"",
  "half": lambda data: data[: len(data) // 2],
  "flipped": lambda data: data[: len(data) // 2] + _flipped(data[len(data) // 2 :]),
  "zeroed": lambda data: bytes(len(data)),
  "wrong type": lambda data: b"[]",
}

FAILURES = {
  "EIO": OSError(errno.EIO, "Input/output error"),
  "EMFILE": OSError(errno.EMFILE, "Too many open files"),
  "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
  "out of memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
}

PLACES = {
  "reading a checkpoint": (storage.Checkpoints, "_read"),
  "checking a checkpoint": (storage, "_file_checksum"),
  "reading arrays": (storage, "load_arrays"),
  "reading JSON": (storage, "read_json"),
  "writing a file": (storage.os, "fsync"),
}


def main(argv: list[str]) -> None:
  """Prints a table of kinds of files and damages, and one of failures."""
  options, overrides = _parser().parse_known_args(argv)
  config = settings.load(options.config)
  pairs = (override.removeprefix("--config.").partition("=") for override in overrides)
  config = sweep.with_values(config, {key: text for key, _, text in pairs})
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder, "whole")
    audit.run(config, workdir=whole)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if _counts(path)]
    ended: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    with events.Stage(progress.Lines(), "faults", len(files) * len(DAMAGES)) as stage:
      for name in files:
        for how in DAMAGES:
          ended[_kind(name), how].append(_after_damage(config, whole, folder, name, how))
          stage.advance(1, f"{name} {how}")
    print(_table(ended, "file", list(DAMAGES)))
    failed = collections.defaultdict(list)
    for where in PLACES:
      for how in FAILURES:
        failed[where, how].append(_after_failure(config, whole, folder, where, how))
    print(_table(failed, "failure", list(FAILURES)))
  wrong = [each for cell in (*ended.values(), *failed.values()) for each in cell if "WRONG" in each]
  print("\n".join(wrong) or "Nothing good was lost and nothing wrong was taken for right.")
  sys.exit(bool(wrong))


def _counts(path):
  return path.is_file() and "lock" not in str(path)


def _kind(name):
  """Files of a kind stand in one row: the folder without numbers, or the file itself."""
  parts = [part for part in name.parts[:-1] if "shadows-" not in part and "targets-" not in part]
  return "/".join([parts[0], "*"] if parts else [name.name])


def _after_damage(config, whole, folder, name, how):
  """What an audit does with one damaged file."""
  copy = _copy(whole, folder)
  damaged = DAMAGES[how]((copy / name).read_bytes())
  (copy / name).unlink()
  if damaged is not None:
    (copy / name).write_bytes(damaged)
  return _ending(config, whole, copy, f"{name} {how}")


def _after_failure(config, whole, folder, where, how):
  """What an audit does when a read or a write fails, and the next one when it does not."""
  copy = _copy(whole, folder)
  shutil.rmtree(next((copy / "quantized").iterdir()))
  target, attribute = PLACES[where]
  before = {path: path.read_bytes() for path in copy.rglob("*/trained/**/*") if path.is_file()}
  with mock.patch.object(target, attribute, side_effect=FAILURES[how]):
    try:
      audit.run(config, workdir=copy)
      first = "unharmed"
    except Exception as error:
      first = "named" if str(error) else f"WRONG: {where} {how}: no sentence"
  if any(not path.exists() or path.read_bytes() != data for path, data in before.items()):
    return f"WRONG: {where} {how}: models were lost"
  then = _ending(config, whole, copy, f"{where} {how}")
  return first if then == "made good" else then


def _ending(config, whole, copy, what):
  """How a run on a damaged copy ends."""
  before = {path: path.read_bytes() for path in copy.rglob("*/trained/**/*") if path.is_file()}
  try:
    audit.run(config, workdir=copy)
  except Exception as error:
    lost = [path for path in before if not path.exists()]
    return f"WRONG: {what}: {error} and {lost[0]} is gone" if lost else "named"
  for path in whole.glob("scores/*/*.npz"):
    expected, found = (storage.load_arrays(p) for p in (path, copy / path.relative_to(whole)))
    if not np.array_equal(expected["scores"], found["scores"], equal_nan=True):
      return f"WRONG: {what}: {path.name} of {path.parent.name} differs"
  for path in (path for path in whole.rglob("*") if _counts(path)):
    missing = not (copy / path.relative_to(whole)).exists()
    if missing and "models" not in path.parts:
      return f"WRONG: {what}: {path.name} is missing"
  return "made good"


def _copy(whole, folder):
  copy = pathlib.Path(folder, "copy")
  with contextlib.suppress(FileNotFoundError):
    shutil.rmtree(copy)
  return pathlib.Path(shutil.copytree(whole, copy))


def _table(cells, what, columns):
  """Rows of what ended how, as Markdown."""
  rows = [f"| {what} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
  for name in dict.fromkeys(name for name, _ in cells):
    ended = [collections.Counter(e.partition(":")[0] for e in cells[name, c]) for c in columns]
    texts = [", ".join(f"{n} {e}" for e, n in counts.items()) for counts in ended]
    rows.append(f"| {name} | {' | '.join(texts)} |")
  return "\n".join(rows)


def _flipped(data):
  return bytes([data[0] ^ 1]) + data[1:] if data else data


def _parser() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
    prog="bench faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--config", default="configs/smoke.py")
  return flags
