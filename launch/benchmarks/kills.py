"""Kills an audit at random moments and compares what it ends with to an uninterrupted run.

    bash launch/run bench kills [--times 20] [--config configs/smoke.py] [--seed 0]
        [--config.KEY=VALUE ...]

One audit runs through. Then fresh ones get a signal (SIGKILL, SIGTERM, SIGINT or SIGHUP; to the
process or to its whole group) at moments drawn evenly from the time that the first took, each
started again until it gets to its end, until --times signals have been dealt out. Every score of
every model in every variant must be the same. Exits with 1 if not.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from launch import progress
from ptq_jax import storage
from ptq_jax.audit import events

ROOT = pathlib.Path(__file__).resolve().parents[2]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str]) -> None:
  """Prints a line per audit, and how far the worst score was off."""
  options, settings = _parser().parse_known_args(argv)
  rng = np.random.default_rng(options.seed)
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder, "whole")
    command = [sys.executable, "-m", "launch.audit", "--config", options.config, *settings]
    _finish(command, whole)  # fills the compilation cache
    start = time.monotonic()
    _finish(command, pathlib.Path(folder, "timed"))
    seconds = time.monotonic() - start
    print(f"uninterrupted: {seconds:.1f} s", flush=True)
    expected, killed, worst, rounds = _scores(whole), 0, 0.0, 0
    with events.Stage(progress.Lines(), "kills", options.times) as stage:
      while killed < options.times:
        workdir = pathlib.Path(folder, f"killed-{rounds}")
        dealt = _run_with_kills(command, workdir, rng, seconds, options.times - killed)
        difference = _largest_difference(expected, _scores(workdir))
        worst, killed, rounds = max(worst, difference), killed + len(dealt), rounds + 1
        stage.say(f"{', '.join(dealt) or 'no signal'}: largest difference {difference:.3g}")
        stage.advance(len(dealt))
  print(f"{killed} signals in {rounds} audits; largest difference of a score {worst:.3g}")
  if worst:
    sys.exit(1)


def _run_with_kills(command, workdir, rng, seconds, at_most) -> list[str]:
  """Starts an audit until it ends by itself; the signals that it got, and after how long."""
  dealt: list[str] = []
  while len(dealt) < at_most:
    moment, number = rng.uniform(0, seconds), SIGNALS[rng.integers(len(SIGNALS))]
    group = bool(rng.integers(2))
    process = _start(command, workdir)
    try:
      _wait(process, timeout=moment)
      return dealt
    except subprocess.TimeoutExpired:
      (os.killpg if group else os.kill)(process.pid, number)
      process.communicate()
      dealt.append(f"{number.name}{' to the group' if group else ''} after {moment:.1f} s")
  _finish(command, workdir)
  return dealt


def _start(command, workdir) -> subprocess.Popen:
  return subprocess.Popen(
    [*command, "--workdir", str(workdir)],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def _finish(command, workdir) -> None:
  """Runs an audit to its end."""
  _wait(_start(command, workdir))


def _wait(process, timeout: float | None = None) -> None:
  """Raises RuntimeError if the audit failed, subprocess.TimeoutExpired if it still runs."""
  _, errors = process.communicate(timeout=timeout)
  if process.returncode:
    raise RuntimeError(f"the audit failed: {errors.strip().splitlines()[-1]}")


def _scores(workdir) -> dict[str, np.ndarray]:
  """Scores and accuracies of every chunk in every variant."""
  found = {}
  for path in sorted(workdir.glob("scores/*/*.npz")):
    arrays = storage.load_arrays(path)
    for name in ("scores", "accuracy"):
      found[f"{path.relative_to(workdir)}/{name}"] = arrays[name]
  return found


def _largest_difference(expected, found) -> float:
  """Over all arrays; infinite where one is missing."""
  if expected.keys() != found.keys():
    return float("inf")
  return max(float(np.max(np.abs(expected[name] - found[name]))) for name in expected)


def _parser() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
    prog="bench kills",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  flags.add_argument("--times", type=int, default=20, help="signals in all")
  flags.add_argument("--config", default="configs/smoke.py")
  flags.add_argument("--seed", type=int, default=0)
  return flags
