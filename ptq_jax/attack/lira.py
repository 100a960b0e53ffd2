"""Likelihood-ratio attack (LiRA): how a target's score on an example compares with shadow models'.

For each example and view the scores of the shadows that trained on the example ("in") and of those
that did not ("out") are each described by a normal distribution: a center (median, or mean) and a
standard deviation (population formula around the mean). `online` compares both; `offline` only asks
how unusual the target's score is among "out". Views are averaged. HIGHER SCORE MEANS MEMBER.

There is one core, `normals` and `log_ratio` (or `surprise`), in plain `jax.numpy`, and two ways in:

- `online` and `offline` on JAX arrays stay on their device and in their type (at least float32),
  and run under `jax.jit`, `jax.vmap` over targets, and `jax.grad` with respect to target scores.
  What is refused with an error when values are known gives NaN when they are traced.
- NumPy arrays and lists are computed in float64 on the host and give NumPy; so does `attack`, for
  many targets. It streams over blocks of examples, so `shadow_scores` may be a `numpy.memmap`
  larger than memory. A block is one compiled call for all examples, views, targets and variants;
  medians come from a sorting network, and leaving one shadow out costs no second sort (see
  `_without`).

Reference: Carlini et al. 2022, "Membership Inference Attacks From First Principles",
arXiv:2112.03570.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from ptq_jax.attack import blocks
from ptq_jax.base import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Int,
  Nested,
  Shaped,
  as_members,
  is_traced,
  on_device,
)

MIN_DEVIATION = 1e-30
"""Added to every standard deviation, as the public code does. Shadows that agree exactly then give
a huge but finite density ratio: the target counts for the side whose center is nearer. In float32
it is 1e-15, for the square of its inverse must be finite."""

Variance = Literal["per_example", "pooled", "shrunk", "reference"]
Tail = Literal["cdf", "density"]
Center = Literal["median", "mean"]


class Variant(NamedTuple):
  """One way to turn the two normal distributions into a score."""

  side: Literal["online", "offline"] = "online"
  variance: Variance = "per_example"
  tail: Tail = "cdf"  # only read when side is "offline"
  center: Center = "median"


def online(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "E *V"] | Nested,
  *,
  variance: Variance = "per_example",
  center: Center = "median",
  block_size: int | None = None,
) -> Float[ArrayLike, "E"]:
  """Log-likelihood ratio of a target's scores, "in" against "out".

  mean over views of log N(s; center_in, sd_in) - log N(s; center_out, sd_out).

  Args:
    shadow_scores: float[M, E, V] (or [M, E]), finite logit-scaled confidences of the shadows.
    shadow_members: bool[M, E], which shadow trained on which example.
    target_scores: float[E, V] (or [E]), finite scores of the target on the same views.
    variance:
      "per_example": population variance of each example and view; needs two shadows on each side.
      "pooled": one variance for "in" and one for "out": squared deviations from the mean of each
        example and view, summed, over their degrees of freedom. Steadier with fewer than about 64
        shadows.
      "shrunk": between the two: (f s^2 + squares) / (f + n - 1), the mean of the posterior under a
        normal-inverse-gamma prior of f degrees of freedom and variance s^2, both estimated from all
        examples by the moments of the logarithm of their variances. Where the examples' variances
        differ no more than chance lets them it is "pooled", and with many shadows "per_example".
      "reference": what the public code calls fixed variance: one scalar, the variance of all "in"
        scores around their common mean, used on *both* sides. It counts differences between
        examples as noise; here to reproduce published numbers.
    center: "median" (public code) or "mean" (the paper's text).
    block_size: examples per block of host arrays; None picks one. Changes memory, not the result.
  Returns:
    [E]; of NumPy arrays or lists float64 on the host, of JAX arrays their type, on their device.
    In float32 the ratio is exact to about 1e-5 of the squared distance from the centers in
    deviations, (s - center)^2 / variance.
  Raises:
    ValueError: if shapes disagree, a score is not finite, members are not 0 and 1, an option is
      unknown, or an example has too few shadows on one side ("pooled" and "shrunk": if no side of
      any example has two). Where values are traced the scores concerned are NaN instead.
  Reference: arXiv:2603.11799 ("BaVarIA-n") and Smyth 2004, "Linear models and empirical Bayes
    methods", for "shrunk".
  """
  variant = Variant("online", variance, center=center)
  return _one(shadow_scores, shadow_members, target_scores, variant, block_size)


def offline(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "E *V"] | Nested,
  *,
  tail: Tail = "cdf",
  variance: Variance = "per_example",
  center: Center = "median",
  block_size: int | None = None,
) -> Float[ArrayLike, "E"]:
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
    variance: "per_example", "pooled", "shrunk" as `online`, or "reference": the variance of all
      "out" scores around their common mean (what the public code does when offline).
  Returns:
    [E], as `online`.
  Raises:
    ValueError: as `online`, for the "out" side alone.
  """
  variant = Variant("offline", variance, tail, center)
  return _one(shadow_scores, shadow_members, target_scores, variant, block_size)


def attack(
  shadow_scores: Shaped[ArrayLike, "M E *V"] | Nested,
  shadow_members: Shaped[ArrayLike, "M E"] | Nested,
  target_scores: Shaped[ArrayLike, "T E *V"] | Nested,
  *,
  variants: Sequence[Variant] = (Variant(),),
  left_out: Int[ArrayLike, "T K *E"] | None = None,
  block_size: int | None = None,
) -> Float[np.ndarray, "N T E"]:
  """Many targets and many variants at once, on the host; the sorting and the sums are shared.

  Args:
    shadow_scores, shadow_members: as `online`.
    target_scores: float[T, E, V] (or [T, E]).
    variants: N ways to score.
    left_out: int[T, K] or int[T, K, E], for each target (and example) the K = 1 or 2 shadows that
      its attacker must not have: the target itself when the shadows audit each other, and perhaps
      one of the other side. Of two, one trained on the example and one did not. None: all serve.
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
  result = np.empty((len(variants), *inputs.target_scores.shape[:2]))
  with jax.enable_x64(True):
    sums, kept = None, {}
    if any(variant.variance != "per_example" for variant in variants):
      sums, kept = _all_moments(inputs)
      _check_freedom(variants, sums)
    shared = None if sums is None else _spreads(sums)
    for index, block in blocks.stream(inputs):
      sides = kept.pop(index.start) if kept else _normals(block)
      scores = np.asarray(_score(block.target_scores, sides, shared, variants=variants))
      result[:, :, index] = scores[:, :, : index.stop - index.start]
  return result


class Normal(NamedTuple):
  """Normal distributions of one side, each array [..., E, V] (or of any trailing shape)."""

  count: Array  # int, shadows
  mean: Array
  median: Array
  squares: Array  # sum of squared deviations from the mean


class Spread(NamedTuple):
  """What all examples of one side tell about its variance; scalars, or one per target."""

  pooled: Array  # variance around each example's mean
  total: Array  # variance around the common mean
  freedom: Array  # degrees of freedom of the prior: how much the examples' variances agree
  typical: Array  # variance of the prior


def normals(
  shadow_scores: Shaped[Array, "M E *V"], shadow_members: Bool[Array, "M E"]
) -> tuple[Normal, Normal]:
  """The "in" and "out" normals of every example and view, in the type of the scores.

  Plain `jax.numpy`, for use inside other code: nothing is checked. A side without a shadow has a
  meaningless center.
  """
  dtype = jnp.promote_types(shadow_scores.dtype, jnp.float32)
  chosen = jnp.broadcast_to(
    jnp.expand_dims(shadow_members, range(2, shadow_scores.ndim)), shadow_scores.shape
  )
  groups = [_whole(_group(shadow_scores, side, dtype)) for side in (chosen, ~chosen)]
  return tuple(jax.tree.map(lambda leaf: leaf[0], group) for group in groups)


def spread(
  normal: Normal, *, num_models: int, weights: Float[Array, "..."] | None = None
) -> Spread:
  """The variance that all examples of one side share, and how far to trust it.

  Args:
    normal: one side, arrays [..., E, V].
    num_models: M, no count is larger.
    weights: broadcast to the arrays; None counts all alike.
  """
  weights = jnp.ones_like(normal.mean) if weights is None else weights
  pivot = jnp.mean(normal.mean)
  shape = (1, -1)
  columns = Normal(*(leaf.reshape(shape) for leaf in normal))
  sums = _side_moments(columns, jnp.broadcast_to(weights, normal.mean.shape).reshape(shape), pivot,
                       num_models)  # fmt: skip
  return jax.tree.map(lambda leaf: leaf[0], _spread(sums))


def log_ratio(
  target_scores: Float[Array, "..."],
  inside: Normal,
  outside: Normal,
  variances: Sequence[Array] | None = None,
  *,
  center: Center = "median",
) -> Float[Array, "..."]:
  """log N(s; in) - log N(s; out), elementwise.

  Args:
    target_scores: the target's scores on the examples and views of the normals.
    inside, outside: as `normals` gives them.
    variances: of both sides, broadcast; None takes each example's own population variance.
    center: as `online`.
  """
  (z_in, log_in), (z_out, log_out) = [
    _standardised(target_scores, side, None if variances is None else variances[i], center)
    for i, side in enumerate((inside, outside))
  ]
  return (z_out - z_in) * (z_out + z_in) / 2 + log_out - log_in


def surprise(
  target_scores: Float[Array, "..."],
  outside: Normal,
  variance: Array | None = None,
  *,
  tail: Tail = "cdf",
  center: Center = "median",
) -> Float[Array, "..."]:
  """How improbable scores are under "out", elementwise; see `offline`."""
  z, log_deviation = _standardised(target_scores, outside, variance, center)
  if tail == "cdf":
    return -jax.scipy.stats.norm.logsf(z)
  return jnp.square(z) / 2 + log_deviation + np.log(2 * np.pi) / 2


def _one(shadow_scores, shadow_members, target_scores, variant, block_size):
  """One target: on the device of JAX arrays, else on the host."""
  if not on_device(shadow_scores, shadow_members, target_scores):
    targets = np.asarray(target_scores)[None]
    return attack(
      shadow_scores, shadow_members, targets, variants=[variant], block_size=block_size
    )[0, 0]
  if block_size is not None and block_size < 1:
    raise ValueError(f"block_size is {block_size}; it must be at least 1 example.")
  _check_options(variant)
  members = jnp.asarray(as_members(shadow_members, name="shadow_members"))
  shadows, targets = blocks.with_views(shadow_scores, jnp.asarray(target_scores)[None])
  blocks.check_shapes(shadows, members, targets)
  shadows, targets = jnp.asarray(shadows), jnp.asarray(targets)
  scores, counts, degrees = _score_one(shadows, members, targets, variant=variant)
  if not is_traced(shadows, members, targets):
    for name, array in (("shadow", shadows), ("target", targets)):
      if not bool(jnp.isfinite(array).all()):
        raise ValueError(f"{name} scores are NaN or infinite; attacks with shadows need finite.")
    sides, needed = _needs(variant)
    for side in sides:
      blocks.check_enough(np.asarray(counts[side]), side, needed, _reason(variant))
    if variant.variance in ("pooled", "shrunk"):
      _check_degrees({side: np.asarray(degrees[side]) for side in sides}, variant)
  return scores


@functools.partial(jax.jit, static_argnames=("variant",))
def _score_one(shadows, members, targets, *, variant):
  """[M, E, V], [M, E] and [1, E, V] -> [E] with NaN where something lacks; counts and degrees."""
  dtype = jnp.promote_types(jnp.promote_types(shadows.dtype, targets.dtype), jnp.float32)
  finite = jnp.isfinite(shadows).all(axis=(0, 2)) & jnp.isfinite(targets).all(axis=(0, 2))
  block = blocks.Block(shadows, members, targets, jnp.ones(members.shape[1], dtype))
  sides = _normals(block)
  spreads = None
  if variant.variance != "per_example":
    spreads = _spreads(_moments(block, sides, jnp.mean(shadows.astype(dtype))))
  scores = _score(targets.astype(dtype), sides, spreads, variants=(variant,))[0, 0]
  counts = {"in": members.sum(axis=0), "out": (~members).sum(axis=0)}
  degrees = {side: jnp.maximum(count - 1, 0).sum() for side, count in counts.items()}
  names, needed = _needs(variant)
  fine = finite
  for side in names:
    fine &= counts[side] >= needed
    if variant.variance in ("pooled", "shrunk"):
      fine &= degrees[side] >= 1
  return jnp.where(fine, scores, jnp.nan), counts, degrees


class _Group(NamedTuple):
  """The "in" (or "out") scores of each column, summarised so that one can be taken away again.

  A column is one view of one example, L = B V of them: long rows are what vector units like.
  """

  count: Array  # int[1, L]
  mean: Array  # [1, L], float64 while streaming, as all that follows
  squares: Array  # [1, L], sum of squared deviations from the mean
  ends: tuple[Array, Array]  # [1, L], smallest and largest
  num_at_ends: tuple[Array, Array]  # int[1, L], how many are equal to these
  ordered: Array  # [M, L], ascending, +inf behind the last


class _Moments(NamedTuple):
  """Sums over the examples and views of one side, [T or 1] each."""

  within: Array  # squared deviations from the mean of each column
  powers: Array  # [3, T or 1], moments 0, 1, 2 of all scores about a pivot amid them
  freedom: Array  # degrees of freedom: n - 1 of each column
  logs: Array  # [4, T or 1], for the prior: columns; their log variances less what chance expects,
  # and squared; the variance that chance gives the logarithm


@functools.partial(jax.jit, static_argnames=("variants",))
def _score(targets, sides, spreads, *, variants):
  """[T, B, V] -> [N, T, B]."""
  columns = targets.reshape(len(targets), -1).astype(sides[0].mean.dtype)
  rows = [_score_columns(variant, columns, sides, spreads) for variant in variants]
  return jnp.stack([row.reshape(targets.shape).mean(axis=-1) for row in rows])


def _score_columns(variant, targets, sides, spreads):
  """One variant for all targets: [T, L]."""
  variances = None
  if variant.variance == "reference":
    chosen = spreads[0] if variant.side == "online" else spreads[1]
    variances = [chosen.total[:, None]] * 2
  elif variant.variance != "per_example":
    pairs = zip(sides, spreads, strict=True)
    variances = [_variance(side, wide, variant.variance) for side, wide in pairs]
  if variant.side == "online":
    return log_ratio(targets, *sides, variances, center=variant.center)
  own = None if variances is None else variances[1]
  return surprise(targets, sides[1], own, tail=variant.tail, center=variant.center)


def _variance(side, wide, name):
  """Pooled [T or 1, 1], or shrunk [T or 1, L], as `online` defines them."""
  wide = Spread(*(part[:, None] for part in wide))
  if name == "pooled":
    return wide.pooled
  return (wide.freedom * wide.typical + side.squares) / (wide.freedom + side.count - 1)


def _standardised(scores, normal, variance, center):
  """Distance from the center in deviations, and the logarithm of the deviation."""
  if variance is None:
    variance = normal.squares / normal.count
  floor = MIN_DEVIATION if normal.mean.dtype == jnp.float64 else 1e-15
  known = jnp.where(variance > 0, variance, 1)  # the root has no slope at zero
  deviation = jnp.where(variance > 0, jnp.sqrt(known), variance) + floor
  return (scores - getattr(normal, center)) / deviation, jnp.log(deviation)


@jax.jit
def _normals(block):
  """The normal distributions of "in" and "out" for each target (or for all alike)."""
  scores, members = _columns(block)
  chosen, dtype = (members, ~members), block.weights.dtype
  groups = [_group(scores, side, dtype) for side in chosen]
  if block.left_out is None:
    return [_whole(group) for group in groups]
  left_scores, left_members = [_left_rows(array, block) for array in (scores, members)]
  sides = (left_members, ~left_members)
  return [
    _without(group, *_leaving(left_scores, side)) for group, side in zip(groups, sides, strict=True)
  ]


def _left_rows(columns, block):
  """What the left-out shadows have in each column: [M, L] -> [T, K, L]."""
  if block.left_out.ndim == 2:
    return columns[block.left_out]
  shadows = jnp.repeat(block.left_out, columns.shape[1] // block.left_out.shape[-1], axis=-1)
  return columns[shadows, jnp.arange(columns.shape[1])[None, None]]


def _columns(block):
  """Shadow scores and members as [M, L]."""
  scores = block.shadow_scores
  members = jnp.broadcast_to(block.shadow_members[..., None], scores.shape)
  return scores.reshape(len(scores), -1), members.reshape(len(scores), -1)


def _leaving(scores, leaves):
  """The one of the K left-out scores that leaves a group, [T, L], and whether there is one."""
  first = jnp.argmax(leaves, axis=1)
  return jnp.take_along_axis(scores, first[:, None], axis=1)[:, 0], leaves.any(axis=1)


def _group(scores, chosen, dtype):
  count = chosen.sum(axis=0, keepdims=True)
  wide = scores.astype(dtype)
  mean = jnp.where(chosen, wide, 0).sum(axis=0, keepdims=True) / jnp.maximum(count, 1)
  squares = jnp.where(chosen, jnp.square(wide - mean), 0).sum(axis=0, keepdims=True)
  smallest = jnp.where(chosen, scores, jnp.inf).min(axis=0, keepdims=True)
  largest = jnp.where(chosen, scores, -jnp.inf).max(axis=0, keepdims=True)
  num_at_ends = [(chosen & (scores == end)).sum(0, keepdims=True) for end in (smallest, largest)]
  return _Group(
    count=count,
    mean=mean,
    squares=jnp.where(smallest == largest, 0.0, squares),
    ends=(smallest.astype(dtype), largest.astype(dtype)),
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


def _take(group, rank):
  """The scores [1, L] at a rank int[1, L] per column, clipped to the ranks there are."""
  rank = jnp.clip(rank, 0, len(group.ordered) - 1)
  return jnp.take_along_axis(group.ordered, rank, axis=0).astype(group.mean.dtype)


def _whole(group):
  """The distribution of the whole group, the same for all targets."""
  n = group.count
  median = (_take(group, (n - 1) // 2) + _take(group, n // 2)) / 2
  return Normal(n, group.mean, median, group.squares)


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
  removed = removed.astype(group.mean.dtype)
  middle = [_take(group, (n - 2) // 2 + i) for i in range(3)]
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
  return Normal(
    count=n - is_removed,
    mean=jnp.where(is_removed, group.mean - offset / rest, whole.mean),
    median=jnp.where(is_removed, median, whole.median),
    squares=jnp.where(is_removed, jnp.where(rest_is_equal, 0.0, squares), whole.squares),
  )


def _all_moments(inputs):
  """First pass over the blocks: what the variances that all examples share rest on.

  Also what was fitted to each block, by its first example, to be used again: 64 bytes per example
  and view when all targets share it, but too large to keep when each target has its own.
  """
  first = np.asarray(inputs.shadow_scores[:, : inputs.size])
  pivot = jnp.float64(first.mean(dtype=np.float64))
  sums, kept = None, {}
  for index, block in blocks.stream(inputs):
    sides = _normals(block)
    if block.left_out is None:
      kept[index.start] = sides
    more = _moments(block, sides, pivot)
    sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
  return sums, kept


@jax.jit
def _moments(block, sides, pivot):
  """For "in" and "out" the `_Moments` of one block."""
  weights = jnp.repeat(block.weights, block.shadow_scores.shape[-1])[None]
  return [_side_moments(side, weights, pivot, len(block.shadow_scores)) for side in sides]


def _side_moments(side, weights, pivot, num_models):
  within, count = side.squares * weights, side.count * weights
  offset = side.mean - pivot
  powers = [count, count * offset, within + count * jnp.square(offset)]
  degrees = jnp.maximum(side.count - 1, 0)
  used = weights * ((degrees > 0) & (side.squares > 0))
  # Of a variance with f degrees of freedom: mean and variance of log(chi^2 / f), by f.
  half = np.maximum(np.arange(num_models + 1), 1) / 2
  tables = [scipy.special.digamma(half) - np.log(half), scipy.special.polygamma(1, half)]
  expected, chance = [jnp.asarray(table, weights.dtype)[degrees] for table in tables]
  safe = jnp.where(used > 0, side.squares / jnp.maximum(degrees, 1), 1)
  excess = jnp.log(safe) - expected
  logs = [used, used * excess, used * jnp.square(excess), used * chance]
  return _Moments(
    within=within.sum(axis=1),
    powers=jnp.stack([power.sum(axis=1) for power in powers]),
    freedom=(degrees * weights).sum(axis=1),
    logs=jnp.stack([jnp.broadcast_to(part, within.shape).sum(axis=1) for part in logs]),
  )


@jax.jit
def _spreads(sums):
  return [_spread(side) for side in sums]


def _spread(sums):
  """The `Spread` [T or 1] of one side.

  Prior by the method of moments: log variances scatter by trigamma(n - 1 over 2) from chance, and
  by trigamma(freedom / 2) more if the true variances differ (Smyth 2004, section 6).
  """
  count, first, second, chance = sums.logs
  number = jnp.maximum(count, 1)
  mean = first / number
  scatter = jnp.maximum(second / number - jnp.square(mean), 0) * number / jnp.maximum(count - 1, 1)
  half = _inverse_trigamma(scatter - chance / number)
  typical = jnp.exp(mean + jax.scipy.special.digamma(half) - jnp.log(half))
  total, center, squares = sums.powers
  return Spread(
    pooled=sums.within / sums.freedom,
    total=jnp.maximum(squares / total - jnp.square(center / total), 0),
    freedom=2 * half,
    typical=jnp.where(count > 0, typical, 0),
  )


def _inverse_trigamma(value):
  """x with trigamma(x) = value by Newton steps (Smyth 2004, appendix), within [1e-3, 1e5]."""
  goal = jnp.clip(value, 1e-5, 1e6)

  def step(_, x):
    trigamma, slope = _trigamma(x)
    return x + trigamma * (1 - trigamma / goal) / slope

  return jax.lax.fori_loop(0, 8, step, 0.5 + 1 / goal)


def _trigamma(x):
  """trigamma(x) and its slope: six steps of the recurrence, then the asymptotic series."""
  steps = [x + k for k in range(6)]
  y = 1 / (x + 6)
  square = jnp.square(y)
  tail = y + square / 2 + y * square * (1 / 6 - square * (1 / 30 - square * (1 / 42 - square / 30)))
  cubes = 1 / 2 - square * (1 / 6 - square * (1 / 6 - 0.3 * square))
  slope = -square - y * square - square**2 * cubes
  return sum((z**-2 for z in steps), tail), slope - 2 * sum(z**-3 for z in steps)


def _needs(variant):
  """The sides that a variant reads, and how many shadows each example needs there."""
  sides = ("in", "out") if variant.side == "online" else ("out",)
  return sides, 2 if variant.variance == "per_example" else 1


def _reason(variant):
  return f"variance {variant.variance!r}"


def _check_options(variant):
  allowed = zip(Variant._fields, variant, Variant.__annotations__.values(), strict=True)
  for name, value, literal in allowed:
    if value not in literal.__args__:
      raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(literal.__args__)}.")


def _check_variants(variants, inputs):
  for variant in variants:
    _check_options(variant)
    sides, needed = _needs(variant)
    blocks.check_counts(inputs, sides=sides, needed=needed, reason=_reason(variant))


def _check_freedom(variants, sums):
  for variant in variants:
    if variant.variance in ("pooled", "shrunk"):
      sides = {"in": sums[0].freedom, "out": sums[1].freedom}
      used = {side: np.asarray(sides[side]) for side in _needs(variant)[0]}
      _check_degrees(used, variant)


def _check_degrees(degrees, variant):
  for side, found in degrees.items():
    if found.min() < 1:
      raise ValueError(
        f"{side!r} shadows have fewer than one degree of freedom: no example has two of them, so "
        f"{_reason(variant)} is unknown; train more shadows."
      )
