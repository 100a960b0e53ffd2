"""Trains the shadows, and the dedicated targets if there are any, chunk by chunk.

    bash launch/run train_shadows --config configs/digits.py --workdir runs/digits

Writes WORKDIR/models/CHUNK (checkpoints) and WORKDIR/scores/full_precision/CHUNK.npz. A run that
was killed goes on from its last checkpoint, to the same result.
"""

import functools
import shutil
import time

import jax
import jax.numpy as jnp

from launch.progress import Progress
from launch.workdir import FULL_PRECISION, Audit, Chunk, open_audit
from ptq_jax import settings, storage
from ptq_jax.data import membership
from ptq_jax.models import parallel
from ptq_jax.quantize import pack
from ptq_jax.train import fit, shadows


def run(config, workdir) -> None:
  """The stage alone."""
  train(open_audit(config, workdir))


def train(audit: Audit) -> None:
  """Trains what is missing."""
  chunks = audit.own_chunks()
  pending = [chunk for chunk in chunks if audit.pending(FULL_PRECISION, chunk)]
  if not pending:
    return
  epochs = audit.config.train.epochs
  total = sum(len(chunk) for chunk in chunks) * epochs
  done = total - sum(len(chunk) for chunk in pending) * epochs
  with audit.timed("train_shadows"), Progress("train_shadows", total, done=done) as progress:
    while pending:
      chunk = pending.pop(0)
      try:
        variables = train_chunk(audit, chunk, progress)
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or len(chunk) == 1:
          raise
        pending = [*halves(audit, chunk, progress), *pending]
        continue
      audit.save_scores({FULL_PRECISION: pack.pack(variables, {})}, chunk)


def halves(audit: Audit, chunk: Chunk, progress: Progress) -> list[Chunk]:
  """Two chunks in place of one that did not fit into memory."""
  middle = (chunk.first + chunk.last) // 2
  progress.say(
    f"out of memory with {len(chunk)} models at once; going on with {middle - chunk.first}. Set "
    f"train.models_per_chunk={middle - chunk.first} to begin so."
  )
  shutil.rmtree(audit.model_directory(chunk), ignore_errors=True)
  return [Chunk(chunk.group, chunk.first, middle), Chunk(chunk.group, middle, chunk.last)]


def train_chunk(audit: Audit, chunk: Chunk, progress: Progress):
  """Trained variables of a chunk, stacked: from its checkpoint, or trained and then saved."""
  directory, epochs = audit.model_directory(chunk), audit.config.train.epochs
  with storage.Checkpoints(directory / "trained") as trained:
    saved = trained.restore(states_like(audit, chunk).variables)
    report_skipped(saved, progress)
    if saved.tree is not None:
      progress.advance(len(chunk) * epochs)
      return saved.tree
    variables = train_epochs(audit, chunk, progress).variables
    trained.save(epochs, variables, {"chunk": chunk.name})
  shutil.rmtree(directory / "training", ignore_errors=True)
  return variables


def recipe_of(audit: Audit, chunk: Chunk, progress: Progress) -> fit.Recipe:
  """The audit's recipe; with train.lowering="measure" it has what was fastest on this chunk.

  Measured once per workdir and process and kept in lowering-PROCESS.json, so that a run that goes
  on computes as it began.
  """
  if audit.config.train.lowering != "measure":
    return audit.recipe
  path = audit.root / f"lowering-{jax.process_index()}.json"
  if not path.exists():
    keys, *data = inputs(audit, chunk)
    mesh = parallel.mesh_for(len(chunk))
    rates = shadows.lowering_rates(keys, audit.recipe, *data, mesh=mesh)
    fastest = max(rates, key=rates.get)
    if not rates[fastest]:  # none fits; training will say so and go on with fewer models
      return audit.recipe
    each = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    progress.say(f"convolutions of {len(chunk)} models: {fastest} is fastest (images/s: {each}).")
    storage.write_json(path, {"lowering": fastest, "images_per_s": rates})
  return audit.recipe._replace(lowering=storage.read_json(path)["lowering"])


def inputs(audit: Audit, chunk: Chunk) -> tuple[jax.Array, ...]:
  """Keys, images, labels and members of a chunk, as `shadows.epochs` takes them."""
  members = membership.members_of(audit.members[chunk.group][chunk.first : chunk.last])
  return (
    shadows.model_keys(audit.key(chunk.group), jnp.asarray(chunk.ids)),
    jnp.asarray(audit.dataset.train_images),
    jnp.asarray(audit.dataset.train_labels),
    jnp.asarray(members),
  )


def train_epochs(audit: Audit, chunk: Chunk, progress: Progress) -> fit.State:
  """Trains a chunk from where it was, with a checkpoint every few minutes and when stopped."""
  train = audit.config.train
  recipe, (keys, *data) = recipe_of(audit, chunk, progress), inputs(audit, chunk)
  directory = audit.model_directory(chunk) / "training"
  with storage.Checkpoints(directory) as checkpoints, settings.stops_deferred() as stopped:
    saved = checkpoints.restore(states_like(audit, chunk))
    report_skipped(saved, progress)
    states = saved.tree
    if states is None:
      states = shadows.init(keys, recipe, image_shape=audit.dataset.image_shape)
    progress.advance(len(chunk) * saved.step)
    last_saved, running = time.monotonic(), None

    def show(epoch: shadows.Epoch | None) -> None:
      if epoch is not None:
        loss = float(epoch.metrics.loss.mean())  # waits for the device
        progress.advance(len(chunk), f"{chunk.name}, epoch {epoch.epoch}, loss {loss:.3f}")

    for epoch in shadows.epochs(
      jax.tree.map(jnp.asarray, states),
      keys,
      recipe,
      *data,
      first=saved.step,
      last=train.epochs,
      mesh=parallel.mesh_for(len(chunk)),
    ):
      show(running)  # of the epoch before, while the device works on this one
      states, running = epoch.states, epoch
      minutes = (time.monotonic() - last_saved) / 60
      if stopped() or minutes > train.checkpoint_minutes:
        checkpoints.save(epoch.epoch, states, {"chunk": chunk.name})
        last_saved = time.monotonic()
      if stopped():
        checkpoints.wait()
        raise stopped()
    show(running)
  return states


def load_variables(audit: Audit, chunk: Chunk):
  """Trained variables of a finished chunk, stacked, on the host.

  Raises:
    FileNotFoundError: if it was never finished.
  """
  directory = audit.model_directory(chunk) / "trained"
  with storage.Checkpoints(directory) as trained:
    saved = trained.restore(states_like(audit, chunk).variables)
  if saved.tree is None:
    audit.scores_path(FULL_PRECISION, chunk).unlink(missing_ok=True)
    raise FileNotFoundError(
      f"the models in {directory} are missing or corrupt; run bash launch/run train_shadows again, "
      "it trains only these."
    )
  return saved.tree


def states_like(audit: Audit, chunk: Chunk) -> fit.State:
  """Shapes and dtypes of a chunk's states."""
  one = functools.partial(fit.init, recipe=audit.recipe, image_shape=audit.dataset.image_shape)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(chunk)))
  return jax.eval_shape(jax.vmap(one), keys)


def report_skipped(saved: storage.Saved, progress: Progress) -> None:
  """Says which damaged checkpoints were passed over, and where training goes on."""
  for reason in saved.skipped:
    where = f"going on from epoch {saved.step}" if saved.step else "starting anew"
    progress.say(f"{reason}; {where}.")


def main() -> None:
  settings.launch(run, config="configs/digits.py", workdir="runs/digits", description=__doc__)


if __name__ == "__main__":
  main()
