"""Launchers in processes of their own, forked from one that has imported what takes seconds."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

SERVER = """
import json, os, sys
from launch import flags, progress
from ptq_jax.audit import running  # what takes seconds to import, once for all programs
for line in sys.stdin:
  job = json.loads(line)
  if isinstance(job, int):
    child, status = os.waitpid(job, os.WNOHANG)
    print(json.dumps(os.waitstatus_to_exitcode(status) if child else None), flush=True)
    continue
  program, arguments, where, folder = job
  child = os.fork()
  if child:
    print(child, flush=True)
    continue
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY), number)
  os.chdir(where)
  sys.path[0] = where
  sys.argv = arguments
  flags._ARGUMENTS = tuple(sys.argv)
  code = 0
  try:
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
  except SystemExit as end:
    code = end.code or 0
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
"""

LAUNCHER = "import runpy\nrunpy.run_module('launch.{}', run_name='__main__', alter_sys=True)"


class Process:
  """A program that was started, with what it says in files of its folder."""

  def __init__(self, ask, program, arguments, where, folder: pathlib.Path):
    self._ask, self._folder, self._code = ask, folder, None
    for name in ("stdout", "stderr"):
      (folder / name).touch()
    self.pid = ask([program, arguments, str(where), str(folder)])

  def poll(self) -> int | None:
    """How it ended, or None."""
    if self._code is None:
      self._code = self._ask(self.pid)
    return self._code

  @property
  def returncode(self) -> int:
    """How it ends; waits for it."""
    deadline = time.monotonic() + 300
    while self.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    return self._code

  def wait_for(self, found) -> None:
    """Until something is found, before it ends."""
    deadline = time.monotonic() + 300
    while not found():
      assert self.poll() is None, self.stderr
      assert time.monotonic() < deadline
      time.sleep(0.01)

  def send(self, number: int) -> None:
    os.kill(self.pid, number)

  @property
  def stdout(self) -> str:
    return (self._folder / "stdout").read_text()

  @property
  def stderr(self) -> str:
    return (self._folder / "stderr").read_text()


@pytest.fixture(scope="session")
def server():
  """Starts programs, and is asked how they ended."""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, **pipes) as process:

    def ask(job):
      print(json.dumps(job), file=process.stdin, flush=True)
      return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()


@pytest.fixture
def execute(server, tmp_path_factory):
  """A function that starts a program, text of Python, with its arguments."""
  folder, count = tmp_path_factory.mktemp("said"), itertools.count()

  started = []

  def run(program, *arguments, name="-c", where=ROOT):
    own = folder / str(next(count))
    own.mkdir()
    started.append(Process(server, program, [name, *map(str, arguments)], where, own))
    return started[-1]

  yield run
  for process in started:  # of a test that failed
    if process.poll() is None:
      process.send(signal.SIGKILL)


@pytest.fixture
def launch(execute):
  """A function that starts a launcher, `python -m launch.STAGE`, with its arguments."""

  def run(stage, *arguments, where=ROOT):
    name = str(ROOT / "launch" / f"{stage}.py")
    return execute(LAUNCHER.format(stage), *arguments, name=name, where=where)

  return run
