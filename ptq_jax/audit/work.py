"""What there is to train, by whom, and who is at it: decided once, written down, and read back.

A folder of models has two files beside the models, each enough to make the other again:

    work.json         settings of training, data, random numbers, the chunks, versions
    membership.npz    bool[M, E] of the shadows and bool[T, E] of the targets; and work.json

Nothing in them is drawn or chosen again when an audit goes on: another JAX, other devices or other
defaults change nothing that was begun. More models are added at the end. The processes of an audit
need not know each other: each takes chunks that nobody has locked, or those of its shard.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np

from ptq_jax import settings, storage
from ptq_jax.base import Bool
from ptq_jax.data import membership

GROUPS = ("shadows", "targets")

STREAMS = ("membership", "shadows", "target_membership", "targets", "queries", "calibration",
           "quantize", "bootstrap", "batchnorm")  # fmt: skip
"""Streams of randomness; a stream is its place in this list, so new ones go to the end."""

IMPLEMENTATION = "threefry2x32"
"""Of all random numbers, whatever JAX's default is."""


@dataclasses.dataclass(frozen=True, order=True)
class Chunk:
  """Models `first` to `last` (exclusive) of a group: one folder, one process at a time."""

  group: str  # of GROUPS
  first: int
  last: int
  together: int = dataclasses.field(default=1, compare=False)
  """Models of one program on one device. Only rounding depends on it, but training amplifies that,
  so it is kept for ever."""
  lowering: str | None = dataclasses.field(default=None, compare=False)
  """Of their convolutions, likewise; None: as the config says, or by the rule."""

  @property
  def name(self) -> str:
    return f"{self.group}-{self.first:05d}-{self.last:05d}"

  @property
  def ids(self) -> np.ndarray:
    return np.arange(self.first, self.last)

  def __len__(self) -> int:
    return self.last - self.first


class Sizes(NamedTuple):
  """How models are divided."""

  per_chunk: int
  together: int
  lowering: str | None = None  # see `Chunk`


@dataclasses.dataclass(frozen=True)
class Work:
  """The work list of a folder of models."""

  training: Mapping[str, Any]  # settings that models depend on, as JSON
  data: str  # fingerprint
  random: str  # what `random_sample` gave when the work was begun
  members: Mapping[str, Bool[np.ndarray, "M E"]]  # by group
  chunks: tuple[Chunk, ...]
  versions: Mapping[str, str]

  def counts(self) -> dict[str, int]:
    """Models by group."""
    return {group: len(rows) for group, rows in self.members.items()}

  @functools.cached_property
  def stamp(self) -> str:
    """Changes with everything that a model depends on, but for its number."""
    return settings.fingerprint([self.training, self.data, self.random])


def key(seed: int, stream: str) -> jax.Array:
  """The key of one stream of randomness of an audit."""
  return jax.random.fold_in(jax.random.key(seed, impl=IMPLEMENTATION), STREAMS.index(stream))


@contextlib.contextmanager
def pinned_randomness() -> Iterator[None]:
  """Inside, keys give the same numbers whatever JAX_THREEFRY_PARTITIONABLE and the like say.

  For all threads: a context of JAX's would reach one only.
  """
  pins = {"jax_threefry_partitionable": True, "jax_default_prng_impl": IMPLEMENTATION}
  before = {name: getattr(jax.config, name) for name in pins if hasattr(jax.config, name)}
  for name in before:
    if before[name] != pins[name]:
      jax.config.update(name, pins[name])
  try:
    yield
  finally:
    for name, value in before.items():
      if getattr(jax.config, name) != value:
        jax.config.update(name, value)


def random_sample() -> str:
  """A fingerprint of what this JAX draws, to recognise one that draws otherwise."""
  drawn = _sample(key(0, "membership"))
  return settings.fingerprint([np.asarray(each).tolist() for each in drawn])


@jax.jit
def _sample(key):
  return (
    jax.random.bits(key, (8,)),
    jax.random.permutation(key, 16),
    (jax.random.uniform(key, (8,)) * 2**20).astype(int),
  )


def draw_members(seed: int, counts: Mapping[str, int], pool_size: int) -> dict[str, np.ndarray]:
  """Who trains on what: pairs of complementary halves, and random halves for targets."""
  drawn = {
    "shadows": membership.paired(
      key(seed, "membership"), num_models=counts["shadows"], num_examples=pool_size
    )
  }
  if counts.get("targets"):
    drawn["targets"] = membership.random_halves(
      key(seed, "target_membership"), num_models=counts["targets"], num_examples=pool_size
    )
  return {group: np.asarray(rows) for group, rows in drawn.items()}


def settle(
  directory: pathlib.Path,
  *,
  training: Mapping[str, Any],
  data: str,
  counts: Mapping[str, int],
  pool_size: int,
  sizes: Callable[..., Sizes],
  say: Callable[[str], None],
) -> Work:
  """The work list of a folder of models: read back, begun, grown, or cut back where none trained.

  Args:
    directory: of the models.
    training: settings that models depend on, `seed` among them.
    data: fingerprint of the data.
    counts: models by group.
    pool_size: E.
    sizes: of the new chunks of so many models, beside those begun; called only if there are any.
    say: told who is waited for, if another process does the same.
  Raises:
    ValueError: for models whose work list is lost, one that would shrink, or random numbers that
      this JAX draws differently.
  """
  busy = "waiting for {}, which divides the work, and may measure how models train fastest."
  with locked(directory / ".lock", waiting=lambda owner: say(busy.format(owner))):
    work = read(directory)
    if work is not None and work.counts() == {g: n for g, n in counts.items() if n}:
      return work
    if work is None and any(directory.glob("*-*-*/*/*.json")):
      raise ValueError(
        f"{directory} has models but neither work.json nor membership.npz, or of an older version, "
        "so nobody knows who trained on what; restore them, or use another --workdir."
      )
    members = draw_members(training["seed"], counts, pool_size)
    chunks: list[Chunk] = []
    for group, rows in members.items():
      kept = _kept(directory, work, group, members)
      chunks += kept
      begun = (*(work.chunks if work else ()), *chunks)
      beside = functools.partial(sizes, begun=begun)
      chunks += new_chunks(group, len(rows), kept, sizes=beside)
    if work is not None:
      kept = set(chunks)
      lost = [c for c in work.chunks if c not in kept and trained_anything(directory, c)]
      if lost:
        raise ValueError(
          f"{directory} has trained {lost[0].group} {lost[0].first} to {lost[0].last - 1}, but "
          f"train.{'models' if lost[0].group == 'shadows' else 'targets'} asks for "
          f"{counts.get(lost[0].group, 0)}; an audit can be extended, not shrunk: use another "
          "--workdir."
        )
    work = Work(
      training=work.training if work else training,
      data=data,
      random=work.random if work else random_sample(),
      members=members,
      chunks=tuple(sorted(chunks, key=lambda chunk: (GROUPS.index(chunk.group), chunk.first))),
      versions=work.versions if work else versions(),
    )
    write(directory, work)
    return work


def _kept(directory, work, group, members):
  """Chunks of a group that stay, after checking that growing draws the same members for them."""
  if work is None or group not in work.members:
    return []
  known, drawn = work.members[group], members[group]
  common = min(len(known), len(drawn))
  if not np.array_equal(known[:common], drawn[:common]):
    raise ValueError(
      f"this JAX ({jax.__version__}) draws other random numbers than the one that began "
      f"{directory} ({work.versions.get('jax')}), so it cannot be given more models; use that one, "
      "or another --workdir."
    )
  kept = [chunk for chunk in work.chunks if chunk.group == group and chunk.last <= len(drawn)]
  if len(known) <= len(drawn):  # grown: a chunk of nothing trained may be divided anew
    return kept
  return [chunk for chunk in kept if trained_anything(directory, chunk)]


def new_chunks(
  group: str, count: int, kept: Sequence[Chunk], *, sizes: Callable[[int], Sizes]
) -> list[Chunk]:
  """Chunks of the models of 0 .. count that are in none of those kept.

  >>> begun = [Chunk("targets", 2, 4)]
  >>> [chunk.name for chunk in new_chunks("targets", 6, begun, sizes=lambda count: Sizes(4, 4))]
  ['targets-00000-00002', 'targets-00004-00006']
  """
  chunks, position = [], 0
  for known in [*sorted(kept), Chunk(group, count, count)]:
    if position < known.first:
      size = sizes(count)
      for first in range(position, known.first, size.per_chunk):
        last = min(first + size.per_chunk, known.first)
        together = min(size.together, last - first)
        chunks.append(Chunk(group, first, last, together, size.lowering))
    position = known.last
  return chunks


def trained_anything(directory: pathlib.Path, chunk: Chunk) -> bool:
  """Whether a chunk has a checkpoint."""
  return any((directory / chunk.name).glob("*/*.json"))


def write(directory: pathlib.Path, work: Work) -> None:
  """Writes both files."""
  document = {
    "training": settings.plain(work.training),
    "data": work.data,
    "random": work.random,
    "members": {group: _members_digest(rows) for group, rows in work.members.items()},
    "chunks": [dataclasses.astuple(chunk) for chunk in work.chunks],
    "versions": dict(work.versions),
  }
  storage.save_arrays(directory / "membership.npz", work=json.dumps(document), **work.members)
  storage.write_json(directory / "work.json", document)


def read(directory: pathlib.Path) -> Work | None:
  """What `write` wrote; if one of the files is missing or damaged, from the other one.

  Raises:
    ValueError: if membership.npz is lost and cannot be drawn again.
  """
  document = _document(directory)
  if document is None:
    return None
  try:
    arrays = storage.load_arrays(directory / "membership.npz")
    members = {group: arrays[group] for group in document["members"]}
    sound = {g: _members_digest(rows) for g, rows in members.items()} == document["members"]
  except (FileNotFoundError, storage.CorruptFileError, KeyError):
    sound = False
  chunks = tuple(Chunk(*each) for each in document["chunks"])
  if not sound:
    members = _drawn_again(directory, document, chunks)
  work = Work(
    document["training"], document["data"], document["random"], members, chunks,
    document["versions"],
  )  # fmt: skip
  if not sound or not (directory / "work.json").exists():
    write(directory, work)
  return work


def _document(directory):
  """work.json, or the copy of it in membership.npz; None if there is neither."""
  with contextlib.suppress(FileNotFoundError, storage.CorruptFileError):
    document = storage.read_json(directory / "work.json")
    if {"training", "data", "random", "members", "chunks", "versions"} <= document.keys():
      return document
  try:
    document = json.loads(str(storage.load_arrays(directory / "membership.npz")["work"]))
  except (FileNotFoundError, storage.CorruptFileError, KeyError):
    return None
  storage.write_json(directory / "work.json", document)
  return document


def _drawn_again(directory, document, chunks):
  """Members drawn anew, if they are the ones that were written."""
  counts = dict.fromkeys(document["members"], 0)
  for chunk in chunks:
    counts[chunk.group] = max(counts[chunk.group], chunk.last)
  pool_size = document["training"]["pool_size"]
  members = draw_members(document["training"]["seed"], counts, pool_size)
  if {group: _members_digest(rows) for group, rows in members.items()} != document["members"]:
    raise ValueError(
      f"{directory / 'membership.npz'} is lost or damaged, and this JAX ({jax.__version__}) draws "
      f"other random numbers than the one that wrote it ({document['versions'].get('jax')}); run "
      "once with that one."
    )
  return members


def _members_digest(rows):
  return hashlib.sha256(f"{rows.shape}".encode() + np.packbits(rows).tobytes()).hexdigest()


def run_apart(directory: pathlib.Path, chunk: Chunk) -> Chunk:
  """The chunk with half as many models in a program, for ever: they did not fit into memory."""
  fewer = dataclasses.replace(chunk, together=-(-chunk.together // 2))
  with locked(directory / ".lock"):
    work = read(directory)
    chunks = tuple(fewer if each == chunk else each for each in work.chunks)
    write(directory, dataclasses.replace(work, chunks=chunks))
  return fewer


def versions() -> dict[str, str]:
  """Of this package and of what results may depend on."""
  found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
  return found | {
    "ptq_jax": settings.code_version("data", "models", "train"),
    "device": jax.local_devices()[0].device_kind,
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
  }


# ---- who does it ----


class Shard(NamedTuple):
  """Part `index` of `count` of the chunks."""

  index: int = 0
  count: int = 1

  def of(self, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks of this part."""
    return list(chunks[self.index :: self.count])


WHOLE = Shard()
"""All chunks."""

SCHEDULERS = {
  "SLURM job array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
  "SLURM task": ("SLURM_PROCID", "SLURM_NTASKS", None),
  "Kubernetes indexed job": ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", None),
  "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", None),
  "TPU pod": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", None),
}
"""Variables that hold the index, the count (or one name per process) and the first index."""


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
  """The shard that "I/N" names; "auto" reads the variables of a scheduler; None is all.

  >>> parse_shard("1/4"), parse_shard(None)
  (Shard(index=1, count=4), Shard(index=0, count=1))

  Raises:
    ValueError: for another form, or "auto" where no scheduler has set its variables.
  """
  if text is None:
    return WHOLE
  if text == "auto":
    for index, count, first in SCHEDULERS.values():
      if index in environment and count in environment:
        names = environment[count]
        number = int(names) if names.isdigit() else len(names.split(","))
        return _shard(int(environment[index]) - int(environment.get(first or "", 0)), number, text)
    known = "; ".join(f"{name}: {i}, {n}" for name, (i, n, _) in SCHEDULERS.items())
    raise ValueError(
      f"--shard=auto finds no scheduler's variables ({known}); give --shard=I/N, from 0/N on."
    )
  index, slash, count = text.partition("/")
  if not (slash and index.isdigit() and count.isdigit()):
    raise ValueError(f"--shard is {text!r}; write I/N, such as 0/4 for the first of four.")
  return _shard(int(index), int(count), text)


def _shard(index, count, text):
  if not 0 <= index < count:
    raise ValueError(f"--shard={text} is part {index} of {count}; parts count from 0 to N - 1.")
  return Shard(index, count)


def own_gpus(environment: Mapping[str, str] = os.environ) -> str | None:
  """What CUDA_VISIBLE_DEVICES should be for a task of several on one node; None to leave it.

  Where SLURM gave each task GPUs of its own (--gpus-per-task), or there is one task, all that are
  visible are right. Where every task of a node sees all GPUs of it, each takes its share.

  Raises:
    ValueError: if a node has more tasks than GPUs.
  """
  tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_NTASKS_PER_NODE")
  on_node, local = environment.get("SLURM_GPUS_ON_NODE"), environment.get("SLURM_LOCALID")
  if not (tasks and on_node and local and on_node.isdigit()):
    return None
  tasks = int(tasks.partition("(")[0].partition(",")[0])
  visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(int(on_node))))
  gpus = visible.split(",")
  if tasks == 1 or len(gpus) < int(on_node):
    return None
  if tasks > len(gpus):
    raise ValueError(
      f"SLURM started {tasks} tasks on a node with {len(gpus)} GPUs; use --ntasks-per-node="
      f"{len(gpus)} or less."
    )
  return ",".join(gpus[int(local) :: tasks])


NO_LOCKS = {None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system says that has none; filelock turns the first into an error without number."""


class Busy(Exception):  # noqa: N818
  """Somebody else has the lock."""


@contextlib.contextmanager
def locked(
  path: pathlib.Path, *, wait: bool = True, waiting: Callable[[str], None] = lambda owner: None
) -> Iterator[None]:
  """Holds a lock that the operating system takes back when its owner dies.

  Args:
    path: of the lock's file, which says who has it.
    wait: for its owner, or raise at once.
    waiting: called with who has it, before that one is waited for.
  Raises:
    Busy: with who has it, if it is taken and `wait` is false.
    OSError: one sentence, if the file system has no locks or something else is in the way.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  lock = filelock.FileLock(path)
  try:
    with contextlib.suppress(filelock.Timeout):
      lock.acquire(timeout=0)
    if not lock.is_locked:
      owner = _owner(path)
      if not wait:
        raise Busy(owner)
      waiting(owner)
      lock.acquire()
  except (OSError, NotImplementedError) as error:
    why = (
      "; the workdir needs a file system with locks (NFS 4, or Lustre mounted with flock)"
      if getattr(error, "errno", None) in NO_LOCKS
      else ""
    )
    raise OSError(f"{path} cannot be locked ({error}){why}.") from error
  try:
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    yield
  finally:
    lock.release()


def _owner(path: pathlib.Path) -> str:
  """Who has a lock, as its file says; whoever has just got it writes that at once."""
  for _ in range(20):
    with contextlib.suppress(OSError):
      if owner := path.read_text().strip():
        return owner
    time.sleep(0.05)
  return "somebody"
