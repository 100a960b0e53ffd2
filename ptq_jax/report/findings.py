"""What an audit found, in plain sentences computed from its records."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ptq_jax.report import records as records_lib
from ptq_jax.report import tables
from ptq_jax.report.records import Difference, Record, Row
from ptq_jax.report.tables import percent_words, rate_decimals


class Findings(NamedTuple):
  """What an audit found, in plain sentences."""

  headline: str  # the main finding
  audited: str  # what was audited, and how
  points: list[str]  # more findings, most important first


def summarize(
  records: Sequence[Record], *, attack: str | None = None, fpr: float | None = None
) -> Findings:
  """The main findings in words, computed from the records.

  A difference that may be 0 (its own interval holds it, or, where only the two numbers have
  intervals, these overlap) is said to be within the intervals, not a finding.

  Args:
    records: any records.
    attack: which attack; default `records.main_attack(records)`.
    fpr: the false-positive rate that the sentences quote; default `records.solid_fpr(records)`.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  fpr = records_lib.solid_fpr(records, attack=attack) if fpr is None else fpr
  rows = records_lib.side_by_side(records, attack=attack)
  audited = _audited(records, attack)
  if fpr is None or not rows:
    return Findings("No leakage was measured.", audited, [])
  full = next((row for row in rows if row.variant.method == "none"), None)
  quantized = [row for row in rows if row.variant.method != "none"]
  chosen = narrowest(records_lib.main_rows(quantized), fpr)
  points = [
    *_baseline_point(full, fpr),
    *_protection_point(full, quantized, fpr),
    *_underestimate_point(quantized, fpr),
    *_unmatched_point(quantized),
    *_accuracy_point(full, quantized),
    *_weak_point(rows, fpr),
  ]
  return Findings(_headline(full, chosen, fpr), audited, points)


def narrowest(rows: Sequence[Row], fpr: float) -> Row | None:
  """Of the rows with the fewest levels, the most accurate: what one would ship at that width."""
  measured = [row for row in rows if _rate(row.worst(fpr), fpr) is not None]
  few = min((row.variant.levels or math.inf for row in measured), default=None)
  some = [row for row in measured if (row.variant.levels or math.inf) == few]
  return max(some, key=lambda row: _accuracy(row) or 0.0, default=None)


def _headline(full: Row | None, chosen: Row | None, fpr: float) -> str:
  at = f"of members found at {percent_words(fpr)} false positives"
  before = None if full is None else _rate(full.worst(fpr), fpr)
  after = None if chosen is None else _rate(chosen.worst(fpr), fpr)
  if after is None:
    return (
      "No leakage was measured."
      if before is None
      else (f"Full precision: {_percent(before, fpr)} {at}.")
    )
  name = records_lib.describe(chosen.variant)
  if before is None:
    return f"{name}: {_percent(after, fpr)} {at}."
  change = _tpr_difference(chosen.worst(fpr), full.worst(fpr), fpr)
  rates = f"{_percent(before, fpr)} to {_percent(after, fpr)} {at}"
  cost = _cost(full, chosen)
  if change.overlap is None:
    return f"{name}: from {rates} (no intervals recorded){cost}."
  if change.overlap:
    return f"{name}: from {rates}, a difference within the intervals{cost}."
  return f"{name} {'lowers' if change.value < 0 else 'raises'} leakage from {rates}{cost}."


def _cost(full: Row, chosen: Row) -> str:
  """What it costs in accuracy, as the end of a sentence."""
  change = records_lib.difference(
    chosen.either.get("test_accuracy"), full.either.get("test_accuracy")
  )
  if change is None:
    return ""
  if change.overlap:
    return ", with test accuracy within the interval of full precision"
  words = "at a cost of" if change.value < 0 else "with a gain of"
  return f", {words} {100 * abs(change.value):.1f} points of test accuracy"


def _audited(records: Sequence[Record], attack: str) -> str:
  """What was audited, from the run record."""
  runs = records_lib.select(records, "run")
  if not runs:
    return f"Attack: {records_lib.attack_name(attack)}."
  run = runs[0]
  model, data = run["model"], run["data"]
  parameters = _count(model.get("parameters"), "parameters")
  pool = _count(data.get("pool_size"), "images, each model trained on half of them")
  what = f"{model.get('name', 'model')} models{f' ({parameters})' if parameters else ''}"
  where = f"{data.get('name', 'data')}{f' ({pool})' if pool else ''}"
  if run["protocol"] == "leave-one-out":
    how = f"{run['models']} {what} on {where}; each is attacked with the others as shadows"
  else:
    how = f"{run['targets']} target {what} on {where}, attacked with {run['models']} shadows"
  return f"{how}. Attack: {records_lib.attack_name(attack)}."


def _baseline_point(full: Row | None, fpr: float) -> list[str]:
  """How much full precision leaks, against chance."""
  number = None if full is None else records_lib.tpr_at(full.worst(fpr), fpr)
  value = records_lib.value_of(number)
  if value is None:
    return []
  low, _ = records_lib.bounds_of(number)
  start = (
    f"At full precision the attack finds {_percent(value, fpr)} of members"
    f"{_interval(number, fpr)} while accusing {percent_words(fpr)} of non-members"
  )
  if low is not None and low <= fpr:
    return [f"{start}; chance ({percent_words(fpr)}) is within the interval."]
  return [f"{start}, {value / fpr:.1f} times chance."]


def _protection_point(full: Row | None, quantized: Sequence[Row], fpr: float) -> list[str]:
  """How many variants leak measurably less than full precision to the better attacker."""
  if full is None:
    return []
  changes = {
    row.variant: _tpr_difference(row.worst(fpr), full.worst(fpr), fpr) for row in quantized
  }
  known = {v: c for v, c in changes.items() if c is not None and c.overlap is not None}
  if not known:
    return []
  lower = [v for v, c in known.items() if not c.overlap and c.value < 0]
  higher = [v for v, c in known.items() if not c.overlap and c.value > 0]
  sentence = f"{_variants(len(lower), len(known))} less than full precision beyond the intervals"
  if lower:
    widest = max(lower, key=lambda v: v.levels or math.inf)
    sentence += f"; the widest of them is {records_lib.describe(widest)}"
  if higher:
    sentence += f"; {len(higher)} more"
  return [f"{sentence}."]


def _underestimate_point(quantized: Sequence[Row], fpr: float) -> list[str]:
  """By how much full-precision shadows underestimate, at most and how often."""
  gaps = [(records_lib.underestimate(row, fpr), row) for row in quantized]
  gaps = [(gap, row) for gap, row in gaps if gap is not None]
  if not gaps:
    return []
  known = [gap for gap, _ in gaps if gap.overlap is not None]
  more, fewer = (sum(not gap.overlap and sign * gap.value > 0 for gap in known) for sign in (1, -1))
  gap, row = max(gaps, key=lambda pair: pair[0].value)
  if gap.value <= 0 and not fewer:
    return ["Nowhere do matched shadows find more members than full-precision shadows."]
  if known and not more and fewer:
    return [
      "Nowhere do matched shadows find measurably more members than full-precision shadows; in"
      f" {fewer} of {len(known)} quantized variants they find fewer, beyond the intervals. The"
      " findings quote the attacker who finds more."
    ]
  seen, found = (_percent(_rate(record, fpr), fpr) for record in row[1:])
  sentence = (
    "An attacker who does not quantize its shadows underestimates leakage most for"
    f" {records_lib.describe(row.variant)}: it finds {seen} of members where matched shadows find"
    f" {found}"
  )
  if gap.overlap:
    sentence += "; that difference is within the intervals"
  if more:
    counts = {"more": more, "fewer": fewer}
    found = " and ".join(f"{word} in {count}" for word, count in counts.items() if count)
    sentence += f". Matched shadows find {found} of {len(known)} quantized variants"
    sentence += " beyond the intervals"
  elif len(known) > 1:
    sentence += ", and so is every other"
  return [f"{sentence}."]


def _unmatched_point(quantized: Sequence[Row]) -> list[str]:
  """A warning when nobody attacked some quantized variant with quantized shadows."""
  missing = [row for row in quantized if row.matched is None]
  if not missing:
    return []
  which = (
    "any quantized variant"
    if len(missing) == len(quantized)
    else (f"{len(missing)} of {len(quantized)} quantized variants")
  )
  return [
    f"Matched shadows were not measured for {which}: there the numbers are what an attacker sees"
    " who does not quantize its shadows, and may underestimate."
  ]


def _accuracy_point(full: Row | None, quantized: Sequence[Row]) -> list[str]:
  """The narrowest variant whose accuracy is within the interval of full precision."""
  if full is None:
    return []
  number = full.either.get("test_accuracy")
  changes = [(records_lib.difference(r.either.get("test_accuracy"), number), r) for r in quantized]
  same = [row for change, row in changes if change is not None and change.overlap]
  if not same:
    return []
  row = min(same, key=lambda r: (r.variant.levels or math.inf, -(_accuracy(r) or 0.0)))
  return [
    "The narrowest variant whose test accuracy is within the interval of full precision"
    f" ({100 * (_accuracy(full) or 0.0):.1f}%) is {records_lib.describe(row.variant)},"
    f" {100 * (_accuracy(row) or 0.0):.1f}%."
  ]


def _weak_point(rows: Sequence[Row], fpr: float) -> list[str]:
  """A warning when the quoted rates themselves rest on too little."""
  shown = [record for row in rows for record in row[1:] if record is not None]
  if not any(records_lib.weakness(r, records_lib.tpr_at(r, fpr)) for r in shown):
    return []
  return [
    f"Some rates at {percent_words(fpr)} FPR rest on fewer than"
    f" {records_lib.FEW_FALSE_POSITIVES} false positives; read the intervals, not the digits."
  ]


def _tpr_difference(
  record: Record | None, reference: Record | None, fpr: float
) -> Difference | None:
  return records_lib.difference(records_lib.tpr_at(record, fpr), records_lib.tpr_at(reference, fpr))


def _rate(record: Record | None, fpr: float) -> float | None:
  return records_lib.value_of(records_lib.tpr_at(record, fpr))


def _accuracy(row: Row) -> float | None:
  return records_lib.value_of(row.either.get("test_accuracy"))


def _percent(rate: float | None, fpr: float) -> str:
  return tables.MISSING if rate is None else f"{100 * rate:.{rate_decimals(fpr)}f}%"


def _interval(number: Record | None, fpr: float) -> str:
  words = tables.interval_words(number, 100.0, rate_decimals(fpr))
  return f" ({words}%)" if words else ""


def _variants(some: int, total: int) -> str:
  """Subject and verb: how many of the quantized variants leak."""
  if some == 0:
    return "No quantized variant leaks"
  return f"{some} of {total} quantized variants {'leaks' if some == 1 else 'leak'}"


def _count(value: Any, what: str) -> str:
  return f"{value:,} {what}" if isinstance(value, int) else ""
