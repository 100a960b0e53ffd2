"""Tables of result records: as text for a terminal, as Markdown, LaTeX, HTML (`page`) and CSV.

`results`, `attacks`, `precision`, `units` and others build a `Table` from records; `to_text`,
`to_markdown` and `to_latex` write one. `to_csv` writes every number of the leakage records.
"""

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ptq_jax.base import csv_cell
from ptq_jax.report import records as records_lib
from ptq_jax.report.records import Record, Row

MISSING = "\u2013"
"""Shown where nothing was measured."""

TO = "\u2013"
"""Between the bounds of an interval; words where one is negative."""

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
  mark: str = ""  # a footnote mark that all of its numbers would carry (`lift_marks`)


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
  narrow: bool = False,
) -> Table:
  """The result table: accuracy beside leakage to each attacker, one row per variant.

  First the attacker who counts, with the change from full precision.

  Args:
    records: any records; the leakage records are shown.
    attack: which attack; default `records.main_attack`.
    fprs: false-positive rates whose TPR is shown.
    narrow: for a terminal: leaves out accuracy on members, and matched shadows where a best
      attacker was chosen.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  rows = records_lib.side_by_side(records, attack=attack)
  headline = records_lib.solid_fpr(records, attack=attack, among=fprs)
  fitted = not narrow and any("member_accuracy" in row.either for row in rows)
  columns = [*variant_columns(), Column("test\naccuracy %")]
  columns += [Column("member\naccuracy %")] if fitted else []
  groups = [who for who in Row._fields[1:] if any(getattr(row, who) for row in rows)]
  groups = records_lib.counted_first(groups)
  if narrow and "best" in groups:
    groups.remove("matched")
  for who in groups:
    group = records_lib.ATTACKERS[who]
    columns += [Column("AUC", group), *(_rate_column(fpr, group) for fpr in fprs)]
    columns += [Column("change", group)] if who == groups[0] else []
  columns += map(Column, ("under-\nestimate", "epsilon\nat least", "size\nkB"))
  changes, gaps = (
    records_lib.surely({row.variant: found(row) for row in rows} if headline else {})
    for found in (
      lambda row: records_lib.change(row.counted, headline),
      lambda row: records_lib.underestimate(row, headline),
    )
  )
  cells = []
  for row in rows:
    line = [*variant_cells(row.variant), number_cell(row.either["test_accuracy"])]
    line += [number_cell(row.either.get("member_accuracy"))] if fitted else []
    for who in groups:
      if (record := getattr(row, who)) is None:
        same = who != "given" and row.variant.method == "none"
        line += [Cell(SAME if same else MISSING)] * (1 + len(fprs))
      else:
        line += [auc_cell(record), *(rate_cell(record, fpr) for fpr in fprs)]
      line += [change_cell(changes.get(row.variant), headline)] if who == groups[0] else []
    line.append(change_cell(gaps.get(row.variant), headline))
    size, bound = row.either["size_kb"], row.counted.get("epsilon") or {}
    line.append(_value_cell(bound.get("epsilon"), ".2f"))
    line.append(_value_cell(size, ",.1f" if size is not None and size < 1000 else ",.0f"))
    cells.append(line)
  title = f"Accuracy and leakage to {records_lib.attack_name(attack)}"
  return Table(title, columns, cells, _result_notes(rows, cells, headline))


def attacks(records: Sequence[Record]) -> Table:
  """Every leakage record on one line: AUC, balanced accuracy and TPR at every FPR.

  An FPR at which no target may accuse even one non-member is left out, unless there is no other.
  """
  leakage = _ordered(record for record in records if record["kind"] == "leakage")
  fprs, left_out = _resolved(leakage)
  in_parts = any(record.get("members", "all") != "all" for record in leakage)
  columns = [*_ATTACKED, Column("attack", words=True)]
  columns += [Column("members", words=True)] if in_parts else []
  columns += [Column("AUC"), Column("balanced\naccuracy %"), *map(_rate_column, fprs)]
  rows = []
  for record in leakage:
    row = [*_attacked(record), words_cell(records_lib.attacks_of(record))]
    row += [words_cell(record.get("members", "all"))] if in_parts else []
    row += [auc_cell(record), number_cell(record["balanced_accuracy"])]
    rows.append([*row, *(rate_cell(record, fpr) for fpr in fprs)])
  notes = [*_interval_notes(leakage), *mark_notes(rows), *left_out]
  return Table("All attacks", columns, rows, notes)


def precision(records: Sequence[Record], *, attack: str | None = None) -> Table:
  """Share of true members among the accused, by FPR and prior membership, for one attack.

  The same FPRs as in `attacks`.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  leakage = _ordered(records_lib.select(records, "leakage", attack=attack))
  leakage = [record for record in leakage if record.get("precision")]
  fprs, left_out = _resolved(leakage)
  found = {(e["fpr"], e["prior"]) for record in leakage for e in record["precision"]}
  keys = sorted((key for key in found if key[0] in fprs), reverse=True)
  columns = [*_ATTACKED]
  for fpr, prior in keys:
    group = f"precision % at {percent_words(fpr)} FPR"
    columns.append(Column(f"{percent_words(prior)}\nmembers", group))
  rows = []
  for record in leakage:
    entries = {(e["fpr"], e["prior"]): e for e in record["precision"]}
    rows.append([*_attacked(record), *(number_cell(entries.get(key)) for key in keys)])
  notes = [
    "Precision: of those the attack accuses, the share that are members, when the given share of"
    " everybody asked about are members. Non-members count with the rate at which new ones pass the"
    " threshold, (k + 1) / (n + 1) with k of n allowed; the interval holds that rate's, too.",
    *_interval_notes(leakage),
    *left_out,
  ]
  title = f"Precision of an accusation by {records_lib.attack_name(attack)}"
  return Table(title, columns, rows, notes)


def thresholds(records: Sequence[Record], *, attack: str | None = None) -> Table:
  """What thresholds realise that an attacker can set: on shadows, or on the other targets."""
  attack = records_lib.main_attack(records) if attack is None else attack
  leakage = _ordered(records_lib.select(records, "leakage", attack=attack))
  fprs = [
    entry["fpr"]
    for entry in (leakage[0]["tpr"] if leakage else ())
    if entry.get("transferred") and entry.get("rule", "at_most") == "at_most"
  ]
  columns, rows = [*_ATTACKED], [_attacked(record) for record in leakage if fprs]
  for fpr in fprs:
    columns += [Column(name, f"aimed at {percent_words(fpr)} FPR") for name in ("TPR %", "FPR %")]
    for row, record in zip(rows, leakage, strict=True):
      found = (records_lib.tpr_at(record, fpr) or {}).get("transferred") or {}
      decimals = rate_decimals(fpr) + 1
      row += [number_cell(found.get(part), decimals=decimals) for part in ("tpr", "fpr")]
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
    moments = [
      _value_cell(each["mean"], ",.2f", below=f"sd {each['sd']:z,.2f}") if each else Cell(MISSING)
      for each in found
    ]
    cells.append([*variant_cells(row.variant), *moments])
  notes = [
    "Mean of the scores that the attacks read, and their standard deviation below it, over models,"
    " examples and queries. An attacker who takes the target's scores as they are expects those of"
    " its shadows; where every model is target once, matched shadows are the targets."
  ]
  return Table("Scores of targets beside those of shadows", columns, cells, notes)


def calibration(
  records: Sequence[Record], *, attack: str | None = None, fprs: Sequence[float] = (0.01, 0.001)
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
  columns = [*_ATTACKED, Column("AUC of\none by other")]
  gaps = {}
  for fpr in fprs:
    group = f"TPR % at {percent_words(fpr)} FPR"
    names = ("calibration\nmembers", "other\nmembers", "difference")
    columns += [Column(name, group) for name in names]
    for who in dict.fromkeys(who for who, _ in own):
      found = {k: records_lib.calibration_gap(own[k], fpr) for k in own if k[0] == who}
      gaps |= {(fpr, key): gap for key, gap in records_lib.surely(found).items()}
  rows = []
  for key in sorted(filter(others.get, own), key=lambda key: records_lib.order(key[1])):
    row = [*_attacked(own[key]), auc_cell(among.get(key))]
    for fpr in fprs:
      row += [rate_cell(one[key], fpr) for one in (own, others)]
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
      rows.append([*variant_cells(row.variant), words_cell(entry["class"]), auc_cell(entry)])
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
  """The most exposed examples at full precision by their number, not shown."""
  columns = [Column("example"), Column("number in\nthe source"), Column("label", words=True)]
  rows = [
    [
      *(Cell(str(each[name]), sort=each[name]) for name in ("example", "source_example")),
      words_cell(each["label"]),
      _value_cell(each["exposure"], ",.1f"),
    ]
    for each in most_exposed(records)
  ]
  notes = [
    "Example: its row in the pool and in exposure.csv, which has all examples and every bit width;"
    f" number in the source: its place among the training {records_lib.examples(records)} that were"
    " read. Of so many examples some come first by chance alone: audit with another seed, and see"
    " which are named again.",
  ]
  return Table("The most exposed examples", [*columns, Column("exposure")], rows, notes)


def units(records: Sequence[Record]) -> Table:
  """Reconstruction error of every unit: nearest rounding against the method (mean over models)."""
  columns = [*variant_columns(), Column("unit", words=True)]
  columns += map(Column, ("error\nnearest", "error\nmethod", "kept %", "steps", "seconds"))
  rows = []
  for record in _ordered(records_lib.select(records, "unit")):
    before, after = record["error_nearest"], record["error_after"]
    kept = 100 * after / before if before and after is not None else None
    row = [*variant_cells(records_lib.variant(record)), words_cell(record["unit"])]
    row += [_value_cell(before, ".3e"), _value_cell(after, ".3e"), _value_cell(kept, ",.1f")]
    row += [_value_cell(record.get("steps"), ",.0f"), _value_cell(record.get("seconds"), ",.2f")]
    rows.append(row)
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
  table = lift_marks(table)
  headings = [(column.name + column.mark).split("\n") for column in table.columns]
  body = [[*map(_cell_lines, row, table.columns, _gutters(table))] for row in table.rows]
  widths = _widths(table.columns, [headings, *body], width)
  room = sum(widths) + 2 * (len(widths) - 1)
  lines = [clean(table.title), ""]
  if any(column.group for column in table.columns):
    lines.append("  ".join(_group_lines(table.columns, widths)))
  height = max(map(len, headings))
  padded = [[""] * (height - len(heading)) + heading for heading in headings]
  lines += [*_lines(padded, table.columns, widths), "─" * room]
  for i, (row, parts) in enumerate(zip(table.rows, body, strict=True)):
    if i and table.columns[0].name == "method" and table.rows[i - 1][0].text != row[0].text:
      lines.append("")
    lines += _lines(parts, table.columns, widths)
  notes = [line for note in table.notes for line in textwrap.wrap(clean(note), max(room, 80))]
  return "\n".join(line.rstrip() for line in [*lines, "", *notes]).rstrip() + "\n"


def to_markdown(table: Table) -> str:
  """The table as GitHub-flavoured Markdown with its title as a heading, ending in a newline."""
  if not table.rows:
    return f"### {escape_markdown(table.title)}\n\nNone recorded.\n"
  table = lift_marks(table)
  lines = [f"### {escape_markdown(table.title)}", ""]
  parts = [
    map(_markdown_heading, table.columns),
    [":--" if column.words else "--:" for column in table.columns],
    *(map(_markdown_cell, row) for row in table.rows),
  ]
  lines += [f"| {' | '.join(row)} |" for row in parts]
  if table.notes:
    lines += ["", "<br>".join(escape_markdown(note) for note in table.notes)]
  return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
  """The table as a LaTeX tabular for booktabs, its title and notes as comments.

  An interval stands in parentheses after its number.
  """
  import pandas

  if not table.rows:
    return f"% {clean(table.title)}: none recorded.\n"
  table = lift_marks(table)
  frame = pandas.DataFrame(
    [
      [clean(f"{c.text} ({c.below})" if c.below else c.text) + c.mark for c in row]
      for row in table.rows
    ],
    columns=pandas.MultiIndex.from_tuples(
      [(column.group, _one_line(column), str(i)) for i, column in enumerate(table.columns)]
    ),
  )
  style = frame.style.hide(axis="index").hide(axis="columns", level=2)
  style = style.format(escape="latex").format_index(escape="latex", axis="columns")
  text = style.to_latex(
    hrules=True,
    multicol_align="c",
    column_format="".join("l" if column.words else "r" for column in table.columns),
  )
  comments = "".join(f"% {clean(line)}\n" for line in (table.title, *table.notes))
  return comments + text.replace(OVERLAP, r"$\approx$")


def to_csv(records: Sequence[Record] | Mapping[str, Sequence[Record]]) -> str:
  """Every number of the leakage records, exact: one line per (variant, attacker, attack).

  Records of several studies by name have a first column "study".

  Columns are the fields of the record; a number takes four (itself, `_low`, `_high`, `_interval`).
  TPR columns are named by FPR and rule, precision columns by prior and FPR, parts of an entry by
  their path. Full precision is written "full", what is missing is empty. Rates are fractions in
  [0, 1]. The ROC curves are left out. Text that a spreadsheet would run is quoted: `csv_cell`.
  """
  import pandas  # a second of every command, which few need

  rows = [
    {
      csv_cell(name): csv_cell(value)
      for name, value in (({"study": study} if study else {}) | _flat(record)).items()
    }
    for study, some in (records if isinstance(records, Mapping) else {None: records}).items()
    for record in _ordered(record for record in some if record["kind"] == "leakage")
  ]
  frame = pandas.DataFrame(rows, dtype=object)  # else integers beside gaps become floats
  return frame.to_csv(index=False, lineterminator="\n")


def lift_marks(table: Table) -> Table:
  """The same table, a mark of weak rates in the heading of a column whose numbers all carry it."""
  columns, rows = list(table.columns), [list(row) for row in table.rows]
  for i, column in enumerate(columns):
    marks = {row[i].mark for row in rows if row[i].sort is not None}
    if len(marks) == 1 and marks <= set(MARKS.values()):
      columns[i] = column._replace(mark=marks.pop())
      for row in rows:
        row[i] = row[i]._replace(mark="")
  return table._replace(columns=columns, rows=rows)


def groups(columns: Sequence[Column]) -> list[tuple[str, list[int]]]:
  """Neighbouring columns with the same group, by their positions."""
  found: list[tuple[str, list[int]]] = []
  for i, column in enumerate(columns):
    if found and found[-1][0] == column.group:
      found[-1][1].append(i)
    else:
      found.append((column.group, [i]))
  return found


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
  return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def escape_markdown(text: str) -> str:
  """The text as literal Markdown inside a table cell."""
  text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
  return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", text)


# ---- rows and cells ----


def _ordered(records: Iterable[Record]) -> list[Record]:
  """Records of variants in the order of tables."""
  return sorted(records, key=lambda record: records_lib.order(records_lib.variant(record)))


def change_cell(found: records_lib.Difference | None, fpr: float | None = 0.01) -> Cell:
  """A paired difference in percentage points with its interval, marked if it may be 0.

  Args:
    found: a fraction.
    fpr: of which TPR, for its digits.
  """
  if found is None or fpr is None:
    return Cell(MISSING)
  decimals = rate_decimals(fpr)
  below = interval_words(found._asdict(), 100.0, decimals)
  mark = "" if found.sure else OVERLAP
  return Cell(f"{100 * found.value:+z.{decimals}f}", below, sort=found.value, mark=mark)


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


_ATTACKED = (*variant_columns(), Column("shadows", words=True))
"""Columns of `_attacked`."""


def _attacked(record: Record) -> list[Cell]:
  """What was attacked, and with which shadows."""
  attacker = words_cell(records_lib.ATTACKERS[record["attacker"]])
  return [*variant_cells(records_lib.variant(record)), attacker]


def _rate_column(fpr: float, group: str = "") -> Column:
  return Column(f"TPR % at\n{percent_words(fpr)} FPR", group)


def _resolved(leakage: Sequence[Record]) -> tuple[list[float], list[str]]:
  """The recorded FPRs that some target's non-members can resolve, and a note of the others."""
  fprs = records_lib.false_positive_rates(leakage)
  found = [(r, fpr, records_lib.tpr_at(r, fpr)) for r in leakage for fpr in fprs]
  resolved = {fpr for r, fpr, tpr in found if tpr and records_lib.weakness(r, tpr) != "non_members"}
  left_out = ", ".join(percent_words(fpr) for fpr in fprs if fpr not in resolved)
  if not resolved or not left_out:
    return fprs, []
  note = f"Not shown: {left_out} FPR, at which no target may accuse even one non-member."
  return [fpr for fpr in fprs if fpr in resolved], [f"{note} The CSV has them."]


def words_cell(text: Any) -> Cell:
  """Text, sorted regardless of case."""
  return Cell(str(text), sort=str(text).lower())


def number_cell(number: Record | None, scale: float = 100.0, decimals: int = 1) -> Cell:
  """A number with its interval, in per cent unless told otherwise."""
  value = records_lib.value_of(number)
  if value is None:
    return Cell(MISSING)
  span = records_lib.bounds_of(number)
  return Cell(
    f"{scale * value:z,.{decimals}f}",
    interval_words(number, scale, decimals),
    sort=value,
    span=None if None in span else span,
  )


def auc_cell(record: Record | None) -> Cell:
  """The AUC of a record with its interval."""
  return number_cell((record or {}).get("auc"), 1.0, 3)


def rate_cell(record: Record, fpr: float) -> Cell:
  """The TPR of a record at an FPR, in per cent with its interval, marked if it is weak."""
  tpr = records_lib.tpr_at(record, fpr)
  cell = number_cell(tpr, decimals=rate_decimals(fpr))
  mark = MARKS.get(records_lib.weakness(record, tpr), "")
  return cell if cell.sort is None else cell._replace(mark=mark)


def interval_words(number: Record | None, scale: float = 1.0, decimals: int = 3) -> str:
  """The interval of a number as "low–high" or "-low to high"; nothing if a bound is missing."""
  low, high = records_lib.bounds_of(number)
  if low is None or high is None:
    return ""
  low, high = (f"{scale * end:z,.{decimals}f}" for end in (low, high))
  return f"{low} to {high}" if low.startswith("-") else f"{low}{TO}{high}"


def _value_cell(value: Any, form: str, below: str = "") -> Cell:
  """A number without interval, never "-0"."""
  if value is None or not math.isfinite(value):
    return Cell(MISSING)
  return Cell(f"{value:z{form}}", below, sort=value)


# ---- notes ----


def _result_notes(rows: Sequence[Row], cells: list[list[Cell]], fpr: float | None) -> list[str]:
  shown = [record for row in rows for record in row.shown]
  notes = _interval_notes(shown, accuracy=True)
  if fpr is not None and any(row.variant.method != "none" and row.full_precision for row in rows):
    count = sum(row.variant.method != "none" for row in rows)
    notes += [
      'Best attacker: one of those of the table "All attacks" with one of the attacks, chosen for'
      " each target by how many members it finds in other models, whose membership the attacker"
      " knows; so it may find a little less than what turns out to find most.",
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


def _widths(
  columns: Sequence[Column], rows: Sequence[Sequence[Sequence[str]]], width: int
) -> list[int]:
  """Widths of the columns; while the table is too wide, its widest column of words shrinks."""
  columnwise = zip(*rows, strict=True)
  widths = [max(_display_width(line) for lines in parts for line in lines) for parts in columnwise]
  for group, members in groups(columns):
    lack = len(group) + 4 - sum(widths[i] for i in members) - 2 * (len(members) - 1)
    if group and lack > 0:
      widths[members[-1]] += lack
  flexible = [i for i, column in enumerate(columns) if column.words]
  while flexible and sum(widths) + 2 * (len(widths) - 1) > width:
    widest = max(flexible, key=lambda i: widths[i])
    if widths[widest] <= 8:
      break
    widths[widest] -= 1
  return widths


def _gutters(table: Table) -> list[int]:
  """Room for marks to the right of each column's digits."""
  return [max(len(row[i].mark) for row in table.rows) for i in range(len(table.columns))]


def _group_lines(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
  """The headings that neighbours share, each over its columns."""
  parts = []
  for group, members in groups(columns):
    room = sum(widths[i] for i in members) + 2 * (len(members) - 1)
    parts.append(f" {group} ".center(room, "─") if group else " " * room)
  return parts


def _cell_lines(cell: Cell, column: Column, gutter: int) -> list[str]:
  """The lines of one cell: words, or a number with its interval below."""
  if column.words:
    return [clean(cell.text)]
  return [clean(cell.text) + cell.mark.ljust(gutter), clean(cell.below) + gutter * " "]


def _lines(
  parts: Sequence[Sequence[str]], columns: Sequence[Column], widths: Sequence[int]
) -> list[str]:
  """The lines of a row of cells, words wrapped, each cell padded to its column and filled up."""
  wrapped = [
    [line for text in lines for line in textwrap.wrap(text, width) or [""]] if c.words else lines
    for lines, c, width in zip(parts, columns, widths, strict=True)
  ]
  height = max(i + 1 for lines in wrapped for i, line in enumerate(lines) if line.strip())
  found = []
  for i in range(height):
    padded = []
    for lines, column, width in zip(wrapped, columns, widths, strict=True):
      text = lines[i] if i < len(lines) else ""
      space = " " * (width - _display_width(text))
      padded.append(text + space if column.words else space + text)
    found.append("  ".join(padded))
  return found


def _display_width(text: str) -> int:
  return sum(
    0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
    for c in text
  )


# ---- Markdown and CSV ----


def _one_line(column: Column) -> str:
  return clean(column.name.replace("-\n", "").replace("\n", " ")) + column.mark


def _markdown_heading(column: Column) -> str:
  return f"{column.group}:<br>{_one_line(column)}" if column.group else _one_line(column)


def _markdown_cell(cell: Cell) -> str:
  text = escape_markdown(cell.text) + cell.mark
  return f"{text}<br><sub>{escape_markdown(cell.below)}</sub>" if cell.below else text


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
  entries = {
    name: record.get(name) or {}
    for name in ("test_accuracy", "accuracy_minus_full_precision", "member_accuracy",
                 "member_accuracy_minus_full_precision", "scores", "auc", "balanced_accuracy",
                 "epsilon")
  }  # fmt: skip
  for entry in record["tpr"]:
    entries["_".join([f"tpr_at_{entry['fpr']:g}", *filter(None, [entry.get("rule")])])] = entry
  for entry in record.get("precision", ()):
    entries[f"precision_prior_{entry['prior']:g}_fpr_{entry['fpr']:g}"] = entry
  for part in ("minus_full_precision", "minus_full_precision_shadows", "minus_other_members"):
    for name, found in (record.get(part) or {}).items():
      for entry in found if isinstance(found, list) else [found]:
        at = ["at", f"{entry['fpr']:g}", entry["rule"]] if "fpr" in entry else []
        entries["_".join([name, *at, part])] = entry
  for name, entry in entries.items():
    flat |= _flat_entry(name, entry)
  return flat


def _flat_entry(name: str, entry: Record) -> dict[str, Any]:
  """The parts of an entry by path, but for what its name says; a value has that of its number."""
  flat = {}
  for part, value in entry.items():
    path = name if part == "value" else f"{name}_{part}"
    if isinstance(value, Mapping):
      flat |= _flat_entry(path, value)
    elif part not in ("fpr", "rule", "prior"):
      flat[path] = records_lib.plain(value)
  return flat
