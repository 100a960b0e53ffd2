"""Several real processes on one workdir, none of which knows the others: failures of each."""

import signal
import subprocess
import time

import pytest

from tests.launch import test_pipeline as pipeline

TWO_CHUNKS = (
  "--config.quantize.methods=nearest",
  "--config.train.models_per_chunk=4",
  "--config.report.figures=false",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished")
  done = pipeline.launch("audit", workdir, *TWO_CHUNKS)
  assert done.returncode == 0, done.stderr
  return workdir


def start(workdir, *arguments):
  return subprocess.Popen(
    pipeline.command("audit", workdir, *TWO_CHUNKS, *arguments),
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


def test_shards_give_what_one_process_gives(finished, tmp_path):
  """Four processes have two chunks: two of them have nothing to do, and end."""
  processes = [start(tmp_path, f"--shard={number}/4") for number in range(4)]
  ended = [ends(process) for process in processes]
  assert [code for code, _, _ in ended] == [0] * 4, ended
  assert sum("index.html shows more" in output for _, output, _ in ended) >= 1
  pipeline.assert_same(finished, tmp_path)


@pytest.mark.parametrize(("victim", "stage"), [(0, "train"), (1, "quantize")])
def test_one_dies_the_other_goes_on_and_a_restart_ends_it(finished, tmp_path, victim, stage):
  processes = [start(tmp_path, f"--shard={number}/2") for number in range(2)]
  chunk = ("shadows-00000-00004", "shadows-00004-00008")[victim]
  begun = {
    "train": tmp_path / "models" / "locks" / chunk,
    "quantize": tmp_path / "scores" / "full_precision" / f"{chunk}.npz",
  }[stage]
  wait_for(begun.exists, processes[victim])
  processes[victim].send_signal(signal.SIGKILL if victim else signal.SIGTERM)
  code, _, errors = ends(processes[victim])
  if victim:
    assert code == -signal.SIGKILL
  else:
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on" in errors
  code, output, errors = ends(processes[1 - victim])
  assert code == 0, errors
  assert "others are at the rest" in output
  code, output, errors = ends(start(tmp_path, f"--shard={victim}/2"))
  assert code == 0, errors
  assert "index.html shows more" in output
  pipeline.assert_same(finished, tmp_path)


def test_two_audits_in_one_workdir_share_the_work(finished, tmp_path):
  processes = [start(tmp_path) for _ in range(2)]
  ended = [ends(process) for process in processes]
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert ends(start(tmp_path))[0] == 0
  pipeline.assert_same(finished, tmp_path)
