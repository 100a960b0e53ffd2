"""Training of the shadows, and the dedicated targets if there are any, chunk by chunk.

Writes checkpoints of models and their scores in full precision, and loss and accuracy by epoch. A
run that was stopped goes on from its last checkpoint, to the same result.
"""

import functools
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import storage
from ptq_jax.audit import stopping, work
from ptq_jax.audit.events import Measured, Stage
from ptq_jax.audit.layout import FULL_PRECISION, Audit
from ptq_jax.audit.work import Chunk
from ptq_jax.data import membership
from ptq_jax.models import parallel
from ptq_jax.quantize import pack
from ptq_jax.train import fit, shadows


def train(audit: Audit) -> list[str]:
  """Trains what is missing and nobody else trains; returns who trains the rest, in words."""
  chunks = audit.own_chunks()
  pending = [chunk for chunk in chunks if audit.pending(FULL_PRECISION, chunk, audit.say)]
  if not pending:
    return []
  epochs, busy = audit.config.train.epochs, []
  total = sum(len(chunk) for chunk in chunks) * epochs
  done = total - sum(len(chunk) for chunk in pending) * epochs
  with audit.timed("train_shadows"), audit.stage("train_shadows", total, done=done) as stage:
    for chunk in pending:
      try:
        with audit.locked(chunk):
          if audit.pending(FULL_PRECISION, chunk):
            finish_chunk(audit, chunk, stage)
      except work.Busy as owner:
        busy.append(f"{chunk.name}: {owner}")
  return busy


def finish_chunk(audit: Audit, chunk: Chunk, stage: Stage) -> None:
  """Trains a chunk and writes its scores."""
  variables = train_chunk(audit, chunk, stage)
  audit.save_scores({FULL_PRECISION: pack.pack(variables, {})}, chunk, variables)


def train_chunk(audit: Audit, chunk: Chunk, stage: Stage):
  """Trained variables of a chunk, stacked: from its checkpoint, or trained and then saved.

  With fewer models in a program if they do not fit. Audits that share models take turns here.
  """
  directory, epochs = audit.model_directory(chunk), audit.config.train.epochs
  with (
    audit.models_locked(chunk, stage.say),
    storage.Checkpoints(directory / "trained", keep=1) as trained,
  ):
    saved = restore(audit, chunk, trained, states_like(audit, chunk).variables, stage.say)
    if saved.tree is not None:
      stage.skip(len(chunk) * epochs)
      return saved.tree
    with stopping.deferred(stage.say) as stopped:
      while True:
        try:
          variables = train_updates(audit, chunk, stage, stopped).variables
          break
        except jax.errors.JaxRuntimeError as error:
          if not parallel.is_out_of_memory(error) or chunk.together == 1:
            raise
          chunk = work.run_apart(audit.trained, chunk)
          stage.say(
            f"out of memory; going on with {chunk.together} models of {chunk.name} in a program. "
            f"Set train.models_together={chunk.together} to begin so."
          )
      trained.save(epochs, variables, metadata(audit, chunk))
      trained.wait()
      shutil.rmtree(directory / "training", ignore_errors=True)
  return variables


def metadata(audit: Audit, chunk: Chunk) -> dict:
  """What a checkpoint says of itself: whose it is."""
  rows = audit.members[chunk.group][chunk.first : chunk.last]
  return {
    "chunk": chunk.name,
    "stamp": audit.work.stamp,
    "members": int(np.packbits(rows).astype(np.uint64).sum()),
    "together": chunk.together,
  }


def restore(audit: Audit, chunk: Chunk, checkpoints: storage.Checkpoints, like, say):
  """What a chunk's checkpoints hold; says which were damaged.

  Raises:
    ValueError: if they belong to other models.
  """
  saved = checkpoints.restore(like)
  for reason in saved.skipped:
    where = f"going on from update {saved.step}" if saved.step else "starting anew"
    say(f"{reason}; {where}.")
  if saved.tree is not None:
    own = metadata(audit, chunk)
    for name in ("chunk", "stamp", "members"):
      if saved.metadata.get(name) != own[name]:
        raise ValueError(
          f"the models in {checkpoints.directory} belong to another audit (their {name} is "
          f"{saved.metadata.get(name)}, not {own[name]}); use another --workdir."
        )
  return saved


def inputs(audit: Audit, chunk: Chunk) -> tuple:
  """Keys, images, labels and members of a chunk, as `shadows.dispatches` takes them."""
  members = membership.members_of(audit.members[chunk.group][chunk.first : chunk.last])
  return (
    shadows.model_keys(audit.key(chunk.group), jnp.asarray(chunk.ids)),
    audit.dataset.train_images,
    audit.dataset.train_labels,
    members,
  )


def train_updates(audit: Audit, chunk: Chunk, stage: Stage, stopped) -> fit.State:
  """Trains a chunk from where it was, with a checkpoint every few minutes and when `stopped()`.

  Returns its states on the host.
  """
  train = audit.config.train
  recipe, (keys, *data) = audit.recipe, inputs(audit, chunk)
  if chunk.lowering:
    recipe = recipe._replace(lowering=chunk.lowering)
  steps = data[-1].shape[1] // recipe.batch_size
  directory = audit.model_directory(chunk) / "training"
  with storage.Checkpoints(directory) as checkpoints:
    saved = restore(audit, chunk, checkpoints, states_like(audit, chunk), stage.say)
    states = saved.tree
    if states is None:
      states = shadows.init(keys, recipe, image_shape=audit.dataset.image_shape)
    stage.skip(len(chunk) * saved.step / steps)
    curve = Curve(audit.model_directory(chunk) / "metrics.jsonl", saved.step, steps)
    last_saved, before, parts, shown = time.monotonic(), saved.step, [], None
    done = shadows.Dispatch(saved.step, (states,), None, len(chunk))
    for done in shadows.dispatches(
      states,
      keys,
      recipe,
      *data,
      first=saved.step,
      last=train.epochs * steps,
      together=chunk.together,
      mesh=parallel.mesh_for(-(-len(chunk) // chunk.together)),
    ):
      parts.append((done.metrics, done.step - before))
      before = done.step
      if done.step % steps == 0 or stopped():
        show(stage, chunk, curve, shown)  # of the time before, while the device works on this one
        shown, parts = (done.step, parts), []
      minutes = (time.monotonic() - last_saved) / 60
      if stopped() or minutes > train.checkpoint_minutes:
        checkpoints.save(done.step, done.on_host(), metadata(audit, chunk))
        last_saved = time.monotonic()
      if stopped():
        checkpoints.wait()
        show(stage, chunk, curve, shown)
        raise stopped()
    show(stage, chunk, curve, shown)
    return done.on_host()


class Curve:
  """Loss and accuracy of every model of a chunk by epoch, in a file of JSON lines.

  It is for people; whoever resumes takes what was before its checkpoint, if it can be read.
  """

  def __init__(self, path: pathlib.Path, step: int, steps_per_epoch: int):
    self._path, self.steps_per_epoch = path, steps_per_epoch
    try:
      rows = [storage.unsealed(row, path) for row in storage.read_records(path)]
      self._rows = [row for row in rows if row["step"] <= step]
    except (FileNotFoundError, storage.CorruptFileError, KeyError, TypeError):
      self._rows = []

  def add(self, step: int, metrics: fit.Metrics) -> float:
    """Appends means since the row before, [M] each; returns the epochs that are done."""
    epoch = step / self.steps_per_epoch
    each = {name: np.round(values, 5).tolist() for name, values in metrics._asdict().items()}
    self._rows.append({"step": step, "epoch": epoch, **each})
    storage.write_records(self._path, map(storage.sealed, self._rows))
    return epoch


def curves(audit: Audit) -> dict[str, list[float]]:
  """Mean, lowest and highest loss and accuracy over all models by epoch, lists of [epochs].

  Raises:
    ValueError: one sentence, if a chunk's cannot be read to the end; nothing depends on them.
  """
  found = np.concatenate([_by_epoch(audit, chunk) for chunk in audit.work.chunks], axis=-1)
  return {
    f"{name}{suffix}": np.round(function(found[:, i], axis=-1), 5).tolist()
    for i, name in enumerate(("loss", "accuracy"))
    for suffix, function in (("", np.mean), ("_low", np.min), ("_high", np.max))
  }


def _by_epoch(audit, chunk):
  """float[epochs, 2, M], loss and accuracy of a chunk's models."""
  path, epochs = audit.model_directory(chunk) / "metrics.jsonl", audit.config.train.epochs
  try:
    rows = [storage.unsealed(row, path) for row in storage.read_records(path)]
    values = np.array([[row["loss"], row["accuracy"]] for row in rows])  # [rows, 2, M]
    until = np.array([row["epoch"] for row in rows])
    weights, epoch = np.diff(until, prepend=0), np.ceil(until)
    if values.shape[1:] == (2, len(chunk)) and set(epoch) == set(range(1, epochs + 1)):
      each = [np.average(values[epoch == e], 0, weights[epoch == e]) for e in sorted(set(epoch))]
      return np.stack(each)
    problem = "does not have every epoch of every model"
  except FileNotFoundError:
    problem = "is missing"
  except (storage.CorruptFileError, KeyError, TypeError, ValueError):
    problem = "is damaged"
  raise ValueError(f"{path} {problem}: no training curve on the page; results do not need it.")


def show(stage: Stage, chunk: Chunk, curve: Curve, done) -> None:
  """Tells of an epoch and writes it down, waiting for the device."""
  if done is not None:
    step, parts = done
    found, weights = zip(*parts, strict=True)
    found = np.asarray(jax.device_get(found), np.float64)  # [dispatches, loss and accuracy, M]
    metrics = fit.Metrics(*np.average(found, axis=0, weights=weights))
    epoch = curve.add(step, metrics)
    means = {name: float(values.mean()) for name, values in metrics._asdict().items()}
    stage.advance(
      len(chunk) * sum(weights) / curve.steps_per_epoch,
      f"{chunk.name}, epoch {epoch:.4g}, loss {means['loss']:.3f}",
      Measured(chunk.name, step, means),
    )


def states_like(audit: Audit, chunk: Chunk) -> fit.State:
  """Shapes and dtypes of a chunk's states."""
  one = functools.partial(fit.init, recipe=audit.recipe, image_shape=audit.dataset.image_shape)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(chunk)))
  return jax.eval_shape(jax.vmap(one), keys)
