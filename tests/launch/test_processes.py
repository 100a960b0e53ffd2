"""Several real processes on one workdir, none of which knows the others: failures of each."""

import signal
import time

import pytest

from tests.audit.conftest import assert_same, run
from tests.launch.test_pipeline import TINY

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
  run(workdir, train__models_per_chunk=2, **changes)
  return workdir


def test_three_of_four_die_the_other_goes_on_and_two_more_end_it(finished, launch, tmp_path):
  """One is asked to end while it trains, one is killed then, one is killed while it quantizes.

  The two that end it have no shards: they share what is left.
  """

  def start(*arguments):
    return launch("audit", f"--workdir={tmp_path}", *TINY, *FOUR_CHUNKS, *arguments)

  locks, scores = tmp_path / "models" / "locks", tmp_path / "scores" / "full_precision"
  *victims, other = [start(f"--shard={number}/4") for number in range(4)]
  awaited = [
    (victims[0], locks / "shadows-00000-00002", signal.SIGTERM),
    (victims[1], locks / "shadows-00002-00004", signal.SIGKILL),
    (victims[2], scores / "shadows-00004-00006.npz", signal.SIGKILL),
  ]

  while awaited:  # each gets its signal as soon as its file is there, whoever comes first
    for each in list(awaited):
      victim, path, number = each
      if path.exists():
        victim.send(number)
        awaited.remove(each)
      assert victim.poll() is None or each not in awaited, victim.stderr
    time.sleep(0.01)
  assert victims[0].returncode == 128 + signal.SIGTERM
  assert "stopped by SIGTERM; the same command goes on" in victims[0].stderr
  assert [victim.returncode for victim in victims[1:]] == [-signal.SIGKILL] * 2
  assert other.returncode == 0, other.stderr
  assert "others are at the rest" in other.stdout
  assert {path.name for path in scores.glob("*.npz")} == {
    "shadows-00004-00006.npz",
    "shadows-00006-00008.npz",
  }
  assert [path.name for path in tmp_path.glob("scores/nearest-3-3/*.npz")] == [
    "shadows-00006-00008.npz"
  ]
  ended = [start(), start()]
  assert [process.returncode for process in ended] == [0, 0], [each.stderr for each in ended]
  assert any("index.html shows more" in process.stdout for process in ended)
  assert_same(finished, tmp_path)
