"""Running statistics of batch normalisation, estimated anew for a network whose weights changed."""

import functools
import math
import warnings
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Array, ArrayLike, Float, Key, Keys, Shaped, Variables
from ptq_jax.models import call, conv
from ptq_jax.models.call import Hashable
from ptq_jax.quantize import capture

BATCH_SIZE = 512
"""Images at once, each batch normalised by its own statistics."""

NO_SPREAD = 1e-6
"""A variance that is no more of the mean square is what float32 leaves of none."""


def estimate(
  key: Key,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "n ..."],
  *,
  batch_size: int = BATCH_SIZE,
) -> Variables:
  """One model with the running means and variances that some images give.

  The model runs in training mode, in batches nearly equal in size and at most `batch_size`; the
  batches' means and mean squares are averaged. What a batch gave follows from the update of
  running statistics that were 0, and the momentum of the module. Statistics of a layer that sees a
  single value per channel (one image, no pixels), or the same one for all images, have no variance:
  they stay, with a warning. So does, with one too, whatever else "batch_stats" holds. Variables
  without "batch_stats" come back as they are.

  Args:
    key: for dropout, should the model have some.
    variables: of one model, see `models.call`.
  Returns:
    Variables of the same tree and dtypes.
  """
  if not variables.get("batch_stats"):
    return variables
  norms = _norms(model, variables, images)
  owners = [path.split("/", 1)[1].rpartition("/")[0] for path in trees.flatten(variables)
            if path.startswith("batch_stats/")]  # fmt: skip
  others = list(dict.fromkeys(owner for owner in owners if owner not in norms))
  if others:
    warnings.warn(
      f"the statistics of {', '.join(map(repr, others))} are not those of an nn.BatchNorm; they "
      "stay as they were in full precision.",
      stacklevel=2,
    )
  single = [path for path, (_, values) in norms.items() if values < 2]
  if single:
    warnings.warn(
      f"{len(images)} image gives {single[0]!r} a single value per channel, which has no variance; "
      "the statistics of such layers stay as they are. Calibrate with more images.",
      stacklevel=2,
    )
  momenta = tuple((path, m) for path, (m, _) in norms.items() if path not in single and m < 1)
  if not momenta:
    return variables
  total = None
  for index, batch in enumerate(capture.batches(images, batch_size)):
    one_key = jax.random.fold_in(key, index)
    moments = _batch_moments(Hashable(model), momenta, one_key, variables, batch)
    weight = len(batch) / len(images)
    part = jax.tree.map(functools.partial(jnp.multiply, weight), moments)
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  old, changed, total = trees.flatten(variables), {}, jax.device_get(total)
  for mean, var, *_ in _leaves(momenta):
    name = mean.removeprefix("batch_stats/").removesuffix("/mean")
    if not (np.isfinite(total[mean]).all() and np.isfinite(total[var]).all()):
      warnings.warn(
        f"what {name!r} normalises is not finite, or depends on running statistics in training, "
        "too; its own statistics stay as they are.",
        stacklevel=2,
      )
      continue
    centered = np.maximum(total[var] - total[mean] ** 2, 0)
    if (centered <= NO_SPREAD * total[var]).all():
      warnings.warn(
        f"the images give {name!r} no variance in any channel; its statistics stay as they are. "
        "Calibrate with images that differ.",
        stacklevel=2,
      )
      continue
    for path, found in ((mean, total[mean]), (var, centered)):
      changed[path] = jnp.asarray(found.astype(old[path].dtype))
  return trees.replace(variables, changed)


def estimate_stacked(
  keys: Keys,
  model: nn.Module,
  variables: Variables,
  images: Shaped[ArrayLike, "M n ..."],
  *,
  changed: Sequence[bool],
) -> Variables:
  """`estimate` for variables [P, M, ...], plan by plan, where the plan has changed the weights."""
  plans = [trees.take(variables, index) for index in range(len(changed))]
  for index in np.flatnonzero(changed):
    models = [
      estimate(key, model, trees.take(plans[index], m), images[m]) for m, key in enumerate(keys)
    ]
    plans[index] = trees.stack(models)
  return trees.stack(plans)


def _norms(model, variables, images) -> dict[str, tuple[float, int]]:
  """Per path of a normalisation its momentum, 1 if no call is in training mode, and values per
  channel that a call sees."""
  found: dict[str, tuple[float, int]] = {}
  active: list[str] = []

  def note(next_function, args, kwargs, context):
    module, path = context.module, trees.join(context.module.path)
    outer = context.method_name == "__call__" and path not in active
    if not outer or not isinstance(module, nn.BatchNorm):
      return next_function(*args, **kwargs)
    active.append(path)
    outputs = next_function(*args, **kwargs)
    active.pop()
    x = args[0] if args else kwargs["x"]
    axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
    values = x.size // max(1, int(np.prod([x.shape[axis] for axis in axes])))
    least, fewest = found.get(path, (1.0, values))
    running = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    running = module.use_running_average if running is None else running
    found[path] = least if running else float(module.momentum), min(fewest, values)
    return outputs

  with nn.intercept_methods(note):
    jax.eval_shape(functools.partial(_updated, model), jax.random.key(0), variables, images)
  return found


def _updated(model, key, variables, images):
  """Collection "batch_stats" after a forward pass in training mode.

  With the model's own convolutions, not by `call.apply`: ours have no forward-mode derivative.
  """
  options = call.mode(model, train=True) | {"mutable": ["batch_stats"], "rngs": call.rngs(key)}
  return model.apply(variables, images, **options)[1]


@functools.partial(conv.jit, static_argnums=(0, 1))
def _batch_moments(model, momenta, key, variables, images) -> dict[str, Float[Array, "..."]]:
  """Means, and mean squares in place of variances, of a batch, by path in the variables.

  What an update leaves of old statistics is its derivative: a scan traces a call once and runs it
  often.
  """
  old = trees.flatten(variables)
  paths = [path for mean, var, _ in _leaves(momenta) for path in (mean, var)]
  wide = {path: jnp.promote_types(old[path].dtype, jnp.float32) for path in paths}
  zeros = {path: jnp.zeros(old[path].shape, wide[path]) for path in paths}

  def update(statistics):
    new = _updated(model.module, key, trees.replace(variables, statistics), images)
    return {path: leaf for path, leaf in trees.flatten(new).items() if path in statistics}

  new, left = jax.jvp(update, (zeros,), (jax.tree.map(jnp.ones_like, zeros),))
  found = {}
  for mean, var, momentum in _leaves(momenta):
    share = 1.0
    if momentum:
      rate = math.log(momentum)
      share = -jnp.expm1(jnp.round(jnp.log(left[mean]) / rate) * rate)  # no difference of near ones
    found[mean] = new[mean] / share
    found[var] = new[var] / share + found[mean] ** 2
  return found


def _leaves(momenta) -> Iterator[tuple[str, str, float]]:
  """(path of the mean, of the variance, momentum) per normalisation."""
  for path, momentum in momenta:
    yield f"batch_stats/{path}/mean", f"batch_stats/{path}/var", momentum
