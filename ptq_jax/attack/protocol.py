"""Audits: every attack on every target, from the scores of shadows and targets alone.

Two protocols. *Dedicated targets* were trained beside the shadows for the audit. *Leave-one-out*:
every model is target once, and the others are its shadows. Names in `ATTACKS` select what to run;
HIGHER SCORE MEANS MEMBER in every result.

Full-precision and matched attackers differ only in the shadows' scores: with `audited_scores` (or
`target_scores`) from quantized models, give the shadows' full-precision scores for the one and the
scores of equally quantized shadows for the other.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ptq_jax.attack import lira, rmia, threshold
from ptq_jax.base import ArrayLike, Float, Int, Nested, Shaped, as_members

LIRA: Mapping[str, lira.Variant] = {
  "lira_online": lira.Variant("online"),
  "lira_online_pooled": lira.Variant("online", "pooled"),
  "lira_online_shrunk": lira.Variant("online", "shrunk"),
  "lira_online_reference": lira.Variant("online", "reference"),
  "lira_offline": lira.Variant("offline"),
  "lira_offline_pooled": lira.Variant("offline", "pooled"),
  "lira_offline_shrunk": lira.Variant("offline", "shrunk"),
  "lira_offline_density": lira.Variant("offline", tail="density"),
  "lira_offline_density_reference": lira.Variant("offline", "reference", tail="density"),
}
ATTACKS = (*LIRA, "rmia_online", "rmia_offline", "loss_threshold", "class_threshold")
"""Names of all attacks."""

LeftOut = Literal["target", "pair", "balanced"]


def leave_one_out(
  scores: Shaped[ArrayLike, "M E *V"] | Nested,
  members: Shaped[ArrayLike, "M E"] | Nested,
  *,
  audited_scores: Shaped[ArrayLike, "M E *V"] | Nested | None = None,
  attacks: Sequence[str] = ("lira_online", "lira_offline", "loss_threshold"),
  left_out: LeftOut | None = None,
  labels: Shaped[ArrayLike, "E"] | Nested | None = None,
  population: rmia.Population | None = None,
  offline_a: float = rmia.OFFLINE_A,
  block_size: int | None = None,
) -> dict[str, Float[np.ndarray, "M E"]]:
  """Every model is target once; the others are its shadows.

  Args:
    scores: float[M, E, V], the models' scores in their role as shadows.
    members: bool[M, E], who trained on what.
    audited_scores: float[M, E, V], the scores of the same models in their role as targets, for
      example after quantization; None: the same as `scores`.
    attacks: names from `ATTACKS`.
    left_out: which models the attacker on model t must do without.
      "target": model t alone. Where every example has the same number of members among the models,
        the counts of "in" and "out" shadows that remain tell the membership: the side that lost t
        is one shadow poorer, its variance is underestimated, and the attack is biased against
        members (with no leakage and 16 models: AUC 0.48 and a TPR of 0.7 % at 1 % FPR).
      "pair": model t and the model trained on the complement (2k and 2k + 1 are partners, as
        `data.membership.paired` draws them). Both sides lose one shadow, and the bias is gone.
      "balanced": model t and, for each example, one random shadow of the other side: the same
        without pairs (with no leakage: AUC 0.50). Which ones depends on nothing but the shape.
      None: "pair" if the models are paired so; else "balanced" if the number of members of an
        example varies less than half as much as by independent draws; else "target", for under
        independent draws the others' counts tell nothing.
    labels, population, offline_a, block_size: as `dedicated_targets`.
  Returns:
    Per attack float64[M, E], row t the attack on model t.
  Raises:
    ValueError: an unknown name, "pair" without pairs, too few shadows, or scores that do not fit.
  """
  audited_scores = scores if audited_scores is None else audited_scores
  return _run(
    attacks,
    _Inputs(scores, members, audited_scores, labels, population, offline_a, block_size),
    left_out_shadows(members, left_out=left_out),
  )


def dedicated_targets(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "T E *V"] | Nested,
  *,
  attacks: Sequence[str] = ("lira_online", "lira_offline", "loss_threshold"),
  labels: Shaped[ArrayLike, "E"] | Nested | None = None,
  population: rmia.Population | None = None,
  offline_a: float = rmia.OFFLINE_A,
  block_size: int | None = None,
) -> dict[str, Float[np.ndarray, "T E"]]:
  """Each target is attacked with all shadows.

  Args:
    shadow_scores: float[M, E, V], may be a `numpy.memmap`.
    shadow_members: bool[M, E].
    target_scores: float[T, E, V], same examples and views.
    attacks: names from `ATTACKS`.
    labels: int[E], true classes; only "class_threshold" needs them.
    population: scores of examples that are not audited, for RMIA; None takes the pool itself.
    offline_a: of "rmia_offline"; see `rmia.tune_offline_a`.
    block_size: examples per block of LiRA; None picks one. Changes memory, not the result.
  Returns:
    Per attack float64[T, E].
  Raises:
    ValueError: an unknown name, too few shadows, or scores that do not fit.
  """
  inputs = (shadow_scores, shadow_members, target_scores)
  return _run(attacks, _Inputs(*inputs, labels, population, offline_a, block_size), None)


def left_out_shadows(
  members: Shaped[ArrayLike, "M E"] | Nested, *, left_out: LeftOut | None = None
) -> Int[np.ndarray, "M K *E"]:
  """For each model as target the models that its attacker does without; see `leave_one_out`.

  Raises:
    ValueError: if "pair" is asked for and some model 2k + 1 is not the complement of model 2k.
  """
  members = np.asarray(as_members(members))
  if left_out not in (None, "target", "pair", "balanced"):
    raise ValueError(f"left_out is {left_out!r}; it must be 'target', 'pair', 'balanced' or None.")
  models = np.arange(len(members))
  paired = len(members) % 2 == 0 and bool((members[::2] != members[1::2]).all())
  if left_out == "pair" and not paired:
    raise ValueError("left_out 'pair' needs model 2k + 1 trained on the complement of model 2k.")
  if left_out is None:
    left_out = "pair" if paired else "balanced" if _counts_are_fixed(members) else "target"
  if left_out == "target":
    return models[:, None]
  if left_out == "pair":
    return np.stack([models, models ^ 1], axis=1)
  rng = np.random.default_rng(0)
  others = []
  for model in models:
    rank = np.where(members != members[model], rng.random(members.shape), -1.0)
    chosen = rank.argmax(axis=0)
    others.append(np.where(rank.max(axis=0) >= 0, chosen, model))  # nobody on the other side
  return np.stack([np.broadcast_to(models[:, None], members.shape), np.stack(others)], axis=1)


def _counts_are_fixed(members):
  rate = members.mean()
  return members.sum(axis=0).var() < 0.5 * len(members) * rate * (1 - rate)


class _Inputs(NamedTuple):
  shadow_scores: ArrayLike | Nested
  shadow_members: ArrayLike | Nested
  target_scores: ArrayLike | Nested
  labels: ArrayLike | Nested | None
  population: rmia.Population | None
  offline_a: float
  block_size: int | None


def _run(attacks, inputs, left_out):
  unknown = [name for name in attacks if name not in ATTACKS]
  if unknown:
    raise ValueError(f"attack {unknown[0]!r} is unknown; there are {', '.join(ATTACKS)}.")
  shadows, size = inputs[:3], inputs.block_size
  variants = {name: LIRA[name] for name in attacks if name in LIRA}
  results = {}
  if variants:
    rows = lira.attack(
      *shadows, variants=tuple(variants.values()), left_out=left_out, block_size=size
    )
    results = dict(zip(variants, rows, strict=True))
  for side in ("online", "offline"):
    if f"rmia_{side}" in attacks:
      results[f"rmia_{side}"] = rmia.attack(
        *shadows,
        side=side,
        population=inputs.population,
        offline_a=inputs.offline_a,
        left_out=left_out,
        block_size=size,
      )
  if "loss_threshold" in attacks:
    scores = np.asarray(inputs.target_scores)
    rows = [threshold.loss_threshold(np.asarray(row).reshape(len(row), -1)) for row in scores]
    results["loss_threshold"] = np.stack(rows)
  if "class_threshold" in attacks:
    results["class_threshold"] = threshold.attack_classes(
      *shadows, inputs.labels, left_out=left_out
    )
  return {name: results[name] for name in attacks}
