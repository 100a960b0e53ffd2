"""Robust membership inference (RMIA): is the target more surprising on x than on other examples?

The likelihood ratio of example x against a population example z is (p(x | target) / p(x)) /
(p(z | target) / p(z)), p the probability of the true class and p(x) its average over models in
general. The score of x is the share of z that x dominates: ratio at least `gamma`. HIGHER SCORE
MEANS MEMBER.

All x of a target are compared with the same z, so for one view the score is a growing function of
p(x | target) / p(x), and z only sets its scale: it matters for thresholds that are carried from one
model to another, and for the average over views. Everything stays in logarithms: scores far from
zero keep their order, where p itself would be 0 or 1.

Reference: Zarifzadeh, Liu, Shokri 2024, "Low-Cost High-Power Membership Inference Attacks",
arXiv:2312.03262. Unlike there, several views are combined by averaging their scores.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.attack import blocks
from ptq_jax.base import (
  ArrayLike,
  Float,
  Int,
  Nested,
  Shaped,
  as_members,
  is_traced,
  on_device,
)

GAMMA = 2.0
OFFLINE_A = 0.3
MAX_POPULATION = 20_000
"""Pool examples, evenly spaced, that serve as population when none is given."""

Side = Literal["online", "offline"]


class Population(NamedTuple):
  """Logit-scaled confidences on Z examples that are not audited and on which no model trained."""

  shadow_scores: Shaped[ArrayLike, "M Z *V"] | Nested
  target_scores: Shaped[ArrayLike, "T Z *V"] | Nested


def score(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "E *V"] | Nested,
  *,
  side: Side = "online",
  population: Population | None = None,
  gamma: float = GAMMA,
  offline_a: float = OFFLINE_A,
) -> Float[ArrayLike, "E"]:
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
    [E] in [0, 1], steps of 1 / (Z V): examples that dominate everybody are tied. NumPy arrays and
    lists give float64 on the host; JAX arrays stay on their device, may be traced, and give their
    type (float32 shares differ from float64's where two ratios agree to seven digits).
  Raises:
    ValueError: if shapes disagree, a score is not finite, an example lacks shadows, or `side`,
      `gamma` or `offline_a` is out of range. Where values are traced the result is NaN instead.
  """
  if on_device(shadow_scores, shadow_members, target_scores):
    return _one(shadow_scores, shadow_members, target_scores, side, population, gamma, offline_a)
  return attack(
    shadow_scores,
    shadow_members,
    np.asarray(target_scores)[None],
    side=side,
    population=population,
    gamma=gamma,
    offline_a=offline_a,
  )[0]


def attack(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "T E *V"] | Nested,
  *,
  side: Side = "online",
  population: Population | None = None,
  gamma: float = GAMMA,
  offline_a: float = OFFLINE_A,
  left_out: Int[ArrayLike, "T K *E"] | None = None,
  block_size: int | None = None,
) -> Float[np.ndarray, "T E"]:
  """`score` for many targets; `left_out` and `block_size` as in `lira.attack`."""
  _check_options(side, gamma, offline_a)
  inputs = blocks.prepare(
    shadow_scores, shadow_members, target_scores, left_out=left_out, size=block_size
  )
  blocks.check_counts(inputs, sides=_sides(side), needed=1, reason=f"RMIA {side}")
  result = np.empty(inputs.target_scores.shape[:2])
  a = offline_a if side == "offline" else None
  with jax.enable_x64(True):
    others = _population(inputs, population, a)
    for index, block in blocks.stream(inputs):
      shares = _dominated(_log_ratios(block, a), others, np.log(gamma))
      result[:, index] = np.asarray(shares)[:, : index.stop - index.start]
  return result


def _sides(side):
  return ("in", "out") if side == "online" else ("out",)


def _check_options(side, gamma, offline_a):
  if side not in ("online", "offline"):
    raise ValueError(f"side is {side!r}; it must be 'online' or 'offline'.")
  if not gamma > 0 or not 0 <= offline_a <= 1:
    raise ValueError(
      f"gamma is {gamma}, offline_a {offline_a}; need gamma > 0, offline_a in [0, 1]."
    )


def _one(shadow_scores, shadow_members, target_scores, side, population, gamma, offline_a):
  """One target on its device."""
  _check_options(side, gamma, offline_a)
  members = jnp.asarray(as_members(shadow_members, name="shadow_members"))
  shadows, targets = blocks.with_views(shadow_scores, jnp.asarray(target_scores)[None])
  blocks.check_shapes(shadows, members, targets)
  dtype = jnp.promote_types(jnp.promote_types(shadows.dtype, targets.dtype), jnp.float32)
  block = blocks.Block(jnp.asarray(shadows), members, jnp.asarray(targets), jnp.ones((), dtype))
  a = offline_a if side == "offline" else None
  own = _log_ratios(block, a)
  if population is None:
    chosen = _evenly(members.shape[1])
    others = own[:, chosen]
  else:
    pair = blocks.with_views(population.shadow_scores, population.target_scores)
    _check_population(pair, (len(shadows), 1, targets.shape[2]))
    nobody = jnp.zeros(pair[0].shape[:2], bool)
    others = _log_ratios(blocks.Block(*map(jnp.asarray, (pair[0], nobody, pair[1])), block.weights),
                         a)  # fmt: skip
  others = jnp.sort(jnp.moveaxis(others, 2, 1), axis=-1)
  result = _dominated(own, others, np.log(gamma))[0].astype(dtype)
  counts = {"in": members.sum(axis=0), "out": (~members).sum(axis=0)}
  fine = jnp.isfinite(own).all() & jnp.isfinite(others).all()
  for name in _sides(side):
    fine &= (counts[name] >= 1).all()
  if not is_traced(fine) and not bool(fine):
    for name in _sides(side):
      blocks.check_enough(np.asarray(counts[name]), name, 1, f"RMIA {side}")
    raise ValueError("scores are NaN or infinite; attacks with shadows need finite scores.")
  return jnp.where(fine, result, jnp.nan)


def tune_offline_a(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  *,
  left_out: Int[ArrayLike, "M K *E"],
  candidates: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> float:
  """The `offline_a` that separates members best when the shadows attack each other.

  No target is touched. Best is the largest AUC, averaged over shadows.

  Args:
    shadow_scores, shadow_members: as `attack`, each shadow being target once.
    left_out: int[M, K], as `protocol.left_out_shadows` gives.
    candidates: values of a to try.
  """
  members = np.asarray(as_members(shadow_members, name="shadow_members"))
  areas = []
  for a in candidates:
    scores = attack(
      shadow_scores, members, shadow_scores, side="offline", offline_a=a, left_out=left_out
    )
    ranks = np.stack([_ranks(row) for row in np.asarray(scores)])
    counts = members.sum(axis=1)
    above = (ranks * members).sum(axis=1) - counts * (counts + 1) / 2
    areas.append(np.mean(above / (counts * (members.shape[1] - counts))))
  return float(candidates[int(np.argmax(areas))])


def _evenly(num_examples):
  return np.linspace(0, num_examples - 1, min(num_examples, MAX_POPULATION)).astype(int)


def _check_population(pair, expected):
  scores, targets = pair
  if scores.ndim != 3 or targets.ndim != 3 or (len(scores), len(targets), targets.shape[2]) != (
    expected
  ):  # fmt: skip
    raise ValueError(
      f"the population's scores are {scores.shape} of shadows and {targets.shape} of targets; "
      f"the audit has {expected[0]} shadows, {expected[1]} targets and {expected[2]} views."
    )


def _population(inputs, population, offline_a):
  """log ratios of the population, sorted: float64[T, V, Z]."""
  left_out = inputs.left_out
  if population is None:
    chosen = _evenly(inputs.shadow_members.shape[1])
    scores, members, targets = (np.asarray(array)[:, chosen] for array in inputs[:3])
    left_out = left_out if left_out is None or left_out.ndim == 2 else left_out[..., chosen]
  else:
    scores, targets = map(np.asarray, blocks.with_views(*population))
    expected = (len(inputs.shadow_scores), len(inputs.target_scores), inputs.target_scores.shape[2])
    _check_population((scores, targets), expected)
    members = np.zeros(scores.shape[:2], bool)
    left_out = left_out if left_out is None or left_out.ndim == 2 else left_out[:, :1, 0]
  size = min(inputs.size, members.shape[1])
  inputs = blocks.Inputs(scores, members, targets, left_out, size)
  ratios = np.empty(targets.shape)
  for index, block in blocks.stream(inputs):
    part = np.asarray(_log_ratios(block, offline_a))
    ratios[:, index] = part[:, : index.stop - index.start]
  return jnp.asarray(np.sort(ratios.transpose(0, 2, 1), axis=-1))


@jax.jit
def _log_ratios(block, offline_a):
  """log p(x | target) - log p(x): [T, B, V]; online when `offline_a` is None."""
  dtype = block.weights.dtype
  logs = jax.nn.log_sigmoid(block.shadow_scores.astype(dtype))
  members = (block.shadow_members, ~block.shadow_members)
  mean_in, mean_out = [_log_mean(logs, chosen, block.left_out) for chosen in members]
  if offline_a is not None:
    least = jnp.log1p(-jnp.asarray(offline_a, dtype))  # -inf at a = 1
    typical = jnp.logaddexp(mean_out + jnp.log1p(jnp.asarray(offline_a, dtype)), least)
  else:
    known = jnp.where(jnp.isnan(mean_in), mean_out, mean_in)
    typical = jnp.logaddexp(known, mean_out)
  return jax.nn.log_sigmoid(block.target_scores.astype(dtype)) - (typical - np.log(2))


def _log_mean(logs, chosen, left_out):
  """log of the mean of exp(logs) over the chosen shadows that are not left out: [T or 1, B, V].

  Each target's sum is put together from the shadows before and behind the one it does without, so
  nothing is subtracted. NaN without any shadow.
  """
  masked = jnp.where(chosen[..., None], logs, -jnp.inf)
  count = chosen.sum(axis=0)[..., None]
  if left_out is None:
    return (jax.nn.logsumexp(masked, axis=0) - jnp.log(count))[None]
  none = jnp.full((1, *masked.shape[1:]), -jnp.inf, masked.dtype)
  before = jnp.concatenate([none, jax.lax.cumlogsumexp(masked, axis=0)])
  behind = jnp.concatenate([jax.lax.cumlogsumexp(masked, axis=0, reverse=True), none])
  gone = left_out if left_out.ndim == 3 else jnp.broadcast_to(
    left_out[..., None], (*left_out.shape, chosen.shape[1])
  )  # fmt: skip
  columns = jnp.arange(chosen.shape[1])
  leaves = chosen[gone, columns[None, None]]
  first = jnp.take_along_axis(gone, jnp.argmax(leaves, axis=1)[:, None], axis=1)[:, 0]
  leaves, columns = leaves.any(axis=1)[..., None], columns[None]
  rest = jnp.logaddexp(before[first, columns], behind[first + 1, columns])
  total = jnp.where(leaves, rest, before[-1][None])
  return total - jnp.log(count[None] - leaves)


@jax.jit
def _dominated(log_ratios, others, log_gamma):
  """Share of sorted `others` [T, V, Z] at most `log_ratios` [T, B, V] less log gamma: [T, B]."""
  count = jax.vmap(jax.vmap(lambda z, x: jnp.searchsorted(z, x, side="right")))
  below = count(others, jnp.moveaxis(log_ratios, 2, 1) - log_gamma)
  return below.mean(axis=1) / others.shape[-1]


def _ranks(values):
  """Ranks from 1 on; ties share their mean."""
  ordered = np.sort(values)
  below, upto = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
  return (below + upto + 1) / 2
