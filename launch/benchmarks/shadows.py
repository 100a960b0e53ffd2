"""What more shadows find: the attackers of one finished audit, each with some of its models.

    bash launch/run bench shadows --workdir RUN [--variants obc-3-3 ...] [--figure FILE.png]

Reads the scores of a leave-one-out audit. Of its first n models each is attacked with the n - 2
others that are not its partner, n from 8 up to all; every row is about the same targets, the first
8 (or --targets), so rows differ by the shadows alone. "as is" has full-precision shadows, "matched"
shadows quantized like the target; both also with the target's scores rescaled to the shadows'.
Differences of TPR, to "as is" and to the same attacker with the fewest shadows, are paired.
"""

import argparse
import pathlib

import jax
import numpy as np

from ptq_jax import storage
from ptq_jax.attack import confidence, protocol
from ptq_jax.metrics import leakage

FULL, AS_IS = "full_precision", "as is"
NUMBERS = ("low", "value", "high")


def main(argv: list[str]) -> None:
  """Prints a table in Markdown, and draws it if asked."""
  flags = _parser().parse_args(argv)
  path = flags.workdir / "membership.npz"
  if not path.exists():
    raise SystemExit(f"error: {path} is missing; bash launch/run attack makes it.")
  members = storage.load_arrays(path)
  if set(members) != {"shadows"}:
    raise SystemExit("error: bench shadows needs a leave-one-out audit (train.targets=0).")
  members = members["shadows"].astype(bool)
  plain, rows = scores_of(flags.workdir, FULL), []
  rate = f"TPR % at {100 * flags.fpr:g} % FPR"
  print(f"| variant | shadows | attacker | AUC | {rate} | minus as is | minus fewest |")
  print("| :-- | --: | :-- | --: | --: | --: | --: |")
  for variant in [FULL, *flags.variants]:
    own = plain if variant == FULL else scores_of(flags.workdir, variant)
    fewest = None
    for count in counts(len(members), flags.targets):
      found = attacked(plain, own, members, count, flags)
      for attacker, (summary, sample) in found.items():
        tpr = summary["tpr"][0]
        rows.append((variant, count - 2, attacker, tpr))
        numbers = [f"{summary['auc']['value']:.3f}", percent(tpr)]
        for other in (None if attacker == AS_IS else found[AS_IS], fewest and fewest[attacker]):
          less = leakage.compare(sample, other[1])["tpr"][0] if other else None
          numbers.append(percent(less) if less else "")
        print(f"| {variant} | {count - 2} | {attacker} | {' | '.join(numbers)} |", flush=True)
      fewest = fewest or found
  if flags.figure:
    draw(rows, flags)


def counts(num_models: int, num_targets: int) -> list[int]:
  """How many models are used: doubled from the targets on, and all."""
  found = [num_targets * 2**i for i in range(10)]
  return [count for count in found if count < num_models] + [num_models]


def scores_of(workdir: pathlib.Path, variant: str) -> np.ndarray:
  """Scores [M, E, V] of all models in one variant."""
  paths = sorted((workdir / "scores" / variant).glob("shadows-*.npz"))
  if not paths:
    raise SystemExit(f"error: no scores of {variant} in {workdir}; see its folder scores/.")
  return np.concatenate([storage.load_arrays(path)["scores"] for path in paths])


def attacked(plain, own, members, count, flags) -> dict[str, tuple[dict, leakage.Sample]]:
  """By attacker what it finds, and what its intervals rest on."""
  is_full = own is plain
  plain, own, members = plain[:count], own[:count], members[:count]
  attackers = {AS_IS: (plain, own), "as is, rescaled": rescaled(plain, own)}
  if not is_full:
    attackers |= {"matched": (own, own), "matched, rescaled": rescaled(own, own)}
  key, found = jax.random.key(0), {}
  for attacker, (shadows, targets) in attackers.items():
    options = {"audited_scores": targets, "attacks": (flags.attack,)}
    rows = protocol.leave_one_out(shadows, members, **options)[flags.attack]
    given = rows[: flags.targets], members[: flags.targets]
    options = {"fprs": (flags.fpr,), "num_resamples": flags.resamples}
    sample = leakage.sample(key, *given, **options)
    found[attacker] = leakage.summarise(key, *given, sampled=sample, **options), sample
  return found


def rescaled(like, own):
  """Both in the median and spread of each model of `like`, as `records.ATTACKERS` has it."""
  return confidence.rescale(like, like), confidence.rescale(own, like)


def percent(number: dict) -> str:
  """A rate with its interval."""
  low, value, high = (100 * number[name] for name in NUMBERS)
  return f"{value:.2f} ({low:.2f} to {high:.2f})"


def draw(rows, flags) -> None:
  """TPR against the number of shadows, one panel per variant."""
  import matplotlib.pyplot as plt  # not needed for the table

  variants = list(dict.fromkeys(row[0] for row in rows))
  figure, panels = plt.subplots(
    1, len(variants), figsize=(2.6 * len(variants), 2.8), sharey=True, squeeze=False
  )
  for panel, variant in zip(panels[0], variants, strict=True):
    own = [row[1:] for row in rows if row[0] == variant]
    for attacker in dict.fromkeys(who for _, who, _ in own):
      shadows = [count for count, who, _ in own if who == attacker]
      tpr = [[100 * t[name] for name in NUMBERS] for _, who, t in own if who == attacker]
      low, value, high = np.transpose(tpr)
      panel.plot(shadows, value, marker="o", markersize=3, label=attacker)
      panel.fill_between(shadows, low, high, alpha=0.12)
    panel.set_xscale("log", base=2)
    panel.set_xticks(shadows, shadows)
    panel.set_title(variant, fontsize=9)
    panel.set_xlabel("shadows")
  panels[0, 0].set_ylabel(f"TPR % at {100 * flags.fpr:g} % FPR")
  panels[0, -1].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(flags.figure, dpi=110)


def _parser():
  parser = argparse.ArgumentParser(
    prog="bench shadows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--variants", nargs="*", default=[], help="folders of WORKDIR/scores")
  parser.add_argument("--attack", default="lira_online_pooled")
  parser.add_argument("--targets", type=int, default=8, help="even; the fewest models, too")
  parser.add_argument("--fpr", type=float, default=0.01)
  parser.add_argument("--resamples", type=int, default=1000)
  parser.add_argument("--figure", type=pathlib.Path, help="a plot of the table")
  return parser
