import base64
import gzip
import html.parser
import re

import jinja2
import numpy as np
import pytest

from ptq_jax.report import comparison, figures, page, records, tables

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Reader(html.parser.HTMLParser):
  """Checks that elements nest, and keeps tags, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> closes something else"

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("style", "script"):
      self.text.append(data)


@pytest.fixture(scope="module")
def audit(example):
  return example.audit(methods=("obc",))


@pytest.fixture(scope="module")
def rendered(audit):
  return page.render(audit)


def test_the_page_is_well_formed_and_complete(rendered):
  reader = Reader(rendered)
  assert reader.open == []
  assert reader.tags.count("svg") == 4
  assert reader.tags.count("h1") == 1
  text = " ".join(reader.text)
  for heading in ("Findings", "1 warning", "Figures", "How to read this", "Settings"):
    assert heading in text
  assert "shadows are 2.1 points less accurate." in text
  assert "train.epochs" in text
  assert "python -m launch.audit --config configs/digits.py" in text
  assert "1 min 1 s" in text


def test_tiles_say_whose_number_they_show(example):
  """The first is what counts in full precision, which is the best attacker's where there is one."""
  plain, best = (example.leakage(attacker=who) for who in ("full_precision", "best"))
  for found, words in (([plain], "full-precision shadows"), ([plain, best], "best attacker")):
    [tile] = page._tiles(found, "lira_online", None, 0.01)
    assert tile["attacker"] == words
  variant = records.Variant("obc", 3, 3)
  whose = ("full_precision", "matched", "best")
  quantized = [example.leakage(*variant, who) for who in whose]
  tiles = page._tiles([plain, *quantized], "lira_online", variant, 0.01)
  assert [tile["attacker"] for tile in tiles[1:]] == [
    records.ATTACKERS[who] for who in ("best", *whose[:2])
  ]


def test_the_page_needs_nothing_else(rendered):
  assert "http" not in rendered
  assert "@import" not in rendered
  assert "url(" not in re.sub(r"url\(#", "", rendered)
  links = [value for name, value in Reader(rendered).attributes if name in ("src", "href")]
  assert all(value.startswith(("data:", "#")) for value in links)


def test_ids_are_unique_except_inside_svg_definitions(rendered):
  ids = [value for name, value in Reader(rendered).attributes if name == "id"]
  assert len(ids) == len(set(ids))


def test_the_page_is_the_same_every_time(example):
  audit = [example.leakage(), example.leakage("obc", 3, 3), example.run()]
  assert page.render(audit) == page.render(audit)


def test_the_numbers_are_inside_as_csv(audit, rendered):
  [data] = re.findall(r'href="data:application/gzip;base64,([^"]*)"', rendered)
  assert gzip.decompress(base64.b64decode(data)).decode() == tables.to_csv(audit)


def test_everything_from_records_is_escaped(example):
  evil = "<script>alert('x')</script>\"&\x1b"
  audit = [
    example.run(
      name=evil,
      config={evil: {evil: evil}},
      command=evil,
      data={"name": evil},
      model={"name": evil},
      seconds={evil: 1.0},
      versions={evil: evil},
      device=evil,
    ),
    example.leakage(interval=evil),
    example.leakage(evil, 3, 3, attack="lira_online"),
    example.leakage(evil, 3, 16, "matched"),
    example.leakage(evil, 3, 3, attack=evil),
    example.unit(evil, 3, 3, evil),
    records.make("warning", about=evil, message=evil),
  ]
  drawn = {evil: figures.privacy_utility(audit)}
  text = page.render(audit, drawn)
  assert text.count("<script>") == 1
  assert "<script>alert" not in text
  assert "\x1b" not in text
  reader = Reader(text)
  assert reader.open == []
  assert "alert('x')" in " ".join(reader.text)


@pytest.mark.parametrize(
  "make",
  [
    lambda example: [],
    lambda example: [example.run()],
    lambda example: [example.leakage()],
    lambda example: [example.leakage("obc", 3, 3, "matched")],
    lambda example: [example.leakage(tpr=[], curve=None, precision=[])],
    lambda example: [example.leakage("a" * 300, 3, 3, test_accuracy=records.number(None))],
    lambda example: [example.run(seconds={"train": None}, config={}), example.leakage()],
  ],
)
def test_the_page_does_with_little(example, make):
  assert Reader(page.render(make(example))).open == []


def test_tables_are_sortable_by_exact_values(example):
  table = tables.results([example.leakage(), example.leakage("obc", 3, 3, accuracy=0.123456)])
  text = page.table_html(table)
  assert 'data-sort="0.123456"' in text
  assert text.count("<button") == len(table.columns)
  assert Reader(text).open == []


def test_whiskers_share_a_scale_between_attackers(example):
  narrow = [example.rate(0.1, fpr=0.01, rule="at_most"), example.rate(0.1, fpr=0.001)]
  wide = [example.rate(0.2, fpr=0.01, rule="at_most"), example.rate(0.1, fpr=0.001)]
  table = tables.results(
    [
      example.leakage("obc", 3, 3, tpr=narrow),
      example.leakage("obc", 3, 3, "matched", tpr=wide),
    ],
    fprs=(0.01,),
  )
  shown = re.findall(r"--low:([\d.]+)%;--size:([\d.]+)%;--value:([\d.]+)%", page.table_html(table))
  matched, plain = np.array(shown[1], float), np.array(shown[3], float)
  np.testing.assert_allclose(plain, 100 * np.array([0.09, 0.02, 0.1]) / 0.22, atol=0.06)
  np.testing.assert_allclose(matched, 100 * np.array([0.18, 0.04, 0.2]) / 0.22, atol=0.06)


def test_weak_rates_keep_their_marks(example):
  text = page.render([example.leakage(non_members=750)])
  assert "<sup>†</sup>" in text
  assert "<sup>‡</sup>" in text


def test_rows_can_be_chosen_by_method_and_bits(example):
  found = [example.leakage(), *(example.leakage(m, n, n) for m in ("obc", "brecq") for n in (4, 3))]
  text = page.table_html(tables.results(found))
  reader = Reader(text)
  assert reader.open == []
  fields = re.findall(
    r'<fieldset data-column="(\d)"><legend>only (\w+)</legend>(.*)</fieldset>', text
  )
  boxes = {
    name: (int(column), re.findall(r'<input type="checkbox"[^>]* value="([^"]*)">', inner))
    for column, name, inner in fields
  }
  assert boxes == {"method": (0, ["BRECQ", "OBC"]), "bits": (1, ["2", "1.58"])}
  shown = re.findall(r"<th scope=\"row\"[^>]*>([^<]*)</th><td[^>]*>([^<]*)</td>", text)
  assert {name for name, _ in shown} - {"full precision"} == set(boxes["method"][1])
  assert {bits for _, bits in shown} - {"full"} == set(boxes["bits"][1])
  assert "<fieldset" not in page.table_html(tables.results(found[:2]))


def test_controls_are_hidden_until_the_script_runs_and_keys_reach_them(audit, rendered):
  reader = Reader(rendered)
  count = rendered.count('<table class="data">')
  assert count > 3
  assert rendered.count('<div class="controls" hidden>') == count
  assert rendered.count('<div class="scroll" tabindex="0" role="region" aria-label="') == count
  assert ("class", "hint") in reader.attributes
  assert any("Headings sort" in text for text in reader.text)
  heads = re.findall(r'<th[^>]*aria-sort="none">(<button type="button">)?', rendered)
  assert len(heads) > count
  assert all(heads)


def test_studies_can_be_chosen(example):
  two = {name: example.study({("obc", 3): -0.08}) for name in ("one", "other")}
  text = page.table_html(comparison.results(two))
  assert '<fieldset data-column="3"><legend>only study</legend>' in text
  assert 'value="one"' in text


def test_a_mark_of_all_numbers_stands_in_the_heading(example):
  weak, solid = example.leakage(non_members=750), example.leakage("obc", 3, 3)
  body = page.table_html(tables.results([weak])).partition("<tbody>")[2]
  assert "<sup>" not in body.partition("</tbody>")[0]
  body = page.table_html(tables.results([weak, solid])).partition("<tbody>")[2]
  assert "<sup>‡</sup>" in body.partition("</tbody>")[0]


def test_nothing_is_minus_zero(example):
  tiny = example.paired(-1e-9, half=1e-9, fpr=0.001, rule="at_most")
  moments = {"targets": {"members": {"mean": -1e-9, "sd": 1.0}}}
  audit = [
    example.leakage(scores=moments),
    example.leakage("obc", 3, 3, "best", minus_full_precision={"tpr": [tiny]}),
  ]
  text = page.render(audit)
  assert "+0.00<" in text
  assert re.findall(r"[^\d]-0\.0+(?!\d)", "".join(Reader(text).text)) == []


def test_the_template_refuses_what_it_was_not_given(example):
  with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
    page.document(csv="", figures={})


@pytest.mark.parametrize("kind", [None, *records.EXAMPLES])
def test_examples_are_called_what_they_are(example, kind):
  """Only an audit of images speaks of images; one before there was anything else is of images."""
  [run_, *rest] = example.audit(methods=("obc",))
  data = run_["data"] | {"name": "some", **({} if kind is None else {"inputs": kind})}
  named = [{"example": 3, "source_example": 5, "label": "0", "exposure": 2.0}]
  exposure = {"levels": None, "last_layer_levels": None, "attacker": "full_precision",
              "attack": "lira_online", "top": 1, "num_examples": 9,
              "jaccard": example.rate(1.0)}  # fmt: skip
  exposed = records.make("exposure", method="none", examples=named, **exposure)
  text = " ".join(
    "".join(Reader(page.render([run_ | {"data": data}, *rest, exposed], {})).text).split()
  )
  words = {"tokens": "token sequences", "vectors": "vectors"}.get(kind, "images")
  assert f"Training {words} may be personal data" in text
  assert f"its place among the training {words} that were read" in text
  assert ("report.show_images=True" in text) == (words == "images")
  if words != "images":
    assert "image" not in text.lower()
  assert records.examples([]) == "examples"
