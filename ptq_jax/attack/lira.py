"""Likelihood-ratio attack (LiRA): how a target's score on an example compares with shadow models'.

For each example and view the scores of the shadows that trained on the example ("in") and of those
that did not ("out") are each described by a normal distribution: a center (median, or mean) and a
standard deviation (population formula around the mean). `online` compares both; `offline` only asks
how unusual the target's score is among "out". Views are averaged. HIGHER SCORE MEANS MEMBER.

Scores may be float32, as models give them; sums and densities are float64. Everything streams over
blocks of examples, so `shadow_scores` may be a `numpy.memmap` larger than memory. A block is one
compiled call for all examples, views, targets and variants; medians come from a sorting network,
and leaving one shadow out costs no second sort (see `_without`).

Reference: Carlini et al. 2022, "Membership Inference Attacks From First Principles",
arXiv:2112.03570.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax.attack import blocks
from ptq_jax.base import Array, ArrayLike, Bool, Float, Int

MIN_DEVIATION = 1e-30
"""Added to every standard deviation, as the public code does. Shadows that agree exactly then give
a huge but finite density ratio: the target counts for the side whose center is nearer."""

Variance = Literal["per_example", "pooled", "reference"]
Tail = Literal["cdf", "density"]
Center = Literal["median", "mean"]


class Variant(NamedTuple):
  """One way to turn the two normal distributions into a score."""

  side: Literal["online", "offline"] = "online"
  variance: Variance = "per_example"
  tail: Tail = "cdf"  # only read when side is "offline"
  center: Center = "median"


def online(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "E V"],
  *,
  variance: Variance = "per_example",
  center: Center = "median",
  block_size: int | None = None,
) -> Float[np.ndarray, "E"]:
  """Log-likelihood ratio of a target's scores, "in" against "out".

  mean over views of log N(s; center_in, sd_in) - log N(s; center_out, sd_out).

  Args:
    shadow_scores: float[M, E, V], finite logit-scaled confidences of the shadows.
    shadow_members: bool[M, E], which shadow trained on which example.
    target_scores: float[E, V], finite scores of the target on the same views.
    variance:
      "per_example": population variance of each example and view; needs two shadows on each side.
      "pooled": one variance for "in" and one for "out", the average of the per-example variances
        weighted by their counts. Steadier with fewer than about 64 shadows.
      "reference": what the public code calls fixed variance: one scalar, the variance of all "in"
        scores around their common mean, used on *both* sides. It counts differences between
        examples as noise; here to reproduce published numbers.
    center: "median" (public code) or "mean" (the paper's text).
    block_size: examples per block; None picks one. Changes memory, not the result.
  Returns:
    float64[E] on the host.
  Raises:
    ValueError: if shapes disagree, a score is not finite, an option is unknown, or an example has
      too few shadows on one side.
  """
  variant = Variant("online", variance, center=center)
  return attack(
    shadow_scores,
    shadow_members,
    target_scores[None],
    variants=[variant],
    block_size=block_size,
  )[0, 0]


def offline(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "E V"],
  *,
  tail: Tail = "cdf",
  variance: Variance = "per_example",
  center: Center = "median",
  block_size: int | None = None,
) -> Float[np.ndarray, "E"]:
  """How improbable a target's scores are for a model that did not train on the example.

  Only "out" shadows are read, so an attacker can train them before seeing the audited examples.

  Args:
    shadow_scores, shadow_members, target_scores, center, block_size: as `online`. The scores of
      "in" shadows are ignored (but must be finite).
    tail:
      "cdf": -log Pr[Z > s], Z ~ N(center_out, sd_out). This is the paper's one-sided test: a
        growing function of its 1 - Pr[Z > s] that does not saturate at one, where ties would
        hide the most exposed examples; over views the evidence adds up.
      "density": -log N(s; center_out, sd_out), the public code. Two-sided: an unusually *low*
        score also speaks for a member.
    variance: "per_example", "pooled" as `online`, or "reference": the variance of all "out" scores
      around their common mean (what the public code does when offline).
  Returns:
    float64[E] on the host.
  Raises:
    ValueError: as `online`, for the "out" side alone.
  """
  variant = Variant("offline", variance, tail, center)
  return attack(
    shadow_scores,
    shadow_members,
    target_scores[None],
    variants=[variant],
    block_size=block_size,
  )[0, 0]


def attack(
  shadow_scores: Float[ArrayLike, "M E V"],
  shadow_members: Bool[ArrayLike, "M E"],
  target_scores: Float[ArrayLike, "T E V"],
  *,
  variants: Sequence[Variant] = (Variant(),),
  left_out: Int[ArrayLike, "T K"] | None = None,
  block_size: int | None = None,
) -> Float[np.ndarray, "N T E"]:
  """Many targets and many variants at once; the sorting and the sums are shared.

  Args:
    shadow_scores, shadow_members: as `online`.
    target_scores: float[T, E, V].
    variants: N ways to score.
    left_out: int[T, K], for each target the K = 1 or 2 shadows that its attacker must not have: the
      target itself when the shadows audit each other, and perhaps the model trained on the
      complement. Two left-out shadows must be complements of each other. None: all shadows serve.
    block_size: as `online`.
  Returns:
    float64[N, T, E] on the host.
  Raises:
    ValueError: as `online`, or if `left_out` is not as described.
  """
  inputs = blocks.prepare(
    shadow_scores, shadow_members, target_scores, left_out=left_out, size=block_size
  )
  variants = tuple(variants)
  _check_variants(variants, inputs)
  result = np.empty((len(variants), *target_scores.shape[:2]))
  with jax.enable_x64(True):
    removed = None if inputs.left_out is None else jnp.asarray(inputs.left_out)
    shared, kept = None, {}
    if any(variant.variance != "per_example" for variant in variants):
      shared, kept = _shared_deviations(inputs, removed)
    for index, block in blocks.stream(inputs):
      sides = kept.pop(index.start) if kept else _sides(block, removed)
      scores = np.asarray(_score(block.target_scores, sides, shared, variants=variants))
      result[:, :, index] = scores[:, :, : index.stop - index.start]
  return result


class _Group(NamedTuple):
  """The "in" (or "out") scores of each column, summarised so that one can be taken away again.

  A column is one view of one example, L = B V of them: long rows are what vector units like.
  """

  count: Array  # int[1, L]
  mean: Array  # float64[1, L]
  squares: Array  # float64[1, L], sum of squared deviations from the mean
  ends: tuple[Array, Array]  # float64[1, L], smallest and largest
  num_at_ends: tuple[Array, Array]  # int[1, L], how many are equal to these
  ordered: Array  # [M, L], ascending, +inf behind the last


class _Normal(NamedTuple):
  """Normal distributions, leading axis T, or 1 when all targets share them."""

  count: Array  # int[T, L]
  mean: Array  # float64[T, L]
  median: Array  # float64[T, L]
  squares: Array  # float64[T, L], sum of squared deviations from the mean


class _Deviations(NamedTuple):
  """One standard deviation per target, for the variants that share it among all examples."""

  pooled_in: Array  # float64[T or 1]
  pooled_out: Array
  total_in: Array
  total_out: Array


@functools.partial(jax.jit, static_argnames=("variants",))
def _score(targets, sides, deviations, *, variants):
  """[T, B, V] -> float64[N, T, B]."""
  columns = targets.reshape(len(targets), -1).astype(jnp.float64)
  rows = [_score_columns(variant, columns, sides, deviations) for variant in variants]
  return jnp.stack([row.reshape(targets.shape).mean(axis=-1) for row in rows])


def _score_columns(variant, targets, sides, deviations):
  """One variant for all targets: float64[T, L]."""
  centers = [getattr(side, variant.center) for side in sides]
  if variant.variance == "per_example":
    spreads = [jnp.sqrt(side.squares / side.count) for side in sides]
  elif variant.variance == "pooled":
    spreads = [deviations.pooled_in[:, None], deviations.pooled_out[:, None]]
  elif variant.side == "online":
    spreads = [deviations.total_in[:, None]] * 2
  else:
    spreads = [deviations.total_out[:, None]] * 2
  z_in, z_out = [
    (targets - center) / (spread + MIN_DEVIATION)
    for center, spread in zip(centers, spreads, strict=True)
  ]
  log_spread_in, log_spread_out = [jnp.log(spread + MIN_DEVIATION) for spread in spreads]
  if variant.side == "online":
    return (z_out - z_in) * (z_out + z_in) / 2 + log_spread_out - log_spread_in
  if variant.tail == "cdf":
    return -jax.scipy.stats.norm.logsf(z_out)
  return jnp.square(z_out) / 2 + log_spread_out + np.log(2 * np.pi) / 2


@jax.jit
def _sides(block, left_out):
  """The normal distributions of "in" and "out" for each target (or for all alike)."""
  scores, members = _columns(block)
  chosen = (members, ~members)
  groups = [_group(scores, side) for side in chosen]
  if left_out is None:
    return [_whole(group) for group in groups]
  return [
    _without(group, *_leaving(scores[left_out], side[left_out]))
    for group, side in zip(groups, chosen, strict=True)
  ]


def _columns(block):
  """Shadow scores and members as [M, L]."""
  scores = block.shadow_scores
  members = jnp.broadcast_to(block.shadow_members[..., None], scores.shape)
  return scores.reshape(len(scores), -1), members.reshape(len(scores), -1)


def _leaving(scores, leaves):
  """The one of the K left-out scores that leaves a group, [T, L], and whether there is one."""
  first = jnp.argmax(leaves, axis=1)
  return jnp.take_along_axis(scores, first[:, None], axis=1)[:, 0], leaves.any(axis=1)


def _group(scores, chosen):
  count = chosen.sum(axis=0, keepdims=True)
  wide = scores.astype(jnp.float64)
  mean = jnp.where(chosen, wide, 0).sum(axis=0, keepdims=True) / jnp.maximum(count, 1)
  squares = jnp.where(chosen, jnp.square(wide - mean), 0).sum(axis=0, keepdims=True)
  smallest = jnp.where(chosen, scores, jnp.inf).min(axis=0, keepdims=True)
  largest = jnp.where(chosen, scores, -jnp.inf).max(axis=0, keepdims=True)
  num_at_ends = [(chosen & (scores == end)).sum(0, keepdims=True) for end in (smallest, largest)]
  return _Group(
    count=count,
    mean=mean,
    squares=jnp.where(smallest == largest, 0.0, squares),
    ends=(smallest.astype(jnp.float64), largest.astype(jnp.float64)),
    num_at_ends=tuple(num_at_ends),
    ordered=_sort(jnp.where(chosen, scores, jnp.inf)),
  )


def _sort(values):
  """Ascending along the first axis, by a bitonic network of whole-row minima and maxima.

  About fifty times faster than `jnp.sort` on CPU, for it is a few dozen passes of vector code.
  """
  num = len(values)
  size = 1 << (num - 1).bit_length()
  rest = values.shape[1:]
  if size > num:
    values = jnp.concatenate([values, jnp.full((size - num, *rest), jnp.inf, values.dtype)])
  width = 2
  while width <= size:
    halves = values.reshape(size // width, 2, width // 2, *rest)
    low, high = halves[:, 0], halves[:, 1, ::-1]
    low, high = jnp.minimum(low, high), jnp.maximum(low, high)[:, ::-1]
    values = jnp.stack([low, high], axis=1).reshape(size, *rest)
    step = width // 4
    while step:
      pairs = values.reshape(size // (2 * step), 2, step, *rest)
      low, high = jnp.minimum(pairs[:, 0], pairs[:, 1]), jnp.maximum(pairs[:, 0], pairs[:, 1])
      values = jnp.stack([low, high], axis=1).reshape(size, *rest)
      step //= 2
    width *= 2
  return values


def _take(ordered, rank):
  """The scores [1, L] at a rank int[1, L] per column, clipped to the ranks there are."""
  rank = jnp.clip(rank, 0, len(ordered) - 1)
  return jnp.take_along_axis(ordered, rank, axis=0).astype(jnp.float64)


def _whole(group):
  """The distribution of the whole group, the same for all targets."""
  n = group.count
  median = (_take(group.ordered, (n - 1) // 2) + _take(group.ordered, n // 2)) / 2
  return _Normal(n, group.mean, median, group.squares)


def _without(group, removed, is_removed):
  """The distribution of the group after one score is taken away, for each target.

  Order statistic k of the rest is that of the whole where it lies below the removed score, and
  number k + 1 of the whole otherwise. Mean and squares follow from the centered update (Welford
  backwards), whose rounding error is float64's times the squares before over the squares after.
  Where all of the rest are equal the squares are set to exactly zero.

  Args:
    group: n scores per column.
    removed: [T, L], the score to take away.
    is_removed: bool[T, L], whether it is in this group at all.
  """
  n, whole = group.count, _whole(group)
  removed = removed.astype(jnp.float64)
  middle = [_take(group.ordered, (n - 2) // 2 + i) for i in range(3)]
  lower = jnp.where(middle[0] < removed, middle[0], middle[1])
  upper = jnp.where(middle[1] < removed, middle[1], middle[2])
  median = jnp.where(n % 2 == 0, lower, (lower + upper) / 2)
  rest = jnp.maximum(n - 1, 1)
  offset = removed - group.mean
  squares = jnp.maximum(group.squares - jnp.square(offset) * (n / rest), 0)
  (smallest, largest), (num_smallest, num_largest) = group.ends, group.num_at_ends
  rest_is_equal = (smallest == largest) | jnp.where(
    removed == largest, num_smallest == rest, num_largest == rest
  )
  return _Normal(
    count=n - is_removed,
    mean=jnp.where(is_removed, group.mean - offset / rest, whole.mean),
    median=jnp.where(is_removed, median, whole.median),
    squares=jnp.where(is_removed, jnp.where(rest_is_equal, 0.0, squares), whole.squares),
  )


def _shared_deviations(inputs, left_out):
  """First pass over the blocks: the standard deviations that all examples share.

  Also what was fitted to each block, by its first example, to be used again: 64 bytes per example
  and view when all targets share it, but too large to keep when each target has its own.
  """
  first = np.asarray(inputs.shadow_scores[:, : inputs.size])
  pivot = jnp.float64(first.mean(dtype=np.float64))
  sums, kept = None, {}
  for index, block in blocks.stream(inputs):
    sides = _sides(block, left_out)
    if left_out is None:
      kept[index.start] = sides
    more = _moments(block, sides, pivot)
    sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
  pooled_in, pooled_out = [jnp.sqrt(within / total[0]) for within, total in sums]
  total_in, total_out = [
    jnp.sqrt(jnp.maximum(total[2] / total[0] - jnp.square(total[1] / total[0]), 0))
    for _, total in sums
  ]
  return _Deviations(pooled_in, pooled_out, total_in, total_out), kept


@jax.jit
def _moments(block, sides, pivot):
  """For "in" and "out": squares within columns [T or 1]; moments 0, 1, 2 of all scores [3, T or 1].

  The moments are taken about `pivot`, a value amid the scores, so that they do not cancel.
  """
  weights = jnp.repeat(block.weights, block.shadow_scores.shape[-1])[None]
  sums = []
  for side in sides:
    within, count = side.squares * weights, side.count * weights
    offset = side.mean - pivot
    powers = [count, count * offset, within + count * jnp.square(offset)]
    sums.append((within.sum(axis=1), jnp.stack([power.sum(axis=1) for power in powers])))
  return sums


def _check_variants(variants, inputs):
  for variant in variants:
    allowed = zip(Variant._fields, variant, Variant.__annotations__.values(), strict=True)
    for name, value, literal in allowed:
      if value not in literal.__args__:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(literal.__args__)}.")
    blocks.check_counts(
      inputs,
      sides=("in", "out") if variant.side == "online" else ("out",),
      needed=2 if variant.variance == "per_example" else 1,
      reason=f"variance {variant.variance!r}",
    )
