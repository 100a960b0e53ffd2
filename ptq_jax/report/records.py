"""Result records: what a results file holds, one mapping per line, and how to choose among them.

Kinds: "run" (what ran, where, with what), "leakage" (one attack on one quantized variant), "unit"
(reconstruction error of one unit), "warning", "exposure" (who is exposed, against full precision).
A number with its interval is `{"value", "low", "high", "interval"}`; unknown parts are None.
`levels` None means full precision, for the weights and for the last layer.
"""

import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ptq_jax.metrics import intervals
from ptq_jax.metrics.leakage import FEW_FALSE_POSITIVES

Record = Mapping[str, Any]

ATTACKERS = {
  "full_precision": "full-precision shadows",
  "rescaled": "full-precision shadows, the target's scores rescaled to theirs",
  "matched": "matched shadows",
  "matched_rescaled": "matched shadows, all scores rescaled",
  "combined": "both kinds of shadows, rescaled",
  "best": "best attacker",
  "releases": "full precision and this version, both published",
  "given": "given shadows",
}
"""Who attacks. The best is one of those before it with one of the attacks, chosen by the attacker
for each target among models whose membership it knows; verdicts count with it."""

COUNTED = ("best", "matched", "full_precision", "given")
"""The first of these that there is, is the one that verdicts count with."""

COMPARED = {
  "full_precision": "scores as they are",
  "rescaled": "scores rescaled",
  "matched": "matched shadows",
  "best": "best attacker",
}
"""Attackers that comparisons show side by side, and who are asked about calibration members."""

SIDES = ("full_precision", "matched")
"""The two that differ only in whether the shadows are quantized like the target."""

METHODS = ("none", "nearest", "adaround", "brecq", "obc")
"""The order of methods in tables and figures; others follow by name. "none" is full precision."""

REQUIRED = {
  "run": ("name", "config", "versions", "device", "command", "date", "seconds", "data", "model",
          "models", "targets", "protocol"),
  "leakage": ("method", "levels", "last_layer_levels", "attacker", "attack", "bits_per_weight",
              "size_kb", "num_targets", "num_members", "num_non_members", "test_accuracy", "auc",
              "balanced_accuracy", "tpr"),
  "unit": ("method", "levels", "last_layer_levels", "unit", "error_nearest", "error_after"),
  "warning": ("about", "message"),
  "exposure": ("method", "levels", "last_layer_levels", "jaccard"),
  "training": ("loss", "loss_low", "loss_high", "accuracy", "accuracy_low", "accuracy_high"),
}  # fmt: skip
"""Fields every record of a kind has. More fields are welcome and kept."""

_MAPPINGS = {"run": ("config", "versions", "seconds", "data", "model")}
_NUMBERS = {"leakage": ("test_accuracy", "auc", "balanced_accuracy"), "exposure": ("jaccard",)}
_OPTIONAL = {"leakage": ("member_accuracy",)}
_RATES = {"tpr": ("fpr",), "precision": ("prior", "fpr")}
_PACKAGES = ("ptq_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


class Variant(NamedTuple):
  """A way of storing the model: method, levels of the weights, levels of the last layer."""

  method: str
  levels: int | None
  last_layer_levels: int | None


class Row(NamedTuple):
  """One variant with its attackers side by side; an attacker without a record is None."""

  variant: Variant
  full_precision: Record | None = None
  matched: Record | None = None
  best: Record | None = None
  given: Record | None = None

  @property
  def shown(self) -> list[Record]:
    """The records there are."""
    return [record for record in self[1:] if record is not None]

  @property
  def either(self) -> Record:
    """The record that holds what does not depend on the attacker: accuracy, bits, size."""
    return next(iter(self.shown), {})

  @property
  def counted(self) -> Record:
    """The record that verdicts count with: the best attacker's, chosen without the membership.

    Without one, of the attacker who knows most; never of whoever happens to find most.
    """
    return next(filter(None, (getattr(self, who) for who in COUNTED)), {})


class Difference(NamedTuple):
  """A paired difference; `p` is that of no difference, None where no interval was recorded."""

  value: float
  low: float | None = None
  high: float | None = None
  p: float | None = None
  sure: bool | None = None  # not 0, at the confidence of its interval or after `surely`


# ---- making records ----


def number(value, low=None, high=None, *, interval: str | None = None) -> dict[str, Any]:
  """A number with its interval; what is missing or not finite becomes None.

  >>> number(0.5, 0.4, float("nan"))
  {'value': 0.5, 'low': 0.4, 'high': None, 'interval': None}
  """
  return {
    "value": _finite(value),
    "low": _finite(low),
    "high": _finite(high),
    "interval": interval,
  }


def make(kind: str, **fields) -> dict[str, Any]:
  """A checked record of plain Python values, ready for a JSON line; its key "kind" comes first.

  Arrays become lists, NumPy and JAX scalars become numbers, what is not finite becomes None.

  Args:
    kind: "run", "leakage", "unit", "warning", "exposure" or "training".
    **fields: the fields of the kind (`REQUIRED`) and any others.
  Raises:
    ValueError: if the kind is unknown or a field is missing or malformed.
  """
  record = {"kind": kind} | {name: plain(value) for name, value in fields.items()}
  validate(record)
  return record


def run(**fields) -> dict[str, Any]:
  """A "run" record; `versions` and `device` are those of this process unless given."""
  return make("run", **({"versions": versions(), "device": device()} | fields))


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that can change a result; absent ones left out."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def device() -> str:
  """What JAX computes on, in words: "1 x NVIDIA H200" or "CPU, 2 cores"."""
  devices = jax.devices()
  if devices[0].platform == "cpu":
    return f"CPU, {os.cpu_count()} cores"
  return f"{len(devices)} x {devices[0].device_kind}"


def plain(value: Any) -> Any:
  """The same value made of dicts, lists, strings, finite numbers, booleans and None.

  >>> plain({"a": np.float32(0.5), "b": (1, float("inf"))})
  {'a': 0.5, 'b': [1, None]}
  """
  if isinstance(value, Mapping):
    return {str(name): plain(item) for name, item in value.items()}
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return plain(np.asarray(value).tolist())
  if isinstance(value, list | tuple | set | frozenset):
    return [plain(item) for item in value]
  if isinstance(value, float):
    return _finite(value)
  if value is None or isinstance(value, bool | int | str):
    return value
  return str(value)


# ---- checking records ----


def validate(record: Record) -> None:
  """Checks one record.

  Raises:
    ValueError: names the kind, the field and what is wrong with it.
  """
  kind = record.get("kind")
  if kind not in REQUIRED:
    raise ValueError(f"a record has kind {kind!r}; known kinds are {', '.join(REQUIRED)}.")
  for name in REQUIRED[kind]:
    if name not in record:
      raise ValueError(f"a {kind} record has no {name!r}; it has {', '.join(record)}.")
  for name in _MAPPINGS.get(kind, ()):
    if not isinstance(record[name], Mapping):
      raise ValueError(f"{name!r} of a {kind} record is {record[name]!r}; it must be a mapping.")
  for name in (*_NUMBERS.get(kind, ()), *_OPTIONAL.get(kind, ())):
    if name in record:
      _validate_number(kind, name, record[name])
  for name, keys in _RATES.items():
    if kind == "leakage":
      _validate_rates(name, record.get(name, ()), keys)
  if "levels" in REQUIRED[kind]:
    _validate_variant(kind, record)
  if kind == "leakage":
    _validate_leakage(record)


def validate_all(records: Iterable[Record]) -> None:
  """Checks every record, and that no two leakage records are about the same thing.

  Raises:
    ValueError: names the record by its position, counted from 1 like the lines of a file.
  """
  seen: dict[tuple, int] = {}
  for line, record in enumerate(records, start=1):
    try:
      validate(record)
    except ValueError as error:
      raise ValueError(f"record {line}: {error}") from None
    if record["kind"] != "leakage":
      continue
    key = (variant(record), record["attacker"], record["attack"], _members(record))
    if key in seen:
      raise ValueError(
        f"records {seen[key]} and {line} are both about {describe(key[0])}, attack"
        f" {record['attack']!r}, attacker {record['attacker']!r}; keep one."
      )
    seen[key] = line


def _validate_number(kind: str, name: str, value: Any) -> None:
  if not isinstance(value, Mapping) or "value" not in value:
    raise ValueError(
      f"{name!r} of a {kind} record is {value!r}; it must be a mapping with 'value', 'low', 'high'."
    )
  for part in ("value", "low", "high"):
    item = value.get(part)
    if item is not None and (isinstance(item, bool) or not isinstance(item, int | float)):
      raise ValueError(f"{name!r} of a {kind} record has {part} {item!r}; it must be a number.")


def _validate_rates(name: str, rates: Any, keys: Sequence[str]) -> None:
  if isinstance(rates, Mapping | str) or not isinstance(rates, Sequence):
    raise ValueError(f"{name!r} of a leakage record is {rates!r}; it must be a list.")
  for rate in rates:
    _validate_number("leakage", name, rate)
    for key in keys:
      at = rate.get(key)
      if isinstance(at, bool) or not isinstance(at, int | float) or not 0 < at <= 1:
        raise ValueError(f"{name!r} of a leakage record has {key} {at!r}; it must be in (0, 1].")


def _validate_variant(kind: str, record: Record) -> None:
  for name in ("levels", "last_layer_levels"):
    levels = record[name]
    if levels is None:
      continue
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
      raise ValueError(
        f"{name!r} of a {kind} record is {levels!r}; it must be an integer of at least 2, or null"
        " for full precision."
      )


def _validate_leakage(record: Record) -> None:
  if record["attacker"] not in ATTACKERS:
    raise ValueError(
      f"a leakage record has attacker {record['attacker']!r}; use {' or '.join(ATTACKERS)}."
    )
  curve = record.get("curve")
  if curve is not None and len(curve["fpr"]) != len(curve["tpr"]):
    raise ValueError(
      f"the curve of a leakage record has {len(curve['fpr'])} fpr but {len(curve['tpr'])} tpr."
    )


# ---- choosing records ----


def select(records: Iterable[Record], kind: str, **equal) -> list[Record]:
  """The records of a kind whose fields equal the given values, in order.

  Leakage measured on part of the members ("members" other than "all") is left out unless asked
  for with `members=...`.
  """
  if kind == "leakage":
    equal = {"members": "all"} | equal
  return [
    record
    for record in records
    if record["kind"] == kind
    and all((_members(record) if k == "members" else record.get(k)) == v for k, v in equal.items())
  ]


def variant(record: Record) -> Variant:
  """What the record is about."""
  return Variant(record["method"], record["levels"], record["last_layer_levels"])


def variants(records: Iterable[Record]) -> list[Variant]:
  """Distinct variants of leakage records: full precision first, then by method, most bits first."""
  found = {variant(record) for record in records if record["kind"] == "leakage"}
  return sorted(found, key=order)


def order(which: Variant) -> tuple:
  """Sort key: full precision, then methods in the order of `METHODS`, most bits first."""
  known = METHODS.index(which.method) if which.method in METHODS else len(METHODS)
  return (known, which.method, -_width(which.levels), -_width(which.last_layer_levels))


def side_by_side(records: Sequence[Record], *, attack: str | None = None) -> list[Row]:
  """One row per variant with the leakage records of its two attackers; full precision on top.

  Args:
    records: any records.
    attack: which attack; default `main_attack(records)`.
  """
  attack = main_attack(records) if attack is None else attack
  leakage = select(records, "leakage", attack=attack)
  found = {(variant(record), record["attacker"]): record for record in leakage}
  return [
    Row(which, *(found.get((which, attacker)) for attacker in Row._fields[1:]))
    for which in variants(leakage)
  ]


def counted_first(attackers: Iterable[str]) -> list[str]:
  """The same, but first the one that verdicts count with, the others as they were.

  >>> counted_first(["full_precision", "matched", "best"])
  ['best', 'full_precision', 'matched']
  """
  attackers = list(attackers)
  first = next((who for who in COUNTED if who in attackers), None)
  return sorted(attackers, key=lambda who: who != first)


EXAMPLES = {"images": "images", "vectors": "vectors", "tokens": "token sequences"}
"""What the examples of a data set are in words, by its kind."""


def examples(records: Iterable[Record]) -> str:
  """What the examples of an audit are, in words; "examples" where the records do not say."""
  data = next((record["data"] for record in select(records, "run")), {})
  kind = data.get("inputs", "images" if "image_shape" in data else None)  # once there was no other
  return EXAMPLES.get(kind, "examples")


def main_attack(records: Iterable[Record]) -> str:
  """The attack that tables and figures show: the first one recorded."""
  return next((record["attack"] for record in select(records, "leakage")), "lira_online")


def main_rows(rows: Sequence[Row]) -> list[Row]:
  """One row per (method, levels): where the last layer was swept, its usual precision.

  Usual is 256 levels beside three-level weights, else the levels of the weights themselves (as
  in arXiv 2512.15335); if that was not measured, the finest last layer that was.
  """
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    groups.setdefault(row.variant[:2], []).append(row)
  chosen = []
  for (_, levels), group in groups.items():
    usual = 256 if levels == 3 else levels
    by_last = {row.variant.last_layer_levels: row for row in group}
    chosen.append(by_last.get(usual, group[0]))
  return chosen


def sweeps(rows: Sequence[Row]) -> dict[tuple[str, int | None], list[Row]]:
  """Rows by (method, levels) where several last-layer precisions were measured."""
  groups: dict[tuple[str, int | None], list[Row]] = {}
  for row in rows:
    groups.setdefault((row.variant.method, row.variant.levels), []).append(row)
  return {key: group for key, group in groups.items() if len(group) > 1}


def false_positive_rates(records: Iterable[Record]) -> list[float]:
  """The distinct FPR at which leakage records hold a TPR, largest first."""
  leakage = (record for record in records if record["kind"] == "leakage")
  found = {tpr["fpr"] for record in leakage for tpr in record["tpr"]}
  return sorted(found, reverse=True)


def tpr_at(record: Record | None, fpr: float, rule: str = "at_most") -> Record | None:
  """The record's TPR entry at an FPR: by the given rule, else by any; None if not measured."""
  entries = [t for t in (record or {}).get("tpr", ()) if math.isclose(t["fpr"], fpr)]
  by_rule = [entry for entry in entries if entry.get("rule", rule) == rule]
  return next(iter(by_rule or entries), None)


def solid_fpr(
  records: Sequence[Record], *, attack: str | None = None, among: Sequence[float] | None = None
) -> float | None:
  """The FPR that headlines and plots use: the smallest at which no TPR of the attack is weak.

  Args:
    records: any records.
    attack: which attack; default `main_attack(records)`.
    among: the FPRs to choose from; default all that were recorded.
  Returns:
    An FPR recorded in every leakage record of the attack, the largest of them if a TPR is weak
    (`weakness`) at each; None if there is no such FPR.
  """
  rows = side_by_side(records, attack=attack)
  shown = [record for row in rows for record in row.shown]
  rates = [
    fpr
    for fpr in (false_positive_rates(shown) if among is None else sorted(among, reverse=True))
    if shown and all(tpr_at(record, fpr) for record in shown)
  ]
  solid = [
    fpr for fpr in rates if not any(weakness(record, tpr_at(record, fpr)) for record in shown)
  ]
  return min(solid) if solid else max(rates, default=None)


def weakness(record: Record | None, tpr: Record | None) -> str | None:
  """Why a TPR should not be trusted alone: "non_members", "false_positives" or None.

  "non_members": a target has fewer non-members than 1/FPR, so one false positive is already too
  many. "false_positives": in some target the rate rests on fewer than
  `FEW_FALSE_POSITIVES` of them.
  """
  if record is None or tpr is None:
    return None
  non_members, count = record.get("num_non_members"), tpr.get("false_positives")
  if non_members is not None and non_members * tpr["fpr"] < 1 - 1e-9:
    return "non_members"
  if count is not None and count < FEW_FALSE_POSITIVES:
    return "false_positives"
  return None


def change(record: Record | None, fpr: float, rule: str = "at_most") -> Difference | None:
  """TPR at an FPR less that at full precision, paired; None if it was not recorded."""
  return _difference(tpr_at((record or {}).get("minus_full_precision"), fpr, rule))


def auc_change(record: Record | None) -> Difference | None:
  """AUC less that at full precision, paired; None if it was not recorded."""
  return _difference(((record or {}).get("minus_full_precision") or {}).get("auc"))


def accuracy_change(record: Record | None, whose: str = "") -> Difference | None:
  """Test accuracy less that at full precision, paired; None if it was not recorded.

  Args:
    record: of leakage.
    whose: "member_" for the accuracy on members.
  """
  return _difference((record or {}).get(f"{whose}accuracy_minus_full_precision"))


def calibration_gap(record: Record | None, fpr: float, rule: str = "at_most") -> Difference | None:
  """TPR at an FPR of the members that calibrated the quantizer less that of the others, paired."""
  return _difference(tpr_at((record or {}).get("minus_other_members"), fpr, rule))


class Fit(NamedTuple):
  """What a variant costs its members' fit and leaves of the leakage, against full precision."""

  lost: Difference  # fall of the accuracy on members, a fraction; below 0 is a gain
  left: Record  # number: its TPR divided by that of full precision, paired


def fits(
  records: Sequence[Record], fpr: float, *, attack: str | None = None, rule: str = "at_most"
) -> dict[str, dict[Variant, Fit]]:
  """By attacker, those of `COMPARED` but for matched shadows, and variant; if both are recorded."""
  attack = main_attack(records) if attack is None else attack
  found: dict[str, dict[Variant, Fit]] = {}
  for who in ("full_precision", "rescaled", "best"):
    for record in select(records, "leakage", attack=attack, attacker=who):
      change = accuracy_change(record, "member_")
      ratios = (record.get("minus_full_precision") or {}).get("tpr_ratio", ())
      left = tpr_at({"tpr": ratios}, fpr, rule)
      if change and left:
        low, high = (None if end is None else -end for end in (change.high, change.low))
        lost = change._replace(value=-change.value, low=low, high=high)
        found.setdefault(who, {})[variant(record)] = Fit(lost, left)
  return found


def underestimate(row: Row, fpr: float, rule: str = "at_most") -> Difference | None:
  """What an attacker misses who does not quantize its shadows: the TPR of the best attacker (or of
  matched shadows where none was chosen) less that of full-precision shadows, paired.
  """
  more = row.best or row.matched
  return _difference(tpr_at((more or {}).get("minus_full_precision_shadows"), fpr, rule))


def surely(changes: Mapping[Any, Difference | None]) -> dict[Any, Difference]:
  """Those that are known, `sure` as Holm's method has it for so many comparisons at 5 %."""
  known = {which: found for which, found in changes.items() if found and found.p is not None}
  sure = intervals.holm([found.p for found in known.values()])
  return {
    which: found._replace(sure=verdict)
    for (which, found), verdict in zip(known.items(), sure, strict=True)
  }


def _difference(number: Record | None) -> Difference | None:
  value, (low, high) = value_of(number), bounds_of(number)
  if value is None:
    return None
  sure = None if low is None or high is None else not low <= 0 <= high
  return Difference(value, low, high, _finite(number.get("p")), sure)


def value_of(number: Record | None) -> float | None:
  """The value of a number with interval; None if missing or not finite."""
  return None if number is None else _finite(number.get("value"))


def bounds_of(number: Record | None) -> tuple[float | None, float | None]:
  """The interval of a number; a bound that is missing or not finite is None."""
  number = number or {}
  return _finite(number.get("low")), _finite(number.get("high"))


# ---- words ----

_METHOD_NAMES = {
  "none": "full precision",
  "scores": "saved scores",
  "nearest": "Nearest",
  "adaround": "AdaRound",
  "brecq": "BRECQ",
  "obc": "OBC",
}
_ATTACK_WORDS = {"lira": "LiRA", "rmia": "RMIA"}


def bits(levels: int | None) -> str:
  """Bits of a grid as written: 3 levels are "1.58", None is "full".

  >>> [bits(levels) for levels in (3, 4, 5, 256, None)]
  ['1.58', '2', '2.32', '8', 'full']
  """
  if levels is None:
    return "full"
  width = math.log2(levels)
  return f"{width:.0f}" if width.is_integer() else f"{width:.2f}"


def method_name(method: str) -> str:
  """A method as written: "adaround" is "AdaRound"; unknown names stay as they are."""
  return _METHOD_NAMES.get(method, method)


def attack_name(attack: str) -> str:
  """An attack as written.

  >>> attack_name("lira_online"), attack_name("loss_threshold")
  ('LiRA online', 'loss threshold')
  """
  return " ".join(_ATTACK_WORDS.get(word, word) for word in attack.split("_"))


def attacks_of(record: Record) -> str:
  """The attack of a record of leakage; several, and for how many targets, if it was chosen."""
  counts = {}
  for entry in record.get("chosen", ()):
    name = attack_name(entry["attack"])
    counts[name] = counts.get(name, 0) + entry["targets"]
  if len(counts) > 1:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
  return next(iter(counts), attack_name(record["attack"]))


def describe(which: Variant) -> str:
  """A variant in words.

  >>> describe(Variant("adaround", 3, 256)), describe(Variant("none", None, None))
  ('AdaRound at 1.58 bit (last layer 8 bit)', 'full precision')
  """
  if which.method == "none" or (which.method == "scores" and which.levels is None):
    return method_name(which.method)
  words = f"{method_name(which.method)} at {_bit_words(which.levels)}"
  if which.last_layer_levels == which.levels:
    return words
  return f"{words} (last layer {_bit_words(which.last_layer_levels)})"


def _bit_words(levels: int | None) -> str:
  return "full precision" if levels is None else f"{bits(levels)} bit"


def _width(levels: int | None) -> float:
  return math.inf if levels is None else float(levels)


def _members(record: Record) -> str:
  return record.get("members", "all")


def _finite(value: Any) -> float | None:
  """A finite Python number, or None."""
  if value is None:
    return None
  value = float(value)
  return value if math.isfinite(value) else None
