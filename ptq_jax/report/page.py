"""One self-contained HTML page that tells the result of an audit to a person.

Styles, figures and the few lines of script are inside; nothing is fetched. Every text that comes
from a record is escaped.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_jax.report import findings, tables
from ptq_jax.report import records as records_lib
from ptq_jax.report.records import Record, Row
from ptq_jax.report.tables import Cell, Table, percent_words, rate_decimals

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

GLOSSARY = (
  ("Member", "An example that was in the target model's training set."),
  (
    "Shadow models",
    "Models the attacker trains on data it knows, to learn how scores of members and non-members"
    " differ.",
  ),
  (
    "Full-precision shadows",
    "The attacker does not quantize its shadows although the target is quantized. This is how"
    " quantized models were audited so far.",
  ),
  (
    "Matched shadows",
    "The attacker quantizes every shadow as the target was quantized: what somebody can do who"
    " knows the format of the shipped model. Few of them may find less than full-precision ones.",
  ),
  (
    "Best attacker",
    "Quantizing shifts and narrows all scores, which hides members from an attacker who does not"
    " correct for it. So there are more attackers: rescaled scores, both kinds of shadows. For each"
    " target the one counts that finds most members in models whose membership the attacker knows;"
    " the target's own membership chooses nothing.",
  ),
  (
    "TPR at 1% FPR",
    "The share of members found when at most 1% of non-members may be accused. Guessing finds 1%;"
    " with k allowed of n non-members it finds (k + 1) / (n + 1), so a rate below 1 / n is no rate"
    " that a threshold can promise. A few people exposed with certainty matter more than an"
    " average, so look at low rates.",
  ),
  (
    "Member accuracy",
    "The share of its own training examples that a model classifies right, asked as the attacker"
    " asks (over all augmented queries of each). Quantizing that leaves it as it was leaves the"
    " network fitted to its members, and what is fitted can leak.",
  ),
  (
    "Scores of targets and shadows",
    "How sure a model is of the right class. Quantizing shifts and narrows these scores; an"
    " attacker who compares them with full-precision shadows as they are misses members until they"
    " are shifted and scaled back.",
  ),
  (
    "Calibration members",
    "Training examples that the quantizer looked at to set its levels. The model may remember them"
    " better than its other members, so their leakage is also told apart.",
  ),
  (
    "AUC",
    "The chance that a random member gets a higher score than a random non-member: 0.5 is"
    " guessing, 1 is perfect.",
  ),
  (
    "Exposure",
    "Of one example: the mean of the attack's evidence that it is a member over the targets that"
    " trained on it, less that over the others. 0 means that this attack cannot tell; with"
    " LiRA it counts in logarithms, and 2.3 more is ten times the odds.",
  ),
  (
    "1.58 bit",
    "Three levels per weight, since log2 3 = 1.58. Bits per weight also count the last layer and"
    " the grids.",
  ),
  (
    "Intervals",
    "Over examples and models: where the number may lie were both drawn anew; with one target over"
    " examples alone. Whether two versions differ is told by their paired difference, which has an"
    " interval of its own, and not by whether their intervals overlap. Where many versions are"
    " compared, Holm's method keeps the chance of any false difference at 5%.",
  ),
  (
    "Epsilon at least",
    "Differential privacy with a smaller epsilon is refuted by this attack. It is a lower bound of"
    " the leakage: a better attack may refute more.",
  ),
)
"""Terms and their meaning, in the order they are read."""


NOTICE = (
  "Training images may be personal data and are shown only with report.show_images=True; here are"
  " their numbers."
)

READING = (
  (
    "What an audit cannot show",
    "Finding little does not prove safety. These are the attacks that were tried, on these models,"
    " with so many shadows: a better attack, or a person who is easier to tell apart than those in"
    " this pool, may be found where this audit finds nobody. Only a proof, such as differentially"
    " private training, bounds what every attacker can learn. Leakage of other kinds, such as"
    " attributes or reconstruction, was not measured.",
  ),
  (
    "What the attacker is assumed to know",
    "The architecture and how it was trained, data of the same kind to train shadow models on, and"
    " the example in question with its label. The attacker sees the model's outputs, not only the"
    " class that it names. The best attacker also knows how the model was quantized. Somebody who"
    " knows less finds less; who knows more, such as other members, may find more.",
  ),
  (
    "What to do next",
    "If a variant leaks measurably less at an accuracy you can ship, attack it again with more"
    " shadows and another seed before you rely on it. If full precision leaks too much, do not rely"
    " on fewer bits alone: regularise, train on more data, drop the most exposed examples, or train"
    " with differential privacy, and audit again. If nothing leaks at full precision, this audit"
    " says nothing for or against fewer bits.",
  ),
)
"""Three paragraphs for who has to decide something."""


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
  body = [
    header(f"Privacy audit of quantized classifiers · {name}", found.headline, found.audited),
    _tiles(records_lib.side_by_side(records, attack=attack), found.variant, fpr),
    listed("Findings", found.points),
    _warnings(records),
    _results(records, attack),
    drawn(figures),
    _exposed(records, shown="exposed_examples" in figures),
    _reading(),
    glossary(),
    _more(records, attack),
    _settings(runs),
  ]
  return document(f"{name}: privacy audit", body)


def document(title: str, body: Sequence[str]) -> str:
  """A whole document made of sections as HTML; empty ones are left out."""
  body = "\n".join(part for part in body if part)
  return _DOCUMENT.format(title=escape(title), style=_STYLE, script=_SCRIPT, body=body)


def escape(text: Any) -> str:
  """Text for HTML, in elements and in quoted attributes."""
  return html.escape(tables.clean(str(text)), quote=True)


# ---- sections ----


def header(about: str, headline: str, lede: str) -> str:
  """The top of a page."""
  return (
    f'<header><p class="eyebrow">{escape(about)}</p><h1>{escape(headline)}</h1>'
    f'<p class="lede">{escape(lede)}</p></header>'
  )


def _tiles(rows: Sequence[Row], variant: records_lib.Variant | None, fpr: float | None) -> str:
  """Full precision beside the headline's variant as each attacker sees it."""
  if fpr is None:
    return ""
  full = next((row for row in rows if row.variant.method == "none"), None)
  chosen = next((row for row in rows if row.variant == variant), None)
  tiles = [] if full is None else [_tile(full, full.counted, "full-precision shadows", fpr)]
  for who in records_lib.Row._fields[1:] if chosen else ():
    record = getattr(chosen, who)
    if record is not None:
      tiles.append(_tile(chosen, record, records_lib.ATTACKERS[who], fpr))
  return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(row: Row, record: Record | None, attacker: str, fpr: float) -> str:
  tpr, accuracy = records_lib.tpr_at(record, fpr), row.either.get("test_accuracy")
  decimals = rate_decimals(fpr)
  return (
    f'<div class="tile"><h3>{escape(records_lib.describe(row.variant))}</h3>'
    f'<p class="who">{escape(attacker)}</p>'
    f'<p class="big">{_big(tpr, decimals)}{_within(tpr, decimals)}</p>'
    f"<p>of members found at {percent_words(fpr)} false positives</p>"
    f"<p>test accuracy <b>{_big(accuracy, 1)}</b>{_within(accuracy, 1)}</p></div>"
  )


def _big(number: Record | None, decimals: int) -> str:
  value = records_lib.value_of(number)
  return tables.MISSING if value is None else f"{100 * value:.{decimals}f}%"


def _within(number: Record | None, decimals: int) -> str:
  words = tables.interval_words(number, 100.0, decimals)
  return f' <span class="range">{words}%</span>' if words else ""


def listed(heading: str, points: Sequence[str]) -> str:
  """Sentences as a list."""
  items = "".join(f"<li>{escape(point)}</li>" for point in points)
  return f'<section><h2>{heading}</h2><ul class="points">{items}</ul></section>' if items else ""


def _warnings(records: Sequence[Record]) -> str:
  found = records_lib.select(records, "warning")
  items = "".join(f"<li><b>{escape(w['about'])}</b>: {escape(w['message'])}</li>" for w in found)
  heading = "1 warning" if len(found) == 1 else f"{len(found)} warnings"
  if not found:
    return ""
  return f'<section class="warnings"><h2>{heading}</h2><ul>{items}</ul></section>'


def section(table: Table) -> str:
  """A table under its title; nothing if it has no rows."""
  return (
    f"<section><h2>{escape(table.title)}</h2>{table_html(table)}</section>" if table.rows else ""
  )


def _results(records: Sequence[Record], attack: str) -> str:
  return main_table(tables.results(records, attack=attack), tables.to_csv(records))


def main_table(table: Table, csv: str) -> str:
  """A table with all numbers behind it as a file to download."""
  if not table.rows:
    return ""
  data = base64.b64encode(csv.encode()).decode()
  link = f'<a download="results.csv" href="data:text/csv;base64,{data}">all numbers as CSV</a>'
  hint = '<p class="hint">Click a heading to sort. The table scrolls sideways.</p>'
  return f"<section><h2>{escape(table.title)}</h2>{hint}{table_html(table)}<p>{link}</p></section>"


def drawn(figures: Mapping[str, Any]) -> str:
  """Figures with their captions."""
  from ptq_jax.report import figures as figures_lib

  parts = []
  for i, (name, figure) in enumerate(figures.items()):
    title, caption = CAPTIONS.get(name, (name.replace("_", " "), ""))
    width = figure.get_size_inches()[0]
    svg = figures_lib.to_inline_svg(figure, name=f"figure{i}", description=f"{title}. {caption}")
    parts.append(
      f'<figure{" class=wide" if width > 6 else ""}><h3>{escape(title)}</h3><div class="scroll">'
      f'<div style="min-width:{68 * width:.0f}px;max-width:{108 * width:.0f}px">{svg}</div></div>'
      f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
  if not parts:
    return ""
  return f'<section><h2>Figures</h2><div class="figures">{"".join(parts)}</div></section>'


def _exposed(records: Sequence[Record], *, shown: bool) -> str:
  """The numbers of the most exposed examples, and why their images are not here."""
  table = tables.exposed(records)
  if not table.rows:
    return ""
  notice = "" if shown else f"<p>{escape(NOTICE)}</p>"
  rows = f"<details><summary>{len(table.rows)} examples</summary>{table_html(table)}</details>"
  return f"<section><h2>{escape(table.title)}</h2>{notice}{rows}</section>"


def _reading() -> str:
  parts = "".join(f"<h3>{escape(title)}</h3><p>{escape(text)}</p>" for title, text in READING)
  return f'<section class="reading"><h2>What this means</h2>{parts}</section>'


def glossary() -> str:
  """Terms and their meaning."""
  items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in GLOSSARY)
  return f"<section><h2>How to read this</h2><dl>{items}</dl></section>"


def _more(records: Sequence[Record], attack: str) -> str:
  """Tables that few need, folded."""
  made = (
    tables.attacks(records),
    tables.calibration(records, attack=attack),
    tables.score_shift(records, attack=attack),
    tables.thresholds(records, attack=attack),
    tables.classes(records, attack=attack),
    tables.precision(records, attack=attack),
    tables.units(records),
  )
  parts = [
    f"<details><summary>{escape(table.title)}</summary>{table_html(table)}</details>"
    for table in made
    if table.rows
  ]
  return f"<section><h2>More numbers</h2>{''.join(parts)}</section>" if parts else ""


def _settings(runs: Sequence[Record]) -> str:
  if not runs:
    return ""
  run = runs[0]
  facts = {"command": run["command"], "date": run["date"], "device": run["device"]}
  facts |= {"protocol": run["protocol"], "models": run["models"], "targets": run["targets"]}
  blocks = [
    ("Run", facts),
    ("Time per stage", {k: duration(v) for k, v in run["seconds"].items()}),
    ("Data", dotted(run["data"])),
    ("Model", dotted(run["model"])),
    ("Configuration", dotted(run["config"])),
    ("Versions", run["versions"]),
  ]
  parts = [
    f"<details{' open' if i == 0 else ''}><summary>{title}</summary>{_facts(facts)}</details>"
    for i, (title, facts) in enumerate(blocks)
    if facts
  ]
  return f"<section><h2>Settings</h2>{''.join(parts)}</section>"


def _facts(facts: Mapping[str, Any]) -> str:
  rows = "".join(
    f"<tr><th>{escape(name)}</th><td>{escape(_shown(value))}</td></tr>"
    for name, value in facts.items()
  )
  return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def _shown(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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


# ---- tables ----


def table_html(table: Table) -> str:
  """A table with sortable columns; intervals are written and drawn below their number."""
  groups = [column.group for column in table.columns]
  top = "".join(
    f'<th colspan="{span}"{" class=group" if group else ""}>{escape(group)}</th>'
    for group, span in _spans(groups)
  )
  heads = "".join(
    f'<th{_classes(groups, i, "words" if column.words else "")} aria-sort="none">'
    f'<button type="button">{_heading(column.name)}</button></th>'
    for i, column in enumerate(table.columns)
  )
  scales = [_scale(table, i) for i in range(len(table.columns))]
  pairs = zip([None, *table.rows], table.rows, strict=False)
  rows = "".join(_row(row, previous, table, groups, scales) for previous, row in pairs)
  notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
  return (
    f'<div class="scroll"><table class="data"><thead>{f"<tr>{top}</tr>" if any(groups) else ""}'
    f"<tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    + (f'<ul class="notes">{notes}</ul>' if notes else "")
  )


def _heading(name: str) -> str:
  return "<br>".join(escape(line) for line in name.split("\n"))


def _row(
  row: Sequence[Cell], previous: Sequence[Cell] | None, table: Table, groups: Sequence[str],
  scales: Sequence[tuple[float, float] | None],
) -> str:  # fmt: skip
  first = previous is not None and previous[0].text != row[0].text
  cells = []
  for i, (cell, column, scale) in enumerate(zip(row, table.columns, scales, strict=True)):
    tag = "th scope=row" if i == 0 else "td"
    sort = "" if cell.sort is None else f' data-sort="{escape(cell.sort)}"'
    classes = _classes(groups, i, "words" if column.words else "")
    cells.append(f"<{tag}{classes}{sort}>{_cell(cell, scale)}</{tag[:2]}>")
  return f"<tr{' class=first' if first else ''}>{''.join(cells)}</tr>"


def _cell(cell: Cell, scale: tuple[float, float] | None) -> str:
  text = escape(cell.text) + (f"<sup>{escape(cell.mark)}</sup>" if cell.mark else "")
  if cell.below:
    text += f"<small>{escape(cell.below)}</small>"
  return text + _whisker(cell, scale)


def _whisker(cell: Cell, scale: tuple[float, float] | None) -> str:
  """The interval drawn as a bar with a dot, on the scale shared by both attackers."""
  if scale is None or cell.span is None or not isinstance(cell.sort, float):
    return ""
  start, stop = scale
  low, high, value = (100 * (x - start) / (stop - start) for x in (*cell.span, cell.sort))
  style = f"--low:{low:.1f}%;--size:{max(high - low, 0):.1f}%;--value:{value:.1f}%"
  return f'<i class="whisker" style="{style}"></i>'


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


def _spans(groups: Sequence[str]) -> list[tuple[str, int]]:
  spans: list[tuple[str, int]] = []
  for group in groups:
    if spans and spans[-1][0] == group:
      spans[-1] = (group, spans[-1][1] + 1)
    else:
      spans.append((group, 1))
  return spans


def _classes(groups: Sequence[str], index: int, *more: str) -> str:
  edge = index and groups[index] != groups[index - 1]
  names = [name for name in ("edge" if edge else "", *more) if name]
  return f' class="{" ".join(names)}"' if names else ""


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root {
  --paper: #ffffff; --page: #f5f6f8; --ink: #1b1b1f; --muted: #5e6570; --line: #dfe2e7;
  --accent: #0b62b0; --warn: #9a5b00; --warn-paper: #fff6e5; --shade: #00000038;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #1c1f24; --page: #14161a; --ink: #e9ebef; --muted: #9aa2ae; --line: #343941;
    --accent: #6db3f2; --warn: #f0b95a; --warn-paper: #2b2416; --shade: #000000a0;
  }
  figure svg { filter: brightness(1.2); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--font);
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.45rem, 3.6vw, 2.15rem); line-height: 1.22; margin: .35rem 0 .8rem;
  max-width: 32em; text-wrap: balance; letter-spacing: -.012em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: .4rem 0; }
a { color: var(--accent); }
.eyebrow { color: var(--muted); font-size: .85rem; margin: 0; overflow-wrap: anywhere; }
.lede { color: var(--muted); max-width: 60em; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .9rem;
  margin: 1.6rem 0; }
.tile, figure, .warnings, details, section > .scroll {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
}
.tile { padding: 1rem 1.1rem; overflow-wrap: anywhere; }
.tile h3 { font-size: .98rem; margin: 0; }
.tile h3::first-letter { text-transform: uppercase; }
.tile .who { color: var(--muted); margin: 0 0 .5rem; }
.tile .big .range { font-size: .95rem; font-weight: 400; letter-spacing: 0; }
.tile .big { font-size: 2.3rem; font-weight: 650; line-height: 1.1; margin: .1rem 0;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile p { font-size: .92rem; }
.range { color: var(--muted); white-space: nowrap; font-variant-numeric: tabular-nums; }
.reading p { max-width: 62em; margin: 0 0 1rem; }
.points { padding-left: 1.2rem; max-width: 62em; margin: 0; }
.points li { margin: .35rem 0; overflow-wrap: anywhere; }
.warnings { background: var(--warn-paper); border-color: var(--warn); padding: .9rem 1.1rem;
  margin-top: 1.6rem; }
.warnings h2 { margin: 0 0 .3rem; font-size: 1rem; color: var(--warn); }
.warnings ul { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.hint { color: var(--muted); font-size: .85rem; margin-bottom: .5rem; }
.scroll { overflow-x: auto; position: relative; scrollbar-width: thin; }
section > .scroll, details > .scroll, figure > .scroll { background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / .8rem 100% no-repeat scroll,
  var(--paper); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
.data { font-variant-numeric: tabular-nums; line-height: 1.3; }
.data th, .data td { padding: .42rem .6rem; text-align: right; vertical-align: top;
  white-space: nowrap; }
.data td.words, .data th.words, .data thead th:first-child { text-align: left; }
.data .words { white-space: normal; overflow-wrap: break-word; min-width: 6rem; max-width: 16rem; }
.data thead th { font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
.data thead .group { text-align: center; border-bottom-width: 2px;
  border-bottom-color: var(--muted); }
.data tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
.data tbody tr + tr td, .data tbody tr + tr th { border-top: 1px solid var(--line); }
.data tbody tr.first td, .data tbody tr.first th { border-top-color: var(--muted); }
.data tbody tr:hover td, .data tbody tr:hover th { background: var(--page); }
.data .edge { border-left: 1px solid var(--line); }
.data button { all: unset; cursor: pointer; font: inherit; }
.data button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.data [aria-sort=ascending] button::after { content: " \\2191"; }
.data [aria-sort=descending] button::after { content: " \\2193"; }
.data small { display: block; color: var(--muted); font-size: .92em; font-weight: 400; }
.data sup { position: absolute; font-size: .85em; line-height: 1.2; color: var(--warn); }
.whisker { display: block; position: relative; height: 7px; margin-top: 3px; min-width: 4.2rem;
  background: linear-gradient(var(--line), var(--line)) center / 100% 1px no-repeat; }
.whisker::before { content: ""; position: absolute; top: 2.5px; height: 2px; left: var(--low);
  width: var(--size); background: var(--accent); }
.whisker::after { content: ""; position: absolute; top: .5px; width: 6px; height: 6px;
  margin-left: -3px; left: var(--value); border-radius: 50%; background: var(--accent); }
.notes { color: var(--muted); font-size: .85rem; padding-left: 1.1rem; max-width: 70em;
  overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; padding: 1rem 1.1rem; min-width: 0; flex: 1 1 min(100%, 30rem); }
figure.wide { flex-basis: 100%; }
figure .scroll > div { margin: 0 auto; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .6rem; max-width: 60em; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .5rem 1.2rem;
  max-width: 62em; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; }
details { margin: 0 0 .6rem; }
summary { cursor: pointer; padding: .65rem 1rem; font-weight: 600; }
details > .scroll { border-top: 1px solid var(--line); }
details > .notes { margin: .6rem 1rem; }
.facts th { text-align: left; font-weight: 400; color: var(--muted); vertical-align: top;
  padding: .3rem 1rem; white-space: nowrap; width: 1%; }
.facts td { padding: .3rem 1rem; font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: .92em; overflow-wrap: anywhere; min-width: 12rem; }
@media (max-width: 640px) {
  main { padding: 1.4rem .9rem 3rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .7rem; }
  .data th, .data td { padding: .38rem .45rem; }
  .data .words { max-width: 8rem; min-width: 6.1rem; }
}
@media print {
  body { background: none; } .scroll { overflow: visible; } main { max-width: none; }
}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.data")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    const key = row => row.cells[index].dataset.sort;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up * order;
    });
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
    rows.forEach(row => { row.classList.remove("first"); table.tBodies[0].append(row); });
  }));
}
"""
