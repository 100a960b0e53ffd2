"""Damages every file of a finished workdir in every way, and says what becomes of it.

    bash launch/run bench faults [--config configs/smoke.py] [--files GLOB] [--places GLOB]
        [--config.KEY=VALUE ...]

Each file, but the locks and those of chunks after the first, is deleted, emptied, halved, has one
bit flipped or one in each of 128 bytes, is zeroed, or holds other JSON; then the audit runs again
in this process, on a copy; where a file of models is damaged, quantizing is not complete there, so
that models are needed. Then reads and writes fail on purpose (I/O error, too many open files, no
space, no memory), from the first and from the third time on, one failure after the other in one
workdir where a chunk is to be trained and a variant quantized, then none. "made good" means that
the audit ran to its end with every score, all codes and results as before, and finds nothing wrong
in the workdir; "named" that it ended with a sentence; in both cases all files of trained models are
still there, under another name perhaps.
Exits with 1 if anything ends otherwise.
"""

import argparse
import collections
import contextlib
import errno
import fnmatch
import hashlib
import itertools
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np

from launch import progress, sweep
from ptq_jax import audit, settings, storage
from ptq_jax.audit import events, preflight
from ptq_jax.report import records

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
  "deleted": lambda data: None,
  "empty": lambda data: b"",
  "half": lambda data: data[: len(data) // 2],
  "one bit": lambda data: _flipped(data, 1),
  "128 bits": lambda data: _flipped(data, 128),
  "zeroed": lambda data: bytes(len(data)),
  "wrong type": lambda data: b"[]",
}

FAILURES = {
  "EIO": OSError(errno.EIO, "Input/output error"),
  "EMFILE": OSError(errno.EMFILE, "Too many open files"),
  "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
  "memory of the device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
  "memory": MemoryError("Unable to allocate 8 GiB"),
}

PLACES = {
  "reading a checkpoint": (storage.Checkpoints, "_read"),
  "checking a checkpoint": (storage, "_file_checksum"),
  "reading a file": (storage.Path, "read_bytes"),
  "reading arrays of a file": (storage.np, "load"),
  "reading JSON": (storage, "read_json"),
  "a checkpointer": (storage, "_orbax"),
  "writing a file": (storage.os, "fsync"),
}

CHUNK = re.compile(r"\w+-\d{5}-\d{5}")
"""The name of a chunk in a path."""

TIMED = ("manifest.json", "results.md", "index.html")
"""Files that tell of times: they need only be there."""


def main(argv: list[str]) -> None:
  """Prints a table of kinds of files and damages, and one of failures."""
  options, overrides = _parser().parse_known_args(argv)
  config = settings.load(options.config)
  pairs = (override.removeprefix("--config.").partition("=") for override in overrides)
  config = sweep.with_values(config, {key: text for key, _, text in pairs})
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # where there is a cache
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder, "whole")
    audit.run(config, workdir=whole)
    first = min((whole / "models").glob("*-*-*")).name
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if _counts(path)]
    files = [name for name in files if name.match(options.files)]
    files = [name for name in files if CHUNK.findall(str(name)) in ([], [first])]
    tries = [(name, how) for name in files for how in DAMAGES]
    places = [where for where in PLACES if fnmatch.fnmatch(where, options.places)]
    ended: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    failed: dict[tuple[str, str], list[str]] = collections.defaultdict(list)

    def note(cells, row, how, end):
      cells[row, how].append(end)
      stage.advance(1, f"{row}, {how}: {end}")
      if "WRONG" in end:
        stage.say(end)

    with events.Stage(
      progress.Lines(), "faults", len(tries) + len(places) * (2 * len(FAILURES) + 1)
    ) as stage:
      for name, how in tries:
        note(ended, _kind(name), how, _after_damage(config, whole, folder, name, how))
      for where in places:
        for how, ends in _after_failures(config, whole, folder, where).items():
          for end in ends:
            note(failed, where, how, end)
  print(_table(ended, "file", list(DAMAGES)))
  print(_table(failed, "failure", [*FAILURES, "then"]))
  wrong = [each for cell in (*ended.values(), *failed.values()) for each in cell if "WRONG" in each]
  print("\n".join(wrong) or "Nothing good was lost and nothing wrong was taken for right.")
  sys.exit(bool(wrong))


def _counts(path):
  return path.is_file() and "lock" not in str(path)


def _kind(name):
  """Files of a kind stand in one row: the folder without numbers, or the file itself."""
  if "trained" in name.parts:
    return "models/*/trained/STEP.json" if name.suffix == ".json" else "models/*/trained/STEP/*"
  parts = [part for part in name.parts if "shadows-" not in part and "targets-" not in part]
  return "/".join([parts[0], "*", *parts[2:]] if len(parts) > 1 and parts[0] != "models" else parts)


def _after_damage(config, whole, folder, name, how):
  """What an audit does with one damaged file."""
  copy = _copy(whole, folder)
  if name.parts[0] == "models":
    _take_away_codes(copy)
  damaged = DAMAGES[how]((copy / name).read_bytes())
  kept = _trained_files(copy) - {_digest(copy / name)}
  (copy / name).unlink()
  if damaged is not None:
    (copy / name).write_bytes(damaged)
  return _ending(config, whole, copy, kept, f"{name} {how}")


def _after_failures(config, whole, folder, where) -> dict[str, list[str]]:
  """What audits do when reads or writes fail in every way from the nth on, then one without."""
  copy, ended = _unfinished(whole, folder), collections.defaultdict(list)
  kept = _trained_files(copy)
  target, attribute = PLACES[where]
  original = getattr(target, attribute)
  for nth in (1, 3):
    for how, error in FAILURES.items():
      calls = itertools.count(1)

      def fail(*arguments, calls=calls, error=error, nth=nth, **more):
        if next(calls) >= nth:
          raise type(error)(*error.args)
        return original(*arguments, **more)

      failing, what = mock.patch.object(target, attribute, fail), f"{where}, {how} ({nth})"
      end = _ending(config, whole, copy, kept, what, during=failing)
      happened = next(calls) > nth or end != "made good"
      ended[how].append(end if happened else "did not happen")
      if end != "named":
        copy = _unfinished(whole, folder)
  ended["then"].append(_ending(config, whole, copy, kept, f"after {where}"))
  return ended


def _unfinished(whole, folder):
  """A copy where a chunk is to be trained, and all of them to be scored and quantized."""
  copy = _copy(whole, folder)
  _take_away_codes(copy)
  *_, last = sorted((copy / "models").glob("*-*-*"))
  shutil.rmtree(last / "trained")
  for path in copy.glob("scores/full_precision/*.npz"):
    path.unlink()
  return copy


def _take_away_codes(copy):
  """Leaves something to do that needs every model."""
  shutil.rmtree(min((copy / "quantized").iterdir()))


def _ending(config, whole, copy, kept, what, during=None):
  """How a run on a damaged copy ends; `kept` are digests of files that must not get lost."""
  try:
    with during or contextlib.nullcontext():
      audit.run(config, workdir=copy)
  except Exception as error:
    if not kept <= _trained_files(copy):
      return f"WRONG: {what}: {error} and models are gone"
    sentence = isinstance(error, OSError | ValueError | RuntimeError | MemoryError) and str(error)
    return "named" if sentence else f"WRONG: {what}: no sentence: {error!r}"
  if not kept <= _trained_files(copy):
    return f"WRONG: {what}: models are gone"
  if problems := preflight.verify(preflight.open_audit(config, copy)):
    return f"WRONG: {what}: {problems[0]}"
  differing = [path for path in whole.rglob("*") if _counts(path) and _differs(whole, copy, path)]
  return f"WRONG: {what}: {differing[0].relative_to(whole)} differs" if differing else "made good"


def _differs(whole, copy, path):
  """Whether a file is not in the copy what it is in the whole workdir, but for times."""
  other = copy / path.relative_to(whole)
  if "trained" in path.parts or path.name in ("metrics.jsonl", "seconds.json"):
    return False  # checksums have been looked at; nothing depends on curves and times
  if not other.exists():
    return True
  if path.name == "results.jsonl":
    return _leakage(path) != _leakage(other)
  if path.suffix == ".npz" and "quantized" not in path.parts:
    one, two = (_timeless(storage.load_arrays(each)) for each in (path, other))
    same = (np.array_equal(two.get(k), one[k], equal_nan=one[k].dtype.kind == "f") for k in one)
    return one.keys() != two.keys() or not all(same)
  return path.name not in TIMED and path.read_bytes() != other.read_bytes()


def _leakage(path):
  return records.select(storage.read_records(path), "leakage")


def _timeless(arrays):
  return {name: array for name, array in sorted(arrays.items()) if "seconds" not in name}


def _trained_files(copy) -> set[str]:
  """Digests of all files of trained models."""
  return {_digest(path) for path in copy.glob("models/*/trained/**/*") if path.is_file()}


def _digest(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


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


def _flipped(data, count):
  """A bit of each of some bytes in the middle."""
  start = len(data) // 2
  flipped = bytes(byte ^ 1 for byte in data[start : start + count])
  return data[:start] + flipped + data[start + count :]


def _parser() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
    prog="bench faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--config", default="configs/smoke.py")
  flags.add_argument("--files", default="*", help="damage only such files")
  flags.add_argument("--places", default="*", help="fail only at such places")
  return flags
