"""How many models share a program, and their convolutions: set, by rule, measured, kept."""

import concurrent.futures
import itertools
import json
import re
import time

import jax
import pytest

from ptq_jax import storage
from ptq_jax.audit import measuring, preflight, training, work
from ptq_jax.models import conv
from ptq_jax.train import shadows
from tests.audit.conftest import Heard, opened, tiny_config, unchecked

SPEEDS = {(1, "unrolled"): 10.0, (1, "patches"): 5.0, (4, "patches"): 20.0, (4, "unrolled"): 0.0}


class Measured:
  """Stands for `shadows.training_rates`, and counts its calls."""

  def __init__(self, rates):
    self.rates, self.asked, self.until = rates, [], lambda: True

  def __call__(self, keys, recipe, images, labels, members, *, together, lowerings):
    assert members.shape == (len(keys), len(labels) // 2)
    self.asked.append((tuple(together), tuple(lowerings)))
    deadline = time.monotonic() + 120
    while not self.until():
      assert time.monotonic() < deadline
      time.sleep(0.01)
    tried = itertools.product(together, lowerings)
    return {pair: self.rates.get(pair, 1.0) for pair in tried}


@pytest.fixture
def measured(monkeypatch):
  found = Measured(SPEEDS)
  monkeypatch.setattr(shadows, "training_rates", found)
  return found


def begin(tmp_path, name, **changes):
  """Chunks of an audit opened in a folder of its own, and what was said."""
  asked = {"train__lowering": "measure", "train__cache_dir": str(tmp_path / "cache")}
  heard = Heard()
  config = tiny_config(**(asked | changes))
  with unchecked():
    audit = preflight.open_audit(config, tmp_path / name, listener=heard)
  return audit.work.chunks, [sentence for sentence in heard if "images/s" in sentence or
                             "cache" in sentence]  # fmt: skip


def pairs(chunks):
  return {(chunk.together, chunk.lowering) for chunk in chunks}


def test_measured_once_for_all_workdirs(tmp_path, measured):
  chunks, said = begin(tmp_path, "one")
  assert pairs(chunks) == {(4, "patches")}
  assert measured.asked == [((1, 4), conv.LOWERINGS)]
  (sentence,) = said
  for part in ("4 in a program, convolutions patches", "1 unrolled 10, 1 patches 5", "4 patches 20",
               "4 unrolled does not fit", "measured now, as the config asks"):  # fmt: skip
    assert part in sentence
  chunks, said = begin(tmp_path, "two")
  (path,) = (tmp_path / "cache").glob("*.json")
  assert pairs(chunks) == {(4, "patches")}
  assert len(measured.asked) == 1
  assert "4 patches 20" in said[0]
  assert f"(from {path})" in said[0]


@pytest.mark.parametrize(
  "changes",
  [
    {"train__batch_size": 15},
    {"data__pool_size": 50},
    {"model__width": 3},
    {"model__dtype": "bfloat16"},
    {"train__optimizer": "muon"},
    {"train__augmentation": ("shift1",)},
    {"train__models_per_chunk": 8},
  ],
  ids=str,
)
def test_another_model_batch_or_shape_is_measured_anew(tmp_path, measured, changes):
  begin(tmp_path, "one")
  begin(tmp_path, "two", **changes)
  assert len(measured.asked) == 2
  begin(tmp_path, "three", **changes, train__epochs=3, seed=1)  # on which no rate depends
  assert len(measured.asked) == 2


@pytest.mark.parametrize(("name", "value"), [("__version__", "0.0"), ("local_devices", None)])
def test_another_jax_or_device_is_measured_anew(tmp_path, measured, monkeypatch, name, value):
  class Chip:
    device_kind, platform = "another", "cpu"

  begin(tmp_path, "one")
  audit = opened(tmp_path / "two", train__cache_dir=str(tmp_path / "cache"))
  audit.config.train.lowering = "measure"
  monkeypatch.setattr(jax, name, value or (lambda: [Chip]))
  measuring.choose(audit, 4, share=4)
  assert len(measured.asked) == 2


def break_in_two(text):
  return text[: len(text) // 2]


DAMAGED = {
  "half": break_in_two,
  "empty": lambda text: "",
  "list": lambda text: "[]",
  "another rate": lambda text: text.replace("20.0", "30.0"),
  "another key": lambda text: resealed(text, "key", {}),
  "no rates": lambda text: resealed(text, "images_per_s", []),
  "words": lambda text: resealed(text, "images_per_s", [[1, "patches", "fast"]]),
  "not a number": lambda text: resealed(text, "images_per_s", [[1, "patches", float("nan")]]),
  "nothing fits": lambda text: resealed(text, "images_per_s", [[1, "patches", 0.0]]),
  "another pair": lambda text: resealed(text, "images_per_s", [[3, "patches", 1.0]]),
  "another lowering": lambda text: resealed(text, "images_per_s", [[4, "slowly", 1.0]]),
}


def resealed(text, name, value):
  document = json.loads(text)
  del document["crc32"]
  return json.dumps(storage.sealed({**document, name: value}))


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cache_is_said_and_measured_anew(tmp_path, measured, damage):
  begin(tmp_path, "one")
  (path,) = (tmp_path / "cache").glob("*.json")
  sound = path.read_text()
  path.write_text(DAMAGED[damage](sound))
  chunks, said = begin(tmp_path, "two")
  assert len(measured.asked) == 2
  assert said[0].startswith(f"{path} cannot be used (")
  assert pairs(chunks) == {(4, "patches")}
  assert path.read_text() == sound


def test_a_cache_that_cannot_be_used_stops_nothing(tmp_path, measured):
  (tmp_path / "cache").write_text("a file")
  chunks, said = begin(tmp_path, "one")
  assert pairs(chunks) == {(4, "patches")}
  assert re.search("what was measured cannot be kept in .* names a writable folder", said[-1])
  for name in ("two", "three"):
    begin(tmp_path, name, train__cache_dir="")
  assert len(measured.asked) == 3


def test_by_default_it_lies_in_the_users_cache(tmp_path, measured, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  begin(tmp_path, "one", train__cache_dir=None)
  assert len(list((tmp_path / "home" / "ptq_jax" / "measured").glob("*.json"))) == 1


@pytest.mark.parametrize(
  ("set_", "asked", "chosen"),
  [
    ({"train__models_together": 2}, [((2,), conv.LOWERINGS)], (2, "unrolled")),
    (
      {"train__models_together": "measure", "train__lowering": "grouped"},
      [((1, 4), ("grouped",))],
      (1, "grouped"),
    ),
    ({"train__models_together": "measure"}, [((1, 4), conv.LOWERINGS)], (4, "patches")),
    ({"train__models_together": "measure", "train__lowering": "auto"},
     [((1, 4), conv.LOWERINGS)], (4, "patches")),
    ({"train__models_together": 2, "train__lowering": "patches"}, [], (2, "patches")),
    ({"train__lowering": "auto"}, [], (4, None)),
  ],
)  # fmt: skip
def test_what_is_set_is_kept_and_the_rest_measured(tmp_path, measured, set_, asked, chosen):
  chunks, _ = begin(tmp_path, "one", **set_)
  assert pairs(chunks) == {chosen}
  assert measured.asked == asked


def test_a_workdir_goes_on_as_it_began_and_grows_so(tmp_path, measured):
  begin(tmp_path, "one")
  measured.rates = {(1, "unrolled"): 99.0}
  for path in (tmp_path / "cache").glob("*.json"):
    path.unlink()
  assert pairs(begin(tmp_path, "two")[0]) == {(1, "unrolled")}
  chunks, said = begin(tmp_path, "one")
  assert pairs(chunks) == {(4, "patches")}
  assert not said
  chunks, _ = begin(tmp_path, "one", train__models=16, train__targets=5)
  assert len(chunks) == 6
  assert {chunk.lowering for chunk in chunks} == {"patches"}
  assert [chunk.together for chunk in chunks] == [4, 4, 4, 4, 4, 1]
  (tmp_path / "one" / "models" / "work.json").unlink()  # the other file has it as well
  assert begin(tmp_path, "one", train__models=16, train__targets=5)[0] == chunks
  assert len(measured.asked) == 2


def test_nothing_that_fits_leaves_it_to_the_rule(tmp_path, measured):
  measured.rates = dict.fromkeys(itertools.product((1, 4), conv.LOWERINGS), 0.0)
  chunks, _ = begin(tmp_path, "one")
  assert pairs(chunks) == {(4, None)}
  assert not list((tmp_path / "cache").glob("*.json"))


def test_processes_that_ask_at_once_measure_once(tmp_path, measured):
  audits = [opened(tmp_path / name, train__cache_dir=str(tmp_path / "cache")) for name in "abc"]
  heard = Heard()
  for audit in audits:
    audit.config.train.lowering = "measure"
    object.__setattr__(audit, "listener", heard)
  waiting = "waiting for process "
  measured.until = lambda: sum(sentence.startswith(waiting) for sentence in heard) == 2
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = list(pool.map(lambda audit: measuring.choose(audit, 4, share=4), audits))
  assert found == [(4, "patches")] * 3
  assert len(measured.asked) == 1


def test_auto_measures_long_trainings_on_accelerators_only(tmp_path, monkeypatch):
  audit = opened(tmp_path)
  images = 8 * 2 * 30  # models, epochs, members
  assert audit.training_images == images
  seconds = audit.training_flop / measuring.FLOP_PER_S / len(jax.local_devices())
  assert measuring.reason(audit) is None
  monkeypatch.setattr(measuring, "LONG_SECONDS", seconds)
  assert measuring.reason(audit) is None
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert re.match(
    r"for .* PFLOP of training .* take 0 minutes, at 77 TFLOP/s", measuring.reason(audit)
  )
  audit.config.train.models_together = 2
  assert measuring.reason(audit)
  audit.config.train.lowering = "unrolled"
  assert measuring.reason(audit) is None
  audit.config.train.models_together = "auto"
  assert measuring.reason(audit)
  monkeypatch.setattr(measuring, "LONG_SECONDS", 2 * seconds)
  assert measuring.reason(audit) is None


def test_training_takes_what_was_measured(tmp_path, measured, monkeypatch):
  """In earnest but for the rates: the chunk's lowering reaches the program."""
  seen, dispatches = [], shadows.dispatches

  def watched(states, keys, recipe, *rest, together, **options):
    seen.append((together, recipe.lowering))
    yield from dispatches(states, keys, recipe, *rest, together=together, **options)

  monkeypatch.setattr(shadows, "dispatches", watched)
  audit = opened(tmp_path / "one", train__lowering="measure", train__cache_dir="")
  assert training.train(audit) == []
  assert seen == [(4, "patches")] * 2
  before = storage.read_json(tmp_path / "one" / "models" / "work.json")["chunks"]
  assert before == [["shadows", 0, 4, 4, "patches"], ["shadows", 4, 8, 4, "patches"]]
  fewer = work.run_apart(audit.trained, audit.work.chunks[0])
  assert (fewer.together, fewer.lowering) == (2, "patches")


def test_evenly():
  assert [measuring.evenly(9, n) for n in (1, 4, 8, 9, 20)] == [1, 3, 5, 9, 9]
