"""Several real processes on one workdir, none of which knows the others: failures of each."""

import signal
import subprocess
import time

import pytest

from ptq_jax import audit
from tests.audit.conftest import tiny_config
from tests.launch import test_pipeline as pipeline

FOUR_CHUNKS = (
  "--config.quantize.methods=nearest",
  "--config.train.models_per_chunk=2",
  "--config.report.figures=false",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """What one process makes of the same settings."""
  workdir = tmp_path_factory.mktemp("finished")
  changes = {"quantize__methods": ("nearest",), "report__figures": False}
  audit.run(tiny_config(train__models_per_chunk=2, **changes), workdir=workdir)
  return workdir


def start(workdir, *arguments):
  return subprocess.Popen(
    pipeline.command("audit", workdir, *FOUR_CHUNKS, *arguments),
    cwd=pipeline.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ends(process, *, within=120):
  output, errors = process.communicate(timeout=within)
  return process.returncode, output, errors


def wait_for(found, process):
  deadline = time.monotonic() + 120
  while not found():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_two_of_four_die_the_others_go_on_and_a_restart_ends_it(finished, tmp_path):
  """One is asked to end while it trains, one is killed while it quantizes."""
  begun = {
    0: tmp_path / "models" / "locks" / "shadows-00000-00002",
    1: tmp_path / "scores" / "full_precision" / "shadows-00002-00004.npz",
  }
  processes = [start(tmp_path, f"--shard={number}/4") for number in range(4)]
  for victim, number in ((0, signal.SIGTERM), (1, signal.SIGKILL)):
    wait_for(begun[victim].exists, processes[victim])
    processes[victim].send_signal(number)
  code, _, errors = ends(processes[0])
  assert code == 128 + signal.SIGTERM
  assert "stopped by SIGTERM; the same command goes on" in errors
  assert ends(processes[1])[0] == -signal.SIGKILL
  for process in processes[2:]:
    code, output, errors = ends(process)
    assert code == 0, errors
    assert "others are at the rest" in output
  ended = [ends(process) for process in [start(tmp_path, f"--shard={n}/4") for n in range(2)]]
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert any("index.html shows more" in output for _, output, _ in ended)
  pipeline.assert_same(finished, tmp_path)


def test_two_audits_in_one_workdir_share_the_work(finished, tmp_path):
  processes = [start(tmp_path) for _ in range(2)]
  ended = [ends(process) for process in processes]
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert ends(start(tmp_path))[0] == 0
  pipeline.assert_same(finished, tmp_path)
