"""The grid, what is shared, what it costs, and one table; through the real stages."""

import csv
import pathlib

import numpy as np
import pytest

from launch import sweep
from ptq_jax import audit, settings, storage, trees
from ptq_jax.audit import preflight, running
from ptq_jax.models import flops
from ptq_jax.report import records
from tests.audit.conftest import unchecked

ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = {
  "data.pool_size": "60",
  "data.test_size": "20",
  "model.width": "2",
  "train.epochs": "2",
  "train.batch_size": "10",
  "train.models": "6",
  "train.models_per_chunk": "6",
  "quantize.methods": "nearest",
  "quantize.levels": "3",
  "quantize.calibration_size": "10",
  "attack.attacks": "lira_online_pooled",
  "attack.resamples": "10",
  "report.figures": "false",
}
BASE = [
  "--config=configs/smoke.py",
  "--config.model.num_convolutions=1",
  *(f"--config.{key}={value}" for key, value in TINY.items()),
]


def tiny_config():
  config = settings.load(f"{ROOT}/configs/smoke.py")
  config.model.num_convolutions = 1
  return sweep.with_values(config, TINY)


def points_of(*texts, workdir="nowhere"):
  return sweep.make_points(tiny_config(), pathlib.Path(workdir), sweep.parse_axes(texts))


def test_values_are_read_as_overrides_are():
  config = settings.load(f"{ROOT}/configs/smoke.py")
  written = {
    "quantize.levels": "3",
    "quantize.methods": "('obc','nearest')",
    "data.path": "here",
    "data.pool_size": "80",
    "train.learning_rate": "1",
    "train.nesterov": "true",
  }
  found = trees.flatten(settings.plain(sweep.with_values(config, written)))
  expected = [[3], ["obc", "nearest"], "here", 80, 1.0, True]
  assert [found[key.replace(".", "/")] for key in written] == expected
  assert config.train.nesterov is False  # the original stays


def test_values_with_commas_go_in_brackets_or_quotes():
  assert sweep.split("3, (3,4),['a,b'],\"x,y\"") == ["3", "(3,4)", "['a,b']", '"x,y"']


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    ([], "nothing to sweep; give --sweep KEY=VALUE,VALUE"),
    (["seed"], "--sweep has 'seed'; write KEY=VALUE,VALUE"),
    (["seed=0,,1"], "--sweep has 'seed=0,,1'; write"),
    (["seed=0", "seed=1"], "--sweep names seed twice"),
    (["train.epoch=3"], r"names train\.epoch, but the config has no such key"),
    (["train=3"], "names train, but the config has no such key"),
    (["train.epochs=few"], "a value that cannot be read: .*few"),
    (["seed=0,00"], "gives the same point twice: seed=0"),
    (["train.models=6,7"], r"at train\.models=7: .*7"),
  ],
)
def test_grids_that_make_no_sense(texts, message):
  with pytest.raises(ValueError, match=message):
    points_of(*texts)


def test_the_last_key_is_fastest_and_names_are_names_of_folders():
  names = [point.name for point in points_of("seed=0,1", "quantize.levels=3,4")]
  assert names[:2] == ["seed=0,quantize.levels=3", "seed=0,quantize.levels=4"]
  assert names[2].startswith("seed=1")
  odd, other = (sweep.point_name({"data.path": path}) for path in ("a/b", "a:b"))
  assert "/" not in odd
  assert odd != other


def test_models_are_shared_when_nothing_they_depend_on_differs():
  def trainings(*texts):
    with unchecked():
      return len({point.trained for point in points_of(*texts)})

  assert trainings("quantize.levels=3,4", "attack.confidence=0.9,0.95", "queries.views=1,2") == 1
  assert trainings("train.models_per_chunk=2,6", "train.checkpoint_minutes=1,2") == 1
  for key, values in {
    "seed": "0,1",
    "train.models": "6,8",
    "train.learning_rate": "0.1,0.2",
    "model.width": "2,3",
    "data.pool_size": "40,60",
  }.items():
    assert trainings(f"{key}={values}") == 2, key


def test_the_plan_counts_each_training_once(tmp_path):
  points = points_of("seed=0,1", "quantize.levels=3,(3,4)", workdir=tmp_path)
  text = sweep.describe(points)
  images = 2 * 6 * 2 * 30  # trainings, models, epochs, members
  assert f"Trainings: 2, together 12 models (0 trained already), {images:,} examples" in text
  opened = preflight.open_audit(tiny_config(), tmp_path / "one")
  per_image = flops.training(opened.model, image_shape=(8, 8, 1))
  assert sweep.short(images * per_image) + "FLOP" in text
  assert f"Quantized models: {2 * 6 * (1 + 2)}." in text
  assert f"Scoring: {2 * 6 * (2 + 3) * (60 + 20):,} examples" in text


def modified(root):
  files = (path for path in root.rglob("*") if path.is_file() and "lock" not in str(path))
  return {path: path.stat().st_mtime_ns for path in files}


LAUNCHED = "seed=1,quantize.levels=4"
"""The point whose command is run: it finds everything done, as no other audit would."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A sweep over two numbers of levels, grown by a second seed."""
  root, by_command = tmp_path_factory.mktemp("sweep"), sweep.run_point

  def run_point(point, base):
    with unchecked():
      running.run_stages(preflight.open_audit(point.config, point.root, trained=point.trained))
    if point.name == LAUNCHED:
      done = modified(root)
      by_command(point, base)
      assert modified(root) == done

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sweep, "run_point", run_point)
    sweep.run(tiny_config(), root, base=BASE, sweep=["seed=0", "quantize.levels=3,4"])
    before = modified(root / "points") | modified(root / "trained")
    sweep.run(tiny_config(), root, base=BASE, sweep=["seed=0,1", "quantize.levels=3,4"])
  return root, before


def test_what_is_there_is_not_computed_again(finished):
  root, before = finished
  after = modified(root / "points") | modified(root / "trained")
  assert {path: after[path] for path in before} == before
  assert len(after) > len(before)


def test_points_share_models_and_get_what_a_plain_audit_gets(finished, tmp_path):
  root, _ = finished
  shared = [
    {point.trained for point in points_of(f"seed={seed}", "quantize.levels=3,4", workdir=root)}
    for seed in (0, 1)
  ]
  assert len(list((root / "trained").iterdir())) == 2
  assert [len(paths) for paths in shared] == [1, 1]
  assert shared[0] != shared[1]
  config = sweep.with_values(tiny_config(), {"seed": "1", "quantize.levels": "4"})
  with unchecked():
    audit.run(config, workdir=tmp_path)
  for path in tmp_path.glob("scores/*/*.npz"):
    of_point = root / "points" / LAUNCHED / path.relative_to(tmp_path)
    found, expected = (storage.load_arrays(each)["scores"] for each in (of_point, path))
    np.testing.assert_array_equal(found, expected)


def test_one_table_of_all_points(finished):
  root, _ = finished
  rows = list(csv.DictReader((root / "sweep.csv").open()))
  assert list(rows[0])[:3] == ["seed", "quantize.levels", "method"]
  found = {(row["seed"], row["quantize.levels"], row["method"]) for row in rows}
  assert found == {(s, v, m) for s in "01" for v in "34" for m in ("none", "nearest")}
  joined = storage.read_records(root / "sweep.jsonl")
  records.validate(joined[0])
  assert joined[-1]["values"] == {"seed": 1, "quantize.levels": [4]}
  own = storage.read_records(root / "points" / joined[-1]["point"] / "results.jsonl")
  last = records.select(own, "leakage")[-1]
  assert joined[-1] == last | {"point": joined[-1]["point"], "values": joined[-1]["values"]}
  assert "| seed | quantize. levels | method |" in (root / "sweep.md").read_text().replace(
    "<br>", " "
  )


def test_a_finished_sweep_says_so_and_can_be_given_more_models(finished):
  root, _ = finished
  points = points_of("seed=0,1", "quantize.levels=3,4", workdir=root)
  text = sweep.describe(points)
  assert text.count("(finished)") == 4
  assert "12 models (12 trained already)" in text
  more = sweep.with_values(tiny_config(), {"train.models": "8"})
  grown = sweep.make_points(more, root, sweep.parse_axes(["seed=0,1", "quantize.levels=3,4"]))
  assert {point.trained for point in grown} == {point.trained for point in points}
  assert "(finished)" not in sweep.describe(grown)


def test_stopped_in_between_leaves_the_table_so_far(tmp_path, monkeypatch, finished):
  root, _ = finished
  done = []

  def stop_at_the_second(point, base):
    done.append(point)
    if len(done) == 2:
      raise KeyboardInterrupt
    source = root / "points" / "seed=0,quantize.levels=3" / "results.jsonl"
    found = storage.read_records(source)
    found[0]["config"] = settings.plain(point.config)
    storage.write_records(point.root / "results.jsonl", found)

  monkeypatch.setattr(sweep, "run_point", stop_at_the_second)
  with pytest.raises(KeyboardInterrupt):
    sweep.run(tiny_config(), tmp_path, base=BASE, sweep=["quantize.levels=3,4"])
  values = {row["quantize.levels"] for row in csv.DictReader((tmp_path / "sweep.csv").open())}
  assert values == {"3"}


def test_dry_run_prints_the_plan_and_writes_nothing(launch, tmp_path):
  where = tmp_path / "sweep"
  done = launch(
    "sweep",
    "--config=configs/smoke.py",
    f"--workdir={where}",
    "--config.train.models=6",
    "--sweep=seed=0,1",
    "--sweep",
    "quantize.levels=3,4",
    "--dry_run",
  )
  assert done.returncode == 0, done.stderr
  assert "Sweep of 4 points" in done.stdout
  assert "Trainings: 2, together 12 models" in done.stdout
  assert not where.exists()
