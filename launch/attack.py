"""Attacks every variant of every target and writes what it found.

    bash launch/run attack --config configs/digits.py --workdir runs/digits

Reads the scores in WORKDIR, writes WORKDIR/results.jsonl. Every quantized target meets two
attackers: one whose shadows stay in full precision, and one who quantized them like the target.
"""

import datetime
import shlex
import sys

import jax
import numpy as np

from launch.progress import Progress
from launch.workdir import FULL_PRECISION, Audit, open_audit, variant_name
from ptq_jax import settings, storage
from ptq_jax.attack import guards, protocol
from ptq_jax.data import duplicates
from ptq_jax.metrics import intervals, leakage
from ptq_jax.report import records
from ptq_jax.report.records import Variant


def run(config, workdir) -> None:
  """The stage alone."""
  attack(open_audit(config, workdir))


def attack(audit: Audit) -> None:
  """Attacks, unless the results of exactly these scores and settings are there already."""
  variants = [FULL_PRECISION, *audit.variants()]
  inputs = fingerprint_of_inputs(audit, variants)
  path = audit.root / "results.jsonl"
  if path.exists() and is_current(path, inputs):
    return
  with audit.timed("attack"), Progress("attack", len(variants)) as progress:
    found = []
    full = scores_of(audit, FULL_PRECISION)
    for variant in variants:
      found += attack_variant(audit, variant, full)
      progress.advance(1, variant_name(variant))
  storage.write_records(path, [run_record(audit, inputs), *found, *warnings(audit, found)])


def attack_variant(audit: Audit, variant: Variant, full: dict) -> list[dict]:
  """Leakage records of one variant, for both attackers, and the records of its units."""
  options, is_full = audit.config.attack, variant == FULL_PRECISION
  own = full if is_full else scores_of(audit, variant)
  accuracy = intervals.over_targets(own["target_accuracy"], confidence=options.confidence)
  common = variant._asdict() | {
    "bits_per_weight": own["bits_per_weight"].mean(),
    "size_kb": own["size_kb"].mean(),
    "test_accuracy": accuracy._asdict(),
  }
  targets = audit.members.get("targets", audit.members["shadows"])
  found = []
  for attacker, shadows in {"full_precision": full, "matched": own}.items():
    if is_full and attacker == "matched":
      continue  # the same attack
    scores = attack_scores(audit, shadows["shadow_scores"], own["target_scores"])
    for number, (name, rows) in enumerate(scores.items()):
      summary = leakage.summarise(
        jax.random.fold_in(audit.key("bootstrap"), number),
        rows,
        targets,
        fprs=tuple(options.fprs),
        num_resamples=options.resamples,
        confidence=options.confidence,
      )
      found.append(records.make("leakage", attacker=attacker, attack=name, **common, **summary))
  return found + ([] if is_full else unit_records(audit, variant))


def attack_scores(audit: Audit, shadow_scores, target_scores) -> dict[str, np.ndarray]:
  """Every configured attack on every target, [T, E] each."""
  options = {
    "attacks": tuple(audit.config.attack.attacks),
    "labels": audit.dataset.train_labels,
  }
  members = audit.members["shadows"]
  if "targets" in audit.members:
    return protocol.dedicated_targets(shadow_scores, members, target_scores, **options)
  return protocol.leave_one_out(shadow_scores, members, audited_scores=target_scores, **options)


def scores_of(audit: Audit, variant: Variant) -> dict[str, np.ndarray]:
  """Scores in one variant of the models as shadows [M, E, V] and as targets [T, E, V].

  Raises:
    ValueError: if there are not as many as the config says.
  """
  shadows = audit.load_scores(variant, "shadows")
  targets = audit.load_scores(variant, "targets") if "targets" in audit.members else shadows
  for group, loaded in {"shadows": shadows, "targets": targets}.items():
    expected = len(audit.members.get(group, audit.members["shadows"]))
    if len(loaded["scores"]) != expected:
      raise ValueError(
        f"{variant_name(variant)} has scores of {len(loaded['scores'])} {group}, but the config "
        f"asks for {expected}; run train_shadows and quantize again."
      )
  return {
    "shadow_scores": shadows["scores"],
    "target_scores": targets["scores"],
    "shadow_accuracy": shadows["accuracy"],
    "target_accuracy": targets["accuracy"],
    "bits_per_weight": targets["bits_per_weight"],
    "size_kb": targets["size_kb"],
  }


def unit_records(audit: Audit, variant: Variant) -> list[dict]:
  """What quantizing did to each unit, as means over all models."""
  parts = [storage.load_arrays(audit.scores_path(variant, chunk)) for chunk in audit.chunks()]
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
  sentences = {}
  full = scores_of(audit, FULL_PRECISION)
  mismatch = guards.accuracy_mismatch(full["shadow_accuracy"], full["target_accuracy"])
  sentences["shadows"] = mismatch
  if "targets" not in audit.members:
    sentences["protocol"] = guards.unbalanced_leave_one_out(audit.members["shadows"])
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


def run_record(audit: Audit, inputs: str) -> dict:
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
    command=shlex.join(["python", "-m", "launch.audit", *sys.argv[1:]]),
    date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
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
  """Changes with the attack's settings and with every score file."""
  paths = [audit.scores_path(variant, chunk) for variant in variants for chunk in audit.chunks()]
  stamps = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths if p.exists()]
  return settings.fingerprint([settings.plain(audit.config), stamps])


def is_current(path, inputs: str) -> bool:
  """Whether results were made from exactly these inputs."""
  try:
    runs = records.select(storage.read_records(path), "run")
  except storage.CorruptFileError:
    return False
  return bool(runs) and runs[0].get("inputs") == inputs


def main() -> None:
  settings.launch(run, config="configs/digits.py", workdir="runs/digits", description=__doc__)


if __name__ == "__main__":
  main()
