"""What an audit found, in plain sentences computed from its records."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ptq_jax.report import records as records_lib
from ptq_jax.report import tables
from ptq_jax.report.records import Record, Row, Variant
from ptq_jax.report.tables import percent_words, rate_decimals

LOSSES = (0.0, 0.01, 0.05, math.inf)
"""Losses of test accuracy that matter alike: none measurable, a little, some, too much."""

WORTH_TELLING = 0.25
"""Share of full precision's rate by which it must fall to be preferred as a headline."""


class Findings(NamedTuple):
  """What an audit found, in plain sentences."""

  headline: str  # the main finding
  audited: str  # what was audited, and how
  points: list[str]  # more findings, most important first
  variant: Variant | None = None  # the one that the headline is about, if it is about one


def summarize(
  records: Sequence[Record], *, attack: str | None = None, fpr: float | None = None
) -> Findings:
  """The main findings in words, computed from the records.

  Differences are paired, over the same examples and targets; one that may be 0 is not a finding.
  Which variants leak less or more is judged with Holm's method for so many comparisons. All rates
  are those of the attacker that `Row.counted` names. The headline is about the variant that
  `most_useful` chooses; where there is none it says that nothing was measurable.

  Args:
    records: any records.
    attack: which attack; default `records.main_attack(records)`.
    fpr: the false-positive rate that the sentences quote; default `records.solid_fpr(records)`.
  """
  attack = records_lib.main_attack(records) if attack is None else attack
  fpr = records_lib.solid_fpr(records, attack=attack) if fpr is None else fpr
  rows = records_lib.side_by_side(records, attack=attack)
  audited = audited_by(records, attack)
  if fpr is None or not rows:
    return Findings("No leakage was measured.", audited, [])
  full = next((row for row in rows if row.variant.method == "none"), None)
  quantized = [row for row in rows if row.variant.method != "none"]
  chosen = most_useful(quantized, fpr)
  if full and chosen and is_chance(full, fpr) and _falls(chosen, fpr):
    chosen = None  # below nothing there is no less
  points = [
    *_baseline_point(full, fpr),
    *_protection_point(quantized, fpr),
    *_underestimate_point(quantized, fpr),
    *_unmatched_point(quantized),
    *_calibration_point(records, attack, fpr),
    *_releases_point(records, attack, fpr),
    *_epsilon_point(full),
    *_targets_point(full or rows[0]),
    *_accuracy_point(full, quantized),
    *_fit_point(full, quantized),
    *_weak_point(rows, fpr),
  ]
  headline = _headline(full, quantized, chosen, fpr)
  return Findings(headline, audited, points, chosen and chosen.variant)


def most_useful(rows: Sequence[Row], fpr: float) -> Row | None:
  """Of the quantized rows whose leakage changes measurably, the one most worth telling.

  One that leaks less: of those whose loss of test accuracy is in the lowest of `LOSSES`, the one
  that leaks least against full precision; those come first that fall by `WORTH_TELLING` and do not
  lose too much. If none leaks less, the one whose leakage rises most.
  """
  known = _sure_changes(rows, fpr)
  lower = [row for row in rows if row.variant in known and known[row.variant] < 0]
  if lower:
    before = {row.variant: _rate(row.counted, fpr) - known[row.variant] for row in lower}
    far = [
      row
      for row in lower
      if -known[row.variant] >= WORTH_TELLING * before[row.variant]
      and _loss_class(row) < LOSSES.index(math.inf)
    ]
    return min(far or lower, key=lambda row: (_loss_class(row), known[row.variant]))
  higher = [row for row in rows if row.variant in known]
  return max(higher, key=lambda row: known[row.variant], default=None)


def _sure_changes(rows: Sequence[Row], fpr: float) -> dict[Variant, float]:
  """Changes of the TPR that are not chance, over all rows together."""
  found = records_lib.surely({row.variant: records_lib.change(row.counted, fpr) for row in rows})
  return {which: change.value for which, change in found.items() if change.sure}


def _loss_class(row: Row) -> int:
  """Place in `LOSSES` of what the row costs; beyond them where that is not known."""
  change = records_lib.accuracy_change(row.either)
  if change is None or change.sure is None:
    return len(LOSSES)
  lost = max(0.0, -change.value) if change.sure else 0.0
  return next(i for i, most in enumerate(LOSSES) if lost <= most)


def _headline(full: Row | None, quantized: Sequence[Row], chosen: Row | None, fpr: float) -> str:
  shown = [row for row in (full, *quantized) if row]
  at = f"of members found at {accepted(shown[0].counted, fpr)}"
  before = None if full is None else _rate(full.counted, fpr)
  if before is None:
    return _without_full_precision(quantized, fpr, at)
  if chosen is not None:
    rates = f"{_percent(before, fpr)} to {_percent(_rate(chosen.counted, fpr), fpr)} {at}"
    verb = "lowers" if _falls(chosen, fpr) else "raises"
    name = records_lib.describe(chosen.variant)
    return f"{name} {verb} leakage from {rates}{_cost(chosen)}{_others(quantized, chosen, fpr)}."
  if is_chance(full, fpr):
    return _nothing(full, fpr)
  start = f"Full precision: {_percent(before, fpr)} {at}"
  rates = [_rate(row.counted, fpr) for row in quantized]
  if all(rate is None for rate in rates):
    return f"{start}."
  changes = [(row, records_lib.change(row.counted, fpr)) for row in quantized]
  measured = [row for row, change in changes if change and change.p is not None]
  if not measured:
    low, high = (_percent(f(r for r in rates if r is not None), fpr) for f in (min, max))
    some = low if low == high else f"{low} to {high}"
    return f"{start}; quantized: {some} (no paired interval recorded)."
  if len(measured) == 1:
    row = measured[0]
    name, rate = records_lib.describe(row.variant), _percent(_rate(row.counted, fpr), fpr)
    return f"{start}; {name}: {rate}, a difference that may be chance{_cost(row)}."
  return f"{start}; none of {len(measured)} quantized variants leaks measurably less or more."


def _falls(row: Row, fpr: float) -> bool:
  return records_lib.change(row.counted, fpr).value < 0


def _others(quantized: Sequence[Row], chosen: Row, fpr: float) -> str:
  """What the headline's variant does not say of the others, as the end of a sentence."""
  if not _falls(chosen, fpr):
    return "; no variant leaks measurably less" if len(quantized) > 1 else ""
  keep = [row for row in quantized if _loss_class(row) == 0]
  if not keep or not 0 < _loss_class(chosen) < len(LOSSES):
    return ""
  known = _sure_changes(quantized, fpr)
  least = min(keep, key=lambda row: known.get(row.variant, 0.0))
  if known.get(least.variant, 0.0) >= 0:
    return "; no variant that keeps its accuracy leaks measurably less"
  name, rate = records_lib.describe(least.variant), _percent(_rate(least.counted, fpr), fpr)
  return f"; of those that keep their accuracy, {name} leaks least, {rate}"


def _without_full_precision(rows: Sequence[Row], fpr: float, at: str) -> str:
  """The headline where nothing in full precision was attacked."""
  rates = [rate for row in rows if (rate := _rate(row.counted, fpr)) is not None]
  if not rates:
    return "No leakage was measured."
  if len(rates) > 1:
    low, high = (_percent(rate, fpr) for rate in (min(rates), max(rates)))
    return f"{len(rates)} quantized variants: {low} to {high} {at}; full precision is missing."
  row = next(row for row in rows if _rate(row.counted, fpr) is not None)
  if is_chance(row, fpr):
    return _nothing(row, fpr)
  return f"{records_lib.describe(row.variant)}: {_percent(rates[0], fpr)} {at}."


def is_chance(row: Row, fpr: float) -> bool:
  """Whether the interval of its TPR does not lie above what guessing finds."""
  number = records_lib.tpr_at(row.counted, fpr)
  low, _ = records_lib.bounds_of(number)
  return low is not None and low <= number.get("chance", fpr)


def _nothing(row: Row, fpr: float) -> str:
  number = records_lib.tpr_at(row.counted, fpr)
  found, chance = _percent(number["value"], fpr), _percent(number.get("chance", fpr), fpr)
  name = records_lib.describe(row.variant)
  return (
    f"Nothing measurable was found: {name} shows {found} of members at"
    f" {accepted(row.counted, fpr)}, and guessing {chance}."
  )


def accepted(record: Record, fpr: float) -> str:
  """The false positives at which a rate is read: none, with too few non-members for one."""
  if records_lib.weakness(record, records_lib.tpr_at(record, fpr)) == "non_members":
    return f"no false positive among {record['num_non_members']} non-members"
  return f"{percent_words(fpr)} false positives"


def _cost(chosen: Row) -> str:
  """What it costs in accuracy, as the end of a sentence."""
  change = records_lib.accuracy_change(chosen.either)
  if change is None or change.sure is None:
    return ""
  if not change.sure:
    return ", with no measurable change of test accuracy"
  words = "at a cost of" if change.value < 0 else "with a gain of"
  return f", {words} {_points(change.value)} points of test accuracy"


def _points(change: float) -> str:
  """A change in percentage points, with as many digits as keep it from being 0."""
  size = 100 * abs(change)
  return next((t for d in (1, 2, 3) if float(t := f"{size:.{d}f}") > 0), f"{size:.1g}")


def audited_by(records: Sequence[Record], attack: str) -> str:
  """What was audited and how, from the run record."""
  return " ".join(filter(None, (audited(records), f"Attack: {records_lib.attack_name(attack)}.")))


def audited(records: Sequence[Record]) -> str:
  """A sentence about the models, the data and the protocol of the run record; "" without one."""
  runs = records_lib.select(records, "run")
  if not runs:
    return ""
  run = runs[0]
  model, data = run["model"], run["data"]
  parameters = _count(model.get("parameters"), "parameters")
  share = _share(data.get("members_share"))
  pool = _count(data.get("pool_size"), f"examples{share}")
  what = f"{model['name']} models" if "name" in model else "models"
  what += f" ({parameters})" if parameters else ""
  where = f"{data.get('name', 'data')}{f' ({pool})' if pool else ''}"
  if run["protocol"] == "leave-one-out":
    return f"{run['models']} {what} on {where}; each is attacked with the others as shadows."
  what = what.replace("models", "model", 1) if run["targets"] == 1 else what
  return f"{run['targets']} target {what} on {where}, attacked with {run['models']} shadows."


def _share(share: float | None) -> str:
  """On how many of the examples each model was trained, if that is known."""
  if share is None:
    return ""
  return f", each model trained on {'half' if abs(share - 0.5) < 0.005 else f'{share:.0%}'} of them"


def _baseline_point(full: Row | None, fpr: float) -> list[str]:
  """How much full precision leaks, against chance."""
  number = None if full is None else records_lib.tpr_at(full.counted, fpr)
  value = records_lib.value_of(number)
  if value is None:
    return []
  low, high = records_lib.bounds_of(number)
  chance = number.get("chance", fpr)
  start = (
    f"At full precision the attack finds {_percent(value, fpr)} of members"
    f"{_interval(number, fpr)} at {accepted(full.counted, fpr)}"
  )
  guess = f"chance ({_percent(chance, fpr)})"
  if low is None or high is None:
    return [f"{start}; {guess} was not compared."]
  if low > chance:
    return [f"{start}, {value / chance:.1f} times {guess}."]
  if high < chance:
    return [f"{start}; that is below {guess}: the attack errs."]
  return [f"{start}; {guess} is within the interval."]


def _protection_point(quantized: Sequence[Row], fpr: float) -> list[str]:
  """How many variants leak measurably less than full precision, over so many comparisons."""
  known = records_lib.surely({r.variant: records_lib.change(r.counted, fpr) for r in quantized})
  if not known:
    return []
  lower = [v for v, c in known.items() if c.sure and c.value < 0]
  higher = [v for v, c in known.items() if c.sure and c.value > 0]
  sentence = f"{_variants(len(lower), len(known))} measurably less than full precision"
  if lower:
    most = max(lower, key=lambda v: v.levels or math.inf)
    sentence += f"; the one with most bits is {records_lib.describe(most)}"
  if higher:
    sentence += f"; {len(higher)} {'leaks' if len(higher) == 1 else 'leak'} more"
  if len(known) > 1:
    sentence += f" (paired, Holm's method for {len(known)} comparisons at 5%)"
  return [f"{sentence}."]


def _targets_point(row: Row) -> list[str]:
  """What one target cannot tell."""
  if row.counted.get("num_targets") != 1:
    return []
  return [
    "One target was attacked: the intervals are about this model and say nothing about others"
    " trained alike."
  ]


def _epsilon_point(full: Row | None) -> list[str]:
  """What differential privacy is refuted."""
  bound = {} if full is None else full.counted.get("epsilon") or {}
  if not bound.get("epsilon"):
    return []
  return [
    f"Full precision cannot be ({bound['epsilon']:.2g}, {bound['delta']:g})-differentially private"
    f" ({bound['confidence']:.0%} confidence, examples taken for independent)."
  ]


def _calibration_point(records: Sequence[Record], attack: str, fpr: float) -> list[str]:
  """Whether the members that calibrated the quantizer leak more than the others."""
  found = records_lib.select(
    records, "leakage", attack=attack, attacker="best", members="calibration members"
  )
  known = records_lib.surely(
    {records_lib.variant(record): records_lib.calibration_gap(record, fpr) for record in found}
  )
  if not known:
    return []
  counts = {
    word: sum(gap.sure and sign * gap.value > 0 for gap in known.values())
    for word, sign in (("more", 1), ("less", -1))
  }
  words = " and ".join(f"{word} often in {count}" for word, count in counts.items() if count)
  start = "The best attacker finds members that calibrated the quantizer"
  if not words:
    return [
      f"{start} measurably neither more nor less often than other members in {_of(len(known))}."
    ]
  which, gap = max(known.items(), key=lambda pair: abs(pair[1].value) * bool(pair[1].sure))
  sign = "+" if gap.value > 0 else "-"
  return [
    f"{start} measurably {words} of {len(known)} variants than other members, the most for"
    f" {records_lib.describe(which)}: {sign}{_points(gap.value)} points."
  ]


def _fit_point(full: Row | None, quantized: Sequence[Row]) -> list[str]:
  """Which variants fit their own members measurably worse."""
  before = None if full is None else records_lib.value_of(full.either.get("member_accuracy"))
  known = records_lib.surely(
    {row.variant: records_lib.accuracy_change(row.either, "member_") for row in quantized}
  )
  if before is None or not known:
    return []
  lost = {which: change.value for which, change in known.items() if change.sure and (
    change.value < 0)}  # fmt: skip
  start = f"Accuracy on members ({100 * before:.1f}% at full precision)"
  if not lost:
    return [f"{start} falls measurably in none of {_of(len(known), 'quantized ')}."]
  most = min(lost, key=lost.get)
  return [
    f"{start} falls measurably in {len(lost)} of {_of(len(known), 'quantized ')}, most for"
    f" {records_lib.describe(most)}: by {_points(lost[most])} points."
  ]


def _releases_point(records: Sequence[Record], attack: str, fpr: float) -> list[str]:
  """What publishing a quantized version beside full precision costs, at most."""
  found = records_lib.select(records, "leakage", attack=attack, attacker="releases")
  changes = {records_lib.variant(r): records_lib.change(r, fpr) for r in found}
  known = records_lib.surely(changes)
  if not known:
    return []
  which, most = max(known.items(), key=lambda pair: pair[1].value)
  more = sum(c.sure and c.value > 0 for c in known.values())
  start = "Publishing full precision and a quantized version together: the attack on both finds"
  if not more:
    return [f"{start} measurably more members than that on full precision alone for none of them."]
  return [
    f"{start} measurably more members than that on full precision alone for {more} of {len(known)}"
    f" versions, most for {records_lib.describe(which)}: {_points(most.value)} points more."
  ]


def _underestimate_point(quantized: Sequence[Row], fpr: float) -> list[str]:
  """By how much full-precision shadows underestimate the attacker that counts, and how often."""
  gaps = {row.variant: records_lib.underestimate(row, fpr) for row in quantized}
  known = records_lib.surely(gaps)
  if not known:
    return []
  more, fewer = (
    [v for v, gap in known.items() if gap.sure and sign * gap.value > 0] for sign in (1, -1)
  )
  attack = records_lib.attack_name(quantized[0].counted["attack"])
  if not more:
    sentence = (
      f"The best attacker finds measurably more members than {attack} with full-precision shadows"
      " nowhere"
    )
    if fewer:
      sentence += f"; in {len(fewer)} of {len(known)} quantized variants it finds fewer"
    return [f"{sentence}."]
  which = max(more, key=lambda v: known[v].value)
  row = next(row for row in quantized if row.variant == which)
  seen, found = (_percent(_rate(record, fpr), fpr) for record in (row.full_precision, row.counted))
  sentence = (
    f"{attack} with full-precision shadows, on scores as they are, underestimates leakage most for"
    f" {records_lib.describe(which)}: it finds {seen} of members where the best attacker finds"
    f" {found}"
  )
  counts = {"more": len(more), "fewer": len(fewer)}
  words = " and ".join(f"{word} in {count}" for word, count in counts.items() if count)
  return [f"{sentence}. That one finds measurably {words} of {len(known)} quantized variants."]


def _unmatched_point(quantized: Sequence[Row]) -> list[str]:
  """A warning when nobody attacked some quantized variant with quantized shadows."""
  missing = [row for row in quantized if row.full_precision and row.matched is None]
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
  """The variant with the fewest bits whose accuracy did not fall measurably."""
  if full is None:
    return []
  changes = [(records_lib.accuracy_change(row.either), row) for row in quantized]
  same = [r for change, r in changes if change and (change.sure is False or (change.sure and (
    change.value > 0)))]  # fmt: skip
  if not same:
    return []
  row = min(same, key=lambda r: (r.variant.levels or math.inf, -(_accuracy(r) or 0.0)))
  change = row.either["accuracy_minus_full_precision"]
  return [
    "The fewest bits without a measurable loss of test accuracy against full precision"
    f" ({100 * (_accuracy(full) or 0.0):.1f}%): {records_lib.describe(row.variant)},"
    f" {100 * (_accuracy(row) or 0.0):.1f}% (change {tables.interval_words(change, 100.0, 1)}"
    " points)."
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


def _of(total: int, kind: str = "") -> str:
  return f"{total} {kind}variant{'s' * (total != 1)}"


def _count(value: Any, what: str) -> str:
  return f"{value:,} {what}" if isinstance(value, int) else ""
