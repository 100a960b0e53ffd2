"""SGD with momentum and weight decay, and learning rates over the steps of a training."""

import jax.numpy as jnp
import optax


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
  for name, value, low in (
    ("epochs", epochs, 1),
    ("learning_rate", learning_rate, 0),
    ("weight_decay", weight_decay, 0),
  ):
    if value < low:
      raise ValueError(f"train.{name} is {value}; it must be at least {low}.")
  if not 0 <= momentum < 1:
    raise ValueError(f"train.momentum is {momentum}; it must be in [0, 1).")
  rate = SCHEDULES[schedule](peak=learning_rate, epochs=epochs, steps_per_epoch=steps_per_epoch)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
  )
