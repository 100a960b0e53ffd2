"""Robust membership inference (RMIA): is the target more surprising on x than on other examples?

The likelihood ratio of example x against a population example z is (p(x | target) / p(x)) /
(p(z | target) / p(z)), p the probability of the true class and p(x) its average over models in
general. The score of x is the share of z that x dominates: ratio at least `gamma`. HIGHER SCORE
MEANS MEMBER.

All x of a target are compared with the same z, so for one view the score is a growing function of
p(x | target) / p(x), and z only sets its scale: it matters for thresholds that are carried from one
model to another, and for the average over views.

Reference: Zarifzadeh, Liu, Shokri 2024, "Low-Cost High-Power Membership Inference Attacks",
arXiv:2312.03262. Unlike there, several views are combined by averaging their scores.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from ptq_jax.attack import blocks
from ptq_jax.base import ArrayLike, Bool, Float, Int

GAMMA = 2.0
OFFLINE_A = 0.3
MAX_POPULATION = 20_000
"""Pool examples, evenly spaced, that serve as population when none is given."""

Side = Literal["online", "offline"]


class Population(NamedTuple):
  """Logit-scaled confidences on Z examples that are not audited and on which no model trained."""

  shadow_scores: Float[ArrayLike, "M Z V"]
  target_scores: Float[ArrayLike, "T Z V"]


def score(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "E V"],
  *,
  side: Side = "online",
  population: Population | None = None,
  gamma: float = GAMMA,
  offline_a: float = OFFLINE_A,
) -> Float[np.ndarray, "E"]:
  """Share of the population that each example dominates, averaged over views.

  Args:
    shadow_scores: float[M, E, V], finite logit-scaled confidences; their sigmoid is p.
    shadow_members: bool[M, E].
    target_scores: float[E, V].
    side:
      "online": p(x) is the average of the mean over "in" and the mean over "out" shadows.
      "offline": only "out" shadows, p(x) = ((1 + a) mean_out + 1 - a) / 2, for "in" models are more
        confident.
    population: the z, T = 1; None takes (up to 20 000 of) the audited examples themselves, whose
      membership is not used.
    gamma: threshold of domination.
    offline_a: a in [0, 1]; see `tune_offline_a`.
  Returns:
    float64[E] in [0, 1], steps of 1 / (Z V): examples that dominate everybody are tied.
  Raises:
    ValueError: if shapes disagree, a score is not finite, an example lacks shadows, or `side`,
      `gamma` or `offline_a` is out of range.
  """
  return attack(
    shadow_scores,
    shadow_members,
    target_scores[None],
    side=side,
    population=population,
    gamma=gamma,
    offline_a=offline_a,
  )[0]


def attack(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "T E V"],
  *,
  side: Side = "online",
  population: Population | None = None,
  gamma: float = GAMMA,
  offline_a: float = OFFLINE_A,
  left_out: Int[ArrayLike, "T K"] | None = None,
  block_size: int | None = None,
) -> Float[np.ndarray, "T E"]:
  """`score` for many targets; `left_out` and `block_size` as in `lira.attack`."""
  if side not in ("online", "offline"):
    raise ValueError(f"side is {side!r}; it must be 'online' or 'offline'.")
  if not gamma > 0 or not 0 <= offline_a <= 1:
    raise ValueError(
      f"gamma is {gamma}, offline_a {offline_a}; need gamma > 0, offline_a in [0, 1]."
    )
  inputs = blocks.prepare(
    shadow_scores, shadow_members, target_scores, left_out=left_out, size=block_size
  )
  sides = ("in", "out") if side == "online" else ("out",)
  blocks.check_counts(inputs, sides=sides, needed=1, reason=f"RMIA {side}")
  result = np.empty(target_scores.shape[:2])
  a = offline_a if side == "offline" else None
  with jax.enable_x64(True):
    others = _population(inputs, population, a)
    for index, block in blocks.stream(inputs):
      shares = _dominated(_log_ratios(block, inputs.left_out, a), others, np.log(gamma))
      result[:, index] = np.asarray(shares)[:, : index.stop - index.start]
  return result


def tune_offline_a(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  *,
  left_out: Int[ArrayLike, "M K"],
  candidates: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> float:
  """The `offline_a` that separates members best when the shadows attack each other.

  No target is touched. Best is the largest AUC, averaged over shadows.

  Args:
    shadow_scores, shadow_members: as `attack`, each shadow being target once.
    left_out: int[M, K], as `protocol.left_out_shadows` gives.
    candidates: values of a to try.
  """
  members = np.asarray(shadow_members).astype(bool)
  areas = []
  for a in candidates:
    scores = attack(
      shadow_scores, members, shadow_scores, side="offline", offline_a=a, left_out=left_out
    )
    ranks = scipy.stats.rankdata(scores, axis=1)
    counts = members.sum(axis=1)
    above = (ranks * members).sum(axis=1) - counts * (counts + 1) / 2
    areas.append(np.mean(above / (counts * (members.shape[1] - counts))))
  return float(candidates[int(np.argmax(areas))])


def _population(inputs, population, offline_a):
  """log ratios of the population, sorted: float64[T, V, Z]."""
  if population is None:
    num_examples = inputs.shadow_members.shape[1]
    chosen = np.linspace(0, num_examples - 1, min(num_examples, MAX_POPULATION)).astype(int)
    scores, members, targets = (np.asarray(array)[:, chosen] for array in inputs[:3])
  else:
    scores, targets = (np.asarray(array) for array in population)
    members = np.zeros(scores.shape[:2], bool)
    expected = (len(inputs.shadow_scores), len(inputs.target_scores), inputs.target_scores.shape[2])
    if (len(scores), len(targets), targets.shape[2]) != expected:
      raise ValueError(
        f"the population's scores are {scores.shape} of shadows and {targets.shape} of targets; "
        f"the audit has {expected[0]} shadows, {expected[1]} targets and {expected[2]} views."
      )
  size = min(inputs.size, members.shape[1])
  inputs = blocks.Inputs(scores, members, targets, inputs.left_out, size)
  ratios = np.empty(targets.shape)
  for index, block in blocks.stream(inputs):
    part = np.asarray(_log_ratios(block, inputs.left_out, offline_a))
    ratios[:, index] = part[:, : index.stop - index.start]
  return jnp.asarray(np.sort(ratios.transpose(0, 2, 1), axis=-1))


@jax.jit
def _log_ratios(block, left_out, offline_a):
  """log p(x | target) - log p(x): float64[T, B, V]; online when `offline_a` is None."""
  probabilities = jax.nn.sigmoid(block.shadow_scores.astype(jnp.float64))
  members = (block.shadow_members, ~block.shadow_members)
  mean_in, mean_out = [_means(probabilities, chosen[..., None], left_out) for chosen in members]
  if offline_a is not None:
    typical = ((1 + offline_a) * mean_out + 1 - offline_a) / 2
  else:
    typical = (jnp.where(jnp.isnan(mean_in), mean_out, mean_in) + mean_out) / 2
  return jax.nn.log_sigmoid(block.target_scores.astype(jnp.float64)) - jnp.log(typical)


def _means(probabilities, chosen, left_out):
  """Mean over the chosen shadows without the left-out ones: [T or 1, B, V]; NaN without any."""
  count = chosen.sum(axis=0, keepdims=True)
  total = (chosen * probabilities).sum(axis=0, keepdims=True)
  if left_out is not None:
    count = count - chosen[left_out].sum(axis=1)
    total = total - (chosen[left_out] * probabilities[left_out]).sum(axis=1)
  return total / count


@jax.jit
def _dominated(log_ratios, others, log_gamma):
  """Share of sorted `others` [T, V, Z] at most `log_ratios` [T, B, V] less log gamma: [T, B]."""
  count = jax.vmap(jax.vmap(lambda z, x: jnp.searchsorted(z, x, side="right")))
  below = count(others, jnp.moveaxis(log_ratios, 2, 1) - log_gamma)
  return below.mean(axis=1) / others.shape[-1]
