"""What a user types, and what a launcher answers."""

import pathlib
import subprocess
import sys

import pytest

from launch import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
from launch import flags
from ptq_jax.audit import stopping
def run(config, workdir, **_):
  raise {error}
flags.launch(run, config={config!r}, description="Says hello.")
"""


def launch(*arguments, error="ValueError('the pool is empty.')", config="configs/digits.py"):
  program = PROGRAM.format(error=error, config=config)
  return subprocess.run(
    [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
  )


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
def test_what_the_user_can_repair_is_one_sentence_and_code_2(arguments, sentence):
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


def test_a_flag_of_several_takes_the_words_and_a_workdir_is_called_like_its_config():
  words = ["--compare", "a", "b", "--out=c", "--config=smoke:models=8"]
  words += ["--config.train.epochs=3", "d"]
  done = subprocess.run(
    [sys.executable, "-c", SEVERAL, *words], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == "['a', 'b', 'd'] c 3 runs/smoke\n", done.stderr


def test_failures_are_code_1_and_debug_shows_the_traceback():
  done = launch(error="RuntimeError('device lost')")
  assert done.returncode == flags.FAILURE
  assert done.stderr.startswith(
    "error: RuntimeError: device lost (at <string>:5; --debug shows all)"
  )
  assert "Traceback" in launch("--debug", error="RuntimeError('device lost')").stderr


def test_interrupt_has_its_own_code():
  done = launch(error="stopping.Stopped(2)")
  assert done.returncode == 130
  assert "goes on from what is saved" in done.stderr


def test_help_explains():
  done = launch("--help")
  assert "Says hello." in done.stdout
  assert "--workdir" in done.stdout
  assert "train.epochs = 40" in done.stdout
  assert done.returncode == 0
