"""The shipped configs: the paper's protocol to the letter, and audits with them on made data."""

import itertools
import pathlib

import numpy as np
import pytest

from launch import audit as launcher
from launch import flags, sweep
from ptq_jax import audit, models, settings, storage, trees
from ptq_jax.attack import protocol as protocols
from ptq_jax.audit import preflight, work
from ptq_jax.audit.layout import Audit
from ptq_jax.data import augment
from ptq_jax.quantize import METHODS, adaround, brecq
from ptq_jax.report import records
from ptq_jax.train import optimizer
from tests.audit.conftest import unchecked
from tests.data import pictures
from tests.data import test_tfds_sets as made

ROOT = pathlib.Path(__file__).resolve().parents[1]
HERE = pathlib.Path("nowhere")
STUDIES = ("cifar10", "cifar100", "tiny_imagenet")
PROTOCOLS = ("fast", "paper", "smoke")  # of all three studies
REDUCED = ("small", "deep")  # of CIFAR alone


def load(name, protocol=None):
  return settings.load(f"{ROOT}/configs/{name}.py" + (f":protocol={protocol}" if protocol else ""))


def flat(config):
  return trees.flatten(settings.plain(config))


@pytest.mark.parametrize(
  ("name", "protocol"),
  [*itertools.product(STUDIES, PROTOCOLS), *itertools.product(("cifar10", "cifar100"), REDUCED)],
)
def test_every_name_in_a_config_exists(name, protocol):
  config = load(name, protocol)
  model = settings.named(config.model, "name")
  assert models.make(config.model.name, num_classes=10, **model).dtype in ("float32", "bfloat16")
  assert config.train.schedule in optimizer.SCHEDULES
  assert set(config.attack.attacks) <= set(protocols.ATTACKS)
  usual = (("flip", ()), ("crop", (4,)))
  of_queries = () if protocol in REDUCED else usual
  of_training = usual[:1] if protocol == "deep" else of_queries
  assert augment.make(config.train.augmentation).steps == of_training
  assert augment.make(config.queries.augmentation).steps == of_queries
  for method in config.quantize.methods:
    section = config.quantize[method]
    settings.arguments(METHODS[method].quantize_stacked, section, "calibration_size")


def test_a_sweep_of_the_last_layer_names_its_variants_once(tmp_path):
  config = load("digits")
  config.quantize.methods = ("obc", "nearest")
  config.quantize.levels = (3, 16)
  config.quantize.last_layer_levels = ("same",)
  config.quantize.sweep_last_layer_at = (3,)
  variants = Audit(config, tmp_path, tmp_path).variants()
  assert len(variants) == len(set(variants)) == 2 * (2 + 5)
  lasts = [v.last_layer_levels for v in variants if (v.method, v.levels) == ("obc", 3)]
  assert lasts == [3, 4, 8, 16, 256, None]


@pytest.mark.parametrize("name", STUDIES)
def test_a_recipe_changes_how_models_are_trained_and_nothing_else(name):
  mixed, paper, fast = (
    flat(load(name, protocol)) for protocol in ("paper,recipe=fast", "paper", "fast")
  )
  counts = {"train/models", "train/targets"}
  for key in mixed.keys() - {"name"}:
    of_recipe = key.startswith("train/") and key not in counts
    assert mixed[key] == (fast if of_recipe else paper)[key], key
  assert mixed["name"] == f"{name} paper, fast recipe"
  assert mixed["train/epochs"] < paper["train/epochs"] / 5
  same = flat(load(name, "fast,recipe=fast"))
  assert {key for key in same if same[key] != fast[key]} == {"name"}
  with pytest.raises(ValueError, match="recipe is 'slow'; choose one of fast, paper"):
    load(name, "fast,recipe=slow")


@pytest.mark.parametrize("name", STUDIES)
def test_the_paper_s_protocol(name):
  """Section by section what arXiv 2512.15335 and its public code do."""
  config = load(name, "paper")
  speed = ("models_per_chunk", "models_together", "lowering", "cache_dir", "checkpoint_minutes")
  train = settings.named(config.train, "muon", *speed)
  assert train == {
    "optimizer": "sgd",
    "models": 64,
    "targets": 10,
    "epochs": 160,
    "batch_size": 128,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "label_smoothing": 0.0,
    "augmentation": ("flip", "crop4"),
  }
  assert settings.plain(config.model) == {"name": "resnet18", "dtype": "float32"}
  assert config.data.pool_size is None  # the whole training split
  assert (config.queries.views, config.queries.augmentation) == (2, ("flip", "crop4"))
  quantize = config.quantize
  assert quantize.methods == ("adaround", "brecq", "obc")
  assert (quantize.calibrate_on, quantize.calibration_augmentation) == (
    "members",
    ("flip", "crop4"),
  )
  last = {variant[1:] for variant in Audit(config, HERE, HERE).variants()}
  usual = {(3, 256), (4, 256), (16, 256)} if name == "tiny_imagenet" else {(3, 256), (4, 4)}
  assert last == usual | ({(16, 16)} if name != "tiny_imagenet" else set())
  for method, schedule, paper in (
    ("adaround", "mini_batch", adaround.MINI_BATCH),
    ("brecq", "schedule", brecq.PAPER),
  ):
    section = quantize[method]
    options = settings.arguments(METHODS[method].quantize_stacked, section, "calibration_size")
    assert options[schedule] == paper
    assert not options["grid_options"]["include_zero"]
    assert (options["form"], options["stop"]) == ("mini_batch", "never")
    assert section.calibration_size == 1024
    assert (paper.warmup, paper.beta_start, paper.beta_end) == (0.2, 20, 2)
    assert paper.decay_rates == (0.9, 0.999)
  assert quantize.brecq.loss == "mse"
  assert adaround.MINI_BATCH[:4] == (20_000, 1e-3, 1e-3, 32)
  assert brecq.PAPER[:4] == (20_000, 1e-3, 0.01, 32)
  obc = quantize.obc
  assert (obc.damping, obc.batchnorm, obc.calibration_size) == (0.0, "all", 2048)
  assert obc.grid_options.include_zero
  assert {"lira_online", "lira_online_reference", "lira_offline_density"} <= set(
    config.attack.attacks
  )
  assert {0.01, 0.001} <= set(config.attack.fprs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_studies_differ_only_in_their_data(protocol):
  reference, allowed = flat(load("cifar100", protocol)), {"name", "data/name"}
  for name, more in {
    "cifar10": set(),
    "tiny_imagenet": {"data/image_size", "quantize/last_layer_levels"},
  }.items():
    other = flat(load(name, protocol))
    differing = {
      key for key in reference.keys() | other.keys() if reference.get(key) != other.get(key)
    }
    assert {"name", "data/name"} <= differing <= allowed | more


def test_fast_is_the_default_and_other_protocols_are_refused():
  assert flat(load("cifar10")) == flat(load("cifar10", "fast"))
  with pytest.raises(ValueError, match="protocol is 'slow'; choose one of fast, paper, small"):
    load("cifar10", "slow")


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
  """A folder with 80 + 20 random images as a CIFAR-10 that TensorFlow Datasets prepared."""
  folder = tmp_path_factory.mktemp("tfds")
  images = {split: pictures.random_images(count, size=32, seed=count)
            for split, count in (("train", 80), ("test", 20))}  # fmt: skip
  examples = {split: made.cifar10_examples(each, split) for split, each in images.items()}
  made.prepare("cifar10", folder, examples, labels=list("abcdefghij"))
  return folder


SMALL = {
  "data.pool_size": "60",
  "data.test_size": "20",
  "data.image_size": "8",
  "model.name": "convnet",  # compiles sooner than the study's network
  "model.width": "2",
  "train.epochs": "1",
  "train.batch_size": "10",
  "train.models_per_chunk": "2",
  "quantize.methods": "nearest",
  "quantize.calibration_size": "10",
  "attack.attacks": "('lira_online_pooled','lira_offline_density')",
  "attack.resamples": "10",
  "report.figures": "False",
}


def test_the_smoke_protocol_opens_cifar10_as_tensorflow_datasets_prepares_it(cifar10, tmp_path):
  config = sweep.with_values(load("cifar10", "smoke"), SMALL | {"data.data_dir": str(cifar10)})
  opened = preflight.open_audit(config, tmp_path)
  assert (opened.dataset.name, opened.dataset.image_shape) == ("cifar10", (8, 8, 3))
  assert len(opened.dataset.train_labels) == 60
  assert len(opened.members["shadows"]) == 6
  assert [tuple(variant) for variant in opened.variants()] == [
    ("nearest", 3, 256),
    ("nearest", 16, 16),
  ]


def test_an_unprepared_set_is_one_sentence(tmp_path):
  config = load("cifar10", "smoke")
  config.data.data_dir = str(tmp_path)
  with pytest.raises(flags.USER_ERRORS) as caught:
    launcher.run(config, tmp_path / "audit", shard=work.WHOLE)
  sentence = str(caught.value)
  assert sentence.startswith("the dataset 'cifar10' is not prepared in")
  assert "download_and_prepare" in sentence
  assert len(sentence.splitlines()) == 1


def test_the_paper_s_protocol_runs(cifar10, tmp_path):
  """Dedicated targets and calibration sets of a method's own size; everything else small."""
  small = {key: value for key, value in SMALL.items() if key != "model.width"}
  config = load("cifar10", "paper")
  config.model.num_convolutions = 1
  config = sweep.with_values(
    config,
    small
    | {
      "data.data_dir": str(cifar10),
      "model.name": "convnet",
      "train.models": "4",
      "train.targets": "2",
      "quantize.methods": "obc",
      "quantize.levels": "3",
      "quantize.adaround.calibration_size": "6",  # not above the common one, or it is refused
      "quantize.obc.calibration_size": "8",
    },
  )
  with unchecked():
    audit.run(config, workdir=tmp_path)
  members = storage.load_arrays(tmp_path / "membership.npz")["targets"]
  calibration = storage.load_arrays(next(tmp_path.glob("scores/obc-3-256/targets-*.npz")))
  assert calibration["calibration"].shape == (2, 8)
  assert np.take_along_axis(members, calibration["calibration"], axis=1).all()
  found = storage.read_records(tmp_path / "results.jsonl")
  records.validate_all(found)
  assert found[0]["data"]["image_shape"] == [8, 8, 3]
  assert found[0]["protocol"] == "dedicated targets"
  found = records.select(found, "leakage")
  assert {record["num_targets"] for record in found} == {2}
  assert {record["attack"] for record in found} == set(config.attack.attacks)


def test_a_tiny_imagenet_archive_passes_the_checks(tmp_path):
  files, _ = pictures.tiny_imagenet_files()
  archive = pictures.write_zip(tmp_path / "tiny-imagenet-200.zip", files)
  values = {"data.path": str(archive), "data.pool_size": "6", "data.test_size": "4"}
  small = SMALL | values | {"train.batch_size": "3", "quantize.calibration_size": "3"}
  opened = Audit(sweep.with_values(load("tiny_imagenet", "smoke"), small), tmp_path, tmp_path)
  preflight.check(opened)
  assert opened.model.num_classes == 2
  assert opened.dataset.image_shape == (8, 8, 3)
