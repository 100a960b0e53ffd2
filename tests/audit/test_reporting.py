"""What a report shows is a matter of its own settings, and nothing else is computed for it."""

import json

import numpy as np
import pytest

from launch import report as report_launcher
from ptq_jax import audit, settings, storage
from ptq_jax.attack import guards
from ptq_jax.audit import attacking, preflight, reporting
from ptq_jax.report import records, tables
from tests.audit.conftest import Heard, run, tiny_config
from tests.report import conftest as example

PICTURES = [*reporting.IMAGES]


def options(**chosen):
  return {"show_images": False, "figures": True} | chosen


def there(workdir):
  return [name for name in PICTURES if (workdir / name).exists()]


def test_no_training_image_is_written_unless_asked_for(finished):
  assert there(finished) == []
  page = (finished / "index.html").read_text()
  assert "The most exposed examples" in page
  assert "shown only with report.show_images=True" in page
  assert page.count("data:image") == 0
  named = tables.most_exposed(storage.read_records(finished / "results.jsonl"))
  first = (finished / "exposure.csv").read_text().splitlines()[1].split(",")
  assert [str(named[0][name]) for name in ("example", "source_example", "label")] == first[:3]
  assert named[0]["exposure"] == pytest.approx(float(first[3]) - float(first[4]))


def test_images_come_and_go_with_the_setting_and_nothing_else_is_made(copied):
  scores = {path: path.stat().st_mtime_ns for path in copied.glob("scores/*/*")}
  results = (copied / "results.jsonl").read_bytes()
  heard = Heard()
  config = tiny_config(report__show_images=True)
  shown = audit.run(config, workdir=copied, progress=heard)
  assert [s for s in heard if "anew" in s] == [
    f"report of {copied} was made from other inputs or by another version; reporting anew."
  ]
  assert there(copied) == PICTURES
  pictures = storage.load_arrays(copied / "exposed.npz")
  data = preflight.open_audit(config, copied).dataset
  np.testing.assert_array_equal(pictures["images"], data.train_images[pictures["example"]])
  assert "data:image" in shown.page.read_text()
  reporting.report(copied, options=options(show_images=True))
  reporting.report(copied, options=options(figures=False))
  assert there(copied) == list((copied / "figures").glob("*")) == []
  assert "data:image" not in shown.page.read_text()
  assert "<svg" not in shown.page.read_text()
  run(copied)
  assert {path: path.stat().st_mtime_ns for path in scores} == scores
  assert (copied / "results.jsonl").read_bytes() == results
  assert "report" not in records.select(shown.records, "run")[0]["config"]


def test_the_page_names_the_settings_it_was_made_with(copied):
  for figures in (False, True):
    reporting.report(copied, options=options(figures=figures))
    page = (copied / "index.html").read_text()
    assert f"<th>report.figures</th><td>{json.dumps(figures)}</td>" in page


def test_images_are_read_again_from_the_data_that_the_workdir_names(copied):
  reporting.report(copied, options=options(show_images=True))
  expected = storage.load_arrays(copied / "exposed.npz")["images"]
  document = storage.read_json(copied / "config.json")
  document["config"]["data"]["pool_size"] = 50
  storage.write_json(copied / "config.json", document)
  assert expected.shape == (24, 8, 8, 1)
  (copied / "index.html").unlink()
  with pytest.raises(ValueError, match="changed since, so its images cannot be shown"):
    reporting.report(copied, options=options(show_images=True))
  document["config"]["data"]["name"] = "arrays"
  storage.write_json(copied / "config.json", document)
  with pytest.raises(ValueError, match="were given as arrays"):
    reporting.report(copied, options=options(show_images=True))


@pytest.mark.parametrize(
  ("chosen", "sentence"),
  [
    ({"figures": "no"}, "report.figures is 'no'; it must be True or False"),
    ({"show_images": True, "figures": False}, "report.show_images needs report.figures"),
  ],
)
def test_bad_options_are_refused(copied, chosen, sentence):
  before = (copied / "index.html").read_bytes()
  with pytest.raises(ValueError, match=sentence):
    reporting.report(copied, options=options(**chosen))
  with pytest.raises((ValueError, TypeError)):
    audit.run(tiny_config(), workdir=copied, **{f"report.{k}": v for k, v in chosen.items()})
  assert (copied / "index.html").read_bytes() == before


def test_results_do_not_depend_on_how_they_are_reported():
  one, other = settings.audit_defaults(), settings.audit_defaults()
  other.report.figures = False
  assert settings.of_results(one) == settings.of_results(other)
  assert settings.of_results(one).keys() == settings.plain(one).keys() - {"report"}


# ---- warnings ----


@pytest.mark.parametrize(
  ("accuracy", "chance", "count", "expected"),
  [(0.1, 0.1, 1000, True), (0.13, 0.1, 1000, True), (0.3, 0.1, 1000, False),
   (0.25, 0.1, 10, True), (0.615, 0.6, 10_000, True), (0.7, 0.6, 10_000, False)],
)  # fmt: skip
def test_networks_that_learned_nothing(accuracy, chance, count, expected):
  assert guards.learned_nothing(accuracy, chance=chance, num_examples=count) is expected


def leak(method="none", levels=None, *, accuracy=0.9, low=0.4, rate=0.005, **fields):
  auc = records.number(0.6, low, 0.8, interval="95 %")
  tpr = example.rate(rate, fpr=0.01, rule="at_most", chance=0.01)
  return example.leakage(method, levels, levels, accuracy=accuracy, auc=auc, tpr=[tpr], **fields)


def test_useless_networks_are_named():
  labels = np.arange(1000) % 10
  good, bad = leak(), leak(accuracy=0.1)
  quantized = [leak("obc", n, accuracy=a) for n, a in ((3, 0.12), (16, 0.9))]
  [(about, sentence)] = attacking.useless(labels, [bad, *quantized]).items()
  assert about == "training"
  assert "reach 10.0% test accuracy" in sentence
  [(about, sentence)] = attacking.useless(labels, [good, *quantized]).items()
  assert about == "quantizing"
  assert "1 of 2 quantized variants" in sentence
  assert "OBC at 1.58 bit (12.0%)" in sentence
  assert attacking.useless(labels, [good, quantized[1]]) == {}


def test_nothing_to_find_is_a_warning():
  found = [leak(), leak("obc", 3, low=0.7)]
  assert "finds nothing measurable in full precision (AUC 0.600" in attacking.nothing_found(found)
  given = [
    leak("scores", attacker="given"),
    leak("scores", attacker="given", attack="rmia", low=0.7),
  ]
  assert "measurable in saved scores (AUC 0.600" in attacking.nothing_found(given)
  assert attacking.nothing_found([leak(low=0.55)]) is None
  assert attacking.nothing_found([leak(rate=0.02)]) is None
  assert attacking.nothing_found([]) is None


# ---- comparisons ----

OBC, ADA = ("obc", 3), ("adaround", 3)


@pytest.fixture
def folders(tmp_path):
  """Two folders with nothing but results."""
  for name, change in (("a", -0.08), ("b", 0.0)):
    storage.write_records(tmp_path / name / "results.jsonl", example.study({OBC: change, ADA: 0.0}))
  return [tmp_path / "a", tmp_path / "b"]


def test_results_alone_are_compared(folders, tmp_path):
  heard = Heard()
  found = audit.compare(folders, out=tmp_path / "out", progress=heard)
  names = {str(path.relative_to(found.out)) for path in found.out.rglob("*") if path.is_file()}
  assert names == {"index.html", "table.md", "results.csv", "manifest.json",
                   "figures/member_fit.png", "figures/member_fit.svg"}  # fmt: skip
  assert "OBC at 1.58 bit in some only" in found.page.read_text()
  assert "OBC at 1.58 bit in some only" in str(found)
  frame = found.frame()
  assert set(frame.study) == {"a", "b"}
  assert {"member_accuracy", "tpr at 0.01 fpr"} <= set(frame.metric)
  assert [*folders[0].iterdir()] == [folders[0] / "results.jsonl"]
  bare = [
    {k: v for k, v in record.items() if not k.startswith("member_accuracy_minus")}
    for record in found.studies["b"]
  ]
  for folder in folders:
    storage.write_records(folder / "results.jsonl", bare)
  report_launcher.run(None, None, shard=None, compare=list(map(str, folders)), out=found.out)
  assert list((found.out / "figures").glob("*")) == []


def test_what_cannot_be_compared_is_one_sentence(folders, tmp_path):
  def refused(sentence, *some, out="out", kind=ValueError):
    with pytest.raises(kind, match=sentence):
      audit.compare(some, out=tmp_path / out)
    assert not (tmp_path / "out").exists()

  refused("needs 2 to 15 studies, not 1", folders[0])
  refused("two studies are called a", folders[0], folders[0])
  refused(f"{tmp_path}/c/results.jsonl is missing", folders[0], tmp_path / "c",
          kind=FileNotFoundError)  # fmt: skip
  refused("a holds an audit; a comparison needs another --out", *folders, out="a")
  lines = (folders[1] / "results.jsonl").read_text()
  (folders[1] / "results.jsonl").write_text(lines.replace('"num_targets"', '"targets_number"'))
  refused("b/results.jsonl was written by another version .record 2: a leakage record has no "
          "'num_targets'", *folders)  # fmt: skip
  (folders[1] / "results.jsonl").write_text(lines[:-20])
  refused("line 12 is not JSON", *folders)
  with pytest.raises(ValueError, match="--out needs --compare"):
    report_launcher.run(None, tmp_path, shard=None, out="x")
