"""Studies side by side: one table, one figure, and in sentences where they differ.

A study is the records of one results file, by a name. Each is judged by its own paired intervals,
with Holm's method over its own variants; two are never compared by whether intervals overlap.
"""

from collections.abc import Iterable, Mapping, Sequence

from ptq_jax.report import findings, page, tables
from ptq_jax.report import records as records_lib
from ptq_jax.report.records import Difference, Record, Variant
from ptq_jax.report.tables import Cell, Column, Table, percent_words

Studies = Mapping[str, Sequence[Record]]

ATTACK_SETTINGS = (
  "attack",
  "protocol",
  "models",
  "targets",
  "config.queries.views",
  "config.queries.augmentation",
)
"""Settings that make another attacker; "attack" is the main one with its variance."""

IGNORED = ("name", "config.name", "config.train.models", "config.train.targets", "command", "date",
           "seconds", "inputs", "device", "kind", "data.notes", "data.duplicates")  # fmt: skip
"""Fields of a run, with what is below them, that do not say what was studied, or say it again."""

KEPT_FIT = 0.01
"""A loss of accuracy on members below this counts as none when variants are grouped."""

CLAIMS = {
  "leakage": "Less leakage than full precision (best attacker)",
  "members": "A loss of accuracy on members",
  "test": "A loss of test accuracy",
}
"""What `verdicts` are about, as a sentence begins."""


def require_comparable(studies: Studies) -> None:
  """Raises ValueError, one sentence, if these are not studies that can be compared."""
  from ptq_jax.report import figures  # matplotlib takes long to import

  most = len(figures.STUDY_MARKS)
  if not 2 <= len(studies) <= most:
    raise ValueError(f"a comparison needs 2 to {most} studies, not {len(studies)}.")
  for name, records in studies.items():
    for kind in ("run", "leakage"):
      if not records_lib.select(records, kind):
        raise ValueError(f"the results of {name} have no {kind} record; attack it again.")
  common_fprs(studies)


def common_fprs(studies: Studies) -> list[float]:
  """The false-positive rates at which every study has TPRs, largest first.

  Raises:
    ValueError: if there are none.
  """
  own = {name: records_lib.false_positive_rates(records) for name, records in studies.items()}
  common = [f for f in next(iter(own.values())) if all(f in found for found in own.values())]
  if not common:
    words = "; ".join(f"{name}: {_rates(found)}" for name, found in own.items())
    raise ValueError(f"the studies have no false-positive rate in common ({words}).")
  return common


def headline_fpr(studies: Studies) -> float:
  """The lowest common rate at which no study's TPRs are weak; the largest if there is none."""
  common = common_fprs(studies)
  solid = (records_lib.solid_fpr(records, among=common) for records in studies.values())
  return max((fpr for fpr in solid if fpr is not None), default=common[0])


def telling_studies(studies: Studies, fpr: float) -> Studies:
  """Without those that find no more than chance in full precision: no fall can show in them."""
  return {
    name: records
    for name, records in studies.items()
    if not any(
      row.variant.method == "none" and findings.is_chance(row, fpr)
      for row in records_lib.side_by_side(records)
    )
  }


# ---- verdicts ----


def verdicts(records: Sequence[Record], fpr: float) -> dict[str, dict[Variant, Difference]]:
  """Changes from full precision by claim (`CLAIMS`), `sure` by Holm's method over the variants."""
  rows = [r for r in records_lib.side_by_side(records) if r.variant.method != "none"]
  changes = {
    "leakage": {row.variant: records_lib.change(row.counted, fpr) for row in rows},
    "members": {row.variant: records_lib.accuracy_change(row.either, "member_") for row in rows},
    "test": {row.variant: records_lib.accuracy_change(row.either) for row in rows},
  }
  return {claim: records_lib.surely(found) for claim, found in changes.items()}


def summarize(studies: Studies) -> findings.Findings:
  """Where the studies differ and what they have in common."""
  fpr = headline_fpr(studies)
  judged = {name: verdicts(records, fpr) for name, records in studies.items()}
  points = [*_settings_points(studies), *_rate_points(studies, fpr), *_fit_points(studies, fpr)]
  points += [_undone(name, records, judged[name]["leakage"], fpr) for name, records in (
    studies.items()) if judged[name]["leakage"]]  # fmt: skip
  for claim, words in CLAIMS.items():
    points += _claim_points({name: found[claim] for name, found in judged.items()}, words)
  audited = [f"{name}: {findings.audited(records)}" for name, records in studies.items()]
  attacks = {
    name: records_lib.attack_name(records_lib.main_attack(records))
    for name, records in studies.items()
  }
  if len(set(attacks.values())) == 1:
    attacks = {"": min(attacks.values())}
  audited += [f"Attack{name and f' of {name}'}: {attack}." for name, attack in attacks.items()]
  found = {name: found["leakage"] for name, found in judged.items()}
  return findings.Findings(_headline(found), " ".join(audited), points)


def _headline(judged: Mapping[str, Mapping[Variant, Difference]]) -> str:
  shared = _shared(judged)
  if not shared:
    return f"{len(judged)} studies that share no quantized variant."
  falls = {v: {_falls(found[v]) for found in judged.values() if v in found} for v in shared}
  differ = [v for v, seen in falls.items() if len(seen) > 1]
  less = [v for v, seen in falls.items() if seen == {True}]
  words = (
    f"{len(less)} of {len(shared)} shared variants {'leaks' if len(less) == 1 else 'leak'}"
    " measurably less than full precision in every study"
  )
  if not differ:
    return f"The studies agree: {words[0].lower()}{words[1:]}."
  named = f"; {records_lib.describe(differ[0])}" if len(differ) == 1 else f"; {len(differ)}"
  return f"{words}{named} in some only."


def _shared(judged: Mapping[str, Mapping[Variant, Difference]]) -> list[Variant]:
  """The variants of which at least two studies tell, in the order of tables."""
  every = [variant for found in judged.values() for variant in found]
  return sorted({v for v in every if every.count(v) > 1}, key=records_lib.order)


def _falls(change: Difference) -> bool:
  return bool(change.sure and change.value < 0)


def _claim_points(judged: Mapping[str, Mapping[Variant, Difference]], words: str) -> list[str]:
  """Of what a claim holds in every study and in none, and then each way in which studies differ."""
  every, none, differ = [], [], {}
  for variant in _shared(judged):
    told = [name for name, found in judged.items() if variant in found]
    falls = tuple(name for name in told if _falls(judged[name][variant]))
    others = tuple(name for name in told if name not in falls)
    if falls and others:
      differ.setdefault((falls, others), []).append(variant)
    else:
      (none if others else every).append(variant)
  points = [
    f"{words} is measurable in {which} study of {_named(variants)}."
    for which, variants in (("every", every), ("no", none))
    if variants
  ]
  for (falls, others), variants in differ.items():
    points.append(
      f"{words} is measurable in {_listed(falls)}, but not in {_listed(others, 'or')}, for"
      f" {_named(variants)} ({_widest(judged, variants, falls, others)})."
    )
  return points


def _named(variants: Iterable[Variant]) -> str:
  return _listed(map(records_lib.describe, variants), most=6)


def _widest(judged, variants: Sequence[Variant], falls, others) -> str:
  """Over which variant they differ most: where it falls most, and the least of the others."""
  ends = {}
  for variant in variants:
    values = {name: judged[name][variant].value for name in (*falls, *others)}
    ends[variant] = min(falls, key=values.get), max(others, key=values.get)
  gaps = {v: judged[most][v].value - judged[least][v].value for v, (most, least) in ends.items()}
  widest = min(gaps, key=gaps.get)
  numbers = "; ".join(f"{name} {_change(judged[name][widest])}" for name in ends[widest])
  return numbers if len(variants) == 1 else f"{records_lib.describe(widest)}: {numbers}"


def _change(change: Difference) -> str:
  value, low, high = (f"{100 * part:+z.1f}" for part in change[:3])
  return f"{value} points ({low} to {high})"


def _undone(name, records, judged: Mapping[Variant, Difference], fpr: float) -> str:
  """How many variants seem to leak less to the attacker who takes scores as they are."""
  rows = [r for r in records_lib.side_by_side(records) if r.variant in judged]
  naive = records_lib.surely(
    {row.variant: records_lib.change(row.full_precision, fpr) for row in rows}
  )
  counts = [sum(map(_falls, found.values())) for found in (naive, judged)]
  return (
    f"{name}: of {len(judged)} quantized variants {counts[0]} leak measurably less to an attacker"
    f" who takes scores as they are, {counts[1]} to the best attacker."
  )


def _fit_points(studies: Studies, fpr: float) -> list[str]:
  """Whether leakage follows the accuracy on members, over all variants of all studies."""
  telling = telling_studies(studies, fpr)
  found = {name: records_lib.fits(records, fpr) for name, records in telling.items()}
  lacking = [name for name, fits in found.items() if not fits]
  points = []
  if lacking:
    points.append(
      f"{_listed(lacking)} {'tells' if len(lacking) == 1 else 'tell'} nothing of the accuracy on"
      " members beside leakage (saved scores, or those of an earlier version), so the figure is"
      " without."
    )
  best = [fit for fits in found.values() for fit in fits.get("best", {}).values()]
  whose = f"variants of {_listed(name for name, fits in found.items() if fits)}" if best else ""
  for keeps, words in ((True, "less than 1 point"), (False, "1 point or more")):
    left = [fit.left["value"] for fit in best if (fit.lost.value < KEPT_FIT) == keeps]
    if left:
      low, high = (f"{100 * end:.0f}%" for end in (min(left), max(left)))
      points.append(
        f"Accuracy on members falls by {words} in {len(left)} of {len(best)} {whose}: the best"
        " attacker still finds"
        f" {low if low == high else f'{low} to {high}'} of what it finds in full precision."
      )
  correlation = _rank_correlation(
    [fit.lost.value for fit in best], [fit.left["value"] for fit in best]
  )
  if correlation is not None:
    points.append(
      "Lost accuracy on members and leakage left to the best attacker have rank correlation"
      f" {correlation:+.2f} over {len(best)} {whose} (those of one study share their networks, so"
      " this has no interval)."
    )
  return points


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
  """Spearman's, equal values of equal rank; None of fewer than four, or if one never varies."""
  import pandas

  ranks = pandas.DataFrame({"one": one, "other": other}).rank()
  if len(ranks) < 4 or (ranks.nunique() == 1).any():
    return None
  return float(ranks.corr().loc["one", "other"])


def _settings_points(studies: Studies) -> list[str]:
  """What makes numbers of two studies another measurement."""
  keys = [row[0].text for row in settings(studies).rows]
  attacks = [key for key in keys if key in ATTACK_SETTINGS]
  others = [key for key in keys if key not in attacks]
  points = []
  if attacks:
    points.append(
      f"The studies attack differently ({_listed(attacks, most=8)}): their rates are those of"
      " different attackers, and only changes within a study can be set side by side."
    )
  if others:
    points.append(f"The studies also differ in {_listed(others, most=8)}.")
  return points


def _rate_points(studies: Studies, fpr: float) -> list[str]:
  own = {tuple(records_lib.false_positive_rates(records)) for records in studies.values()}
  points = []
  if len(own) > 1:
    points.append(
      "The studies have TPRs at different false-positive rates; only those in common are compared:"
      f" {_rates(common_fprs(studies))}."
    )
  telling = telling_studies(studies, fpr)
  points += [
    f"{name} finds nothing measurable in full precision, so no fall can show there, and leakage is"
    " not set against accuracy on members."
    for name in studies
    if name not in telling
  ]
  weak = [
    name
    for name, records in studies.items()
    if any(
      records_lib.weakness(record, records_lib.tpr_at(record, fpr))
      for row in records_lib.side_by_side(records)
      for record in row.shown
    )
  ]
  if weak:
    points.append(
      f"At {percent_words(fpr)} FPR some rates of {_listed(weak)} rest on fewer than"
      f" {records_lib.FEW_FALSE_POSITIVES} false positives; read the intervals, not the digits."
    )
  return points


def _rates(fprs: Sequence[float]) -> str:
  return ", ".join(map(percent_words, fprs)) or "none"


def _listed(words: Iterable[str], last: str = "and", *, most: int = 99) -> str:
  """Words in a row, the rest counted."""
  words = list(words)
  if len(words) > most:
    words = [*words[: most - 1], f"{len(words) - most + 1} more"]
  return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


# ---- tables, page ----


def results(studies: Studies, *, narrow: bool = False) -> Table:
  """The same variants of all studies below each other, with paired changes from full precision.

  Args:
    studies: records by name.
    narrow: for a terminal: without AUC, and two attackers.
  """
  fpr = headline_fpr(studies)
  attackers = ("full_precision", "best") if narrow else tuple(records_lib.COMPARED)
  attackers = records_lib.counted_first(attackers)
  rows = {name: records_lib.side_by_side(records) for name, records in studies.items()}
  judged = {name: verdicts(records, fpr) for name, records in studies.items()}
  found = {
    (name, who): _attacker_cells(studies[name], who, fpr, narrow=narrow)
    for name in studies
    for who in (*attackers, "given")
  }
  shown = [who for who in (*attackers, "given") if any(found[name, who] for name in studies)]
  names = (f"TPR % at\n{percent_words(fpr)} FPR", "change", "AUC", "change")[: 2 if narrow else 4]
  columns = [*tables.variant_columns(), Column("study", words=True)]
  columns += [Column("test acc.\nchange"), Column("member acc.\nchange")]
  for who in shown:
    group = records_lib.COMPARED.get(who, records_lib.ATTACKERS[who])
    columns += [Column(name, group) for name in names]
  cells = []
  lines = [(row, name) for name in studies for row in rows[name]]
  for row, name in sorted(lines, key=lambda line: records_lib.order(line[0].variant)):
    line = [*tables.variant_cells(row.variant), tables.words_cell(name)]
    line += [tables.change_cell(judged[name][c].get(row.variant)) for c in ("test", "members")]
    for who in shown:
      same = who == "matched" and row.variant.method == "none"
      nothing = [Cell(tables.SAME if same else tables.MISSING)] * len(names)
      line += found[name, who].get(row.variant, nothing)
    cells.append(line)
  notes = [
    "Changes: percentage points (AUC: hundredths) less the same model in full precision, paired"
    f" over examples and targets. {tables.OVERLAP} may be 0, by Holm's method at 5% over the"
    " variants of a study.",
    *tables.mark_notes(cells),
  ]
  return Table("The studies side by side", columns, cells, notes)


def _attacker_cells(
  records: Sequence[Record], who: str, fpr: float, *, narrow: bool
) -> dict[Variant, list[Cell]]:
  """By variant what an attacker finds, and its changes as Holm's method has them."""
  attack = records_lib.main_attack(records)
  leakage = records_lib.select(records, "leakage", attack=attack, attacker=who)
  found = {records_lib.variant(record): record for record in leakage}
  parts = [
    (lambda record: tables.rate_cell(record, fpr), lambda record: records_lib.change(record, fpr)),
    (tables.auc_cell, records_lib.auc_change),
  ]
  cells: dict[Variant, list[Cell]] = {variant: [] for variant in found}
  for cell, change in parts[: 1 if narrow else 2]:
    changes = records_lib.surely({v: change(record) for v, record in found.items()})
    for variant, record in found.items():
      cells[variant] += [cell(record), tables.change_cell(changes.get(variant), fpr)]
  return cells


def settings(studies: Studies) -> Table:
  """The settings that differ, those of the attack first."""
  flat = {}
  for name, records in studies.items():
    run = records_lib.select(records, "run")[0]
    flat[name] = {"attack": records_lib.main_attack(records), **page.dotted(run)}
  keys = list(dict.fromkeys(key for values in flat.values() for key in values))
  differ = [
    key
    for key in keys
    if not any(key == name or key.startswith(f"{name}.") for name in IGNORED)
    and len({repr(values.get(key)) for values in flat.values()}) > 1
  ]
  differ.sort(key=lambda key: key not in ATTACK_SETTINGS)
  columns = [Column("setting", words=True), *(Column(name, words=True) for name in studies)]
  rows = [
    [
      tables.words_cell(key),
      *(
        tables.words_cell(tables.MISSING if values.get(key) is None else values[key])
        for values in flat.values()
      ),
    ]
    for key in differ
  ]
  return Table("Settings that differ", columns, rows, ["Those of the attack come first."])


def draw(studies: Studies) -> dict:
  """The figures that these records allow, by name."""
  from ptq_jax.report import figures

  fpr = headline_fpr(studies)
  telling = telling_studies(studies, fpr)
  if not any(records_lib.fits(records, fpr) for records in telling.values()):
    return {}
  return {"member_fit": figures.member_fit(telling, fpr=fpr)}


def render(studies: Studies, drawn: Mapping) -> str:
  """One self-contained page; `drawn` are its figures by name."""
  return page.document(
    title="Privacy audits side by side",
    about=f"{len(studies)} privacy audits side by side",
    found=summarize(studies),
    results=results(studies),
    csv=tables.to_csv(studies),
    figures=drawn,
    differing=settings(studies),
  )
