import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
from ml_collections import config_dict

from ptq_jax import settings

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_named_makes_hashable_arguments():
  section = config_dict.create(name="x", sizes=[1, 2], rate=0.1)
  assert settings.named(section, "name") == {"sizes": (1, 2), "rate": 0.1}


class Pace(NamedTuple):
  steps: int = 10
  rate: float = 0.5


PACE = Pace()


def method(data, *, plans, form="auto", pace=PACE, options=None):
  """What `arguments` is asked for."""


def test_arguments_are_checked_and_subsections_change_records():
  section = config_dict.create(form="full", size=3, pace=dict(steps=20), options=dict(sizes=[1, 2]))
  assert settings.arguments(method, section, "size") == {
    "form": "full",
    "pace": Pace(20, 0.5),
    "options": {"sizes": (1, 2)},
  }
  with pytest.raises(ValueError, match="test_settings has no option 'size'; it has form, pace, o"):
    settings.arguments(method, section)
  with pytest.raises(ValueError, match="has no option 'plans'"):
    settings.arguments(method, config_dict.create(plans=3))
  with pytest.raises(ValueError, match=r"test_settings.pace has no option 'step'; it has steps, r"):
    settings.arguments(method, config_dict.create(pace=dict(step=20)))


def test_fingerprint_changes_with_any_value_and_not_with_order():
  one = config_dict.create(a=1, b=config_dict.create(c=(2, 3)))
  same = {"b": {"c": [2, 3]}, "a": 1}
  assert settings.fingerprint(one) == settings.fingerprint(same)
  assert settings.fingerprint(one) != settings.fingerprint({"b": {"c": [2, 4]}, "a": 1})


def test_differences_name_dotted_keys():
  old, new = {"a": {"x": 1}, "gone": 2}, {"a": {"x": 1, "y": 3}}
  assert settings.differences(old, new) == ["a.y is 3, was absent", "gone is absent, was 2"]


@pytest.mark.parametrize(
  ("argument", "message"),
  [("epoch=3", "'epoch=3' is not one of"), ("epochs=x", "needs a int, got 'x'"), ("epochs", "key")],
)
def test_bad_config_arguments(argument, message):
  with pytest.raises(ValueError, match=message):
    settings.parse_arg(argument, {"epochs": 3})


def test_load_reads_a_file_and_its_argument():
  config = settings.load(f"{ROOT}/configs/digits.py:models=4")
  assert config.train.models == 4
  with pytest.raises(FileNotFoundError, match="does not exist; the shipped ones are in configs"):
    settings.load("configs/nope.py")


PROGRAM = """
from ptq_jax import settings
def run(config, workdir):
  raise {error}
settings.launch(run, config={config!r}, workdir="runs/x", description="Says hello.")
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
  assert done.returncode == settings.USER_ERROR
  assert sentence in done.stderr
  assert "Traceback" not in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_failures_are_code_1_and_debug_shows_the_traceback():
  done = launch(error="RuntimeError('device lost')")
  assert done.returncode == settings.FAILURE
  assert done.stderr.startswith(
    "error: RuntimeError: device lost (at <string>:4; --debug shows all)"
  )
  assert "Traceback" in launch("--debug", error="RuntimeError('device lost')").stderr


def test_interrupt_has_its_own_code():
  done = launch(error="settings.Stopped(2)")
  assert done.returncode == 130
  assert "goes on from what is saved" in done.stderr


def test_help_explains():
  done = launch("--help")
  assert "Says hello." in done.stdout
  assert "--workdir" in done.stdout
  assert "train.epochs = 40" in done.stdout
  assert done.returncode == 0
