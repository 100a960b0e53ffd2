"""Attacks on every variant of every target, and what they found.

Reads the scores of an audit, writes results.jsonl. Every quantized target meets several attackers
(`records.ATTACKERS`) with several attacks; verdicts count with the pair that did best among models
whose membership the attacker knows.
"""

import collections
import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ptq_jax import settings, storage
from ptq_jax.attack import confidence, exposure, guards, privacy, protocol, releases, rmia
from ptq_jax.audit import training
from ptq_jax.audit.layout import FULL_PRECISION, Audit, variant_name
from ptq_jax.audit.preflight import MODELS_LEAVE_ONE_OUT
from ptq_jax.metrics import intervals, leakage, roc
from ptq_jax.models import call
from ptq_jax.report import records
from ptq_jax.report.records import Variant

NUM_EXAMPLES = 24
"""So many of the most exposed examples are named in the records."""

PARTS = ("attack", "metrics", "report/records", "audit/attacking", "audit/training")
"""Of the package, on whose code results depend."""


def attack(audit: Audit, *, command: str = "") -> None:
  """Attacks, unless the results of exactly these scores, settings and code are there already.

  Args:
    audit: all of whose scores are there.
    command: how this was called, for the record.
  Raises:
    FileNotFoundError: if scores are missing, with the stage that makes them.
  """
  variants = [FULL_PRECISION, *audit.variants()]
  for variant in variants:
    for group in audit.members:
      audit.load_scores(variant, group)  # says what is missing
  inputs = fingerprint_of_inputs(audit, variants)
  problem = audit.manifest.problem("attack", inputs)
  if problem is None:
    return
  if problem:
    audit.say(f"{problem.rstrip('.')}; attacking anew.")
  with audit.timed("attack"), audit.stage("attack", len(variants)) as stage:
    found, evidence = [], {}
    full, base, omitted = scores_of(audit, FULL_PRECISION), None, []
    for variant in variants:
      attacked = attack_variant(audit, variant, full, base)
      base = base or attacked
      found += attacked.records
      evidence[variant] = attacked.scores, attacked.kept
      omitted += [attacked.left_out] if attacked.left_out else []
      stage.advance(1, variant_name(variant))
    found += exposures(audit, evidence)
  try:
    found.append(records.make("training", **training.curves(audit)))
  except ValueError as error:
    audit.say(str(error))
  path, cautions = audit.root / "results.jsonl", warnings(audit, found, omitted)
  storage.write_records(path, [run_record(audit, inputs, command), *found, *cautions])
  storage.save_arrays(audit.root / "membership.npz", **audit.members)
  names = ("results.jsonl", "exposure.csv", "membership.npz")
  audit.manifest.record("attack", inputs, [audit.root / name for name in names])


IN_FULL_PRECISION = {
  "rescaled": "rescaled",
  "matched_rescaled": "rescaled",
  "combined": "rescaled",
  "best": "best",
}
"""Who does to full precision what an attacker does to a quantized model; else "full_precision"."""


class Attacked(NamedTuple):
  """What attacking one variant gave."""

  records: list[dict]
  scores: np.ndarray  # [T, E], of the main attack by the attacker with most knowledge
  kept: np.ndarray  # bool, which of the sound targets are in it
  samples: dict  # leakage.Sample by (attacker, attack, group)
  left_out: str | None  # a sentence


class Scores(NamedTuple):
  """One attacker's scores on every target, and on models whose membership it knows."""

  targets: np.ndarray  # [T, E]
  known: np.ndarray | None  # [M, E], the shadows attacked by each other; None: the other targets


def attack_variant(audit: Audit, variant: Variant, full: dict, base: Attacked | None) -> Attacked:
  """Leakage of one variant to every attacker, what happened to its units, who is exposed.

  Args:
    audit: whose scores these are.
    variant: which one.
    full: `scores_of` full precision.
    base: what attacking full precision gave; None: this is it.
  """
  options, main = audit.config.attack, audit.config.attack.attacks[0]
  own = full if base is None else scores_of(audit, variant)
  kept = {group: finite(own[f"{group}_scores"]) for group in ("shadow", "target")}
  if "targets" not in audit.members:
    kept["shadow"] = kept["target"]
  own, plain = keep(own, kept), keep(full, kept)
  shadow_members = audit.sound_members["shadows"][kept["shadow"]]
  members = target_members(audit)[kept["target"]]
  if min(len(members), len(shadow_members)) == 0:
    raise ValueError(
      f"{variant_name(variant)}: no model has finite scores; quantize it again with other options."
    )
  found = every_attack(audit, plain, own, shadow_members, is_full=base is None)
  common = variant._asdict() | accuracy_fields(audit, own, members, plain if base else None)
  common["scores"] = {
    "targets": leakage.score_moments(own["target_scores"], members),
    "full_precision_shadows": leakage.score_moments(plain["shadow_scores"], shadow_members),
  }
  if base is not None and "targets" in audit.members:  # else they are the targets
    common["scores"]["matched_shadows"] = leakage.score_moments(
      own["shadow_scores"], shadow_members
    )
  candidates = {
    (who, name): rows
    for who, attacks in found.items()
    for name, rows in attacks.items()
    if who != "releases"
  }
  chosen = best_attacker(candidates, members, shadow_members, options.fprs)
  found["best"] = {main: best_of(candidates, chosen)}
  leaks, samples = [], {}
  for attacker, attacks in found.items():
    for name, rows in attacks.items():
      number = list(options.attacks).index(name)
      key = jax.random.fold_in(audit.key("bootstrap"), number)  # the same for all variants
      every = name == main and attacker in records.COMPARED
      groups = audited_groups(members, own, every=every)
      for group, examples in groups.items():
        samples[attacker, name, group] = sample(options, key, rows.targets, examples)
      for group, examples in groups.items():
        sampled = samples[attacker, name, group]
        known = rows.known if group == "all" else None
        summary = summarise(
          options,
          key,
          rows.targets,
          examples.members,
          audited=examples.audited,
          shadows=None if known is None else leakage.Pool(known, shadow_members),
          sampled=sampled,
        )
        summary |= comparisons(samples, base, attacker, name, group, kept["target"], options)
        if group == "calibration members" and "other members" in groups:
          others = samples[attacker, name, "other members"]
          summary["minus_other_members"] = leakage.compare(
            sampled, others, confidence=options.confidence
          )
        if group == "all" and name == main:
          summary["epsilon"] = bound_on_epsilon(options, rows.targets, examples.members)
        if attacker == "best":
          summary["chosen"] = served(chosen)
        if attacker == "best" and name == main and group == "all":
          summary["classes"] = per_class(audit, rows.targets, members)
        about = {"attacker": attacker, "attack": name, "members": group}
        leaks.append(records.make("leakage", **about, **common, **summary))
  leaks += [] if base is None else unit_records(audit, variant)
  knows_most = found.get("matched", found["full_precision"])
  sentence = None if all(rows.all() for rows in kept.values()) else left_out_of(variant, kept)
  return Attacked(leaks, knows_most[main].targets, kept["target"], samples, sentence)


def every_attack(audit: Audit, plain: dict, own: dict, members, *, is_full: bool) -> dict:
  """Every attacker's `Scores` by attack; the configured ones, and the main one for the further.

  In full precision those who quantize their shadows are those who do not.

  Args:
    audit: whose config and labels these are.
    plain: scores in full precision.
    own: scores in the variant, of the same models.
    members: bool[M, E], of the shadows.
    is_full: whether the variant is full precision.
  """
  attacks, main = tuple(audit.config.attack.attacks), audit.config.attack.attacks[0]
  shadows = {"full_precision": plain["shadow_scores"]}
  targets = {"full_precision": own["target_scores"]}
  pseudo = {"full_precision": own["shadow_scores"]}
  kinds = {"rescaled": plain}
  if not is_full:
    shadows["matched"] = own["shadow_scores"]
    targets["matched"], pseudo["matched"] = own["target_scores"], own["shadow_scores"]
    kinds["matched_rescaled"] = own
  for name, like in kinds.items():
    for parts, scores in ((shadows, like["shadow_scores"]), (targets, own["target_scores"]),
                          (pseudo, own["shadow_scores"])):  # fmt: skip
      parts[name] = confidence.rescale(scores, like["shadow_scores"])
  found = {
    who: attack_scores(
      audit,
      shadows[who],
      members,
      targets[who],
      pseudo[who],
      attacks if who in ("full_precision", "matched") else (main,),
    )
    for who in shadows
  }
  if is_full or not main.startswith("lira"):
    return found
  pair = [found[who][main] for who in ("rescaled", "matched_rescaled")]
  known = None if pair[0].known is None else sum(rows.known for rows in pair) / 2
  found["combined"] = {main: Scores(sum(rows.targets for rows in pair) / 2, known)}
  if main.startswith("lira_online"):
    both = [np.stack([part[f"{group}_scores"] for part in (plain, own)])
            for group in ("shadow", "target")]  # fmt: skip
    out = None if "targets" in audit.members else protocol.left_out_shadows(members)
    rows = releases.attack(both[0], members, both[1], left_out=out)
    found["releases"] = {main: Scores(rows, None)}
  return found


def best_attacker(
  candidates: Mapping[tuple[str, str], Scores], members, shadow_members, fprs
) -> list[tuple[str, str]]:
  """Which attacker and attack to count with, for each target, without its membership.

  The pair with the largest TPR among models whose membership the attacker knows: the shadows where
  these were attacked by each other, else the other targets, less the one on the complementary half,
  whose membership tells the target's. TPR is read at the lowest rate at which every model may have
  ten false positives. Where nothing is known, the first that quantizes its shadows, or the first.
  """
  others = min((~members).sum(axis=1))
  fpr = min((f for f in fprs if f * others >= 10), default=max(fprs))
  pairs = list(candidates)
  if candidates[pairs[0]].known is not None:
    models, used = shadow_members, np.ones((len(members), len(shadow_members)), bool)
    rows = [found.known for found in candidates.values()]
  else:
    models, rows = members, [found.targets for found in candidates.values()]
    inside = members.astype(np.float32)
    alike = inside @ inside.T + (1 - inside) @ (1 - inside).T  # examples on the same side
    used = (alike > 0) & ~np.eye(len(members), dtype=bool)
  if not used.any(axis=1).all():
    return [next((pair for pair in pairs if pair[0] == "matched"), pairs[0])] * len(members)
  rates = np.array(
    [
      [roc.tpr_at_fpr(scores, inside, fpr=fpr) for scores, inside in zip(each, models, strict=True)]
      for each in rows
    ]
  )  # [pairs, models]
  return [pairs[i] for i in (rates @ used.T / used.sum(axis=1)).argmax(axis=0)]


def best_of(candidates: Mapping[tuple[str, str], Scores], chosen: Sequence) -> Scores:
  """The scores of the one that was chosen for each target."""
  rows = np.stack([candidates[pair].targets[t] for t, pair in enumerate(chosen)])
  return Scores(rows, candidates[chosen[0]].known)


def served(chosen: Sequence[tuple[str, str]]) -> list[dict]:
  """How many targets each attacker and attack was chosen for, most first."""
  counts = collections.Counter(chosen).most_common()
  return [{"attacker": who, "attack": name, "targets": n} for (who, name), n in counts]


def comparisons(samples, base, attacker, name, group, kept, options) -> dict:
  """Paired differences: to full precision, and to the attacker with full-precision shadows.

  In full precision the attacker counts who does the same there: who rescales, who chooses, or
  neither.
  """
  fields, level = {}, options.confidence
  own = samples[attacker, name, group]
  same = (IN_FULL_PRECISION.get(attacker, "full_precision"), name, group)
  if base is not None and same in base.samples:
    before = base.samples[same].of_targets(kept[base.kept])
    fields["minus_full_precision"] = leakage.compare(own, before, confidence=level)
  plain = samples.get(("full_precision", name, group))
  if attacker != "full_precision" and base is not None and plain is not None:
    fields["minus_full_precision_shadows"] = leakage.compare(own, plain, confidence=level)
  return fields


def accuracy_fields(audit: Audit, own: dict, members: np.ndarray, plain: dict | None) -> dict:
  """Size of a variant, and its accuracy on test images and on the targets' own members.

  With `plain` also the paired changes from full precision. Accuracy on members is left out where
  an earlier version, which did not count it, made the scores.
  """
  level = audit.config.attack.confidence
  fields = {"bits_per_weight": own["bits_per_weight"].mean(), "size_kb": own["size_kb"].mean()}
  counts = {
    "accuracy": len(audit.dataset.test_labels),
    "member_accuracy": int(members.sum(axis=1).min()),
  }
  for name, size in counts.items():
    options = {"num_examples": size, "confidence": level}
    accuracy, before = own[f"target_{name}"], plain and plain[f"target_{name}"]
    if accuracy is not None:
      field = "test_accuracy" if name == "accuracy" else name
      fields[field] = intervals.of_accuracy(accuracy, **options)._asdict()
    if accuracy is not None and before is not None:
      change = intervals.of_accuracy_difference(accuracy, before, **options)
      fields[f"{name}_minus_full_precision"] = change and change._asdict()
  return fields


def bound_on_epsilon(options, scores, members) -> dict:
  """What the scores refute; `options` as in `summarise`."""
  given = {"delta": options.delta, "confidence": options.confidence}
  return privacy.lower_bound(scores, members, **given)._asdict()


def per_class(audit: Audit, scores: np.ndarray, members: np.ndarray) -> list[dict]:
  """AUC within the classes that leak most, means over the targets that can tell.

  The most of many noisy numbers is too high: read it as where to look.
  """
  labels, level = audit.dataset.train_labels, audit.config.attack.confidence
  found = []
  for label in np.unique(labels):
    here = labels == label
    areas = [
      roc.auc(row[here], inside[here])
      for row, inside in zip(scores, members, strict=True)
      if inside[here].any() and not inside[here].all()
    ]
    if areas:
      auc = intervals.over_targets(np.array(areas), confidence=level)._asdict()
      name = str(audit.dataset.class_names[label])
      found.append({"class": name, "num_examples": int(here.sum()), "auc": auc})
  found.sort(key=lambda entry: -entry["auc"]["value"])
  return found[: audit.config.attack.worst_classes]


def finite(scores: np.ndarray) -> np.ndarray:
  """bool, which models have only finite scores."""
  return np.isfinite(scores).all(axis=(1, 2))


def keep(scores: dict, kept: dict) -> dict:
  """`scores_of` some models."""
  groups = {"shadow": ("shadow_",), "target": ("target_", "bits_", "size_", "calibration")}
  found = dict(scores)
  for group, starts in groups.items():
    for name, rows in scores.items():
      if name.startswith(starts) and rows is not None and not kept[group].all():
        found[name] = rows[kept[group]]
  return found


def left_out_of(variant: Variant, kept: dict) -> str:
  """Which models are not in a variant."""
  groups = {group: np.flatnonzero(~rows) for group, rows in kept.items() if not rows.all()}
  if len(groups) == 2 and np.array_equal(*groups.values()):
    groups = {"model": groups["target"]}
  named = "; ".join(f"{group} {', '.join(map(str, rows))}" for group, rows in groups.items())
  return (
    f"{records.describe(variant)} is without {named} (of those attacked, counted from 0): "
    "quantized, its scores are not finite."
  )


def sample(options, key, scores, examples: leakage.Audit) -> leakage.Sample:
  """What the intervals of one attack rest on; `options` as in `summarise`."""
  return leakage.sample(
    key,
    scores,
    examples.members,
    fprs=tuple(options.fprs),
    audited=examples.audited,
    num_resamples=options.resamples,
  )


def summarise(options, key, scores, members, **more) -> dict:
  """Metrics of one attack with intervals; `options` is the attack section of a config."""
  return leakage.summarise(
    key,
    scores,
    members,
    fprs=tuple(options.fprs),
    num_resamples=options.resamples,
    confidence=options.confidence,
    **more,
  )


def target_members(audit: Audit) -> np.ndarray:
  """bool[T, E], who the targets trained on."""
  return audit.sound_members.get("targets", audit.sound_members["shadows"])


def audited_groups(members: np.ndarray, own: dict, *, every: bool) -> dict[str, leakage.Audit]:
  """All examples, and with `every` also those apart that calibrated the quantizer."""
  groups = {"all": leakage.Audit(members, np.ones_like(members))}
  if every and own["calibration"] is not None:
    calibrated = np.zeros_like(members)
    np.put_along_axis(calibrated, own["calibration"], True, axis=1)
    groups |= leakage.calibration_audits(members, calibrated)
  return groups


def exposures(audit: Audit, evidence: dict) -> list[dict]:
  """Writes who is exposed in each variant, and tells how that differs from full precision.

  WORKDIR/exposure.csv ranks the pool by exposure at full precision; the record of full precision
  names the first. No image is written.

  Args:
    audit: whose pool this is.
    evidence: by variant the scores [T, E] of the targets that are in it, and which these are.
  """
  members, data = target_members(audit), audit.dataset
  per_variant = {
    variant: exposure.per_example(scores, members[kept])
    for variant, (scores, kept) in evidence.items()
  }
  ranking = exposure.ranking(per_variant[FULL_PRECISION])
  columns = {"example": ranking, "source_example": data.train_ids[ranking]}
  columns["label"] = [data.class_names[label] for label in data.train_labels[ranking]]
  for variant, found in per_variant.items():
    columns[f"{variant_name(variant)}_when_member"] = found.when_member[ranking]
    columns[f"{variant_name(variant)}_when_non_member"] = found.when_non_member[ranking]
  storage.write_csv(audit.root / "exposure.csv", columns)
  gap = per_variant[FULL_PRECISION].gap
  named = [
    {
      "example": int(i),
      "source_example": int(data.train_ids[i]),
      "label": str(data.class_names[data.train_labels[i]]),
      "exposure": float(gap[i]),
    }
    for i in ranking[np.isfinite(gap[ranking])][:NUM_EXAMPLES]
  ]
  top = max(1, round(len(ranking) * audit.config.attack.exposed_share))
  reference, known = evidence[FULL_PRECISION]
  return [
    records.make(
      "exposure",
      attacker="matched",
      **variant._asdict(),
      **({"examples": named} if variant == FULL_PRECISION else {}),
      **exposure.compare(
        audit.key("bootstrap"), scores, reference[kept[known]], members[kept], top=top
      ),
    )
    for variant, (scores, kept) in evidence.items()
  ]


def attack_scores(audit: Audit, shadows, members, targets, pseudo, attacks) -> dict[str, Scores]:
  """Attacks on every target, and where targets are apart on the shadows by each other, too.

  Args:
    audit: whose protocol and labels these are.
    shadows: [M, E, V], the shadows' scores as the attacker has them.
    members: bool[M, E].
    targets: [T, E, V].
    pseudo: [M, E, V], the shadows' scores in the role of targets.
    attacks: names.
  """
  options = {"attacks": attacks, "labels": audit.dataset.train_labels}
  if any(name.startswith("rmia_offline") for name in attacks) and len(members) >= (
    MODELS_LEAVE_ONE_OUT
  ):
    out = protocol.left_out_shadows(members)
    options["offline_a"] = rmia.tune_offline_a(shadows, members, left_out=out)
  if "targets" not in audit.members:
    found = protocol.leave_one_out(shadows, members, audited_scores=targets, **options)
    return {name: Scores(rows, None) for name, rows in found.items()}
  found = protocol.dedicated_targets(shadows, members, targets, **options)
  if len(members) < MODELS_LEAVE_ONE_OUT:
    return {name: Scores(rows, None) for name, rows in found.items()}
  known = protocol.leave_one_out(shadows, members, audited_scores=pseudo, **options)
  return {name: Scores(rows, known[name]) for name, rows in found.items()}


def scores_of(audit: Audit, variant: Variant) -> dict[str, np.ndarray]:
  """Scores in one variant of the models as shadows [M, E, V] and as targets [T, E, V].

  Raises:
    ValueError: if there are not as many as the config says.
  """
  shadows = audit.load_scores(variant, "shadows")
  guards.check_shadow_count(len(shadows["scores"]), expected=int(audit.sound["shadows"].sum()))
  targets = audit.load_scores(variant, "targets") if "targets" in audit.members else shadows
  return {
    "shadow_scores": shadows["scores"],
    "target_scores": targets["scores"],
    "shadow_accuracy": shadows["accuracy"],
    "target_accuracy": targets["accuracy"],
    "target_member_accuracy": targets.get("member_accuracy"),
    "bits_per_weight": targets["bits_per_weight"],
    "size_kb": targets["size_kb"],
    "calibration": targets.get("calibration"),
  }


def unit_records(audit: Audit, variant: Variant) -> list[dict]:
  """What quantizing did to each unit, as means over all models."""
  parts = [storage.load_arrays(audit.scores_path(variant, chunk)) for chunk in audit.work.chunks]
  arrays = {
    name: np.concatenate([part[f"unit_{name}"] for part in parts], axis=1)
    for name in ("error_before", "error_after", "steps", "seconds")
  }
  return [
    records.make(
      "unit",
      **variant._asdict(),
      unit=str(name),
      error_nearest=float(arrays["error_before"][i].mean()),
      error_after=float(arrays["error_after"][i].mean()),
      steps=float(arrays["steps"][i].mean()),
      seconds=float(arrays["seconds"][i].sum()),
    )
    for i, name in enumerate(parts[0]["unit_names"])
  ]


def warnings(audit: Audit, found: list[dict], omitted: list[str]) -> list[dict]:
  """What a reader must know before trusting the numbers; `omitted` says what is left out where."""
  sentences = {
    group: left_out(np.flatnonzero(~sound), group)
    for group, sound in audit.sound.items()
    if not sound.all()
  }
  full = scores_of(audit, FULL_PRECISION)
  mismatch = guards.accuracy_mismatch(full["shadow_accuracy"], full["target_accuracy"])
  sentences["accuracy"] = mismatch
  sentences["model"] = " ".join(audit.notes_on_model)
  sentences |= useless(audit.dataset.test_labels, records.select(found, "leakage"))
  sentences["leakage"] = nothing_found(found)
  sentences["evaluation mode"] = behind_training(found, audit.config)
  sentences |= {f"models, {i + 1}": sentence for i, sentence in enumerate(omitted)}
  leaks = records.select(found, "leakage")
  sentences["member accuracy"] = uncounted(leaks)
  fewest = min(record["num_non_members"] for record in leaks)
  sentences["false-positive rates"] = guards.too_few_non_members(fewest, audit.config.attack.fprs)
  pool = len(audit.dataset.train_labels)
  sentences["copies"] = guards.copies(audit.copies.pool_pairs, pool, audit.config.attack.fprs)
  test_size = len(audit.dataset.test_labels)
  sentences["test split"] = guards.copies_in_test(audit.copies.cross_pairs, test_size)
  # In an embedding nearest rounding is best already: every row is read alone.
  tables = {layer.path for layer in audit.layers if layer.kind == "embed"}
  units = [record for record in records.select(found, "unit") if record["unit"] not in tables]
  for method in dict.fromkeys(record["method"] for record in units):
    rows = records.select(units, "unit", method=method)
    idle = [record for record in rows if record["error_after"] >= record["error_nearest"] > 0]
    if method != "nearest" and idle:
      names = ", ".join(f"{r['unit']} at {r['levels']} levels" for r in idle[:3])
      sentences[records.method_name(method)] = (
        f"{len(idle)} of {len(rows)} units are no better than rounded to the nearest level, for "
        f"example {names}; more or other calibration {records.EXAMPLES[audit.dataset.kind]} "
        "may help."
      )
  return [
    records.make("warning", about=about, message=message)
    for about, message in sentences.items()
    if message
  ]


def useless(labels, leaks: list[dict]) -> dict[str, str]:
  """Sentences about variants whose networks do hardly better than guessing, by what they are about.

  Args:
    labels: int[N], of the test examples.
    leaks: leakage records.
  """
  chance, accuracy = np.bincount(labels).max() / len(labels), {}
  for record in leaks:
    accuracy[records.variant(record)] = record["test_accuracy"]["value"]
  low = {
    which: value
    for which, value in accuracy.items()
    if guards.learned_nothing(value, chance=chance, num_examples=len(labels))
  }
  if FULL_PRECISION in low:
    return {
      "training": f"the networks reach {low[FULL_PRECISION]:.1%} test accuracy, and naming always "
      f"the most frequent class {chance:.1%}: they learned next to nothing, so little can leak; "
      "check the labels, train.epochs and train.learning_rate."
    }
  if not low:
    return {}
  names = ", ".join(f"{records.describe(which)} ({low[which]:.1%})" for which in list(low)[:3])
  return {
    "quantizing": f"{len(low)} of {len(accuracy) - 1} quantized variants do hardly better than "
    f"naming always the most frequent class ({chance:.1%}), for example {names}: that these leak "
    "little is no protection one can use."
  }


def uncounted(leaks: list[dict]) -> str | None:
  """A sentence if the accuracy on members is not known of some variants."""
  variants = list(dict.fromkeys(map(records.variant, leaks)))
  lacking = {records.variant(record) for record in leaks if "member_accuracy" not in record}
  if not lacking:
    return None
  return (
    f"accuracy on members is not known of {len(lacking)} of {len(variants)} variants, whose scores "
    "an earlier version made; delete their folders in scores/ to have them computed anew."
  )


WORSE_IN_EVALUATION = 0.02
"""By so much the accuracy on members lies below that in training before it is told."""


def behind_training(found: list[dict], config) -> str | None:
  """A sentence if full precision classifies its members worse than it did in its last epoch.

  Only where members are asked about as they were seen in training; its mean over an epoch, by
  networks that still learn, with dropout, would rather be too low.
  """
  curves = records.select(found, "training")
  leaks = [r for r in records.select(found, "leakage") if records.variant(r) == FULL_PRECISION]
  if set(config.queries.augmentation) - set(config.train.augmentation) or not (curves and leaks):
    return None
  seen = (leaks[0].get("member_accuracy") or {}).get("value")
  trained = curves[0]["accuracy"][-1]
  if None in (seen, trained) or trained - seen < WORSE_IN_EVALUATION:
    return None
  return (
    f"in training the networks classify {trained:.1%} of their members, in evaluation mode "
    f"{seen:.1%}, so full precision is not at its best; often running statistics of batch "
    "normalisation lag behind, which more epochs or a smaller momentum mend. OBC estimates those "
    "anew, so it may be more accurate than full precision and leak more."
  )


def nothing_found(found: list[dict]) -> str | None:
  """A sentence if the main attack finds nothing where it should find most: at full precision."""
  leaks = records.select(found, "leakage")
  leaks = [r for r in leaks if r["method"] == "none" or r["attacker"] == "given"]
  if not leaks:
    return None
  auc, rates = leaks[0]["auc"], [rate for rate in leaks[0]["tpr"] if rate["low"] is not None]
  if auc["low"] is None or auc["low"] > 0.5 or any(r["low"] > r["chance"] for r in rates):
    return None
  return (
    f"the attack finds nothing measurable in {records.describe(records.variant(leaks[0]))} (AUC "
    f"{auc['value']:.3f}, {auc['low']:.3f} to {auc['high']:.3f}), so no change by quantizing can "
    "show; more shadows make it stronger, more epochs or a smaller pool give it more to find."
  )


def left_out(models, group: str) -> str:
  """Why some models are not in the audit."""
  numbers = ", ".join(map(str, models[:10])) + (", ..." if len(models) > 10 else "")
  return (
    f"{group} {numbers} are left out: their training, or that of the model on the complementary "
    "half, ended in numbers that are not finite; a smaller train.learning_rate may help."
  )


def run_record(audit: Audit, inputs: str, command: str) -> dict:
  """What ran, where, with what."""
  data, config = audit.dataset, audit.config
  init = functools.partial(call.init, audit.model)
  parameters = jax.eval_shape(init, jax.random.key(0), data.fed(1))["params"]
  targets = config.train.targets
  return records.run(
    name=config.name,
    config=settings.of_results(config),
    command=command,
    date=today(),
    seconds=audit.seconds(),
    data={
      "name": data.name,
      "pool_size": len(data.train_labels),
      "members_share": float(audit.sound_members["shadows"].mean()),
      "test_size": len(data.test_labels),
      "num_classes": data.num_classes,
      "inputs": data.kind,
      "image_shape": data.image_shape,
      "notes": data.notes,
      "duplicates": audit.copies._asdict(),
      "fingerprint": data.fingerprint,
    },
    model={
      "name": config.model.name,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
    },
    models=config.train.models,
    targets=targets or config.train.models,
    protocol="dedicated targets" if targets else "leave-one-out",
    inputs=inputs,
  )


def fingerprint_of_inputs(audit: Audit, variants: list[Variant]) -> str:
  """Changes with the attack's settings, with every score, and with the code that attacks."""
  paths = [audit.scores_path(v, chunk) for v in variants for chunk in audit.work.chunks]
  scores = [[path.name, path.parent.name, storage.digest(path)] for path in paths]
  options = {key: settings.plain(audit.config)[key] for key in ("name", "seed", "attack")}
  return settings.fingerprint([options, audit.work.stamp, scores, settings.code_version(*PARTS)])


def today() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
