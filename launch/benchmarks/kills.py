"""Kills an audit at random moments and compares what it ends with to an uninterrupted run.

    bash launch/run bench kills [--times 20] [--config configs/smoke.py] [--seed 0]
        [--config.KEY=VALUE ...]

One audit runs through. Then fresh ones are killed (SIGKILL) at moments drawn evenly from the time
that the first took, each started again until it gets to its end, until --times kills have been
dealt out. Every score of every model in every variant must be the same. Exits with 1 if not.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from launch import progress
from ptq_jax import storage
from ptq_jax.audit import events

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
        moments = _run_with_kills(command, workdir, rng, seconds, options.times - killed)
        difference = _largest_difference(expected, _scores(workdir))
        worst, killed, rounds = max(worst, difference), killed + len(moments), rounds + 1
        when = ", ".join(f"{moment:.1f}" for moment in moments) or "never"
        stage.say(f"killed after {when} s: largest difference {difference:.3g}")
        stage.advance(len(moments))
  print(f"{killed} kills in {rounds} audits; largest difference of a score {worst:.3g}")
  if worst:
    sys.exit(1)


def _run_with_kills(command, workdir, rng, seconds, at_most) -> list[float]:
  """Starts an audit until it ends by itself; the seconds after which each run was killed."""
  moments: list[float] = []
  while len(moments) < at_most:
    moment = rng.uniform(0, seconds)
    process = _start(command, workdir)
    try:
      _wait(process, timeout=moment)
      return moments
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      moments.append(moment)
  _finish(command, workdir)
  return moments


def _start(command, workdir) -> subprocess.Popen:
  return subprocess.Popen(
    [*command, "--workdir", str(workdir)],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
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
  flags.add_argument("--times", type=int, default=20, help="kills in all")
  flags.add_argument("--config", default="configs/smoke.py")
  flags.add_argument("--seed", type=int, default=0)
  return flags
