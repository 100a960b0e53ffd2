"""One self-contained HTML page that tells the result of an audit to a person.

`page.html.jinja` is its text, `table.html.jinja` a table, with page.css and page.js inside; nothing
is fetched. Every text that comes from a record is escaped.
"""

import base64
import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from ptq_jax.report import findings, tables
from ptq_jax.report import records as records_lib
from ptq_jax.report.records import Record
from ptq_jax.report.tables import Cell, Table

CAPTIONS = {
  "privacy_utility": (
    "Privacy against utility",
    "Down is more private, right is more accurate. Each line runs from full precision (star)"
    " to ever fewer bits; bars are the intervals of both axes.",
  ),
  "roc": (
    "ROC curves",
    "True positives the attack gains for the false positives it accepts, both on logarithmic axes:"
    " the left edge is where an accusation means something. On the diagonal it guesses. Lines are"
    " means over targets, bands reach from the least to the most exposed target.",
  ),
  "member_fit": (
    "Leakage against lost member fit",
    "What each variant leaves of full precision's leakage, and how much worse it classifies its own"
    " members: where members are still fitted, a fall that rescaling undoes is no protection. Both"
    " intervals are paired.",
  ),
  "last_layer": (
    "Precision of the last layer",
    "The last layer alone is stored with more or fewer bits; all other layers stay the same.",
  ),
  "releases": (
    "Publishing two versions",
    "Members found by an attacker who sees full precision and the quantized version of one model,"
    " against each alone; the shadows are quantized alike.",
  ),
  "exposure_overlap": (
    "Who is exposed",
    "Are the most exposed examples the same as at full precision? An overlap of 1 means that they"
    " are, 0 that none of them is.",
  ),
  "training": (
    "Training",
    "Loss and accuracy on the training batches, augmented if the recipe says so: the mean over all"
    " models, the band from the lowest to the highest.",
  ),
  "exposed_examples": (
    "The most exposed examples",
    "Training images whose scores differ most between targets that trained on them and targets that"
    " did not. Below each its label and its exposure.",
  ),
}
"""Titles and captions of figures by name; other names are shown with their name as title."""

FILTERED = ("method", "bits", "study")
"""Columns by which a reader can choose rows."""

UNFILTERED = (records_lib.method_name("none"), records_lib.bits(None), tables.MISSING)
"""What stays whatever is chosen."""


def render(
  records: Sequence[Record],
  figures: Mapping[str, Any] | None = None,
  *,
  attack: str | None = None,
  fpr: float | None = None,
) -> str:
  """The whole page as HTML text.

  Args:
    records: any records (`records.validate_all`).
    figures: matplotlib figures by name (`CAPTIONS`), in order; default `figures.draw(records)`.
    attack: which attack; default `records.main_attack(records)`.
    fpr: which false-positive rate the words quote; default `records.solid_fpr(records)`.
  Returns:
    A complete document: no other file and no network is needed to show it.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  fpr = records_lib.solid_fpr(records, attack=attack) if fpr is None else fpr
  if figures is None:
    from ptq_jax.report import figures as figures_lib  # matplotlib takes long to import

    figures = figures_lib.draw(records, attack=attack, fpr=fpr)
  found = findings.summarize(records, attack=attack, fpr=fpr)
  runs = records_lib.select(records, "run")
  name = str(runs[0]["name"]) if runs else "audit"
  more = [tables.attacks(records)]
  more += [
    make(records, attack=attack)
    for make in (tables.calibration, tables.score_shift, tables.thresholds, tables.classes,
                 tables.precision)
  ]  # fmt: skip
  more.append(tables.units(records))
  return document(
    title=f"{name}: privacy audit",
    about=f"Privacy audit of quantized classifiers · {name}",
    found=found,
    results=tables.results(records, attack=attack),
    csv=tables.to_csv(records),
    figures=figures,
    tiles=_tiles(records, attack, found.variant, fpr),
    warnings=records_lib.select(records, "warning"),
    exposed=tables.exposed(records),
    examples=records_lib.examples(records),
    reading=True,
    more=[table for table in more if table.rows],
    settings=_settings(runs[0]) if runs else {},
  )


_EMPTY = {"tiles": (), "warnings": (), "exposed": None, "examples": "", "differing": None,
          "reading": False, "more": (), "settings": {}}  # fmt: skip
"""Parts of the page that not every one has."""


def document(*, csv: str, figures: Mapping[str, Any], **parts: Any) -> str:
  """A whole document.

  Args:
    csv: all numbers, to download.
    figures: matplotlib figures by name.
    **parts: what `page.html.jinja` says it takes; what is not given or empty is left out.
  """
  return _ENVIRONMENT.get_template("page.html.jinja").render(
    **(_EMPTY | parts),
    csv=Markup(base64.b64encode(gzip.compress(csv.encode(), mtime=0)).decode()),
    figures=[_figure(f"figure{i}", *item) for i, item in enumerate(figures.items())],
    images_hidden="exposed_examples" not in figures,
    style=Markup((_FOLDER / "page.css").read_text()),
    script=Markup((_FOLDER / "page.js").read_text()),
  )


def table_html(table: Table) -> str:
  """A table with filters and sortable columns; intervals are written and drawn below numbers."""
  return str(_ENVIRONMENT.get_template("table.html.jinja").module.data_table(table))


# ---- what the templates show ----


def _tiles(
  records: Sequence[Record], attack: str, variant: records_lib.Variant | None, fpr: float | None
) -> list[dict]:
  """Full precision beside the headline's variant as each attacker sees it."""
  if fpr is None:
    return []
  rows = {row.variant: row for row in records_lib.side_by_side(records, attack=attack)}
  shown = [(row, row.counted) for row in rows.values() if row.variant.method == "none"][:1]
  if variant in rows:
    row = rows[variant]
    shown += [(row, r) for r in sorted(row.shown, key=lambda record: record is not row.counted)]
  return [
    {
      "variant": records_lib.describe(row.variant),
      "attacker": records_lib.ATTACKERS[record["attacker"]],
      "rate": tables.number_cell(
        records_lib.tpr_at(record, fpr), decimals=tables.rate_decimals(fpr)
      ),
      "at": findings.accepted(record, fpr),
      "accuracy": tables.number_cell(row.either.get("test_accuracy")),
    }
    for row, record in shown
  ]


def _figure(name: str, kind: str, figure: Any) -> dict[str, Any]:
  from ptq_jax.report import figures as figures_lib

  title, caption = CAPTIONS.get(kind, (kind.replace("_", " "), ""))
  svg = figures_lib.to_inline_svg(figure, name=name, description=f"{title}. {caption}")
  inches = figure.get_size_inches()[0]
  return {"title": title, "caption": caption, "svg": Markup(svg), "inches": inches}


def _settings(run: Record) -> dict[str, dict[str, str]]:
  names = ("command", "date", "device", "protocol", "models", "targets")
  blocks = {
    "Run": {name: run[name] for name in names},
    "Time per stage": {name: duration(seconds) for name, seconds in run["seconds"].items()},
    "Data": {name.replace("image_", ""): fact for name, fact in dotted(run["data"]).items()},
    "Model": dotted(run["model"]),
    "Configuration": dotted(run["config"]),
    "Versions": run["versions"],
  }
  return {
    title: {
      name: fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False, default=str)
      for name, fact in facts.items()
    }
    for title, facts in blocks.items()
    if facts
  }


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings by dotted key, as they are written on a command line.

  >>> dotted({"train": {"epochs": 30}, "levels": [4, 3]})
  {'train.epochs': 30, 'levels': [4, 3]}
  """
  flat = {}
  for name, value in settings.items():
    if isinstance(value, Mapping) and value:
      flat |= dotted(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def duration(seconds: float | int | None) -> str:
  """Seconds in words.

  >>> duration(3.14159), duration(75), duration(7384)
  ('3.1 s', '1 min 15 s', '2 h 3 min')
  """
  if seconds is None:
    return tables.MISSING
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# ---- what a table looks like ----


def _layout(table: Table) -> dict[str, Any]:
  """What the template needs beside a table: by column its classes and scale, groups, filters."""
  table = tables.lift_marks(table)
  groups = [column.group for column in table.columns]
  edges = [i > 0 and groups[i] != groups[i - 1] for i in range(len(groups))]
  filters = []
  for i, column in enumerate(table.columns):
    values = list(dict.fromkeys(tables.clean(row[i].text) for row in table.rows))
    values = [value for value in values if value not in UNFILTERED]
    if column.name in FILTERED and len(values) > 1:
      filters.append({"name": column.name, "column": i, "offered": values})
  return {
    "table": table,
    "spans": [(name, len(members)) for name, members in tables.groups(table.columns)]
    if any(groups)
    else [],
    "classes": [
      " ".join(["edge"] * edge + ["words"] * column.words)
      for edge, column in zip(edges, table.columns, strict=True)
    ],
    "scales": [_scale(table, i) for i in range(len(groups))],
    "filters": filters,
  }


def _whisker(cell: Cell, scale: tuple[float, float] | None) -> str:
  """The interval as the style of a bar with a dot, on the scale shared by both attackers."""
  if scale is None or cell.span is None or not isinstance(cell.sort, float):
    return ""
  start, stop = scale
  low, high, value = (100 * (x - start) / (stop - start) for x in (*cell.span, cell.sort))
  return f"--low:{low:.1f}%;--size:{max(high - low, 0):.1f}%;--value:{value:.1f}%"


def _scale(table: Table, index: int) -> tuple[float, float] | None:
  """The range of a grouped column and of those with its name: from zero (AUC: from 0.5)."""
  column = table.columns[index]
  if not column.group:
    return None
  same = [i for i, other in enumerate(table.columns) if other.name == column.name]
  spans = [row[i].span for row in table.rows for i in same if row[i].span is not None]
  start = min([0.5 if column.name == "AUC" else 0.0, *(low for low, _ in spans)])
  stop = max((high for _, high in spans), default=start)
  return (start, stop) if stop > start else None


def _finalize(value: Any) -> Any:
  """Text of records on one line, without control characters, before it is escaped."""
  return value if isinstance(value, Markup) else tables.clean(str(value))


_FOLDER = pathlib.Path(__file__).parent
_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.FileSystemLoader(_FOLDER),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  finalize=_finalize,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
)
_ENVIRONMENT.globals |= {"layout_of": _layout, "whisker": _whisker}
