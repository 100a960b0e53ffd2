import inspect
import pathlib
from typing import NamedTuple

import pytest
from ml_collections import config_dict

from ptq_jax import settings
from ptq_jax.quantize import METHODS, grid

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_named_makes_hashable_arguments():
  section = config_dict.create(name="x", sizes=[1, 2], rate=0.1)
  assert settings.named(section, "name") == {"sizes": (1, 2), "rate": 0.1}


class Pace(NamedTuple):
  steps: int = 10
  rate: float = 0.5


PACE = Pace()


def method(data, *, plans, form="auto", pace=PACE, options=None):
  """What `arguments` is asked for."""


def test_arguments_are_checked_and_subsections_change_records():
  section = config_dict.create(form="full", size=3, pace=dict(steps=20), options=dict(sizes=[1, 2]))
  assert settings.arguments(method, section, "size") == {
    "form": "full",
    "pace": Pace(20, 0.5),
    "options": {"sizes": (1, 2)},
  }
  with pytest.raises(ValueError, match="test_settings has no option 'size'; it has form, pace, o"):
    settings.arguments(method, section)
  with pytest.raises(ValueError, match="has no option 'plans'"):
    settings.arguments(method, config_dict.create(plans=3))
  with pytest.raises(ValueError, match=r"test_settings.pace has no option 'step'; it has steps, r"):
    settings.arguments(method, config_dict.create(pace=dict(step=20)))


def test_fingerprint_changes_with_any_value_and_not_with_order():
  one = config_dict.create(a=1, b=config_dict.create(c=(2, 3)))
  same = {"b": {"c": [2, 3]}, "a": 1}
  assert settings.fingerprint(one) == settings.fingerprint(same)
  assert settings.fingerprint(one) != settings.fingerprint({"b": {"c": [2, 4]}, "a": 1})


def test_differences_name_dotted_keys():
  old, new = {"a": {"x": 1}, "gone": 2}, {"a": {"x": 1, "y": 3}}
  assert settings.differences(old, new) == {
    "a.y": "a.y is 3, was absent",
    "gone": "gone is absent, was 2",
  }


@pytest.mark.parametrize(
  ("argument", "message"),
  [("epoch=3", "'epoch=3' is not one of"), ("epochs=x", "needs a int, got 'x'"), ("epochs", "key")],
)
def test_bad_config_arguments(argument, message):
  with pytest.raises(ValueError, match=message):
    settings.parse_arg(argument, {"epochs": 3})


def test_load_reads_a_file_and_its_argument():
  config = settings.load(f"{ROOT}/configs/digits.py:models=4")
  assert config.train.models == 4
  with pytest.raises(FileNotFoundError, match="does not exist; shipped ones are cifar10, "):
    settings.load("configs/nope.py")


def write_config(path, *lines):
  body = "".join(f"  {line}\n" for line in lines)
  path.write_text(
    "from ptq_jax import settings\n"
    f"def get_config(arg=''):\n  config = settings.audit_defaults()\n{body}  return config\n"
  )
  return str(path)


@pytest.mark.parametrize(
  ("line", "sentence"),
  [
    ("config.train.epoch = 3", "no key 'epoch'; did you mean 'train.epochs'"),
    ("config.trian = 3", "the config has no key 'trian'; did you mean 'train'"),
    ("config.train.muon = dict(decay=3)", "no key 'train.muon.decay'; did you mean"),
    ("config.train.models = 'many'", "cannot be cast"),
    ("import there_is_no_such_module", "could not be read: No module named"),
    ("return 3", "must return a ConfigDict"),
    ("config.queries.view = 3", "did you mean 'queries.views'"),
  ],
)
def test_a_config_file_that_makes_no_sense_is_one_sentence(tmp_path, line, sentence):
  path = write_config(tmp_path / "odd.py", line)
  with pytest.raises(ValueError, match=sentence.replace("(", "\\(")) as caught:
    settings.load(path)
  assert "odd.py" in str(caught.value) or "no key" in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


def test_models_may_have_options_of_their_own(tmp_path):
  path = write_config(
    tmp_path / "own.py", "config.model.hidden = 3", "config.quantize.obc.damping = 0.1"
  )
  config = settings.load(path)
  assert (config.model.hidden, config.quantize.obc.damping) == (3, 0.1)


NO_SETTINGS = {"plans", "labels", "batchnorm_images", "progress"}
"""Arguments of methods that no config can hold."""


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_stands_in_the_config_with_its_default(method):
  section = settings.plain(settings.audit_defaults().quantize[method])
  options = inspect.signature(METHODS[method].quantize_stacked).parameters.values()
  named = {
    o.name: o.default for o in options if o.kind is o.KEYWORD_ONLY and o.name not in NO_SETTINGS
  }
  of_grids = inspect.signature(grid.fit).parameters
  named["grid_options"] = {key: of_grids[key].default for key in section["grid_options"]}
  assert of_grids.keys() - section["grid_options"] == {"weights", "levels", "two_levels"}
  expected = {
    name: default._asdict() if hasattr(default, "_asdict") else default
    for name, default in named.items()
  }
  assert section == settings.plain(expected) | {"calibration_size": None}


def test_every_key_has_a_meaning_and_defaults_are_not_shared():
  meanings = settings.descriptions()
  assert meanings.keys() == settings.dotted(settings.plain(settings.audit_defaults())).keys()
  assert all(meanings.values())
  one = settings.audit_defaults()
  one.train.models_per_chunk = 3
  assert settings.audit_defaults().train.models_per_chunk == "auto"


def test_the_version_of_code_changes_with_any_of_its_files(tmp_path, monkeypatch):
  (tmp_path / "part").mkdir()
  (tmp_path / "part" / "one.py").write_text("1")
  (tmp_path / "two.py").write_text("2")
  monkeypatch.setattr(settings, "__file__", str(tmp_path / "settings.py"))
  seen = {settings.code_version("part", "two")}
  for name in ("part/one.py", "two.py", "part/three.py", "part/page.css", "part/page.html.jinja"):
    (tmp_path / name).write_text("3")
    assert settings.code_version("part", "two") not in seen
    seen.add(settings.code_version("part", "two"))
