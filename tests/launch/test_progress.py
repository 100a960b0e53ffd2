"""What a user sees of the progress, and what TensorBoard is given."""

import io
import struct
import sys

import pytest

from launch import progress
from ptq_jax.audit.events import Event, Measured

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def scalars(path):
  """Tag, step and value of every scalar in an event file: records with lengths and checksums."""
  data, found = path.read_bytes(), []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    data = data[16 + length :]
  return found


def test_loss_and_accuracy_become_event_files_and_events_are_handed_on(tmp_path):
  heard = []
  listener = progress.TensorBoard(heard.append, tmp_path)
  for step in (3, 6):
    values = {"loss": 3.0 / step, "accuracy": 0.5}
    listener(Event("train_shadows", measured=Measured("shadows-0-4", step, values)))
  listener(Event("train_shadows", ended=True))
  (path,) = (tmp_path / "shadows-0-4").iterdir()
  assert scalars(path) == [
    ("train/loss", 3, 1.0),
    ("train/accuracy", 3, 0.5),
    ("train/loss", 6, 0.5),
    ("train/accuracy", 6, 0.5),
  ]
  assert len(heard) == 3


def test_a_missing_package_is_one_sentence_before_anything_runs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ValueError, match="--tensorboard needs another package: pip install"):
    progress.listener(tmp_path, True)
  assert isinstance(progress.listener(tmp_path, False), progress.Lines)


def test_the_time_left_counts_what_goes_on_within_a_stage(monkeypatch):
  """Quantizing reads the models of each chunk, which is a stage of its own."""
  stream, clock = io.StringIO(), iter((0, 100, 100, 100, 150, 200))
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
  listener, stage = progress.Lines(stream), Event("quantize", done=10, total=40, before=10)
  listener(stage)
  listener(stage._replace(done=20))
  for done in (0, 0.5):
    listener(Event("train_shadows", done=done, total=1))
  listener(stage._replace(done=25))
  listener(stage._replace(done=30))
  times = [line.rsplit("  ", 1)[1] for line in stream.getvalue().splitlines()]
  assert times == ["3 min 20 s left", "1 min 40 s left"]
