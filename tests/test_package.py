"""What `pip install` brings along, and the command that it makes."""

import fnmatch
import importlib
import pathlib
import re
import sys
import tomllib
import types

import pytest

import ptq_jax
from launch import __main__ as command
from ptq_jax import settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = PROJECT["tool"]["setuptools"]


def test_every_module_of_the_checkout_is_in_the_wheel():
  patterns = TOOLS["packages"]["find"]["include"]
  files = [path for top in ("ptq_jax", "launch", "configs") for path in (ROOT / top).rglob("*.py")]
  names = {".".join(path.parent.relative_to(ROOT).parts) for path in files}
  assert {"ptq_jax.audit", "launch.benchmarks", "configs"} <= names
  assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names)


def test_what_the_report_reads_is_in_the_wheel():
  patterns = TOOLS["package-data"]["ptq_jax.report"]
  others = [path.name for path in (ROOT / "ptq_jax/report").iterdir() if path.suffix != ".py"]
  names = [name for name in others if name != "__pycache__"]
  assert {"page.html.jinja", "page.css", "page.js", "ptq_jax.mplstyle"} <= set(names)
  assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names)


def test_types_and_version_come_along():
  assert "py.typed" in TOOLS["package-data"]["ptq_jax"]
  assert (ROOT / "ptq_jax" / "py.typed").exists()
  assert PROJECT["project"]["dynamic"] == ["version"]
  module, _, name = TOOLS["dynamic"]["version"]["attr"].rpartition(".")
  assert re.fullmatch(r"\d+\.\d+\.\d+", getattr(importlib.import_module(module), name))


def test_the_console_script_knows_the_tasks_of_launch_run():
  module, _, function = PROJECT["project"]["scripts"]["ptq-jax"].partition(":")
  assert getattr(importlib.import_module(module), function) is command.main
  [cases] = re.findall(r"^  (audit .*bench) \| test \| lint\)", (ROOT / "launch/run").read_text(),
                       flags=re.MULTILINE)  # fmt: skip
  assert tuple(cases.split(" | ")) == command.TASKS
  for task in command.TASKS:
    assert "\ndef main() -> None:\n" in (ROOT / "launch" / f"{task}.py").read_text()


def test_a_task_gets_its_flags(monkeypatch):
  seen = []
  monkeypatch.setattr(sys, "argv", ["/bin/ptq-jax", "audit", "--config", "smoke"])
  module = types.SimpleNamespace(main=lambda: seen.append(sys.argv))
  monkeypatch.setitem(sys.modules, "launch.audit", module)
  command.main()
  assert seen == [["audit", "--config", "smoke"]]


@pytest.mark.parametrize(
  ("argument", "said"), [("--version", ptq_jax.__version__), ("-h", "audit")]
)
def test_questions_are_answered(monkeypatch, capsys, argument, said):
  monkeypatch.setattr(sys, "argv", ["ptq-jax", argument])
  command.main()
  assert said in capsys.readouterr().out


def test_an_unknown_task_is_one_sentence(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["ptq-jax", "adit"])
  with pytest.raises(SystemExit, match="2"):
    command.main()
  known = "audit, train_shadows, quantize, attack, report, sweep, bench"
  assert capsys.readouterr().err == f"error: no task 'adit'; there are {known}.\n"


def test_shipped_configs_are_known_by_name_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits").mkdir()  # a folder is no config
  assert settings.load("digits").name == "digits"
  assert settings.load("smoke:models=16").train.models == 16
  assert settings.load("configs/smoke.py").name == "smoke"
  (tmp_path / "smoke.py").write_text("raise ImportError('mine')")
  with pytest.raises(ValueError, match="mine"):
    settings.load("smoke.py")
  with pytest.raises(FileNotFoundError, match="smok does not exist; shipped ones are cifar10, "):
    settings.load("smok")
