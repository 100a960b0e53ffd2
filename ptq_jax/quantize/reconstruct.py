"""One loop that learns the rounding of some layers so that a unit's output changes least.

AdaRound's mini-batch form gives it a layer, BRECQ a block. The unit is a function
`run(weights, variables, inputs) -> outputs` of one model and one batch; its weights are replaced
by soft-rounded ones and all alphas are optimised jointly by Adam. Many problems of equal shapes
(models under plans) run stacked.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ptq_jax.base import Array, Bool, Float, Int, Key, Keys, PyTree
from ptq_jax.models import conv
from ptq_jax.quantize import capture, grid, rounding
from ptq_jax.quantize.grid import Grid

UNDECIDED = 0.01
"""A loop may end once no more than this share of the weights has h between 1e-4 and 1 - 1e-4."""

STEPS_PER_CALL = 50  # steps in one dispatch, and between two looks at whether to stop


class Schedule(NamedTuple):
  """How alpha is optimised. Hashable: may be a static argument of jit."""

  num_steps: int
  """Most steps that are taken; the schedule of beta spans them."""
  learning_rate: float
  """Of Adam, in units of alpha."""
  weight: float
  """lambda, the factor of the rounding term (equation 21 of arXiv:2004.10568)."""
  batch_size: int = 32
  """Images per step; the second-moment form does not use it."""
  warmup: float = 0.2
  """Share of the steps without the rounding term."""
  beta_start: float = 20.0
  beta_end: float = 2.0
  decay_rates: tuple[float, float] = (0.9, 0.999)
  """Of Adam's averages of gradients and of their squares."""

  def optimizer(self) -> optax.GradientTransformation:
    """Adam on alpha."""
    return optax.adam(self.learning_rate, *self.decay_rates)


class Problem(NamedTuple):
  """One unit of one model, or stacked ones with a leading axis N on every leaf."""

  weights: dict[str, Array]
  """Full-precision kernel per layer path."""
  grids: dict[str, Grid]
  """Grid per layer path."""
  variables: PyTree
  """Whatever else `run` needs."""
  inputs: Array
  """[n, ...] of the unit in the network quantized so far."""
  targets: Array
  """[n, ..., channels] outputs of the unit in full precision."""
  importance: Array | None = None
  """Weights of the squared errors, of the targets' shape; None: all 1."""


@runtime_checkable
class Run(Protocol):
  """The unit as a function, hashable, so that equal units share one compilation."""

  def __call__(self, weights: dict[str, Array], variables: PyTree, inputs: Array) -> Array: ...


class _State(NamedTuple):
  """Carry of the loop, leading axis N."""

  alphas: dict[str, Array]
  optimizer: optax.OptState
  steps: Array  # taken so far
  done: Array  # bool: decided, frozen


def minimize(
  run: Run,
  problems: Problem,
  keys: Keys,
  *,
  schedule: Schedule,
  stop: str = "plateau",
  steps_per_call: int = STEPS_PER_CALL,
) -> tuple[dict[str, Array], np.ndarray]:
  """Learns the alphas of stacked problems, leading axis N everywhere.

  Args:
    keys: [N]; step i of a problem draws its batch from `fold_in(key, i)`.
    stop: "plateau" freezes a problem once nearly all its weights have decided (see `UNDECIDED`):
      their gradient is 0 from there. "never" runs all steps.
    steps_per_call: 1 where a loop inside the compiled step is slow (convolutions on CPU).
  Returns:
    alphas per layer path, and the steps taken, int [N].
  """
  check_stop(stop)
  state = _start(schedule, problems.weights, problems.grids)
  first = 0
  while first < schedule.num_steps:
    count = min(steps_per_call, schedule.num_steps - first)
    state = _advance(run, schedule, count, problems, keys, state, first)
    first += count
    if stop == "plateau" and (first % STEPS_PER_CALL == 0):
      state = state._replace(done=_all_decided(state.alphas))
      if bool(state.done.all()):
        break
  return state.alphas, np.asarray(state.steps)


def loss(
  run: Run,
  problem: Problem,
  alphas: dict[str, Array],
  index: Int[Array, " batch"],
  *,
  weight: float | Float[Array, ""],
  beta: float | Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Reconstruction error of a batch of one problem plus the weighted rounding term.

  Returns:
    The loss and its gradient with respect to the alphas.
  """
  importance = None if problem.importance is None else problem.importance[index]

  def total(alphas):
    weights = {
      path: rounding.soft_weights(problem.weights[path], alpha, problem.grids[path])
      for path, alpha in alphas.items()
    }
    outputs = run(weights, problem.variables, problem.inputs[index])
    terms = [rounding.regularizer(alpha, beta=beta) for alpha in alphas.values()]
    return output_error(outputs, problem.targets[index], importance) + weight * sum(terms)

  return jax.value_and_grad(total)(alphas)


def output_error(
  outputs: Float[Array, "*n channels"],
  targets: Float[Array, "*n channels"],
  importance: Float[Array, "*n channels"] | None = None,
) -> Float[Array, ""]:
  """Squared error, summed over channels, mean over images and pixels."""
  squares = (outputs.astype(jnp.float32) - targets) ** 2
  if importance is not None:
    squares = squares * importance
  return jnp.mean(jnp.sum(squares, axis=-1))


def total_error(
  run: Run, problems: Problem, weights: Mapping[str, Array], *, batch_size: int
) -> Float[np.ndarray, " N"]:
  """`output_error` of stacked problems on all their images, with the given kernels [N, ...]."""
  num_images = problems.inputs.shape[1]
  total = np.zeros(len(problems.inputs))
  for index in capture.batches(np.arange(num_images), batch_size):
    total += len(index) * np.asarray(_errors(run, problems, dict(weights), index), np.float64)
  return total / num_images


def finish(
  run: Run, problems: Problem, alphas: Mapping[str, Array], *, batch_size: int
) -> tuple[dict[str, Array], np.ndarray, np.ndarray]:
  """Rounds stacked problems, or keeps nearest rounding where that is better.

  Returns:
    Kernels [N, ...] per layer path, and the errors [N] of nearest rounding and of the result.
  """
  rounded, nearest = _candidates(problems, dict(alphas))
  before, after = (
    total_error(run, problems, weights, batch_size=batch_size) for weights in (nearest, rounded)
  )
  return _choose(after <= before, rounded, nearest), before, np.minimum(before, after)


def rounding_term(
  step: int | Int[Array, ""], schedule: Schedule
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Factor of the rounding term (0 during the warm-up) and beta, at a step counted from 1."""
  options = {"num_steps": schedule.num_steps, "warmup": schedule.warmup}
  weight = jnp.where(rounding.in_warmup(step, **options), 0.0, schedule.weight)
  return weight, rounding.beta(step, start=schedule.beta_start, end=schedule.beta_end, **options)


def decided(alphas: PyTree, *, share: float = UNDECIDED) -> Bool[Array, ""]:
  """Whether at most a share of the weights still has h more than 1e-4 away from 0 and 1."""
  undecided, total = 0, 0
  for alpha in jax.tree.leaves(alphas):
    h = rounding.soft(alpha)
    undecided += jnp.sum((h > 1e-4) & (h < 1 - 1e-4))
    total += h.size
  return (undecided <= share * total).astype(bool)  # strong type, or callers compile twice


def draw(key: Key, *, num_images: int, batch_size: int) -> Int[Array, " batch"]:
  """A random batch without repetition, every image as likely as any other.

  One image from each of `batch_size` stretches of the images on a ring, turned at random: far
  cheaper than a permutation for every problem at every step.
  """
  batch_size = min(batch_size, num_images)
  place, turn = jax.random.split(key)
  ends = jnp.asarray(np.linspace(0, num_images, batch_size + 1).astype(np.int32))
  first, length = ends[:-1], jnp.diff(ends)
  offset = (jax.random.uniform(place, (batch_size,)) * length).astype(jnp.int32)
  shift = jax.random.randint(turn, (), 0, num_images)
  return (first + jnp.minimum(offset, length - 1) + shift) % num_images


def check_stop(stop: str) -> None:
  """Raises ValueError for an unknown way to stop."""
  if stop not in ("plateau", "never"):
    raise ValueError(f'stop must be "plateau" or "never", got {stop!r}.')


@functools.partial(jax.jit, static_argnums=0)
def _start(schedule, weights, grids):
  def one(weights, grids):
    alphas = {path: rounding.initial_alpha(weights[path], grids[path]) for path in weights}
    zero = jnp.zeros((), jnp.int32)
    return _State(alphas, schedule.optimizer().init(alphas), zero, zero > 0)

  return jax.vmap(one)(weights, grids)


@jax.jit
def _all_decided(alphas):
  return jax.vmap(decided)(alphas)


@functools.partial(conv.jit, static_argnums=(0, 1, 2), donate_argnums=(5,))
def _advance(run, schedule, count, problems, keys, state, first):
  """`count` steps of every problem; those that are done stay as they are."""
  optimizer = schedule.optimizer()

  def one_step(problem, key, state, i):
    step = first + i + 1
    num_images = len(problem.inputs)
    index = draw(
      jax.random.fold_in(key, step), num_images=num_images, batch_size=schedule.batch_size
    )
    weight, beta = rounding_term(step, schedule)
    _, gradient = loss(run, problem, state.alphas, index, weight=weight, beta=beta)
    updates, memory = optimizer.update(gradient, state.optimizer)
    alphas = optax.apply_updates(state.alphas, updates)
    return _State(alphas, memory, state.steps + 1, state.done)

  def one(problem, key, state):
    if count == 1:
      end = one_step(problem, key, state, 0)
    else:
      end, _ = jax.lax.scan(
        lambda s, i: (one_step(problem, key, s, i), None), state, jnp.arange(count)
      )
    return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, end)

  return jax.vmap(one)(problems, keys, state)


@functools.partial(conv.jit, static_argnums=0)
def _errors(run, problems, weights, index):
  def one(problem, weights):
    importance = None if problem.importance is None else problem.importance[index]
    outputs = run(weights, problem.variables, problem.inputs[index])
    return output_error(outputs, problem.targets[index], importance)

  return jax.vmap(one)(problems, weights)


@jax.jit
def _choose(better, rounded, nearest):
  """The rounded kernels of the problems that are better for it, and the nearest of the others."""
  choose = jax.vmap(jnp.where)
  return jax.tree.map(lambda new, old: choose(better, new, old), rounded, nearest)


@jax.jit
def _candidates(problems, alphas):
  """Kernels of stacked problems rounded as learned, and to the nearest level, as they are kept."""

  def one(weights, grids, alphas):
    hard = {p: rounding.hard_weights(weights[p], a, grids[p]) for p, a in alphas.items()}
    near = {p: grid.nearest(kernel, grids[p]) for p, kernel in weights.items()}
    return [{p: grid.kept(found[p], weights[p].dtype) for p in found} for found in (hard, near)]

  return jax.vmap(one)(problems.weights, problems.grids, alphas)
