"""How many models train in a program and how their convolutions are lowered: a rule, or measured.

Measured is how fast real steps of training are here. The rates are kept in the user's cache, a file
for every device, version, model and shapes, so the next workdir need not pay for them. What was
chosen stays in the work list: a workdir goes on as it began whatever the cache says by then.
"""

import contextlib
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import settings, storage
from ptq_jax.audit import work
from ptq_jax.audit.layout import Audit
from ptq_jax.models import conv, parallel
from ptq_jax.train import fit, shadows

LONG_SECONDS = 600
"""Of training on an accelerator, from which on measuring is worth its compilations."""

FLOP_PER_S = 77e12
"""With which time is reckoned: the slowest of the public one-model loops of ResNet-18 on an A100
(77 to 112 TFLOP/s, BUILD_NOTES.md). Small networks get less out of a chip."""

FEW = (4, parallel.MOST_TOGETHER)
"""Models together that are tried between one alone and all of a device."""


class Choice(NamedTuple):
  """How the models of a chunk train."""

  together: int  # models of one program on one device
  lowering: str | None  # of `conv.LOWERINGS`; None: see `conv.choose_lowering`


def choose(
  audit: Audit, num_models: int, *, share: int, begun: Sequence[work.Chunk] = ()
) -> Choice:
  """The choice for new chunks: what the config sets, and for the rest the rule or what is measured.

  Args:
    audit: its work list need not be settled.
    num_models: of a chunk.
    share: of each device.
    begun: chunks that there are; new ones are not measured anew, so that all models train alike.
  """
  train = audit.config.train
  together = None if train.models_together in ("auto", "measure") else train.models_together
  lowering = train.lowering if train.lowering in conv.LOWERINGS else None
  why = reason(audit)
  if why is not None and begun:
    found = Choice(together or evenly(share, begun[0].together), lowering or begun[0].lowering)
    audit.say(
      f"new models train as those before: {found.together} in a program, convolutions "
      f"{found.lowering or 'by the rule'}."
    )
    return found
  if why is not None:
    counts = (together,) if together else sorted({1, share, *(evenly(share, n) for n in FEW)})
    lowerings = (lowering,) if lowering else conv.LOWERINGS
    rates = kept_rates(audit, num_models, counts, lowerings, why)
    if max(rates.values()):
      return Choice(*max(rates, key=rates.get))
    audit.say("no number of models fits into memory together; going by the rule.")
  image_shape = audit.dataset.image_shape
  rule = together or shadows.models_together(audit.recipe, share, image_shape=image_shape)
  return Choice(rule, lowering)


def evenly(share: int, at_most: int) -> int:
  """The size of the fewest groups of models that are no larger and all but equal.

  >>> evenly(9, 8), evenly(64, 8)
  (5, 8)
  """
  return -(-share // -(-share // at_most))


def reason(audit: Audit) -> str | None:
  """Why something is measured, in words; None if it is not."""
  train = audit.config.train
  chosen = (train.models_together, train.lowering)
  if "measure" in chosen:
    return "as the config asks"
  seconds = 0.0
  if "auto" in chosen and jax.default_backend() != "cpu":
    with contextlib.suppress(ValueError):  # layers that cannot be counted
      seconds = audit.training_flop / FLOP_PER_S / len(jax.local_devices()) / audit.shard.count
  if seconds < LONG_SECONDS:
    return None
  return (
    f"for {audit.training_flop / 1e15:.3g} PFLOP of training are reckoned to take "
    f"{seconds / 60:.0f} minutes, at {FLOP_PER_S / 1e12:.0f} TFLOP/s of each device"
  )


# ---- rates ----


def kept_rates(
  audit: Audit, num_models: int, counts: Sequence[int], lowerings: Sequence[str], why: str
) -> dict[tuple[int, str], float]:
  """`shadows.training_rates` from the cache, or measured and kept there; says which is fastest.

  Processes that ask for the same at once measure once.
  """
  key = settings.plain(measured_for(audit, num_models, counts, lowerings))
  path = cache_path(audit, key)
  with _locked(path, audit.say):
    found = read(path, key, say=audit.say) if path else None
    rates = found or measure(audit, num_models, counts, lowerings)
    if max(rates.values()):
      audit.say(sentence(rates, f"from {path}" if found else f"measured now, {why}"))
      if path and not found:
        write(path, key, rates, say=audit.say)
  return rates


def measure(
  audit: Audit, num_models: int, counts: Sequence[int], lowerings: Sequence[str]
) -> dict[tuple[int, str], float]:
  """The rates, from steps of training on this audit's data; whose members is all the same."""
  data, each = audit.dataset, np.arange(len(audit.dataset.train_labels) // 2, dtype=np.int32)
  return shadows.training_rates(
    shadows.model_keys(audit.key("shadows"), jnp.arange(num_models)),
    audit.recipe,
    data.train_images,
    data.train_labels,
    np.tile(each, (num_models, 1)),
    together=counts,
    lowerings=lowerings,
  )


def sentence(rates: dict[tuple[int, str], float], whence: str) -> str:
  """What is fastest, beside all that was tried."""
  (together, lowering), each = max(rates, key=rates.get), []
  for (count, name), rate in rates.items():
    each.append(f"{count} {name} {rate:.0f}" if rate else f"{count} {name} does not fit")
  return (
    f"models train {together} in a program, convolutions {lowering}: the fastest in images/s of "
    f"{', '.join(each)} ({whence})."
  )


# ---- the cache ----


def measured_for(
  audit: Audit, num_models: int, counts: Sequence[int], lowerings: Sequence[str]
) -> dict[str, Any]:
  """Everything that rates depend on."""
  devices, data = jax.local_devices(), audit.dataset
  state = jax.eval_shape(
    lambda key: fit.init(key, audit.recipe, image_shape=data.image_shape), jax.random.key(0)
  )
  return {
    "device": f"{len(devices)} x {devices[0].device_kind}",
    "jax": f"{jax.__version__}, {jax.config.jax_default_matmul_precision}",
    "code": settings.code_version("models", "train"),
    "model": re.sub(r" at 0x\w+", "", " ".join(repr(audit.model).split())),
    "state": settings.fingerprint(str(state)),  # names, shapes and dtypes
    "augmentation": audit.config.train.augmentation,
    "pool": f"{data.train_images.dtype}{data.train_images.shape}",
    "batch": audit.config.train.batch_size,
    "models": num_models,
    "together": counts,
    "lowerings": lowerings,
  }


def cache_path(audit: Audit, key: dict[str, Any]) -> pathlib.Path | None:
  """Where the rates of this key are kept; None with train.cache_dir=""."""
  folder = audit.config.train.cache_dir
  if folder is None:
    folder = storage.user_cache() / "measured"
  elif not folder:
    return None
  return pathlib.Path(folder).expanduser() / f"{settings.fingerprint(key)}.json"


def read(path: pathlib.Path, key: dict[str, Any], *, say) -> dict[tuple[int, str], float] | None:
  """Rates that were kept; None if there are none, or none that can be trusted, which is said."""
  try:
    document = storage.read_json(path)
    if document["key"] != key:
      raise ValueError("it is of something else")
    rates = {(count, lowering): rate for count, lowering, rate in document["images_per_s"]}
    if not set(rates) <= {(n, name) for n in key["together"] for name in key["lowerings"]}:
      raise ValueError("it has pairs that are not tried")
    if not all(0 <= rate < math.inf for rate in rates.values()) or not max(rates.values()):
      raise ValueError("its rates make no sense")
    return rates
  except FileNotFoundError:
    return None
  except (OSError, KeyError, TypeError, ValueError) as error:
    say(f"{path} cannot be used ({type(error).__name__}: {error}); measuring anew.")
    return None


def write(
  path: pathlib.Path, key: dict[str, Any], rates: dict[tuple[int, str], float], *, say
) -> None:
  """Keeps rates; where that is impossible, says so."""
  rows = [[count, lowering, rate] for (count, lowering), rate in rates.items()]
  try:
    storage.write_json(path, {"key": key, "images_per_s": rows})
  except OSError as error:
    say(
      f"what was measured cannot be kept in {path} ({error.__cause__}); every new workdir will "
      "measure again unless train.cache_dir names a writable folder."
    )


@contextlib.contextmanager
def _locked(path, say):
  """Holds the lock of a file of the cache, if it can be had; without it files are still whole."""
  with contextlib.ExitStack() as held:
    with contextlib.suppress(OSError):
      if path:
        busy = "waiting for {}, which measures the same."
        waiting = work.locked(path.with_suffix(".lock"), waiting=lambda who: say(busy.format(who)))
        held.enter_context(waiting)
    yield
