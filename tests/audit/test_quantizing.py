"""What the quantizing stage says of itself while it works."""

import concurrent.futures
import shutil

import jax
import pytest

from ptq_jax.audit import events, preflight, quantizing
from tests.audit.conftest import tiny_config


def test_every_layer_is_told_and_all_adds_up(copied):
  shutil.rmtree(copied / "scores" / "nearest-3-3")
  heard = []
  audit = preflight.open_audit(tiny_config(), copied, listener=heard.append)
  assert quantizing.quantize(audit) == []
  told = [event for event in heard if event.stage == "quantize" and not event.sentence]
  done = [event.done for event in told]
  assert done == sorted(done)
  assert done[0] == told[0].before == 8
  assert done[-1] == pytest.approx(told[-1].total)
  assert told[-1].total == 16
  notes = {event.note for event in told}
  paths = {layer.path for layer in audit.layers}
  assert {f"shadows-00004-00008, nearest {path}" for path in paths} <= notes
  assert len(set(done)) > len(paths)


def test_threads_of_several_devices_add_up(monkeypatch):
  """Each counts its own models; one that begins anew after running out of memory takes nothing."""
  monkeypatch.setattr(jax, "local_devices", lambda: [None, None])
  heard = []
  stage = events.Stage(heard.append, "quantize", 10)
  portions = quantizing.Portions(stage, 10.0, 8, "some")
  with concurrent.futures.ThreadPoolExecutor(1) as other:
    for done in (1, 2):
      portions("layer", done, 4)
      other.submit(portions, "layer", done, 4).result()
  assert [event.done for event in heard] == [1.25, 2.5, 3.75, 5.0]
  portions("layer", 0, 4)
  portions.end()
  assert heard[-1].done == 10
