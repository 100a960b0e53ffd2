"""Tables of result records, as plain text for a terminal, as Markdown and as CSV.

`results`, `attacks`, `precision`, `units` and `warnings` build a `Table` from records; `to_text`
and `to_markdown` write one. `to_csv` writes every number of the leakage records.
"""

import csv
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptq_jax.base import csv_cell
from ptq_jax.report import records as records_lib
from ptq_jax.report.records import Record, Row

MISSING = "\u2013"
"""Shown where nothing was measured."""

TO = "\u2013"
"""Between the bounds of an interval."""

SAME = "same"
"""Shown for matched shadows of a full-precision target: they are the full-precision shadows."""

MARKS = {"false_positives": "†", "non_members": "‡"}
"""Footnote mark of a rate by its `records.weakness`."""

OVERLAP = "≈"
"""Footnote mark of a difference that may be 0."""


class Column(NamedTuple):
  """A column: heading (lines split by newline), heading shared with its neighbours, alignment."""

  name: str
  group: str = ""
  words: bool = False  # left-aligned and wrapped


class Cell(NamedTuple):
  """What a cell shows."""

  text: str
  below: str = ""  # the interval
  sort: int | float | str | None = None  # the exact value
  mark: str = ""  # a footnote mark, outside the alignment of the digits
  span: tuple[float, float] | None = None  # the exact interval


class Table(NamedTuple):
  """A titled table with notes below it; every row has one cell per column."""

  title: str
  columns: list[Column]
  rows: list[list[Cell]]
  notes: list[str]


# ---- tables ----


def results(
  records: Sequence[Record],
  *,
  attack: str | None = None,
  fprs: Sequence[float] = (0.01, 0.001),
  rule: str = "at_most",
  narrow: bool = False,
) -> Table:
  """The result table: accuracy beside leakage to both attackers, one row per variant.

  Args:
    records: any records; the leakage records are shown.
    attack: which attack; default `records.main_attack`.
    fprs: false-positive rates whose TPR is shown.
    rule: the rule by which TPR is read off the ROC curve where several were recorded.
    narrow: for a terminal: leaves out accuracy on members, and matched shadows where a best
      attacker was chosen.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  rows = records_lib.side_by_side(records, attack=attack)
  headline = records_lib.solid_fpr(records, attack=attack, among=fprs)
  columns = [
    Column("method", words=True),
    Column("bits"),
    Column("last\nlayer"),
    Column("test\naccuracy %"),
  ]
  fitted = not narrow and any("member_accuracy" in row.either for row in rows)
  columns += [Column("member\naccuracy %")] if fitted else []
  groups = [who for who in records_lib.Row._fields[1:] if any(getattr(row, who) for row in rows)]
  if narrow and "best" in groups:
    groups.remove("matched")
  for who in groups:
    group = records_lib.ATTACKERS[who]
    columns.append(Column("AUC", group))
    columns.extend(Column(f"TPR % at\n{percent_words(fpr)} FPR", group) for fpr in fprs)
  columns += [Column("change"), Column("under-\nestimate"), Column("epsilon\nat least")]
  columns.append(Column("size\nkB"))
  changes = {row.variant: records_lib.change(row.counted, headline, rule) for row in rows} if (
    headline
  ) else {}  # fmt: skip
  gaps = {row.variant: records_lib.underestimate(row, headline, rule) for row in rows} if (
    headline
  ) else {}  # fmt: skip
  changes, gaps = records_lib.surely(changes), records_lib.surely(gaps)
  cells = []
  for row in rows:
    own = changes.get(row.variant), gaps.get(row.variant)
    cells.append(_result_row(row, fitted, groups, fprs, rule, own, headline))
  title = f"Accuracy and leakage to {records_lib.attack_name(attack)}"
  return Table(title, columns, cells, _result_notes(rows, cells, headline))


def attacks(records: Sequence[Record], *, rule: str = "at_most") -> Table:
  """Every leakage record on one line: AUC, balanced accuracy and TPR at every FPR.

  An FPR at which no target may accuse even one non-member is left out, unless there is no other.
  """
  leakage = [record for record in records if record["kind"] == "leakage"]
  leakage.sort(key=lambda record: records_lib.order(records_lib.variant(record)))
  fprs, left_out = _resolved(leakage)
  in_parts = any(record.get("members", "all") != "all" for record in leakage)
  columns = [*variant_columns(), Column("shadows", words=True), Column("attack", words=True)]
  columns += [Column("members", words=True)] if in_parts else []
  columns += [Column("AUC"), Column("balanced\naccuracy %")]
  columns += [Column(f"TPR % at\n{percent_words(fpr)} FPR") for fpr in fprs]
  rows = []
  for record in leakage:
    row = [*variant_cells(records_lib.variant(record)), _shadows(record)]
    row.append(words_cell(records_lib.attack_name(record["attack"])))
    row += [words_cell(record.get("members", "all"))] if in_parts else []
    row += [number_cell(record["auc"], 1.0, 3), number_cell(record["balanced_accuracy"], 100.0, 1)]
    row += [rate_cell(record, records_lib.tpr_at(record, fpr, rule)) for fpr in fprs]
    rows.append(row)
  notes = [*_interval_notes(leakage), *mark_notes(rows), *_left_out_notes(left_out)]
  return Table("All attacks", columns, rows, notes)


def precision(records: Sequence[Record], *, attack: str | None = None) -> Table:
  """Share of true members among the accused, by FPR and prior membership, for one attack.

  The same FPRs as in `attacks`.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  leakage = [r for r in records_lib.select(records, "leakage", attack=attack) if r.get("precision")]
  leakage.sort(key=lambda record: records_lib.order(records_lib.variant(record)))
  _, left_out = _resolved(leakage)
  found = {(e["fpr"], e["prior"]) for record in leakage for e in record["precision"]}
  keys = sorted((key for key in found if key[0] not in left_out), reverse=True)
  columns = [*variant_columns(), Column("shadows", words=True)]
  columns += [
    Column(f"{percent_words(prior)}\nmembers", f"precision % at {percent_words(fpr)} FPR")
    for fpr, prior in keys
  ]
  rows = []
  for record in leakage:
    entries = {(e["fpr"], e["prior"]): e for e in record["precision"]}
    row = [*variant_cells(records_lib.variant(record)), _shadows(record)]
    rows.append([*row, *(number_cell(entries.get(key), 100.0, 1) for key in keys)])
  notes = [
    "Precision: of those the attack accuses, the share that are members, when the given share of"
    " everybody asked about are members. Non-members count with the rate at which new ones pass the"
    " threshold, (k + 1) / (n + 1) with k of n allowed; the interval holds that rate's, too.",
    *_interval_notes(leakage),
    *_left_out_notes(left_out),
  ]
  title = f"Precision of an accusation by {records_lib.attack_name(attack)}"
  return Table(title, columns, rows, notes)


def thresholds(records: Sequence[Record], *, attack: str | None = None) -> Table:
  """What thresholds realise that an attacker can set: on shadows, or on the other targets."""
  attack = records_lib.main_attack(records) if attack is None else attack
  leakage = records_lib.select(records, "leakage", attack=attack)
  leakage.sort(key=lambda record: records_lib.order(records_lib.variant(record)))
  keys = [
    (t["fpr"], t.get("rule", "at_most"))
    for t in (leakage[0]["tpr"] if leakage else ())
    if t.get("transferred") and t.get("rule", "at_most") == "at_most"
  ]
  columns = [*variant_columns(), Column("shadows", words=True)]
  for fpr, _ in keys:
    group = f"aimed at {percent_words(fpr)} FPR"
    columns += [Column("TPR %", group), Column("FPR %", group)]
  rows = []
  for record in leakage if keys else ():
    row = [*variant_cells(records_lib.variant(record)), _shadows(record)]
    for fpr, rule in keys:
      found = (records_lib.tpr_at(record, fpr, rule) or {}).get("transferred") or {}
      row += [
        number_cell(found.get(part), 100.0, rate_decimals(fpr) + 1) for part in ("tpr", "fpr")
      ]
    rows.append(row)
  notes = ["The threshold is set on non-members of models whose membership the attacker knows."]
  return Table("Thresholds an attacker can set", columns, rows, notes)


SCORES_OF = {
  "targets": "targets",
  "full_precision_shadows": "full-precision shadows",
  "matched_shadows": "matched shadows",
  "given_shadows": "given shadows",
}
"""Whose scores a leakage record has the moments of."""


def score_shift(records: Sequence[Record], *, attack: str | None = None) -> Table:
  """Where the scores of members and non-members lie: those of targets beside those of shadows."""
  rows = [r for r in records_lib.side_by_side(records, attack=attack) if r.either.get("scores")]
  kinds = [kind for kind in SCORES_OF if any(kind in row.either["scores"] for row in rows)]
  sides = ("members", "non_members")
  columns = [*variant_columns()]
  columns += [Column(s.replace("_", "-"), SCORES_OF[kind]) for kind in kinds for s in sides]
  cells = []
  for row in rows:
    found = [row.either["scores"].get(kind, {}).get(side) for kind in kinds for side in sides]
    cells.append([*variant_cells(row.variant), *map(_moments, found)])
  notes = [
    "Mean of the scores that the attacks read, and their standard deviation below it, over models,"
    " examples and queries. An attacker who takes the target's scores as they are expects those of"
    " its shadows; where every model is target once, matched shadows are the targets."
  ]
  return Table("Scores of targets beside those of shadows", columns, cells, notes)


def calibration(
  records: Sequence[Record],
  *,
  attack: str | None = None,
  fprs: Sequence[float] = (0.01, 0.001),
  rule: str = "at_most",
) -> Table:
  """Leakage of the members that calibrated the quantizer beside that of the other members.

  At those of `fprs` that were recorded, or at all if none of them was.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  parts = {
    part: {
      (record["attacker"], records_lib.variant(record)): record
      for record in records_lib.select(records, "leakage", attack=attack, members=part)
    }
    for part in ("calibration members", "other members", "calibration among members")
  }
  own, others, among = parts.values()
  known = records_lib.false_positive_rates(own.values())
  fprs = [fpr for fpr in known if fpr in fprs] or known
  columns = [*variant_columns(), Column("shadows", words=True), Column("AUC of\none by other")]
  gaps = {}
  for fpr in fprs:
    group = f"TPR % at {percent_words(fpr)} FPR"
    names = ("calibration\nmembers", "other\nmembers", "difference")
    columns += [Column(name, group) for name in names]
    for who in dict.fromkeys(who for who, _ in own):
      found = {k: records_lib.calibration_gap(own[k], fpr, rule) for k in own if k[0] == who}
      gaps |= {(fpr, key): gap for key, gap in records_lib.surely(found).items()}
  rows = []
  for key in sorted(filter(others.get, own), key=lambda key: records_lib.order(key[1])):
    row = [*variant_cells(key[1]), _shadows(own[key])]
    row.append(number_cell(among[key]["auc"], 1.0, 3) if key in among else Cell(MISSING))
    for fpr in fprs:
      row += [rate_cell(one[key], records_lib.tpr_at(one[key], fpr, rule)) for one in (own, others)]
      row.append(change_cell(gaps.get((fpr, key)), fpr))
    rows.append(row)
  notes = [
    "Both against the same non-members. AUC: how well the attack tells members that calibrated from"
    " those that did not; 0.5 is not at all. Difference in percentage points, paired over examples"
    f" and targets; {OVERLAP} may be 0, by Holm's method at 5% over the variants of an attacker.",
    *_interval_notes(list(own.values())),
    *mark_notes(rows),
  ]
  return Table("Members that calibrated the quantizer", columns, rows, notes)


def classes(records: Sequence[Record], *, attack: str | None = None) -> Table:
  """The classes that leak most, in the record that verdicts count with."""
  rows = []
  for row in records_lib.side_by_side(records, attack=attack):
    for entry in row.counted.get("classes") or ():
      auc = number_cell(entry["auc"], 1.0, 3)
      rows.append([*variant_cells(row.variant), words_cell(entry["class"]), auc])
  columns = [*variant_columns(), Column("class", words=True), Column("AUC")]
  notes = [
    "Three of many classes, so their AUC is too high by chance: where to look, not how much."
  ]
  return Table("Classes that leak most", columns, rows, notes)


def most_exposed(records: Sequence[Record]) -> list[Record]:
  """The examples that the record of full precision names, most exposed first."""
  found = records_lib.select(records, "exposure", method="none")
  return list(found[0].get("examples") or ()) if found else []


def exposed(records: Sequence[Record]) -> Table:
  """The most exposed examples at full precision by their number; no image is shown."""
  columns = [Column("example"), Column("number in\nthe source"), Column("label", words=True)]
  rows = [
    [
      *(Cell(str(each[name]), sort=each[name]) for name in ("example", "source_example")),
      words_cell(each["label"]),
      Cell(_fixed(each["exposure"], 1), sort=each["exposure"]),
    ]
    for each in most_exposed(records)
  ]
  notes = [
    "Example: its row in the pool and in exposure.csv, which has all examples and every bit width;"
    " number in the source: its place among the training images that were read.",
  ]
  return Table("The most exposed examples", [*columns, Column("exposure")], rows, notes)


def units(records: Sequence[Record]) -> Table:
  """Reconstruction error of every unit: nearest rounding against the method (mean over models)."""
  columns = [
    *variant_columns(),
    Column("unit", words=True),
    Column("error\nnearest"),
    Column("error\nmethod"),
    Column("kept %"),
    Column("steps"),
    Column("seconds"),
  ]
  found = records_lib.select(records, "unit")
  rows = []
  for record in sorted(found, key=lambda r: records_lib.order(records_lib.variant(r))):
    before, after = record["error_nearest"], record["error_after"]
    kept = 100 * after / before if before and after is not None else None
    rows.append(
      [
        *variant_cells(records_lib.variant(record)),
        words_cell(record["unit"]),
        _scientific(before),
        _scientific(after),
        Cell(_fixed(kept, 1), sort=kept),
        Cell(_fixed(record.get("steps"), 0), sort=record.get("steps")),
        Cell(_fixed(record.get("seconds"), 2), sort=record.get("seconds")),
      ]
    )
  notes = ["Kept: error of the method in % of the error of nearest rounding; above 100 is worse."]
  return Table("Reconstruction error per unit", columns, rows, notes)


def warnings(records: Sequence[Record]) -> Table:
  """What the audit warns about, in the order it was recorded."""
  found = records_lib.select(records, "warning")
  columns = [Column("about", words=True), Column("warning", words=True)]
  rows = [[words_cell(record["about"]), words_cell(record["message"])] for record in found]
  return Table("Warnings", columns, rows, [])


# ---- writing ----


def to_text(table: Table, *, width: int = 140) -> str:
  """The table as aligned plain text, ending in a newline; long words are wrapped to fit.

  Args:
    table: a table.
    width: columns of the terminal. Only columns of words shrink, so a narrow one may overflow.
  """
  if not table.rows:
    return f"{table.title}: none recorded.\n"
  widths, gutters = _widths(table, width), _gutters(table)
  room = sum(widths) + 2 * (len(widths) - 1)
  lines = [clean(table.title), "", *_group_lines(table.columns, widths)]
  headings = [column.name.split("\n") for column in table.columns]
  height = max(map(len, headings))
  padded = [[""] * (height - len(heading)) + heading for heading in headings]
  lines += _lines(padded, table.columns, widths)
  lines.append("─" * room)
  for previous, row in zip([None, *table.rows], table.rows, strict=False):
    if previous and table.columns[0].name == "method" and previous[0].text != row[0].text:
      lines.append("")
    parts = [
      _cell_lines(cell, column, size, gutter)
      for cell, column, size, gutter in zip(row, table.columns, widths, gutters, strict=True)
    ]
    lines += _lines(parts, table.columns, widths)
  notes = [line for note in table.notes for line in textwrap.wrap(clean(note), max(room, 80))]
  return "\n".join(line.rstrip() for line in [*lines, "", *notes]).rstrip() + "\n"


def to_markdown(table: Table) -> str:
  """The table as GitHub-flavoured Markdown with its title as a heading, ending in a newline."""
  if not table.rows:
    return f"### {escape_markdown(table.title)}\n\nNone recorded.\n"
  headings = [_markdown_heading(column) for column in table.columns]
  rules = [":--" if column.words else "--:" for column in table.columns]
  lines = [f"### {escape_markdown(table.title)}", "", _pipes(headings), _pipes(rules)]
  for row in table.rows:
    lines.append(_pipes([_markdown_cell(cell) for cell in row]))
  if table.notes:
    lines += ["", "<br>".join(escape_markdown(note) for note in table.notes)]
  return "\n".join(lines) + "\n"


def to_csv(records: Sequence[Record] | Mapping[str, Sequence[Record]]) -> str:
  """Every number of the leakage records, exact: one line per (variant, attacker, attack).

  Records of several studies by name have a first column "study".

  Columns are the fields of the record; a number takes four (itself, `_low`, `_high`, `_interval`).
  TPR columns are named by FPR and rule, precision columns by prior and FPR, parts of an entry by
  their path. Full precision is written "full", what is missing is empty. Rates are fractions in
  [0, 1]. The ROC curves are left out. Text that a spreadsheet would run is quoted: `csv_cell`.
  """
  rows = []
  for study, some in (records if isinstance(records, Mapping) else {None: records}).items():
    leakage = [record for record in some if record["kind"] == "leakage"]
    leakage.sort(key=lambda record: records_lib.order(records_lib.variant(record)))
    rows += [({} if study is None else {"study": study}) | _flat(record) for record in leakage]
  out = io.StringIO()
  names = list(dict.fromkeys(name for row in rows for name in row))
  writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
  writer.writerow({name: csv_cell(name) for name in names})
  writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
  return out.getvalue()


def percent_words(fraction: float) -> str:
  """A fraction as per cent without trailing zeros.

  >>> percent_words(0.01), percent_words(0.00001)
  ('1%', '0.001%')
  """
  return f"{100 * fraction:.6f}".rstrip("0").rstrip(".") + "%"


def rate_decimals(fpr: float) -> int:
  """Decimals of a TPR in per cent such that chance (TPR = FPR) shows two digits.

  >>> rate_decimals(0.1), rate_decimals(0.01), rate_decimals(0.001)
  (1, 1, 2)
  """
  return max(1, math.ceil(-math.log10(fpr) - 1e-9) - 1)


def clean(text: str) -> str:
  """The text on one line without control characters: names may come from anywhere."""
  return "".join(c if c.isprintable() else " " for c in text)


def escape_markdown(text: str) -> str:
  """The text as literal Markdown inside a table cell."""
  text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
  return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", text)


# ---- rows and cells ----


def _result_row(
  row: Row, fitted: bool, groups: Sequence[str], fprs: Sequence[float], rule: str,
  differences: Sequence[records_lib.Difference | None], headline: float | None,
) -> list[Cell]:  # fmt: skip
  base = row.either
  cells = [*variant_cells(row.variant), number_cell(base["test_accuracy"], 100.0, 1)]
  cells += [number_cell(base.get("member_accuracy"), 100.0, 1)] if fitted else []
  for attacker in groups:
    record = getattr(row, attacker)
    if record is None:
      same = attacker != "given" and row.variant.method == "none"
      cells += [Cell(SAME if same else MISSING)] * (1 + len(fprs))
      continue
    cells.append(number_cell(record["auc"], 1.0, 3))
    cells += [rate_cell(record, records_lib.tpr_at(record, fpr, rule)) for fpr in fprs]
  cells += [change_cell(found, headline) for found in differences]
  return [*cells, _epsilon(row.counted), *_size_cells(base)]


def change_cell(found: records_lib.Difference | None, fpr: float | None = 0.01) -> Cell:
  """A paired difference in percentage points with its interval, marked if it may be 0.

  Args:
    found: a fraction.
    fpr: of which TPR, for its digits.
  """
  if found is None or fpr is None:
    return Cell(MISSING)
  decimals = rate_decimals(fpr)
  number = {"low": found.low, "high": found.high}
  text, below = f"{100 * found.value:+z.{decimals}f}", interval_words(number, 100.0, decimals)
  return Cell(text, below, sort=found.value, mark="" if found.sure else OVERLAP)


def _moments(found: Record | None) -> Cell:
  """A mean with the standard deviation below it."""
  if found is None:
    return Cell(MISSING)
  return Cell(_fixed(found["mean"], 2), f"sd {_fixed(found['sd'], 2)}", sort=found["mean"])


def _epsilon(record: Record) -> Cell:
  bound = record.get("epsilon")
  return Cell(MISSING) if not bound else Cell(f"{bound['epsilon']:.2f}", sort=bound["epsilon"])


def _size_cells(record: Record) -> list[Cell]:
  size = record["size_kb"]
  decimals = 1 if size is not None and size < 1000 else 0
  return [Cell(_fixed(size, decimals), sort=size)]


def variant_columns() -> list[Column]:
  """Columns of `variant_cells`."""
  return [Column("method", words=True), Column("bits"), Column("last\nlayer")]


def variant_cells(which: records_lib.Variant) -> list[Cell]:
  """Method, bits, bits of the last layer."""
  last = "full" if which.method == "none" else records_lib.bits(which.last_layer_levels)
  if which.method == "scores" and which.levels is None:
    return [words_cell(records_lib.method_name(which.method)), Cell(MISSING), Cell(MISSING)]
  return [
    words_cell(records_lib.method_name(which.method)),
    Cell(records_lib.bits(which.levels), sort=which.levels),
    Cell(last, sort=which.last_layer_levels),
  ]


def _shadows(record: Record) -> Cell:
  return words_cell(records_lib.ATTACKERS[record["attacker"]])


def _resolved(leakage: Sequence[Record]) -> tuple[list[float], list[float]]:
  """The recorded FPRs that some target's non-members can resolve, and the others."""
  fprs = records_lib.false_positive_rates(leakage)
  weak = "non_members"
  resolved = [
    fpr
    for fpr in fprs
    if any(
      records_lib.tpr_at(r, fpr) and records_lib.weakness(r, records_lib.tpr_at(r, fpr)) != weak
      for r in leakage
    )
  ]
  return (resolved, [fpr for fpr in fprs if fpr not in resolved]) if resolved else (fprs, [])


def words_cell(text: Any) -> Cell:
  """Text, sorted regardless of case."""
  return Cell(str(text), sort=str(text).lower())


def number_cell(number: Record | None, scale: float, decimals: int) -> Cell:
  """A number with its interval."""
  value = records_lib.value_of(number)
  if value is None:
    return Cell(MISSING)
  low, high = records_lib.bounds_of(number)
  span = None if low is None or high is None else (low, high)
  text, below = _fixed(scale * value, decimals), interval_words(number, scale, decimals)
  return Cell(text, below, sort=value, span=span)


def rate_cell(record: Record, tpr: Record | None) -> Cell:
  """A TPR of a record in per cent with its interval, marked if it is weak."""
  if tpr is None or records_lib.value_of(tpr) is None:
    return Cell(MISSING)
  cell = number_cell(tpr, 100.0, rate_decimals(tpr["fpr"]))
  return cell._replace(mark=MARKS.get(records_lib.weakness(record, tpr), ""))


def interval_words(number: Record | None, scale: float = 1.0, decimals: int = 3) -> str:
  """The interval of a number as "low–high", or nothing if a bound is missing."""
  low, high = records_lib.bounds_of(number)
  if low is None or high is None:
    return ""
  return f"{_fixed(scale * low, decimals)}{TO}{_fixed(scale * high, decimals)}"


def _fixed(value: Any, decimals: int) -> str:
  if value is None or not math.isfinite(value):
    return MISSING
  return f"{value:z,.{decimals}f}"


def _scientific(value: Any) -> Cell:
  if value is None or not math.isfinite(value):
    return Cell(MISSING)
  return Cell(f"{value:.3e}", sort=value)


# ---- notes ----


def _result_notes(rows: Sequence[Row], cells: list[list[Cell]], fpr: float | None) -> list[str]:
  shown = [record for row in rows for record in row[1:] if record is not None]
  notes = _interval_notes(shown, accuracy=True)
  if fpr is not None and any(row.variant.method != "none" and row.full_precision for row in rows):
    count = sum(row.variant.method != "none" for row in rows)
    notes += [
      'Best attacker: one of those of the table "All attacks", chosen for each target by how many'
      " members it finds in models whose membership the attacker knows.",
      f"Change: TPR of the best attacker at {percent_words(fpr)} FPR less that at full precision;"
      " underestimate: the same less that of the attacker with full-precision shadows. Percentage"
      f" points, paired over examples and targets. {OVERLAP} may be 0, by Holm's method for"
      f" {count} comparisons at 5%.",
    ]
  bounds = [record["epsilon"] for record in shown if record.get("epsilon")]
  if bounds:
    notes.append(
      "Epsilon: differential privacy with less is refuted, at delta"
      f" {bounds[0]['delta']:g} and {bounds[0]['confidence']:.0%} confidence; threshold set on half"
      " of the examples, judged on the others, which are taken for independent."
    )
  return notes + mark_notes(cells)


def _interval_notes(leakage: Sequence[Record], *, accuracy: bool = False) -> list[str]:
  """What the intervals cover; those of accuracy apart if they are shown and differ."""
  rates = [r[name] for r in leakage for name in ("auc", "balanced_accuracy")]
  rates += [tpr for record in leakage for tpr in record["tpr"]]
  words = _interval_names(rates)
  numbers = [r[name] for r in leakage for name in ("test_accuracy", "member_accuracy") if name in r]
  of_accuracy = _interval_names(numbers) if accuracy else ""
  if of_accuracy and of_accuracy != words:
    words = "; ".join(filter(None, (words, f"accuracy: {of_accuracy}")))
  return [f"Intervals: {words}."] if words else []


def _interval_names(numbers: Sequence[Record]) -> str:
  return " or ".join(sorted({n["interval"] for n in numbers if n.get("interval")}))


def _left_out_notes(left_out: Sequence[float]) -> list[str]:
  if not left_out:
    return []
  rates = ", ".join(percent_words(fpr) for fpr in left_out)
  return [
    f"Not shown: {rates} FPR, at which no target may accuse even one non-member. The CSV has them."
  ]


def mark_notes(cells: list[list[Cell]]) -> list[str]:
  """What the marks of weak rates mean."""
  words = {
    MARKS["false_positives"]: f"rests on fewer than {records_lib.FEW_FALSE_POSITIVES} false"
    " positives in some target",
    MARKS["non_members"]: "a target has fewer non-members than 1/FPR: not even one false positive"
    " is allowed, and the threshold cannot promise this rate; chance is 1 / (non-members + 1)",
  }
  used = {cell.mark for row in cells for cell in row}
  return [f"{mark} {note}." for mark, note in words.items() if mark in used]


# ---- layout of plain text ----


def _widths(table: Table, width: int) -> list[int]:
  """Widths of the columns; while the table is too wide, its widest column of words shrinks."""
  widths = []
  for i, (column, gutter) in enumerate(zip(table.columns, _gutters(table), strict=True)):
    parts = column.name.split("\n")
    parts += [clean(part) + gutter * " " for row in table.rows for part in row[i][:2]]
    widths.append(max(map(_display_width, parts)))
  for group, members in _groups(table.columns):
    lack = len(group) + 4 - sum(widths[i] for i in members) - 2 * (len(members) - 1)
    if group and lack > 0:
      widths[members[-1]] += lack
  flexible = [i for i, column in enumerate(table.columns) if column.words]
  while flexible and sum(widths) + 2 * (len(widths) - 1) > width:
    widest = max(flexible, key=lambda i: widths[i])
    if widths[widest] <= 8:
      break
    widths[widest] -= 1
  return widths


def _gutters(table: Table) -> list[int]:
  """Room for marks to the right of each column's digits."""
  return [max(len(row[i].mark) for row in table.rows) for i in range(len(table.columns))]


def _groups(columns: Sequence[Column]) -> list[tuple[str, list[int]]]:
  groups: list[tuple[str, list[int]]] = []
  for i, column in enumerate(columns):
    if groups and groups[-1][0] == column.group:
      groups[-1][1].append(i)
    else:
      groups.append((column.group, [i]))
  return groups


def _group_lines(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
  if not any(column.group for column in columns):
    return []
  parts = []
  for group, members in _groups(columns):
    room = sum(widths[i] for i in members) + 2 * (len(members) - 1)
    parts.append(f" {group} ".center(room, "─") if group else " " * room)
  return ["  ".join(parts)]


def _cell_lines(cell: Cell, column: Column, width: int, gutter: int) -> list[str]:
  """The lines of one cell: words wrapped, a number with its interval below."""
  if column.words:
    return textwrap.wrap(clean(cell.text), width) or [""]
  return [clean(cell.text) + cell.mark.ljust(gutter), clean(cell.below) + gutter * " "]


def _lines(
  parts: Sequence[Sequence[str]], columns: Sequence[Column], widths: Sequence[int]
) -> list[str]:
  """The lines of a row of cells, each cell padded to its column and filled up with blanks."""
  height = max(i + 1 for part in parts for i, line in enumerate(part) if line.strip())
  lines = []
  for i in range(height):
    padded = []
    for part, column, width in zip(parts, columns, widths, strict=True):
      text = part[i] if i < len(part) else ""
      space = " " * (width - _display_width(text))
      padded.append(text + space if column.words else space + text)
    lines.append("  ".join(padded))
  return lines


def _display_width(text: str) -> int:
  return sum(
    0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
    for c in text
  )


# ---- Markdown and CSV ----


def _markdown_heading(column: Column) -> str:
  name = column.name.replace("-\n", "").replace("\n", " ")
  return f"{column.group}:<br>{name}" if column.group else name


def _markdown_cell(cell: Cell) -> str:
  text = escape_markdown(cell.text) + cell.mark
  return f"{text}<br><sub>{escape_markdown(cell.below)}</sub>" if cell.below else text


def _pipes(parts: Sequence[str]) -> str:
  return f"| {' | '.join(parts)} |"


def _flat(record: Record) -> dict[str, Any]:
  """A leakage record as one line of a CSV."""
  which = records_lib.variant(record)
  unknown = "unknown" if which.method == "scores" and which.levels is None else None
  flat: dict[str, Any] = {
    "method": which.method,
    "levels": which.levels or unknown or "full",
    "bits": unknown or records_lib.bits(which.levels),
    "last_layer_levels": which.last_layer_levels or unknown or "full",
    "attacker": record["attacker"],
    "attack": record["attack"],
    "members": record.get("members", "all"),
  }
  for name in ("bits_per_weight", "size_kb", "num_targets", "num_members", "num_non_members"):
    flat[name] = record[name]
  for name in ("test_accuracy", "accuracy_minus_full_precision", "member_accuracy",
               "member_accuracy_minus_full_precision", "scores", "auc", "balanced_accuracy",
               "epsilon"):  # fmt: skip
    flat |= _flat_entry(name, record.get(name) or {})
  for entry in record["tpr"]:
    rule = f"_{entry['rule']}" if "rule" in entry else ""
    flat |= _flat_entry(f"tpr_at_{entry['fpr']:g}{rule}", entry, known=("fpr", "rule"))
  for entry in record.get("precision", ()):
    name = f"precision_prior_{entry['prior']:g}_fpr_{entry['fpr']:g}"
    flat |= _flat_entry(name, entry, known=("fpr", "prior"))
  for part in ("minus_full_precision", "minus_full_precision_shadows", "minus_other_members"):
    for name, entries in (record.get(part) or {}).items():
      for entry in entries if isinstance(entries, list) else [entries]:
        at = f"_at_{entry['fpr']:g}_{entry['rule']}" if "fpr" in entry else ""
        flat |= _flat_entry(f"{name}{at}_{part}", entry, known=("fpr", "rule"))
  return {name: "" if value is None else value for name, value in flat.items()}


def _flat_entry(name: str, entry: Record, known: Sequence[str] = ()) -> dict[str, Any]:
  """The parts of an entry by path; a number's value has the path of the number itself."""
  flat = {}
  for part, value in entry.items():
    path = name if part == "value" else f"{name}_{part}"
    if isinstance(value, Mapping):
      flat |= _flat_entry(path, value)
    elif part not in known:
      flat[path] = records_lib.plain(value)
  return flat
