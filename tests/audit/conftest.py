"""The smallest audit, run once in this process, and copies of it that a test may spoil."""

import ast
import contextlib
import pathlib
import shutil

import jaxtyping
import matplotlib.figure
import numpy as np
import pytest

from ptq_jax import audit, settings, storage
from ptq_jax.audit import preflight
from ptq_jax.report import figures, records

ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = {
  "data.pool_size": 60,
  "data.test_size": 20,
  "model.width": 2,
  "model.num_convolutions": 1,
  "train.epochs": 2,
  "train.batch_size": 10,
  "train.models": 8,
  "quantize.methods": ("nearest", "obc"),
  "quantize.levels": (3,),
  "quantize.calibration_size": 10,
  "attack.attacks": ("lira_online_pooled",),
  "attack.resamples": 20,
}


def tiny_config(**changes):
  """configs/smoke.py made smaller; changes by dotted key with __ for the dots."""
  config = settings.load(f"{ROOT}/configs/smoke.py")
  for key, value in (TINY | {k.replace("__", "."): v for k, v in changes.items()}).items():
    *parents, name = key.split(".")
    section = settings.get(config, ".".join(parents)) if parents else config
    section[name] = value
  return config


def literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


class Heard(list):
  """A listener that remembers the sentences, and what was measured."""

  def __init__(self):
    super().__init__()
    self.measured = []

  def __call__(self, event):
    if event.measured:
      self.measured.append(event.measured)
    if event.sentence:
      self.append(event.sentence)


@contextlib.contextmanager
def unchecked():
  """Annotations are not checked: at a hundred thousand calls an audit, most of its time."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    yield
  finally:
    jaxtyping.config.update("jaxtyping_disable", before)


def run(workdir, **changes):
  """Runs the audit to its end; what was said. Annotations are checked in `finished`."""
  heard = Heard()
  with unchecked():
    result = audit.run(tiny_config(**changes), workdir=workdir, progress=heard)
  assert result.records
  return heard


def opened(workdir, **changes):
  """The audit, opened in this process."""
  return preflight.open_audit(tiny_config(**changes), workdir)


def scores(workdir):
  """Every score file's arrays, without times."""
  return {
    str(path.relative_to(workdir)): {
      name: array for name, array in storage.load_arrays(path).items() if "seconds" not in name
    }
    for path in sorted(workdir.glob("scores/*/*.npz"))
  }


def leakage(workdir):
  return records.select(storage.read_records(workdir / "results.jsonl"), "leakage")


def assert_same(one, other):
  """The same scores and the same leakage, bit by bit."""
  assert scores(one).keys() == scores(other).keys()
  for path, arrays in scores(one).items():
    for name, array in arrays.items():
      np.testing.assert_array_equal(array, scores(other)[path][name], err_msg=f"{path} {name}")
  assert leakage(one) == leakage(other)


@contextlib.contextmanager
def few():
  """Two small figures instead of all: they take most of the time, and have their own tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "draw", lambda found: {n: small_figure() for n in FIGURES})
    yield


@pytest.fixture(autouse=True, scope="module")
def few_figures():
  with few():
    yield


FIGURES = ("roc", "privacy_utility")


def small_figure():
  figure = matplotlib.figure.Figure(figsize=(1, 1))
  figure.add_subplot().plot([0, 1])
  return figure


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  """Run once in a process, for all modules of these tests."""
  workdir = tmp_path_factory.mktemp("finished")
  with few():
    audit.run(tiny_config(), workdir=workdir)
  return workdir


@pytest.fixture
def copied(finished, tmp_path):
  """A finished workdir that a test may spoil."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))
