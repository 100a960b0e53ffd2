"""What a user types, and what a launcher answers."""

import signal

import pytest

from launch import attack, flags

PROGRAM = """
from launch import flags
from ptq_jax.audit import stopping
def run(config, workdir, **_):
  raise {error}
flags.launch(run, config={config!r}, description="Says hello.")
"""


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
  assert done.returncode == 0
  assert done.stdout == "['a', 'b', 'd'] c 3 runs/smoke\n", done.stderr


def test_failures_are_code_1_and_debug_shows_the_traceback(launch):
  done = launch(error="RuntimeError('device lost')")
  assert done.returncode == flags.FAILURE
  assert done.stderr.startswith(
    "error: RuntimeError: device lost (at <string>:5; --debug shows all)"
  )
  debugged = launch("--debug", error="RuntimeError('device lost')")
  assert debugged.returncode == flags.FAILURE
  assert "Traceback" in debugged.stderr


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
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  assert "stopped by SIGTERM" in done.stderr


def test_help_explains(launch):
  done = launch("--help")
  assert done.returncode == 0
  assert "Says hello." in done.stdout
  assert "--workdir" in done.stdout
  assert "train.epochs = 40" in done.stdout


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
