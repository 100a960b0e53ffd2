"""SGD and Muon, and learning rates over the steps of a training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib


def cosine(*, peak: float, epochs: int, steps_per_epoch: int) -> optax.Schedule:
  """Cosine from `peak` to 0 that changes once per epoch, as PyTorch's CosineAnnealingLR is used."""

  def schedule(step):
    epoch = step // steps_per_epoch
    return peak * 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))

  return schedule


def triangular(
  *, peak: float, epochs: int, steps_per_epoch: int, rise: float = 0.25
) -> optax.Schedule:
  """Straight up to `peak` during the share `rise` of all steps, then straight down to 0."""
  total = epochs * steps_per_epoch

  def schedule(step):
    progress = (step + 1) / (total + 1)
    return peak * jnp.minimum(progress / rise, (1 - progress) / (1 - rise))

  return schedule


def constant(*, peak: float, epochs: int, steps_per_epoch: int) -> optax.Schedule:
  """`peak` at every step."""
  del epochs, steps_per_epoch
  return optax.constant_schedule(peak)


SCHEDULES = {"cosine": cosine, "triangular": triangular, "constant": constant}


def sgd(
  *,
  learning_rate: float,
  epochs: int,
  steps_per_epoch: int,
  momentum: float = 0.9,
  weight_decay: float = 5e-4,
  schedule: str = "cosine",
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """PyTorch's SGD: weight decay joins the gradient of every parameter before the momentum.

  Args:
    learning_rate: the peak.
    epochs: passes over the members.
    steps_per_epoch: updates in one pass.
    momentum: of the velocity; 0 for none.
    weight_decay: added to the gradient as `weight_decay * parameter`, biases and batch
      normalisation included.
    schedule: a key of `SCHEDULES`.
    nesterov: looks ahead by one step of momentum.
  Raises:
    ValueError: for an unknown schedule or a number out of its range.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"train.schedule is {schedule!r}; choose one of {sorted(SCHEDULES)}.")
  if epochs < 1:
    raise ValueError(f"train.epochs is {epochs}; it must be at least 1.")
  _check_range("train", learning_rate, weight_decay, momentum)
  rate = SCHEDULES[schedule](peak=learning_rate, epochs=epochs, steps_per_epoch=steps_per_epoch)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
  )


class Muon(NamedTuple):
  """How `muon` updates the kernels of convolutions."""

  learning_rate: float = 0.05  # the peak; an update has spectral norm 1 before it
  weight_decay: float = 0.05  # of the learning rate, decoupled from the gradient
  momentum: float = 0.9


MUON = Muon()


def muon(
  *,
  epochs: int,
  steps_per_epoch: int,
  schedule: str = "cosine",
  kernels: Muon = MUON,
  **others,
) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024) for the kernels of convolutions, `sgd` for everything else.

  A kernel's momentum, as a matrix [window and inputs, outputs], is replaced by the nearest
  orthogonal one, nearly: five Newton-Schulz iterations of `optax.contrib.scale_by_muon`. In few
  epochs it gets further than SGD; for ResNet-18 it adds a quarter to the operations of a step with
  128 images.

  Args:
    epochs, steps_per_epoch, schedule: as `sgd`, for all parameters.
    kernels: rate, decay and momentum of convolutions' kernels.
    **others: further arguments of `sgd`, for biases, batch normalisation and dense layers.
  Raises:
    ValueError: as `sgd`, also for `kernels`.
  """
  steps = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
  rest = sgd(schedule=schedule, **steps, **others)
  _check_range("train.muon", *kernels)
  rate = SCHEDULES[schedule](peak=kernels.learning_rate, **steps)
  orthogonal = optax.chain(
    contrib.scale_by_muon(beta=kernels.momentum, weight_dimension_numbers=_as_matrices),
    optax.add_decayed_weights(kernels.weight_decay),
    optax.scale_by_learning_rate(rate),
  )

  def labels(params):
    return jax.tree.map(lambda leaf: "kernel" if leaf.ndim == 4 else "other", params)

  return optax.partition({"kernel": orthogonal, "other": rest}, labels)


def _as_matrices(params):
  """Which axes of a kernel [h, w, in, out] are the rows of its matrix."""
  numbers = contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
  return jax.tree.map(lambda _: numbers, params)


def _check_range(where, learning_rate, weight_decay, momentum):
  for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
    if not 0 <= value < float("inf"):
      raise ValueError(f"{where}.{name} is {value}; it must be a number of at least 0.")
  if not 0 <= momentum < 1:
    raise ValueError(f"{where}.momentum is {momentum}; it must be in [0, 1).")
  if learning_rate * weight_decay >= 1:
    raise ValueError(
      f"{where}.weight_decay is {weight_decay}; times {where}.learning_rate, {learning_rate}, it "
      "must be below 1, or an update takes away all of a weight."
    )


OPTIMIZERS = {"sgd": sgd, "muon": muon}
