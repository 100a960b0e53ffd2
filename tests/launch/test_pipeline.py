"""The whole pipeline through the real launchers, on the smallest audit."""

import ast
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import flags
from ptq_jax import settings, storage
from ptq_jax.audit import events, layout, preflight, quantizing, training
from ptq_jax.report import records

ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = (
  "--config=configs/smoke.py",
  "--config.data.pool_size=60",
  "--config.data.test_size=20",
  "--config.model.width=2",
  "--config.train.epochs=2",
  "--config.train.batch_size=10",
  "--config.train.models=8",
  "--config.quantize.calibration_size=10",
  "--config.quantize.levels=(3,)",
  "--config.attack.resamples=20",
)
METHODS = "--config.quantize.methods=('nearest','obc')"


def command(stage, where, *arguments):
  return [sys.executable, "-m", f"launch.{stage}", f"--workdir={where}", *TINY, *arguments]


def launch(stage, workdir, *arguments):
  return subprocess.run(
    command(stage, workdir, *arguments), cwd=ROOT, capture_output=True, text=True
  )


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
  assert scores(one).keys() == scores(other).keys()
  for path, arrays in scores(one).items():
    for name, array in arrays.items():
      np.testing.assert_array_equal(array, scores(other)[path][name], err_msg=f"{path} {name}")
  assert leakage(one) == leakage(other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished")
  done = launch("audit", workdir, METHODS)
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
  assert "full precision" in done.stdout
  assert "Traceback" not in done.stderr
  for stage in ("train_shadows", "quantize", "attack"):
    assert stage in done.stderr
  found = storage.read_records(workdir / "results.jsonl")
  records.validate_all(found)
  variants = {records.variant(record) for record in records.select(found, "leakage")}
  assert variants == {("none", None, None), ("nearest", 3, 3), ("obc", 3, 3)}
  attackers = {r["attacker"] for r in records.select(found, "leakage", method="obc")}
  assert attackers == {"full_precision", "matched"}
  by_attacker = {
    r["attacker"]: r
    for r in records.select(found, "leakage", method="obc", attack="lira_online", members="all")
  }
  gap = by_attacker["matched"]["minus_full_precision_shadows"]["auc"]
  values = [by_attacker[name]["auc"]["value"] for name in ("matched", "full_precision")]
  assert gap["value"] == pytest.approx(values[0] - values[1])
  assert gap["low"] <= gap["value"] <= gap["high"]


def test_running_again_does_nothing_and_prints_the_same_table(finished):
  workdir, done = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
  again = launch("audit", workdir, METHODS)
  assert again.stdout == done.stdout
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_stages_alone_in_other_chunks_give_the_same(finished, tmp_path):
  for stage in ("train_shadows", "quantize", "attack", "report"):
    done = launch(stage, tmp_path, METHODS, "--config.train.models_per_chunk=8")
    assert done.returncode == 0, done.stderr
  one, other = (
    np.concatenate([arrays["scores"] for path, arrays in scores(w).items() if "full" in path])
    for w in (finished[0], tmp_path)
  )
  np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def audit_in(directory, **quantize_options):
  """The audit of `TINY` in a workdir, in this process."""
  config = settings.load(str(ROOT / TINY[0].partition("=")[2]))
  for argument in TINY[1:]:
    key, _, text = argument.removeprefix("--config.").partition("=")
    config.update_from_flattened_dict({key: parse(text)})
  config.quantize.update(quantize_options)
  return preflight.open_audit(config, directory)


def test_images_are_drawn_from_whom_they_should_be(finished):
  audit = audit_in(finished[0])
  chunk = audit.own_chunks()[0]
  rows = audit.members[chunk.group][chunk.first : chunk.last]
  for whom, count, share in (("members", 10, 1), ("non_members", 10, 0), ("all", 60, 0.5)):
    positions, images = quantizing.drawn_images(audit, chunk, "calibration", whom, count)
    assert images.shape == (len(chunk), count, *audit.dataset.image_shape)
    assert all(len(set(row)) == count for row in positions.tolist())
    assert np.take_along_axis(rows, positions, axis=1).mean() == share


def kill_when(found, process):
  """Kills a running launcher as soon as `found()`."""
  deadline = time.monotonic() + 300
  while not found():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()


def test_killed_twice_and_run_again_gives_the_same(finished, tmp_path):
  """Killed inside training and inside quantizing, when the first of two chunks was written."""
  for variant in ("full_precision", "obc-3-3"):
    process = subprocess.Popen(
      command("audit", tmp_path, METHODS),
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    folder = tmp_path / "scores" / variant
    kill_when(lambda folder=folder: list(folder.glob("*.npz")), process)
    assert len(list(folder.glob("*.npz"))) == 1
  done = launch("audit", tmp_path, METHODS)
  assert done.returncode == 0, done.stderr
  assert_same(finished[0], tmp_path)


def test_two_processes_give_what_one_gives(finished, tmp_path):
  """Two chunks, two processes that find each other on localhost, one workdir."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  arguments = [METHODS, f"--coordinator=localhost:{port}", "--num_processes=2"]
  processes = [
    subprocess.Popen(
      command("audit", tmp_path, *arguments, f"--process_id={number}"),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
  assert_same(finished[0], tmp_path)


def test_a_stop_saves_the_epochs_done(tmp_path):
  long = ("--config.train.epochs=100000", "--config.train.checkpoint_minutes=60")
  process = subprocess.Popen(
    command("train_shadows", tmp_path, *long), cwd=ROOT, stderr=subprocess.PIPE, text=True
  )
  line = ""
  while "epoch" not in line:
    line = process.stderr.readline()
    assert line, "ended before the first epoch"
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM
  assert "stopped by SIGTERM; the same command goes on" in errors
  saved = [int(p.name) for p in tmp_path.glob("models/*/training/*") if p.name.isdigit()]
  assert len(saved) == 1
  assert 0 < saved[0] < 100000


@pytest.fixture
def copied(finished, tmp_path):
  """A finished workdir that a test may spoil."""
  shutil.copytree(finished[0], tmp_path / "copy")
  return tmp_path / "copy"


def test_more_models_train_only_the_new_ones(finished, copied):
  grown = launch("audit", copied, METHODS, "--config.train.models=12")
  assert grown.returncode == 0, grown.stderr
  for path, arrays in scores(finished[0]).items():
    for name, array in arrays.items():
      np.testing.assert_array_equal(array, scores(copied)[path][name])
  assert (copied / "models" / "shadows-00008-00012").exists()
  assert leakage(copied)[0]["num_targets"] == 12


def test_a_damaged_score_file_is_computed_again(finished, copied):
  path = next(copied.glob("scores/obc-3-3/*.npz"))
  path.write_bytes(path.read_bytes()[:500])
  done = launch("audit", copied, METHODS)
  assert done.returncode == 0, done.stderr
  assert "is corrupt; computing it anew" in done.stdout
  assert_same(finished[0], copied)


def test_variants_of_other_last_layers_are_scored_together(finished, copied, monkeypatch):
  audit = audit_in(
    copied, methods=("nearest",), levels=(3, 4), last_layer_levels=("same", "usual", "full")
  )
  together, save = [], layout.Audit.save_scores

  def observe(audit, packed, *arguments, **options):
    together.append([variant[1:] for variant in packed])
    save(audit, packed, *arguments, **options)

  monkeypatch.setattr(layout.Audit, "save_scores", observe)
  chunk = audit.own_chunks()[0]
  quantizing.quantize_chunk(
    audit, chunk, audit.variants(), events.Stage(events.silent, "quantize", 1)
  )
  assert together == [[(3, 3), (3, 256), (3, None)], [(4, 4), (4, None)]]
  alone, in_company = (
    storage.load_arrays(root / "scores" / "nearest-3-3" / f"{chunk.name}.npz")
    for root in (finished[0], copied)
  )
  for name in ("scores", "accuracy", "size_kb", "calibration"):
    np.testing.assert_array_equal(alone[name], in_company[name])
  other = storage.load_arrays(copied / "scores" / "nearest-3-256" / f"{chunk.name}.npz")
  assert not np.array_equal(other["scores"], alone["scores"])


def test_a_diverged_model_is_left_out_with_its_partner_and_named(copied):
  path = copied / "scores" / "full_precision" / "shadows-00000-00004.npz"
  arrays = storage.load_arrays(path)
  arrays["scores"][3] = np.nan
  storage.save_arrays(path, **arrays)
  shutil.rmtree(copied / "scores" / "obc-3-3")
  done = launch("audit", copied, METHODS)
  assert done.returncode == 0, done.stderr
  assert "warning, shadows: shadows 2, 3 are left out" in done.stdout
  assert {record["num_targets"] for record in leakage(copied)} == {6}
  quantized = storage.load_arrays(copied / "scores" / "obc-3-3" / path.name)["scores"]
  assert list(np.isfinite(quantized).all(axis=(1, 2))) == [True, True, True, False]


def test_damaged_models_are_named_and_trained_again(finished, copied):
  chunk = next((copied / "models").glob("shadows-*"))
  for path in (chunk / "trained").rglob("d/*"):
    path.write_bytes(b"damaged")
  shutil.rmtree(copied / "scores" / "obc-3-3")
  done = launch("quantize", copied, METHODS)
  assert done.returncode == flags.USER_ERROR
  assert "missing or corrupt; run bash launch/run train_shadows again" in done.stderr
  assert launch("audit", copied, METHODS).returncode == 0
  assert_same(finished[0], copied)


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (("--config.train.epochs=3",), "belongs to another config: train.epochs is 3, was 2"),
    (("--config.model.width=3",), "belongs to another config: model.width is 3, was 2"),
    (("--config.quantize.calibration_size=11",), "quantize.calibration_size is 11, was 10"),
    (("--config.train.models=6",), "train.models is 6, was 8"),
    (("--config.train.models=7",), "num_models is 7; models come in complementary pairs"),
    (("--config.train.models=4",), "needs two shadows"),
    (("--config.quantize.levels=(300,)",), "levels must be a whole number from 2 to 256, got 300"),
    (("--config.quantize.levels=(1,)",), "levels must be a whole number from 2 to 256, got 1"),
    (("--config.quantize.methods=('gptq',)",), "quantize.methods has 'gptq'; choose among"),
    (("--config.quantize.calibration_size=31",), "a model has 30 members"),
    (("--config.quantize.calibrate_on=all",), "calibrate_on is 'all'"),
    (("--config.quantize.overrides=('nope=3',)",), "matches no layer; the layers are"),
    (("--config.quantize.last_layer_levels=('none',)",), "last_layer_levels has 'none'"),
    (("--config.train.batch_size=31",), "batch_size is 31, but a model trains on 30 members"),
    (("--config.attack.fprs=(2.0,)",), "attack.fprs has 2.0"),
    (("--config.attack.attacks=('guess',)",), "attack 'guess' is unknown"),
    (("--config.train.augmentation=('blur',)",), "no augmentation 'blur'"),
    (("--config.model.name=resnet9",), "model.name is 'resnet9'"),
    (("--config.train.models_per_chunk=0",), "models_per_chunk is 0; give a number of models, or"),
    (("--config.train.models_per_chunk=all",), "models_per_chunk is 'all'; give a number of"),
    (("--config.train.lowering=fast",), "train.lowering is 'fast'; choose auto, measure, unrolled"),
    (("--config.train.optimizer=adam",), "train.optimizer is 'adam'; choose one of sgd, muon"),
    (("--config.data.name=cifar1",), "cifar1"),
    (("--config.data.pool_size=100000",), "pool_size"),
  ],
  ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_bad_settings_are_one_sentence_and_spoil_nothing(finished, arguments, sentence):
  directory, _ = finished
  before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
  config = settings.load(str(ROOT / TINY[0].partition("=")[2]))
  for argument in (*TINY[1:], METHODS, *arguments):
    key, _, text = argument.removeprefix("--config.").partition("=")
    config.update_from_flattened_dict({key: parse(text)})
  with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
    preflight.open_audit(config, directory)
  assert len(str(caught.value).splitlines()) == 1
  assert {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()} == before


def parse(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def test_a_bad_setting_through_the_launcher(finished):
  done = launch("audit", finished[0], METHODS, "--config.train.epochs=3")
  assert done.returncode == flags.USER_ERROR
  assert "belongs to another config: train.epochs is 3, was 2" in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_an_unwritable_workdir_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  done = launch("audit", tmp_path / "file")
  assert done.returncode == 2
  assert "cannot be written" in done.stderr


def test_stages_out_of_order_say_what_is_missing(tmp_path):
  for stage, needs in (("report", "attack"), ("attack", "train_shadows")):
    done = launch(stage, tmp_path)
    assert done.returncode == 2
    assert f"run bash launch/run {needs} first" in done.stderr


def test_out_of_memory_halves_the_chunk(tmp_path, monkeypatch, capsys):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  config.train.models_per_chunk = 8
  audit = preflight.open_audit(config, tmp_path)

  def train_chunk(audit, chunk, progress):
    progress.advance(0)
    audit.model_directory(chunk).mkdir(parents=True)
    if len(chunk) > 2:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    like = training.states_like(audit, chunk).variables
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)

  monkeypatch.setattr(training, "train_chunk", train_chunk)
  training.train(audit)
  names = sorted(path.name for path in (tmp_path / "models").iterdir())
  assert names == [f"shadows-{i:05d}-{i + 2:05d}" for i in (0, 2, 4, 6)]
  assert "out of memory with 8 models at once; going on with 4" in capsys.readouterr().err
  assert len(audit.load_scores(layout.FULL_PRECISION, "shadows")["scores"]) == 8


def test_chunks_are_as_large_as_fits_unless_a_number_is_given(tmp_path, monkeypatch):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  config.train.models_per_chunk = "auto"
  for most, names in ((3, ["00000-00003", "00003-00006", "00006-00008"]), (99, ["00000-00008"])):
    audit = preflight.open_audit(config, tmp_path)
    monkeypatch.setattr(preflight.shadows, "largest_chunk", lambda *_, most=most, **__: most)
    assert [chunk.name.removeprefix("shadows-") for chunk in audit.work.chunks] == names
  config.train.models_per_chunk = 4
  assert [len(chunk) for chunk in preflight.open_audit(config, tmp_path).chunks()] == [4, 4]


def test_the_lowering_is_measured_once_and_kept(tmp_path, monkeypatch, capsys):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  config.train.lowering = "measure"
  audit = preflight.open_audit(config, tmp_path)
  chunk = audit.work.chunks[0]
  measured = []
  nothing = dict.fromkeys(("unrolled", "patches", "grouped"), 0.0)
  monkeypatch.setattr(training.shadows, "lowering_rates", lambda *_, **__: nothing)
  assert (
    training.recipe_of(audit, chunk, events.Stage(events.silent, "train_shadows", 1))
    == audit.recipe
  )

  def rates(keys, recipe, images, labels, members, **_):
    measured.append(members.shape)
    return {"unrolled": 10.0, "patches": 30.0, "grouped": 20.0}

  monkeypatch.setattr(training.shadows, "lowering_rates", rates)
  for _ in range(2):
    recipe = training.recipe_of(audit, chunk, events.Stage(events.silent, "train_shadows", 1))
    assert recipe == audit.recipe._replace(lowering="patches")
  assert measured == [(len(chunk), 100)]
  assert capsys.readouterr().err.count("patches is fastest (images/s: unrolled 10, ") == 1
  config.train.lowering = "grouped"
  assert preflight.open_audit(config, tmp_path).recipe.lowering == "grouped"


def test_a_training_with_muon_goes_on_from_its_checkpoint(tmp_path):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  config.train.optimizer = "muon"
  whole, broken = (preflight.open_audit(config, tmp_path / name) for name in ("whole", "broken"))
  chunk, progress = whole.chunks()[0], events.Stage(events.silent, "train_shadows", 1)
  expected = training.train_updates(whole, chunk, progress)
  keys, *data = training.inputs(broken, chunk)
  states = training.shadows.init(keys, broken.recipe, image_shape=(8, 8, 1))
  first = next(training.shadows.epochs(states, keys, broken.recipe, *data, first=0, last=1))
  with storage.Checkpoints(broken.model_directory(chunk) / "training") as checkpoints:
    checkpoints.save(1, first.states, {"chunk": chunk.name})
  resumed = training.train_updates(broken, chunk, progress)
  jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_a_workdir_older_than_a_setting_goes_on_with_its_default(tmp_path):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  preflight.open_audit(config, tmp_path)
  stored = storage.read_json(tmp_path / "config.json")
  del stored["config"]["train"]["optimizer"], stored["config"]["train"]["muon"]
  storage.write_json(tmp_path / "config.json", stored)
  preflight.open_audit(config, tmp_path)
  storage.write_json(tmp_path / "config.json", stored)
  config.train.optimizer = "muon"
  with pytest.raises(ValueError, match=r"train\.optimizer is muon, was sgd"):
    preflight.open_audit(config, tmp_path)


def test_what_auto_means_belongs_to_the_workdir(tmp_path, monkeypatch):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  config.model.dtype = "auto"
  assert preflight.open_audit(config, tmp_path).model.dtype == "float32"
  config.model.dtype = "float32"
  preflight.open_audit(config, tmp_path)
  config.model.dtype = "auto"
  monkeypatch.setattr(layout.models.jax, "default_backend", lambda: "gpu")
  with pytest.raises(ValueError, match=r"model\.dtype is bfloat16, was float32"):
    preflight.open_audit(config, tmp_path)


def npz(path, **changes):
  rng = np.random.default_rng(0)
  arrays = {
    "x_train": rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8),
    "y_train": np.arange(60) % 3,
    "x_test": rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8),
    "y_test": np.arange(20) % 3,
  }
  np.savez(path, **(arrays | changes))
  return path


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"x_train": np.full((60, 8, 8, 1), np.nan)}, "NaN"),
    ({"x_train": np.zeros((60, 8, 8, 1))}, "uint8"),
    ({"x_train": np.zeros((60, 8), np.uint8)}, "x_train"),
    ({"y_train": np.full(60, -1)}, "label"),
  ],
)
def test_bad_images_are_one_sentence(tmp_path, changes, sentence):
  config = settings.load(str(ROOT / "configs/smoke.py"))
  config.data.name, config.data.path = "npz", str(npz(tmp_path / "data.npz", **changes))
  with pytest.raises(ValueError, match=sentence) as caught:
    preflight.open_audit(config, tmp_path / "run")
  assert len(str(caught.value).splitlines()) == 1


def test_own_data_own_model_and_dedicated_targets(tmp_path):
  (tmp_path / "mine.py").write_text(
    "import flax.linen as nn\n"
    "class Net(nn.Module):\n"
    "  num_classes: int\n"
    "  @nn.compact\n"
    "  def __call__(self, x, train=False):\n"
    "    x = nn.relu(nn.Conv(3, (3, 3), name='first')(x))\n"
    "    return nn.Dense(self.num_classes, name='last')(x.reshape(len(x), -1))\n"
    "def make(num_classes, width):\n"
    "  return Net(num_classes)\n"
  )
  path = npz(tmp_path / "data.npz")
  done = subprocess.run(
    command(
      "audit",
      tmp_path / "run",
      METHODS,
      "--config.data.name=npz",
      f"--config.data.path={path}",
      "--config.model.name=mine:make",
      "--config.train.models=4",
      "--config.train.targets=3",
    ),
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  first = leakage(tmp_path / "run")[0]
  assert (first["num_targets"], first["num_members"]) == (3, 30)
  run = records.select(storage.read_records(tmp_path / "run" / "results.jsonl"), "run")[0]
  assert run["protocol"] == "dedicated targets"
  assert run["config"]["train"]["targets"] == 3
