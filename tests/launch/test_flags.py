"""What a user types, and what a launcher answers."""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest

from launch import attack, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
from launch import flags
from ptq_jax.audit import stopping
def run(config, workdir, **_):
  raise {error}
flags.launch(run, config={config!r}, description="Says hello.")
"""


SERVER = """
import json, os, sys
from launch import flags
from ptq_jax.audit import stopping  # what takes seconds to import, once for all programs
for line in sys.stdin:
  program, arguments, folder = json.loads(line)
  child = os.fork()
  if child:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    continue
  for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
  sys.argv[1:] = arguments
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


@pytest.fixture(scope="module")
def server():
  """Runs programs, each in a process of its own that has imported everything."""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, **pipes) as process:
    yield process
    process.stdin.close()


class Done(NamedTuple):
  returncode: int
  stdout: str
  stderr: str


@pytest.fixture
def execute(server, tmp_path):
  """A function of a program and its arguments, which says how it ended."""
  count = itertools.count()

  def run(program, *arguments):
    folder = tmp_path / str(next(count))
    folder.mkdir()
    print(json.dumps([program, arguments, str(folder)]), file=server.stdin, flush=True)
    code = int(server.stdout.readline())
    return Done(code, *((folder / name).read_text() for name in ("stdout", "stderr")))

  return run


@pytest.fixture
def launch(execute):
  """The launcher of `PROGRAM`."""

  def run(*arguments, error="ValueError('the pool is empty.')", config="configs/digits.py"):
    return execute(PROGRAM.format(error=error, config=config), *arguments)

  return run


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ((), "error: the pool is empty.\n"),
    (("--config.train.epoch=3",), "no key 'train.epoch'; did you mean 'train.epochs'?"),
    (("--config", "configs/digits.py", "--config.train.epoch=3"), "no key 'train.epoch'"),
    (("--config=nope.py",), "nope.py"),
    (("--config=configs/digits.py:epoch=3",), "error: config argument 'epoch=3' is not one of"),
    (("--nope=1",), "Unknown command line flag 'nope'"),
    (("word",), "'word' is not a flag"),
    (("--config.train.epochs=many",), "invalid literal for int"),
  ],
)
def test_what_the_user_can_repair_is_one_sentence_and_code_2(launch, arguments, sentence):
  done = launch(*arguments)
  assert done.returncode == flags.USER_ERROR
  assert sentence in done.stderr
  assert "Traceback" not in done.stderr
  assert len(done.stderr.splitlines()) == 1


SEVERAL = """
from launch import flags
def run(config, workdir, *, compare, out, **_):
  print(compare, out, config.train.epochs, workdir)
flags.launch(run, description="Says hello.", options={"out": ""}, several={"compare": ""})
"""


def test_a_flag_of_several_takes_the_words_and_a_workdir_is_called_like_its_config(execute):
  words = ["--compare", "a", "b", "--out=c", "--config=smoke:models=8"]
  words += ["--config.train.epochs=3", "d"]
  done = execute(SEVERAL, *words)
  assert done.stdout == "['a', 'b', 'd'] c 3 runs/smoke\n", done.stderr


def test_failures_are_code_1_and_debug_shows_the_traceback(launch):
  done = launch(error="RuntimeError('device lost')")
  assert done.returncode == flags.FAILURE
  assert done.stderr.startswith(
    "error: RuntimeError: device lost (at <string>:5; --debug shows all)"
  )
  assert "Traceback" in launch("--debug", error="RuntimeError('device lost')").stderr


def test_interrupt_has_its_own_code(launch):
  done = launch(error="stopping.Stopped(2)")
  assert done.returncode == 130
  assert "goes on from what is saved" in done.stderr


DEAF = """
import gc, signal, time
from launch import flags
def collected(phase, info):
  gc.callbacks.remove(collected)
  signal.raise_signal(signal.SIGTERM)
def run(config, workdir, **_):
  gc.callbacks.append(collected)
  gc.collect()
  time.sleep(20)
flags.launch(run, config="configs/digits.py", description="Hears nothing while it collects.")
"""


def test_a_signal_amid_garbage_collection_is_not_forgotten(execute):
  """What is raised there Python prints and drops."""
  done = execute(DEAF)
  assert done.returncode == 128 + signal.SIGTERM, done
  assert "stopped by SIGTERM" in done.stderr


def test_help_explains(launch):
  done = launch("--help")
  assert "Says hello." in done.stdout
  assert "--workdir" in done.stdout
  assert "train.epochs = 40" in done.stdout
  assert done.returncode == 0


@pytest.mark.parametrize(
  ("arguments", "models", "named"),
  [(("--config.train.epochs=3",), None, "train.epochs"), ((), "runs/other", "--models")],
)
def test_flags_without_use_for_saved_scores_are_refused(
  monkeypatch, tmp_path, arguments, models, named
):
  arguments = ("attack", "--scores=x.npz", "--config.attack.fprs=(0.1,)", *arguments)
  monkeypatch.setattr(flags, "_ARGUMENTS", arguments)
  with pytest.raises(ValueError, match=f"^{named} has no use for saved scores"):
    attack.run(None, tmp_path, shard=None, models=models, scores="x.npz")
