"""Loss and accuracy by epoch, also of a training that was stopped."""

import concurrent.futures
import contextlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from ptq_jax import storage
from ptq_jax.audit import preflight, quantizing, stopping, training, work
from ptq_jax.report import records
from ptq_jax.train import shadows
from tests.audit.conftest import Heard, opened, run, scores, tiny_config

CHUNK = "models/shadows-00000-00004"


def stop_after(step, patch):
  """Training hears a signal once it has done so many updates."""
  done, dispatches = [], shadows.dispatches

  def counted(*args, **options):
    for each in dispatches(*args, **options):
      done.append(each.step)
      yield each

  @contextlib.contextmanager
  def deferred(say):
    yield lambda: stopping.Stopped(signal.SIGTERM) if done[-1] == step else None

  patch.setattr(training.shadows, "dispatches", counted)
  patch.setattr(training.stopping, "deferred", deferred)


def curve(workdir):
  return storage.read_records(workdir / CHUNK / "metrics.jsonl")


def test_loss_and_accuracy_of_every_model_and_epoch(finished):
  rows = curve(finished)
  assert [(row["step"], row["epoch"]) for row in rows] == [(3, 1), (6, 2)]
  for row in rows:
    assert np.shape(row["loss"]) == np.shape(row["accuracy"]) == (4,)
    assert min(row["loss"]) > 0
    assert 0 <= min(row["accuracy"]) <= max(row["accuracy"]) <= 1
    assert np.ptp(row["loss"]) > 0  # each model its own


def test_results_have_the_mean_over_all_models(finished, copied):
  (record,) = records.select(storage.read_records(finished / "results.jsonl"), "training")
  rows = [storage.read_records(path) for path in finished.glob("models/*/metrics.jsonl")]
  every = np.array([[row["loss"] for row in each] for each in rows])  # [chunks, epochs, M]
  np.testing.assert_allclose(record["loss"], every.mean(axis=(0, 2)), atol=1e-5)
  np.testing.assert_allclose(record["loss_high"], every.max(axis=(0, 2)), atol=1e-5)
  path, audit = copied / CHUNK / "metrics.jsonl", opened(copied)
  lines = path.read_text().splitlines(keepends=True)
  texts = {
    "is damaged": "".join(lines).replace('"step": 6', '"step": 7'),
    "does not have every epoch": lines[0],
  }
  for problem, text in texts.items():
    path.write_text(text)
    with pytest.raises(ValueError, match=f"metrics.jsonl {problem}"):
      training.curves(audit)
  path.unlink()
  said = run(copied, attack__confidence=0.9)
  assert any("metrics.jsonl is missing" in sentence for sentence in said)
  assert not records.select(storage.read_records(copied / "results.jsonl"), "training")


@pytest.mark.parametrize("damage", [None, b"{}\n", b"\xff"])
def test_a_resumed_training_goes_on_with_its_curve(finished, tmp_path, monkeypatch, damage):
  """Stopped amid the second epoch; what was written past the checkpoint is not kept twice."""
  heard = Heard()
  with monkeypatch.context() as patch:
    stop_after(4, patch)
    audit = preflight.open_audit(tiny_config(), tmp_path, listener=heard)
    with pytest.raises(stopping.Stopped):
      training.train(audit)
  path = tmp_path / CHUNK / "metrics.jsonl"
  assert [row["step"] for row in curve(tmp_path)] == [3, 4]
  if damage is None:
    with path.open("a") as file:
      file.write('{"step": 5, "epoch": 1.7, "loss": [9.0], "accuracy": [0.0]}\n')
  else:
    path.write_bytes(damage)
  told = []
  training.train(preflight.open_audit(tiny_config(), tmp_path, listener=told.append))
  (*_, last) = (event for event in told if event.stage == "train_shadows")
  assert (last.done, last.total) == (16, 16)  # models x epochs
  assert last.before == pytest.approx(4 * 4 / 3)  # the speed of this run is that of the rest
  steps = [3, 4, 6] if damage is None else [6]
  assert [row["step"] for row in curve(tmp_path)] == steps
  if damage is None:
    assert curve(tmp_path)[0] == curve(finished)[0]
    assert [measured.step for measured in heard.measured] == [3, 4]
    assert heard.measured[0].values["loss"] == pytest.approx(np.mean(curve(finished)[0]["loss"]))


def test_models_that_are_there_tell_nothing_about_the_speed(copied):
  shutil.rmtree(copied / "scores" / "full_precision")
  told = []
  assert training.train(preflight.open_audit(tiny_config(), copied, listener=told.append)) == []
  stage = [event for event in told if event.stage == "train_shadows" and not event.sentence]
  assert [event.done for event in stage] == [event.before for event in stage]
  assert stage[-1].done == stage[-1].total == 16


def test_a_stop_after_the_last_moment_to_save_is_not_forgotten(tmp_path, monkeypatch):
  """It comes while the trained models are written: they are kept, then training stops."""
  save = storage.Checkpoints.save

  def saved(checkpoints, *args):
    save(checkpoints, *args)
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(storage.Checkpoints, "save", saved)
  with pytest.raises(stopping.Stopped):
    training.train(opened(tmp_path))
  assert (tmp_path / CHUNK / "trained" / "2.json").exists()
  assert not (tmp_path / CHUNK / "training").exists()
  assert not list((tmp_path / "scores").rglob("*.npz"))


def waits(audit, lock, stage):
  """Runs a stage while somebody holds a lock until it has said so; what the stage returns."""
  before = len(audit.listener)
  with concurrent.futures.ThreadPoolExecutor(1) as pool, work.locked(lock):
    done = pool.submit(stage, audit)
    while len(audit.listener) == before and not done.done():
      time.sleep(0.01)
    assert not done.done()
  assert audit.listener[before].startswith(f"waiting for the models of {lock.name}, which process ")
  return done.result()


def test_a_folder_for_models_without_any_is_told(tmp_path):
  said = []
  for name in ("one", "two"):
    said.append(Heard())
    preflight.open_audit(
      tiny_config(), tmp_path / name, trained=tmp_path / "shared", listener=said[-1]
    )
  sentence = f"{tmp_path / 'shared'} holds no models yet; they are trained there."
  assert [sentence in heard for heard in said] == [True, False]


def test_audits_that_share_models_take_turns_with_them_and_share_nothing_else(finished, tmp_path):
  models = tmp_path / "models"
  shutil.copytree(finished / "models", models)
  audit, other = (
    preflight.open_audit(tiny_config(), tmp_path / name, trained=models, listener=Heard())
    for name in ("own", "other")
  )
  chunk = audit.work.chunks[0]
  assert waits(audit, models / "locks" / chunk.name, training.train) == []
  shutil.rmtree(models / chunk.name / "trained")  # so that quantizing has to train
  assert waits(audit, models / "locks" / chunk.name, quantizing.quantize) == []
  shutil.rmtree(tmp_path / "own" / "quantized")
  with other.locked(chunk):  # what another audit does with the same models is its own affair
    assert quantizing.quantize(audit) == []
  own, expected = scores(tmp_path / "own"), scores(finished)
  assert own.keys() == expected.keys()
  for path, arrays in own.items():
    np.testing.assert_array_equal(arrays["scores"], expected[path]["scores"])


def test_models_that_do_not_fit_are_trained_with_fewer_in_a_program(tmp_path, monkeypatch):
  audit, tried = opened(tmp_path, train__models_together=4), []

  def train(audit, chunk, stage, stopped):
    tried.append(chunk.together)
    if chunk.together > 2:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    like = training.states_like(audit, chunk)
    return like._replace(
      variables=jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), like.variables)
    )

  monkeypatch.setattr(training, "train_updates", train)
  chunk, stage = audit.work.chunks[0], audit.stage("train_shadows", 0)
  training.train_chunk(audit, chunk, stage)
  assert tried == [4, 2]
  assert work.read(audit.trained).chunks[0].together == 2
  assert storage.read_json(tmp_path / CHUNK / "trained" / "2.json")["metadata"]["together"] == 2
