"""Every key with a bad value is refused before anything is computed, and nothing is spoilt."""

import re

import flax.linen as nn
import numpy as np
import pytest

from ptq_jax import audit, settings, storage
from ptq_jax.audit import layout, preflight
from ptq_jax.data import load
from ptq_jax.quantize import brecq, capture
from tests.audit.conftest import Heard, opened, tiny_config, unchecked

BAD = {
  "seed": (-1, 2**32, True),
  "data.name": ("cifar1", ""),
  "data.path": ("nowhere", None),
  "data.columns": (("image", "label"), (3,)),
  "data.pool_size": (1, 100_000, 31),
  "data.test_size": (0, 100_000),
  "data.image_size": (0, 10**9, True),
  "model.name": ("resnet9", "no_such_module:make"),
  "train.models": (0, 4, 7, 10**9, 2**70),
  "train.targets": (-1, 10**9),
  "train.epochs": (0, 10**9, True),
  "train.batch_size": (0, 31, True),
  "train.optimizer": ("adam",),
  "train.muon.learning_rate": (-1.0, 0.0, 1e9),
  "train.muon.weight_decay": (-1.0, 1e9),
  "train.muon.momentum": (1.0,),
  "train.learning_rate": (-1.0, 0.0, 1e9, float("nan"), float("inf")),
  "train.momentum": (1.0, float("nan")),
  "train.weight_decay": (-1.0, 1e9, float("nan")),
  "train.schedule": ("sometimes",),
  "train.label_smoothing": (1.0, -0.1),
  "train.augmentation": (("blur",), (1,), ("flip", "shift8")),
  "train.models_per_chunk": (0, "all", 2.5, True),
  "train.models_together": (0, "all"),
  "train.lowering": ("fast",),
  "train.checkpoint_minutes": (0.0, float("nan")),
  "queries.views": (0, 10**9),
  "queries.augmentation": (("blur",), (None,), (f"crop{10**11}",)),
  "queries.batch_size": (0, True),
  "quantize.methods": (("gptq",), ("obc", "obc")),
  "quantize.levels": ((1,), (300,), ("three",), (3.5,), (), (3, 3)),
  "quantize.last_layer_levels": (("none",), (1,), ()),
  "quantize.sweep_last_layer_at": ((1,),),
  "quantize.overrides": (("nope=3",), ("stem",), (3,)),
  "quantize.calibration_size": (0, True),
  "quantize.calibration_augmentation": (("blur",),),
  "quantize.calibrate_on": ("all",),
  "quantize.obc": ({"damp": 0.1},),
  "quantize.adaround": ({"mini_batch": {"step": 1}},),
  "quantize.nearest": tuple(
    {"grid_options": options}
    for options in (
      {"nope": 1},
      {"two_levels": False},
      {"group_size": ("nope=3", "*=all")},
      {"group_size": ("*=3.5",)},
      {"group_size": "*=3"},
    )
  ),
  "attack.attacks": (("guess",), (), ("loss_threshold",) * 2),
  "attack.fprs": ((2.0,), (0.0,), (), (0.1, 0.1), ("a",)),
  "attack.resamples": (0, 10**9, 2**70),
  "attack.confidence": (0.0, 1.0, 2.0),
  "attack.delta": (-1e-5, 1.0, float("nan")),
  "attack.worst_classes": (-1, True),
  "attack.exposed_share": (0.0, 2.0),
  "report.show_images": (None,),
  "report.figures": (None,),
}
"""Values that make no sense, by key; None and 31 stand for values that do."""

BAD_OPTIONS = {
  "calibration_size": 11,
  "symmetric": None,
  "search": "best",
  "norm": 1e9,
  "include_zero": None,
  "group_size": 7,  # divides the inputs of no layer
  "memory_bytes": 0,
  "strict": None,
  "form": "x",
  "stop": "x",
  "num_steps": 0,
  "learning_rate": -1.0,
  "weight": -0.1,
  "batch_size": 0,
  "warmup": 1.0,
  "beta_start": 0.0,
  "beta_end": float("nan"),
  "decay_rates": (0.9,),
  "sweeps": -1,
  "units": (3,),
  "loss": "x",
  "damping": -1.0,
  "batchnorm": "x",
  "block_size": 0,
}
"""A value that makes no sense for every option of a method."""

for option in settings.dotted(settings.plain(settings.audit_defaults().quantize)):
  if option.startswith(("nearest.", "adaround.", "brecq.", "obc.")):
    BAD[f"quantize.{option}"] = (BAD_OPTIONS[option.rpartition(".")[2]],)

HARMLESS = [("data.path", None), ("data.pool_size", 31), ("data.path", "nowhere")]
CASES = [(k, v) for k, values in BAD.items() for v in values if (k, v) not in HARMLESS]


@pytest.mark.parametrize(("key", "value"), CASES, ids=str)
def test_a_bad_value_is_one_sentence_and_writes_nothing(tmp_path, key, value):
  methods = ("nearest", "adaround", "brecq", "obc")
  needed = {} if key == "quantize.methods" else {"quantize__methods": methods}
  config = tiny_config(**needed, train__optimizer="muon" if "muon" in key else "sgd")
  *parents, name = key.split(".")
  with config.unlocked():
    (settings.get(config, ".".join(parents)) if parents else config)[name] = value
  with pytest.raises((ValueError, FileNotFoundError)) as caught:
    preflight.open_audit(config, tmp_path / "run")
  assert len(str(caught.value).splitlines()) == 1
  assert not list((tmp_path / "run").rglob("*.npz"))


def test_group_sizes_by_pattern_reach_the_method(tmp_path):
  sizes = ("head/*=all", "*=9")
  audit_ = layout.Audit(
    tiny_config(quantize__obc__grid_options__group_size=sizes), tmp_path, tmp_path
  )
  preflight.check(audit_)
  options = audit_.method_options("obc")["grid_options"]
  assert options["group_size"] == {"head/*": None, "*": 9}


def test_none_is_for_settings_that_may_be_left_out(tmp_path):
  known = settings.dotted(settings.plain(settings.audit_defaults()))
  needed = [key for key, value in known.items() if value is not None]
  assert len(needed) > 50
  for key in needed:
    config = tiny_config()
    *parents, name = key.split(".")
    with config.unlocked():
      (settings.get(config, ".".join(parents)) if parents else config)[name] = None
    with pytest.raises(ValueError, match=f"^{key} is None; it needs a value"):
      preflight.check(layout.Audit(config, tmp_path, tmp_path))


def test_every_key_is_tried():
  known = settings.dotted(settings.plain(settings.audit_defaults()))
  free = {"name", "data.data_dir", "data.cache_dir", "train.nesterov", "train.cache_dir"}
  assert known.keys() - free <= BAD.keys()


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"train__epochs": 3}, "train.epochs is 3, was 2"),
    ({"model__width": 3, "train__epochs": 3}, "model.width is 3, was 2; train.epochs is 3, was 2"),
    ({"quantize__calibration_size": 11}, "quantize.calibration_size is 11, was 10"),
    ({"queries__views": 2}, "queries.views is 2, was 1"),
    ({"train__models": 6}, "has trained shadows 4 to 7, but train.models asks for 6"),
    ({"data__pool_size": 40}, "pool_size is 40, was 60"),
    ({"quantize__obc": {"damping": 0.1}, "quantize__calibrate_on": "non_members"}, "calibrate_on"),
  ],
)
def test_another_config_is_refused_with_all_that_differs(copied, changes, sentence):
  before = {path: path.read_bytes() for path in copied.rglob("*.*") if path.is_file()}
  with pytest.raises(ValueError, match=re.escape(sentence)):
    opened(copied, **changes)
  assert {path: path.read_bytes() for path in before} == before


def test_codes_that_were_deleted_do_not_make_old_scores_pass_for_new(copied):
  for path in (copied / "quantized").rglob("*.npz"):
    path.unlink()
  with pytest.raises(ValueError, match="calibrate_on is non_members, was members"):
    opened(copied, quantize__calibrate_on="non_members")


def test_what_changes_no_result_may_change(copied):
  audit_ = opened(
    copied,
    name="other",
    train__models_per_chunk=2,
    train__models_together=1,
    train__checkpoint_minutes=1.0,
    train__cache_dir=str(copied),
    queries__batch_size=7,
    quantize__levels=(3, 4),
    attack__confidence=0.9,
    report__figures=False,
  )
  assert [len(chunk) for chunk in audit_.work.chunks] == [4, 4]
  assert not audit_.pending(layout.Variant("obc", 3, 3), audit_.work.chunks[0])


def test_scores_of_other_settings_are_made_anew_even_if_the_config_is_lost(copied):
  (copied / "config.json").write_text("{}")
  audit_ = opened(copied, quantize__calibrate_on="non_members")
  variant, chunk = layout.Variant("obc", 3, 3), audit_.work.chunks[0]
  assert "was made with other settings" in audit_.problem(variant, chunk)
  assert audit_.problem(layout.FULL_PRECISION, chunk) is None


def test_one_class_is_refused(tmp_path):
  images = np.zeros((40, 8, 8, 1), np.uint8)
  data = (images, np.zeros(40, int), images[:10], np.zeros(10, int))
  with pytest.raises(ValueError, match="of one class only"):
    audit.run(tiny_config(data__pool_size=None, data__test_size=None), workdir=tmp_path, data=data)


FOUR = (np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 2) * 2


class Valid(nn.Module):
  """A network that needs images of 4 pixels."""

  features: int = 3

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(4, (4, 4), padding="VALID", name="first")(x)
    return nn.Dense(self.features, name="last")(x.reshape(len(x), -1))


@pytest.mark.parametrize(
  ("size", "features", "sentence"),
  [(1, 3, "too small for model|cannot take images"), (8, 5, "must give logits")],
)
def test_a_model_that_does_not_fit_the_data_is_refused(tmp_path, size, features, sentence):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, size, size, 1), dtype=np.uint8)
  data = (images, np.arange(40) % 3, images[:10], np.arange(10) % 3)
  config = tiny_config(data__pool_size=None, data__test_size=None)
  with pytest.raises(ValueError, match=sentence):
    audit.run(config, workdir=tmp_path, data=data, model=Valid(features))


class Whole(nn.Module):
  """Gives numbers that nothing can be learned from."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x.reshape(len(x), -1)).astype(int)


class Moody(nn.Module):
  """Does something to its inputs, and may end in another way while it trains."""

  norm: object = None
  end: object = None

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = x.reshape(len(x), -1)
    x = nn.Dense(2)(self.norm(x) if self.norm else x)
    return self.end(x) if train and self.end else x


def unsteady(x):
  return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize(
  ("model", "sentence"),
  [
    (Moody(unsteady), "Moody changes its statistics in evaluation mode, too; give its BatchNorm"),
    (Moody(nn.sigmoid, lambda x: x[0]), "Moody gives (2,) for 2 images of 2 classes in training;"),
    (Moody(None, lambda x: x.reshape(-1, 3)), "of shape (8, 8, 1) in training: TypeError: cannot"),
    (nn.Sequential([Moody(), nn.softmax]), "Sequential gives probabilities, which add up to 1;"),
    (nn.Sequential([Moody(), nn.Dense(10**11), nn.Dense(2)]), "Sequential takes 2000 GB, and this"),
    (Whole(), "Whole gives int32; logits must be floating-point numbers."),
    (lambda n: Valid(n), "cannot be made with num_classes=2: TypeError: "),
    (lambda num_classes: num_classes / 0, "cannot be made with num_classes=2: ZeroDivisionError: "),
  ],
)
def test_a_model_that_is_none_is_one_sentence(tmp_path, model, sentence):
  config = tiny_config(data__pool_size=None, data__test_size=None, quantize__methods=())
  with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
    audit.run(config, workdir=tmp_path, data=FOUR, model=model)
  assert len(str(caught.value).splitlines()) == 1


def test_what_is_odd_in_a_model_is_said_and_stands_in_the_results(tmp_path, monkeypatch):
  config = tiny_config(data__pool_size=None, data__test_size=None, quantize__methods=())
  model, said = nn.Sequential([Moody(), nn.relu]), []
  given = {"given_data": load.from_arrays(*FOUR), "given_model": model}
  found = preflight.open_audit(
    config, tmp_path, listener=lambda event: said.append(event.sentence), **given
  )
  [note] = found.notes_on_model
  assert "are never negative" in note
  assert note in said


class Placed(nn.Module):
  """A flat model, one of whose weights stays in full precision."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3)(x.reshape(len(x), -1))
    return nn.Dense(2)(x + self.param("place", nn.initializers.ones, (1, 3)))


def test_what_is_said_is_not_warned_of_again(tmp_path, recwarn):
  heard = Heard()
  config = tiny_config(data__pool_size=None, data__test_size=None, quantize__levels=(4,))
  config.quantize.methods, config.quantize.calibration_size = ("nearest", "brecq"), 1
  config.train.batch_size = 2
  with unchecked():
    audit.run(config, workdir=tmp_path, data=FOUR, model=Placed(), progress=heard)
  for sentence in (brecq.LAYER_BY_LAYER, f"{capture.KEPT}'place' [1, 3]"):
    assert sum(each.startswith(sentence) for each in heard) == 1
    assert not any(str(each.message).startswith(sentence) for each in recwarn)


def test_a_model_without_blocks_is_named_where_brecq_wants_them(tmp_path):
  config = tiny_config(data__pool_size=None, data__test_size=None)
  flat = nn.Sequential([nn.Dense(4), lambda x: x.mean(axis=(1, 2)), nn.Dense(2)])
  given, notes = {"given_data": load.from_arrays(*FOUR), "given_model": flat}, []
  for name, methods in (("with", ("brecq", "obc")), ("without", ("obc",))):
    config.quantize.methods = methods
    notes.append(preflight.open_audit(config, tmp_path / name, **given).notes_on_model)
  assert notes == [[brecq.LAYER_BY_LAYER], []]


def test_a_gpu_that_is_not_used_is_named_unless_it_is_meant(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(preflight, "GPU", tmp_path)
  monkeypatch.setattr(preflight.jax, "default_backend", lambda: "cpu")
  assert "but JAX computes on the CPU" in preflight.unused_gpu()
  monkeypatch.setattr(preflight, "GPU", tmp_path / "none")
  assert preflight.unused_gpu() is None
  monkeypatch.setattr(preflight, "GPU", tmp_path)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert preflight.unused_gpu() is None


def test_no_device_is_not_taken_for_a_model_that_does_not_fit(tmp_path, monkeypatch):
  def devices():
    raise AssertionError  # as JAX_PLATFORMS=cuda without a GPU; `launch.flags` has the sentence

  monkeypatch.setattr(preflight.jax, "devices", devices)
  with pytest.raises(AssertionError):
    opened(tmp_path)


def test_views_that_would_be_the_same_are_one_aloud(tmp_path):
  heard = Heard()
  config = tiny_config(queries__views=3, queries__augmentation=())
  audit = preflight.open_audit(config, tmp_path, listener=heard)
  assert audit.num_views == 1
  assert any("all 3 views (queries.views) of an example are the same" in each for each in heard)
  augmented = tiny_config(queries__views=3, queries__augmentation=("flip",))
  assert preflight.open_audit(augmented, tmp_path / "other", listener=heard).num_views == 3
  assert len([each for each in heard if "queries.views" in each]) == 1


def test_too_many_calibration_images_are_capped_aloud(tmp_path):
  said = []
  config = tiny_config(quantize__calibration_size=31)
  opened_ = preflight.open_audit(config, tmp_path, listener=lambda e: said.append(e.sentence))
  assert opened_.method_options("obc")["calibration_size"] == 30
  assert "a model has 30 members" in "".join(said)


@pytest.mark.parametrize(
  ("given", "sentence"),
  [
    ({"data": FOUR[:2]}, "data is a tuple; give the four arrays (x_train, y_train, x_test, y_te"),
    ({"data": FOUR[0]}, "data is a ndarray; give the four arrays"),
    ({"data": {"x_train": 1, "y_train": 2}}, "data is a dict of x_train, y_train; give the four"),
    ({"data": {"name": "digits", "folder": "x"}}, "a dict of name, data_dir, path"),
    ({"data": {"path": "x"}}, "data.path is x, but the dataset 'digits' has no use for it"),
    ({"data": FOUR, "data.path": "x"}, "data.path is x, but the dataset 'arrays' has no use"),
    ({"data": FOUR, "data.image_size": 0}, "data.image_size is 0; it must be at least 1"),
    ({"data": FOUR, "model": Valid(2), "model.width": 3}, "model.width is given beside model="),
    ({"model": Valid(10), "model.name": "mlp"}, "model.name is given beside model="),
    ({"data": {"pool_size": "a"}}, "data.pool_size is 'a'; it must be of the type"),
    ({"progress": 3}, "progress is 3; give a function of an audit.Event, or None."),
    ({"models": "8"}, "train.models is '8'; it must be of the type int."),
    ({"methods": "obc"}, "quantize.methods is 'obc'; it must be of the type tuple."),
  ],
)
def test_what_run_would_pass_over_is_refused(tmp_path, given, sentence):
  with unchecked(), pytest.raises(ValueError, match=re.escape(sentence)) as caught:
    audit.run(settings.load("smoke"), workdir=tmp_path, **given)
  assert len(str(caught.value).splitlines()) == 1
  assert not list(tmp_path.rglob("*.npz"))


def test_a_test_split_of_the_pool_is_said(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
  data = (images, np.arange(40) % 2, images[:20], np.arange(20) % 2)
  config = tiny_config(data__pool_size=None, data__test_size=None, quantize__methods=())
  given, said = load.from_arrays(*data), []
  heard = {"listener": lambda event: said.append(event.sentence)}
  preflight.open_audit(config, tmp_path, given_data=given, **heard)
  assert any(s.startswith("20 pairs of exact copies lie one in the pool and one in") for s in said)


def test_given_arrays_are_scaled(tmp_path):
  config = tiny_config(data__pool_size=None, data__test_size=None, data__image_size=4)
  config.quantize.methods = ()
  with pytest.raises(ValueError, match=r"too small|images of shape \(4, 4, 1\)"):
    audit.run(config, workdir=tmp_path, data=FOUR, model=NoSize())


class NoSize(nn.Module):
  """Takes images of 8 pixels alone."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x.reshape(len(x), 64))


@pytest.mark.parametrize(
  ("chosen", "key"), [({"models": 4}, "train.models"), ({"quantize.levels": (3,)}, None)]
)
def test_settings_that_saved_scores_pass_over_are_refused(tmp_path, chosen, key):
  key = key or next(iter(chosen))
  with pytest.raises(ValueError, match=f"^{key} has no use for saved scores"):
    audit.run_scores({"scores": 1, "members": 1}, workdir=tmp_path / "run", **chosen)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("chosen", "sentence"),
  [
    ({"attack.resamples": 10**9}, "attack.resamples is 1000000000; it must be 2 to 1000000."),
    ({"attack.confidence": 2.0}, "attack.confidence is 2.0; it must be in (0, 1)."),
    ({"seed": -1}, "seed is -1; it must be from 0"),
    ({"attack.attacks": ("lira",)}, "attack 'lira' is unknown; there are lira_online"),
    ({"progress": 3}, "progress is 3; give a function"),
    ({"shadows": 3}, "the scores are a int; give a dict of arrays, or the name of a file."),
    ({"shadows": {"scores": [[1], [1, 2]]}}, "'scores' is a list that is no array: "),
  ],
)
def test_settings_of_saved_scores_are_checked_before_the_attack(tmp_path, chosen, sentence):
  given = {"shadows": {"scores": np.zeros((8, 4)), "members": np.eye(8, 4)}} | chosen
  with unchecked(), pytest.raises(ValueError, match=re.escape(sentence)):
    audit.run_scores(workdir=tmp_path / "run", **given)


def test_a_workdir_may_be_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert storage.require_writable("~/runs") == tmp_path / "runs"
  with pytest.raises(NotADirectoryError, match=r"cannot be written .*null (byte|character)"):
    storage.require_writable(tmp_path / "a\0b")


@pytest.mark.parametrize("name", ["models", "locks", "scores"])
def test_a_file_in_the_place_of_a_folder_is_found_before_training(tmp_path, name):
  (tmp_path / name).write_text("mine")
  with pytest.raises(NotADirectoryError, match=f"{name} cannot be written .*; choose another"):
    opened(tmp_path)
  assert (tmp_path / name).read_text() == "mine"


def test_a_folder_without_an_audit_has_no_networks(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no audit"):
    audit.load_quantized(tmp_path, "obc-3-3")
  with unchecked(), pytest.raises(ValueError, match="workdir is a NoneType; give the folder"):
    audit.load_quantized(None, "obc-3-3")


@pytest.mark.parametrize("where", ["", " ", "gs://bucket/runs", "s3://bucket"])
def test_workdirs_that_are_none(where):
  with pytest.raises(ValueError, match="--workdir"):
    storage.require_writable(where)


def test_links_in_a_circle_are_one_sentence(tmp_path):
  (tmp_path / "a").symlink_to(tmp_path / "b")
  (tmp_path / "b").symlink_to(tmp_path / "a")
  with pytest.raises(NotADirectoryError, match="cannot be written"):
    storage.require_writable(tmp_path / "a")


def test_a_setting_younger_than_the_workdir_takes_its_default(tmp_path):
  opened(tmp_path)
  document = storage.read_json(tmp_path / "models" / "work.json")
  del document["training"]["train"]["optimizer"]
  storage.write_json(tmp_path / "models" / "work.json", document)
  opened(tmp_path)


def test_what_auto_means_belongs_to_the_workdir(tmp_path, monkeypatch):
  assert opened(tmp_path, model__dtype="auto").model.dtype == "float32"
  opened(tmp_path, model__dtype="float32")
  monkeypatch.setattr(layout.models.jax, "default_backend", lambda: "gpu")
  with pytest.raises(ValueError, match=r"model\.dtype is bfloat16, was float32"):
    opened(tmp_path, model__dtype="auto")


def test_auto_gives_every_device_of_every_process_some_models(tmp_path, monkeypatch):
  """64 models on 4 processes with 8 devices each."""
  devices = [preflight.jax.local_devices()[0]] * 8
  monkeypatch.setattr(preflight.jax, "local_devices", lambda: devices)
  asked = []

  def fits(*_, at_most, **__):
    asked.append(at_most)
    return min(at_most, 5)

  monkeypatch.setattr(preflight.shadows, "largest_chunk", fits)
  audit_ = layout.Audit(tiny_config(train__models_per_chunk="auto"), tmp_path, tmp_path)
  shared = layout.dataclasses.replace(audit_, shard=layout.work.Shard(0, 4))
  assert preflight.sizes(shared, 64).per_chunk == 16
  assert preflight.sizes(audit_, 64).per_chunk == 40
  assert asked == [2, 8]
