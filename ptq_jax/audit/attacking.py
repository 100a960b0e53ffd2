"""Attacks on every variant of every target, and what they found.

Reads the scores of an audit, writes results.jsonl. Every quantized target meets two attackers: one
whose shadows stay in full precision, and one who quantized them like the target. `attack_files`
does the same with scores that any framework saved.
"""

import datetime
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from ptq_jax import settings, storage
from ptq_jax.attack import exposure, guards, protocol
from ptq_jax.audit.layout import FULL_PRECISION, Audit, Manifest, variant_name
from ptq_jax.audit.preflight import MODELS_LEAVE_ONE_OUT
from ptq_jax.data import duplicates
from ptq_jax.metrics import intervals, leakage
from ptq_jax.report import records
from ptq_jax.report.records import Variant

NUM_PICTURES = 24
"""So many of the most exposed examples are shown."""

PARTS = ("attack", "metrics", "report/records", "audit/attacking")
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
    full = scores_of(audit, FULL_PRECISION)
    for variant in variants:
      attacked = attack_variant(audit, variant, full)
      found += attacked.records
      evidence[variant] = attacked.scores
      stage.advance(1, variant_name(variant))
    found += exposures(audit, evidence)
  path = audit.root / "results.jsonl"
  storage.write_records(path, [run_record(audit, inputs, command), *found, *warnings(audit, found)])
  storage.save_arrays(audit.root / "membership.npz", **audit.members)
  names = ("results.jsonl", "exposure.csv", "exposed.npz", "membership.npz")
  audit.manifest.record("attack", inputs, [audit.root / name for name in names])


class Attacked(NamedTuple):
  """What attacking one variant gave."""

  records: list[dict]
  scores: np.ndarray  # [T, E], of the first attack by the attacker who knows most


def attack_variant(audit: Audit, variant: Variant, full: dict) -> Attacked:
  """Leakage of one variant to both attackers, what happened to its units, who is exposed."""
  is_full = variant == FULL_PRECISION
  own = full if is_full else scores_of(audit, variant)
  accuracy = intervals.over_targets(
    own["target_accuracy"], confidence=audit.config.attack.confidence
  )
  common = variant._asdict() | {
    "bits_per_weight": own["bits_per_weight"].mean(),
    "size_kb": own["size_kb"].mean(),
    "test_accuracy": accuracy._asdict(),
  }
  found, samples, main = [], {}, audit.config.attack.attacks[0]
  attackers = {"full_precision": full} if is_full else {"full_precision": full, "matched": own}
  for attacker, shadows in attackers.items():
    scores, pools = attack_scores(audit, shadows["shadow_scores"], own["target_scores"])
    for number, (name, rows) in enumerate(scores.items()):
      key = jax.random.fold_in(audit.key("bootstrap"), number)  # the same for all variants
      for group, examples in audited_groups(audit, own, every=name == main).items():
        about = {"attacker": attacker, "attack": name, "members": group}
        sampled = sample(audit.config.attack, key, rows, examples)
        summary = summarise(
          audit.config.attack,
          key,
          rows,
          examples.members,
          audited=examples.audited,
          shadows=pools.get(name) if group == "all" else None,
          sampled=sampled,
        )
        if attacker == "matched":
          summary["minus_full_precision_shadows"] = leakage.compare(
            key, sampled, samples[name, group], confidence=audit.config.attack.confidence
          )
        samples[name, group] = sampled
        found.append(records.make("leakage", **about, **common, **summary))
  found += [] if is_full else unit_records(audit, variant)
  return Attacked(found, scores[main])


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


def audited_groups(audit: Audit, own: dict, *, every: bool) -> dict[str, leakage.Audit]:
  """All examples, and with `every` also those apart that calibrated the quantizer."""
  members = target_members(audit)
  groups = {"all": leakage.Audit(members, np.ones_like(members))}
  if every and own["calibration"] is not None:
    calibrated = np.zeros_like(members)
    np.put_along_axis(calibrated, own["calibration"], True, axis=1)
    groups |= leakage.calibration_audits(members, calibrated)
  return groups


def exposures(audit: Audit, evidence: dict[Variant, np.ndarray]) -> list[dict]:
  """Writes who is exposed in each variant, and tells how that differs from full precision.

  WORKDIR/exposure.csv ranks the pool by exposure at full precision; exposed.npz has the pictures
  of the first.
  """
  members, data = target_members(audit), audit.dataset
  per_variant = {
    variant: exposure.per_example(scores, members) for variant, scores in evidence.items()
  }
  ranking = exposure.ranking(per_variant[FULL_PRECISION])
  columns = {"example": ranking, "source_example": data.train_ids[ranking]}
  columns["label"] = [data.class_names[label] for label in data.train_labels[ranking]]
  for variant, found in per_variant.items():
    columns[f"{variant_name(variant)}_when_member"] = found.when_member[ranking]
    columns[f"{variant_name(variant)}_when_non_member"] = found.when_non_member[ranking]
  storage.write_csv(audit.root / "exposure.csv", columns)
  shown = ranking[:NUM_PICTURES]
  storage.save_arrays(
    audit.root / "exposed.npz",
    images=data.train_images[shown],
    labels=columns["label"][:NUM_PICTURES],
    exposure=per_variant[FULL_PRECISION].when_member[shown],
  )
  top = max(1, round(len(ranking) * audit.config.attack.exposed_share))
  return [
    records.make(
      "exposure",
      attacker="matched",
      **variant._asdict(),
      **exposure.compare(
        audit.key("bootstrap"), scores, evidence[FULL_PRECISION], members, top=top
      ),
    )
    for variant, scores in evidence.items()
  ]


def attack_scores(audit: Audit, shadow_scores, target_scores) -> tuple[dict, dict]:
  """Every configured attack on every target, [T, E] each; on shadows too where targets are apart.

  The second sets the thresholds of an attacker who knows no target's membership.
  """
  options = {
    "attacks": tuple(audit.config.attack.attacks),
    "labels": audit.dataset.train_labels,
  }
  members = audit.sound_members["shadows"]
  if "targets" not in audit.members:
    found = protocol.leave_one_out(shadow_scores, members, audited_scores=target_scores, **options)
    return found, {}
  found = protocol.dedicated_targets(shadow_scores, members, target_scores, **options)
  if len(members) < MODELS_LEAVE_ONE_OUT:
    return found, {}
  among_shadows = protocol.leave_one_out(shadow_scores, members, **options)
  return found, {name: leakage.Pool(rows, members) for name, rows in among_shadows.items()}


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


def warnings(audit: Audit, found: list[dict]) -> list[dict]:
  """What a reader must know before trusting the numbers."""
  sentences = {
    group: left_out(np.flatnonzero(~sound), group)
    for group, sound in audit.sound.items()
    if not sound.all()
  }
  full = scores_of(audit, FULL_PRECISION)
  mismatch = guards.accuracy_mismatch(full["shadow_accuracy"], full["target_accuracy"])
  sentences["accuracy"] = mismatch
  if "targets" not in audit.members:
    sentences["protocol"] = guards.unbalanced_leave_one_out(audit.sound_members["shadows"])
  leaks = records.select(found, "leakage")
  fewest = min(record["num_non_members"] for record in leaks)
  sentences["false-positive rates"] = guards.too_few_non_members(fewest, audit.config.attack.fprs)
  for method in dict.fromkeys(record["method"] for record in records.select(found, "unit")):
    rows = records.select(found, "unit", method=method)
    idle = [record for record in rows if record["error_after"] >= record["error_nearest"] > 0]
    if method != "nearest" and idle:
      names = ", ".join(f"{r['unit']} at {r['levels']} levels" for r in idle[:3])
      sentences[records.method_name(method)] = (
        f"{len(idle)} of {len(rows)} units are no better than rounded to the nearest level, for "
        f"example {names}; more or other calibration images may help."
      )
  return [
    records.make("warning", about=about, message=message)
    for about, message in sentences.items()
    if message
  ]


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
  count = duplicates.count(data.train_images, data.train_labels, data.test_images, data.test_labels)
  parameters = jax.eval_shape(
    lambda: audit.model.init(jax.random.key(0), np.zeros((1, *data.image_shape), np.float32))
  )["params"]
  targets = config.train.targets
  return records.run(
    name=config.name,
    config=settings.plain(config),
    command=command,
    date=today(),
    seconds=audit.seconds(),
    data={
      "name": data.name,
      "pool_size": len(data.train_labels),
      "test_size": len(data.test_labels),
      "num_classes": data.num_classes,
      "image_shape": data.image_shape,
      "notes": data.notes,
      "duplicates": count._asdict(),
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


def attack_files(
  config, workdir: pathlib.Path, shadows: str, targets: str | None = None, *, command: str = ""
) -> None:
  """Attacks saved scores and writes their results; `reporting.report` shows them.

  Args:
    config: its attack section and seed.
    workdir: of these results alone.
    shadows: an .npz file with `scores` float[M, E, V] (or [M, E]; higher means member) and
      `members` bool[M, E]; for a "class_threshold" among attack.attacks also `labels` int[E].
    targets: the same of T targets on the same examples; None: every shadow is target once.
    command: how this was called, for the record.
  Raises:
    ValueError: also if the workdir holds an audit.
    ValueError: arrays that are missing or do not fit.
    FileNotFoundError: no such file.
  """
  if (workdir / "config.json").exists():
    raise ValueError(f"{workdir} holds an audit; results of saved scores need another --workdir.")
  own = read_scores(shadows)
  attacked = read_scores(targets) if targets else own
  options = {"attacks": tuple(config.attack.attacks), "labels": own.get("labels")}
  if targets:
    found = protocol.dedicated_targets(own["scores"], own["members"], attacked["scores"], **options)
  else:
    found = protocol.leave_one_out(own["scores"], own["members"], **options)
  key = jax.random.key(config.seed)
  leaks = [
    records.make(
      "leakage",
      **FULL_PRECISION._asdict(),
      attacker="full_precision",
      attack=name,
      bits_per_weight=None,
      size_kb=None,
      test_accuracy=records.number(None),
      **summarise(config.attack, jax.random.fold_in(key, number), rows, attacked["members"]),
    )
    for number, (name, rows) in enumerate(found.items())
  ]
  files = {"name": shadows if targets is None else f"{shadows}, {targets}"}
  run_ = records.run(
    name=pathlib.Path(shadows).stem,
    config={"attack": settings.plain(config.attack), "seed": config.seed},
    command=command,
    date=today(),
    seconds={},
    data=files | {"pool_size": own["scores"].shape[1]},
    model={"name": "unknown"},
    models=len(own["scores"]),
    targets=len(attacked["scores"]),
    protocol="dedicated targets" if targets else "leave-one-out",
  )
  path = workdir / "results.jsonl"
  storage.write_records(path, [run_, *leaks])
  Manifest(workdir).record("attack", "saved scores", [path])


def read_scores(path: str) -> dict[str, np.ndarray]:
  """`scores` [N, E, V], `members` and perhaps `labels` of an .npz file, checked.

  Raises:
    FileNotFoundError, ValueError: one sentence that names the file.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"{path} does not exist; --scores and --targets name .npz files.")
  arrays = storage.load_arrays(path)
  for name in ("scores", "members"):
    if name not in arrays:
      raise ValueError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}.")
  scores, members = arrays["scores"], arrays["members"].astype(bool)
  scores = scores[:, :, None] if scores.ndim == 2 else scores
  if scores.ndim != 3 or members.shape != scores.shape[:2]:
    raise ValueError(
      f"{path} has scores of shape {arrays['scores'].shape} and members {members.shape}; they must "
      "be [models, examples, views] and [models, examples]."
    )
  return arrays | {"scores": scores, "members": members}


def today() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
