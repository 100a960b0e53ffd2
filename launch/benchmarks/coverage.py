"""How often the intervals hold the truth: nominal against actual coverage.

    bash launch/run bench coverage [--studies N] [--examples N] [--shadows N]

Every study draws examples, models and membership anew, attacks with LiRA (pooled variance) by one
of the two protocols, and asks for 95 % intervals. The truth is what so many studies find on
average. Examples differ in how much they show, models in how much they memorise ("effect", the
deviation of the models' memorising over its mean), so the targets of a study share something and
differ in something. Also the paired difference between the target and a blurred version of it, and
how often it is called one where there is none.
"""

import argparse

import jax
import numpy as np

from ptq_jax.attack import protocol
from ptq_jax.metrics import intervals

ATTACK = "lira_online_pooled"
LEVEL = intervals.Level(0.05)


def main(argv: list[str]) -> None:
  """Prints a table in Markdown."""
  flags = _parser().parse_args(argv)
  print(
    "| protocol | targets | effect of models | AUC | TPR at 5 % | AUC difference | no difference |"
  )
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for name, targets in [("dedicated targets", n) for n in (1, 2, 8, 16)] + [
    ("leave-one-out", n) for n in (8, 16)
  ]:
    for effect in (0.0, 0.3):
      if targets == 1 and effect:
        continue  # one target cannot tell how targets vary, and its interval says so
      rates = coverage(name, targets, effect, flags)
      cells = " | ".join(f"{100 * rate:.1f}" for rate in rates)
      print(f"| {name} | {targets} | {effect:g} | {cells} |", flush=True)
  print(f"\nPer cent of {flags.studies} studies; one deviation is "
        f"{100 * np.sqrt(0.05 * 0.95 / flags.studies):.1f}. Nominal 95.")  # fmt: skip


def coverage(name, targets, effect, flags) -> list[float]:
  """Share of the studies whose interval holds the truth, by metric."""
  found = [study(seed, name, targets, effect, flags) for seed in range(flags.studies)]
  rates = []
  for metric in range(3):
    truth = np.mean([numbers[metric].value for numbers in found])
    rates.append(np.mean([n[metric].low <= truth <= n[metric].high for n in found]))
  rates.append(np.mean([n[3].low <= 0 <= n[3].high for n in found]))
  return rates


def study(seed, name, targets, effect, flags):
  """The intervals of AUC and TPR, of the difference to a blurred target, and of no difference."""
  rng = np.random.default_rng(seed)
  leaving = name == "leave-one-out"
  num_shadows = targets if leaving else flags.shadows
  shadows = paired(rng, num_shadows, flags.examples)
  members = shadows if leaving else paired(rng, targets + targets % 2, flags.examples)[:targets]
  easy, shown = rng.normal(size=flags.examples), rng.exponential(size=flags.examples)

  def scores(members, memorising):
    noise = rng.normal(size=members.shape)
    return 2 * easy + noise + 1.5 * memorising[:, None] * shown * members

  def memorising(count):
    return 1 + effect * rng.normal(size=count)

  own = scores(shadows, memorising(num_shadows))
  audited = own if leaving else scores(members, memorising(targets))
  key, rows = jax.random.key(seed), []
  for blur in (0.0, 1.0, 1.0):
    moved = audited + blur * rng.normal(size=audited.shape)
    options = {"attacks": (ATTACK,)}
    found = (
      protocol.leave_one_out(own, shadows, audited_scores=moved, **options)
      if leaving
      else protocol.dedicated_targets(own, shadows, moved, **options)
    )[ATTACK]
    ranked = intervals.rank(found, members)
    values = intervals.measure(found, members, levels=[LEVEL], ranked=ranked)
    draws = intervals.resample(
      key, found, members, levels=[LEVEL], ranked=ranked, num_resamples=flags.resamples
    )
    rows.append((values, draws))
  (values, draws), (other, other_draws), (third, third_draws) = rows
  return (
    intervals.over_both(values.auc, draws.auc),
    intervals.over_both(values.tpr[:, 0], draws.tpr[..., 0]),
    intervals.of_difference(other.auc, other_draws.auc, values.auc, draws.auc),
    intervals.of_difference(third.auc, third_draws.auc, other.auc, other_draws.auc),
  )


def paired(rng, num_models, num_examples):
  """bool[M, E], models in complementary pairs."""
  half = rng.permuted(np.tile(np.arange(num_examples) % 2 == 0, (num_models // 2, 1)), axis=1)
  return np.stack([half, ~half], axis=1).reshape(num_models, num_examples)


def _parser():
  parser = argparse.ArgumentParser(
    prog="bench coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--studies", type=int, default=400)
  parser.add_argument("--examples", type=int, default=400)
  parser.add_argument("--shadows", type=int, default=16, help="of dedicated targets")
  parser.add_argument("--resamples", type=int, default=200)
  return parser
