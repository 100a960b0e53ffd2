"""Synthetic records of a whole audit, for the tests of the report."""

import types

import numpy as np
import pytest
from scipy import stats

from ptq_jax.report import records

FPRS = (0.1, 0.01, 0.001)
INTERVAL = "over examples and models, 95 %"
METHODS = ("nearest", "adaround", "brecq", "obc")
GRIDS = ((16, 16), (4, 4), (3, 256))


def rate(value, *, spread=0.1, **fields):
  low, high = value * (1 - spread), min(1.0, value * (1 + spread))
  return records.number(value, low, high, interval=INTERVAL) | fields


def paired(value, *, half=0.002, **fields):
  """A paired difference; its p is that of a normal whose 95 % interval has this half-width."""
  p = float(2 * stats.norm.sf(abs(value) / half * 1.96))
  number = records.number(value, value - half, value + half, interval="paired, 95 %")
  return number | {"p": p} | fields


def differences(value, *, fpr=0.01, half=0.002):
  """A field of paired differences with one TPR."""
  return {
    "auc": paired(value),
    "tpr": [paired(value, half=half, fpr=fpr, rule="at_most")],
  }


def leakage(
  method="none",
  levels=None,
  last=None,
  attacker="full_precision",
  *,
  attack="lira_online",
  separation=1.0,
  accuracy=0.7,
  non_members=25_000,
  **fields,
):
  """A leakage record whose ROC is that of two unit Gaussians `separation` apart."""

  def roc(fpr):
    return stats.norm.sf(stats.norm.isf(fpr) - separation)

  auc = float(stats.norm.cdf(separation / np.sqrt(2)))
  grid = np.logspace(-4, 0, 33)
  bits = 32.0 if levels is None else np.log2(levels)
  contents = {
    "method": method,
    "levels": levels,
    "last_layer_levels": last,
    "attacker": attacker,
    "attack": attack,
    "bits_per_weight": bits,
    "size_kb": bits / 8 * 78.0,
    "num_targets": 16,
    "num_members": non_members,
    "num_non_members": non_members,
    "test_accuracy": rate(accuracy, spread=0.01),
    "auc": rate(auc, spread=0.01),
    "balanced_accuracy": rate(float(stats.norm.cdf(separation / 2)), spread=0.01),
    "tpr": [
      rate(float(roc(f)), fpr=f, rule="at_most", false_positives=int(f * non_members)) for f in FPRS
    ],
    "precision": [rate(float(roc(0.01)) / (float(roc(0.01)) + 0.01), prior=0.5, fpr=0.01)],
    "curve": {"fpr": grid, "tpr": roc(grid)},
  }
  return records.make("leakage", **(contents | fields))


def study(changes, *, fit=(), members=0.99, ratios=(), **fields):
  """A run, full precision, and each variant as four attackers see it.

  Args:
    changes: TPR at 1 % FPR less that of full precision (.1), by variant, for every attacker.
    fit: accuracy on members less that of full precision, by variant; 0 if not given.
    members: accuracy on members in full precision.
    ratios: by attacker and variant, what is left of the TPR instead of what the change says.
    fields: of the run.
  """
  fit, ratios = dict(fit), dict(ratios)
  full = {"tpr": [rate(0.1, fpr=0.01, rule="at_most", false_positives=250)]}
  found = [run(**fields)]
  for who in ("full_precision", "rescaled", "best"):
    found.append(leakage(attacker=who, member_accuracy=rate(members, spread=0), **full))
  for (method, levels), change in changes.items():
    for who in records.COMPARED:
      left = ratios.get((who, method, levels), 1 + change / 0.1)
      more = differences(change)
      more["tpr_ratio"] = [rate(left, fpr=0.01, rule="at_most")]
      lost = fit.get((method, levels), 0.0)
      found.append(
        leakage(
          method,
          levels,
          levels,
          who,
          tpr=[rate(0.1 + change, fpr=0.01, rule="at_most", false_positives=250)],
          member_accuracy=rate(members + lost, spread=0.01),
          minus_full_precision=more,
          member_accuracy_minus_full_precision=paired(lost),
          accuracy_minus_full_precision=paired(-0.001),
        )
      )
  return found


def unit(method, levels, last, name, *, before=0.04, after=0.01, **fields):
  contents = {"error_nearest": before, "error_after": after, "steps": 2000, "seconds": 1.25}
  return records.make(
    "unit",
    method=method,
    levels=levels,
    last_layer_levels=last,
    unit=name,
    **(contents | fields),
  )


def run(**fields):
  contents = {
    "name": "digits",
    "config": {"train": {"epochs": 30, "seed": 0}, "quantize": {"levels": [16, 4, 3]}},
    "command": "python -m launch.audit --config configs/digits.py --workdir runs/digits",
    "date": "2025-01-31 12:00",
    "seconds": {"train_shadows": 61.2, "quantize": 44.0, "attack": 3.1},
    "data": {
      "name": "digits",
      "pool_size": 1500,
      "members_share": 0.5,
      "test_size": 297,
      "num_classes": 10,
      "image_shape": [8, 8, 1],
    },
    "model": {"name": "convnet", "parameters": 19_562},
    "models": 16,
    "targets": 0,
    "protocol": "leave-one-out",
  }
  return records.run(**(contents | fields))


def audit(*, methods=METHODS, grids=GRIDS, attackers=records.SIDES, sweep=True, **fields):
  """Everything a whole audit records; later keywords go to every leakage record."""
  found = [run(), leakage(separation=1.0, accuracy=0.7, **fields)]
  found.append(leakage(attack="loss_threshold", separation=0.5, accuracy=0.7, **fields))
  loss = {16: 0.002, 4: 0.02, 3: 0.07}
  quality = {"nearest": 4.0, "adaround": 1.4, "brecq": 0.9, "obc": 1.0}
  for method in methods:
    factor = quality.get(method, 1.0)
    lasts = [(levels, last) for levels, last in grids]
    if sweep and method != "nearest":
      lasts += [(3, 3), (3, 4), (3, 16), (3, None)]
    for levels, last in dict.fromkeys(lasts):
      drop = loss[levels] * factor + (0.01 * (8 - np.log2(last or 512)) / 8 if levels == 3 else 0)
      for attacker in attackers:
        hidden = 1 - drop * (4 if attacker == "full_precision" else 2)
        found.append(
          leakage(
            method,
            levels,
            last,
            attacker,
            separation=max(0.02, hidden),
            accuracy=0.7 - drop,
            **fields,
          )
        )
      found.append(
        records.make(
          "exposure",
          method=method,
          levels=levels,
          last_layer_levels=last,
          attacker="matched",
          attack="lira_online",
          top=150,
          num_examples=1500,
          jaccard=rate(max(0.05, 0.95 - 8 * drop)),
        )
      )
      for name in ("stem", "blocks_0", "head"):
        found.append(unit(method, levels, last, name, after=0.01 * factor))
  found.append(
    records.make("warning", about="targets", message="shadows are 2.1 points less accurate.")
  )
  return found


@pytest.fixture(scope="session")
def example():
  """The builders above: `example.audit()` and so on."""
  return types.SimpleNamespace(
    rate=rate, leakage=leakage, unit=unit, run=run, audit=audit, paired=paired,
    differences=differences, study=study,
  )  # fmt: skip
