"""The whole pipeline through the real launchers, on the smallest audit."""

import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from launch import attack, flags, report
from ptq_jax import storage
from ptq_jax.audit import work
from ptq_jax.report import records
from tests.audit.conftest import tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = (
  "--config=configs/smoke.py",
  "--config.data.pool_size=60",
  "--config.data.test_size=20",
  "--config.model.width=2",
  "--config.model.num_convolutions=1",
  "--config.train.epochs=2",
  "--config.train.batch_size=10",
  "--config.train.models=8",
  "--config.quantize.calibration_size=10",
  "--config.quantize.levels=(3,)",
  "--config.attack.attacks=('lira_online_pooled',)",
  "--config.attack.resamples=20",
)
METHODS = "--config.quantize.methods=('nearest','obc')"


def modified(workdir):
  """When every file but the locks was written."""
  files = (path for path in workdir.rglob("*") if path.is_file() and "lock" not in str(path))
  return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished")
  command = [sys.executable, "-m", "launch.audit", f"--workdir={workdir}", *TINY, METHODS]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_writes_everything_it_promises(finished):
  workdir, done = finished
  for name in ("results.jsonl", "results.csv", "results.md", "index.html", "membership.npz"):
    assert (workdir / name).stat().st_size > 0
  for figure in ("roc", "privacy_utility"):
    assert (workdir / "figures" / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (workdir / "figures" / f"{figure}.svg").read_text()
  assert "60 images of digits in the pool, 8 models" in done.stdout
  assert f"Runs on 1 x cpu with JAX {jax.__version__}" in done.stdout
  assert "full precision" in done.stdout
  assert "Traceback" not in done.stderr
  for stage in ("train_shadows", "quantize", "attack"):
    assert stage in done.stderr
  found = storage.read_records(workdir / "results.jsonl")
  records.validate_all(found)
  variants = {records.variant(record) for record in records.select(found, "leakage")}
  assert variants == {("none", None, None), ("nearest", 3, 3), ("obc", 3, 3)}
  attackers = {r["attacker"] for r in records.select(found, "leakage", method="obc")}
  assert attackers == set(records.ATTACKERS) - {"given"}
  by_attacker = {
    r["attacker"]: r
    for r in records.select(
      found, "leakage", method="obc", attack="lira_online_pooled", members="all"
    )
  }
  gap = by_attacker["matched"]["minus_full_precision_shadows"]["auc"]
  values = [by_attacker[name]["auc"]["value"] for name in ("matched", "full_precision")]
  assert gap["value"] == pytest.approx(values[0] - values[1])
  assert gap["low"] <= gap["value"] <= gap["high"]


def test_running_again_does_nothing_and_prints_the_same_table(finished, launch):
  workdir, done = finished
  before = modified(workdir)
  again = launch("audit", f"--workdir={workdir}", *TINY, METHODS)
  assert again.returncode == 0, again.stderr
  assert again.stdout == done.stdout
  assert modified(workdir) == before


def test_a_stop_saves_the_epochs_done(launch, tmp_path):
  long = ("--config.train.epochs=100000", "--config.train.checkpoint_minutes=60")
  process = launch("train_shadows", f"--workdir={tmp_path}", *TINY, *long)
  process.wait_for(lambda: "epoch" in process.stderr)
  process.send(signal.SIGTERM)
  assert process.returncode == 128 + signal.SIGTERM
  assert "stopped by SIGTERM; the same command goes on" in process.stderr
  saved = [int(p.name) for p in tmp_path.glob("models/*/training/*") if p.name.isdigit()]
  assert len(saved) == 1
  assert 0 < saved[0] < 100000


def test_a_bad_setting_through_the_launcher(finished, launch):
  changed = (METHODS, "--config.train.epochs=3")
  done = launch("audit", f"--workdir={finished[0]}", *TINY, *changed)
  assert done.returncode == flags.USER_ERROR
  assert "belongs to another config: train.epochs is 3, was 2" in done.stderr
  note, error = done.stderr.splitlines()  # what is said of the data comes first
  assert "classes have no test example" in note
  assert error.startswith("error: workdir ")


def test_stages_out_of_order_say_what_is_missing(tmp_path):
  for stage, needs in ((report, "attack"), (attack, "train_shadows")):
    with pytest.raises(flags.USER_ERRORS, match=f"run bash launch/run {needs} first"):
      stage.run(tiny_config(), tmp_path, shard=work.WHOLE)
