"""Data and a model of one's own, from a folder that is not the checkout."""

import os
import pathlib
import subprocess
import sys

import numpy as np

from launch import flags
from ptq_jax import storage
from ptq_jax.report import records

ROOT = pathlib.Path(__file__).resolve().parents[2]

MODEL = """
import flax.linen as nn

class Net(nn.Module):
  num_classes: int
  hidden: int

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(self.hidden, (3, 3), name="first")(x))
    x = nn.Dropout(0.1, deterministic=not train)(x.mean((1, 2)))
    return nn.Dense(self.num_classes, name="last")(x)

def make(num_classes, hidden=3):
  return Net(num_classes, hidden)
"""


def write(folder):
  rng = np.random.default_rng(0)
  (folder / "mine.py").write_text(MODEL)
  np.savez(
    folder / "mine.npz",
    x_train=rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
    y_train=np.arange(60) % 3,
    x_test=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
    y_test=np.arange(20) % 3,
  )


OWN = (
  "--workdir=runs/mine", "--config.data.name=npz",
  "--config.data.path=mine.npz", "--config.model.name=mine:make", "--config.train.models=6",
  "--config.train.epochs=2", "--config.train.batch_size=10",
  "--config.quantize.methods=nearest", "--config.quantize.levels=3",
  "--config.quantize.calibration_size=10", "--config.attack.attacks=lira_online_pooled",
  "--config.attack.resamples=20", "--config.report.figures=False",
)  # fmt: skip


def test_an_audit_with_options_of_model_and_method(tmp_path):
  write(tmp_path)
  options = "--config.model.hidden=5", "--config.quantize.nearest.grid_options.norm=2.0"
  done = subprocess.run(
    [sys.executable, "-m", "launch.audit", *OWN, *options],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": f"{ROOT}:."},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = storage.read_records(tmp_path / "runs" / "mine" / "results.jsonl")
  run = records.select(found, "run")[0]
  assert run["name"] == "own"
  assert run["config"]["model"]["hidden"] == 5
  assert run["config"]["quantize"]["nearest"]["grid_options"]["norm"] == 2.0
  methods = {record["method"] for record in records.select(found, "leakage")}
  assert methods == {"none", "nearest"}


def test_an_unknown_option_is_refused_with_those_of_the_factory(launch, tmp_path):
  write(tmp_path)
  done = launch("audit", *OWN, "--config.model.width=5", where=tmp_path)
  assert done.returncode == flags.USER_ERROR
  assert "has no option 'width'; it has ['hidden']" in done.stderr
  assert len(done.stderr.splitlines()) == 1
