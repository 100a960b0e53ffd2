"""The work list: frozen, read back, grown, shared out; thousands of models without training one."""

import concurrent.futures
import dataclasses
import errno
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from ptq_jax import storage
from ptq_jax.audit import work
from ptq_jax.audit.work import Chunk, Sizes

TRAINING = {"seed": 0, "pool_size": 20, "train": {"epochs": 2}}


def settle(
  directory, shadows=8, targets=0, *, per_chunk=4, together=2, training=TRAINING, say=print
):
  return work.settle(
    directory,
    training=training,
    data="data",
    counts={"shadows": shadows, "targets": targets},
    pool_size=20,
    sizes=lambda models, begun: Sizes(per_chunk, together),
    say=say,
  )


def names(found):
  return [chunk.name for chunk in found.chunks]


def trained(directory, chunk):
  (directory / chunk / "trained").mkdir(parents=True)
  (directory / chunk / "trained" / "2.json").write_text("{}")


def test_what_was_begun_is_read_back_whatever_is_asked_now(tmp_path):
  begun = settle(tmp_path)
  again = settle(tmp_path, per_chunk=8, together=1)
  assert names(again) == ["shadows-00000-00004", "shadows-00004-00008"]
  assert [chunk.together for chunk in again.chunks] == [2, 2]
  np.testing.assert_array_equal(begun.members["shadows"], again.members["shadows"])
  assert (again.stamp, again.random, again.versions) == (begun.stamp, begun.random, begun.versions)


@pytest.mark.parametrize(
  ("there", "wrong"), [('"seed": 0', '"seed": 1'), ("      2,\n", "      3,\n")]
)
def test_a_changed_digit_in_the_work_list_is_made_good(tmp_path, there, wrong):
  """It is not taken for another audit's, nor for models divided otherwise."""
  settle(tmp_path)
  path = tmp_path / "work.json"
  before = path.read_text()
  path.write_text(before.replace(there, wrong, 1))
  assert path.read_text() != before
  assert [chunk.together for chunk in settle(tmp_path).chunks] == [2, 2]
  assert path.read_text() == before


@pytest.mark.parametrize("lost", ["work.json", "membership.npz"])
@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_each_file_makes_the_other(tmp_path, lost, how):
  begun = settle(tmp_path, targets=2)
  path = tmp_path / lost
  path.unlink() if how == "deleted" else path.write_bytes(path.read_bytes()[:-40])
  again = settle(tmp_path, targets=2)
  for group in ("shadows", "targets"):
    np.testing.assert_array_equal(begun.members[group], again.members[group])
  assert dataclasses.replace(again, members={}) == dataclasses.replace(begun, members={})
  assert work.read(tmp_path).chunks == begun.chunks
  assert path.exists()


def test_a_list_from_before_lowerings_were_in_it_is_read(tmp_path):
  begun = settle(tmp_path)
  document = storage.read_json(tmp_path / "work.json")
  document["chunks"] = [chunk[:-1] for chunk in document["chunks"]]
  storage.write_json(tmp_path / "work.json", document)
  again = work.read(tmp_path)
  assert again.chunks == begun.chunks
  assert [chunk.lowering for chunk in again.chunks] == [None, None]


def test_models_are_added_at_the_end(tmp_path):
  begun = settle(tmp_path, 8)
  grown = settle(tmp_path, 12, 2, per_chunk=8)
  assert names(grown) == [*names(begun), "shadows-00008-00012", "targets-00000-00002"]
  np.testing.assert_array_equal(grown.members["shadows"][:8], begun.members["shadows"])


def test_a_mistyped_number_can_be_taken_back_until_something_is_trained(tmp_path):
  settle(tmp_path, 8)
  trained(tmp_path, "shadows-00004-00008")
  settle(tmp_path, 80)
  assert names(settle(tmp_path, 8)) == ["shadows-00000-00004", "shadows-00004-00008"]
  assert len(settle(tmp_path, 16, per_chunk=16).chunks) == 3
  trained(tmp_path, "shadows-00008-00016")
  with pytest.raises(ValueError, match=r"trained shadows 8 to 15, but train\.models asks for 12"):
    settle(tmp_path, 12)
  assert len(settle(tmp_path, 16).chunks) == 3


def test_chunks_never_overlap_and_cover_every_model(tmp_path):
  rng = np.random.default_rng(0)
  for number in range(30):
    directory = tmp_path / str(number)
    for models in (rng.integers(1, 12, 3) * 2).tolist():
      try:
        found = settle(directory, models, per_chunk=int(rng.integers(1, 6)))
      except ValueError:  # what is trained does not shrink
        found = work.read(directory)
      ids = np.concatenate([chunk.ids for chunk in found.chunks])
      np.testing.assert_array_equal(ids, np.arange(len(found.members["shadows"])))
      if rng.random() < 0.5:
        chunk = found.chunks[rng.integers(len(found.chunks))].name
        if not (directory / chunk).exists():
          trained(directory, chunk)


def test_random_numbers_do_not_depend_on_the_environment():
  environment = {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
  program = (
    "from ptq_jax.audit import work\nwith work.pinned_randomness():\n  print(work.random_sample())"
  )
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | environment,
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.stdout.strip() == work.random_sample(), done.stderr


def test_who_divides_the_work_is_waited_for_and_named(tmp_path):
  said = []
  with concurrent.futures.ThreadPoolExecutor(1) as pool, work.locked(tmp_path / ".lock"):
    second = pool.submit(settle, tmp_path, say=said.append)
    while not said and not second.done():
      time.sleep(0.01)
    assert not second.done()
  assert names(second.result()) == ["shadows-00000-00004", "shadows-00004-00008"]
  assert said == [
    f"waiting for process {os.getpid()} on {socket.gethostname()}, which divides the work, and may "
    "measure how models train fastest."
  ]


def test_another_generator_may_not_add_models(tmp_path, monkeypatch):
  settle(tmp_path, 8)
  monkeypatch.setattr(work, "key", lambda seed, stream: jax.random.key(seed + 1))
  assert settle(tmp_path, 8)  # what is there is read back
  with pytest.raises(ValueError, match="draws other random numbers than the one that began"):
    settle(tmp_path, 12)


def test_pins_are_taken_out_again():
  before = jax.config.jax_threefry_partitionable
  jax.config.update("jax_threefry_partitionable", False)
  try:
    with work.pinned_randomness():
      assert jax.config.jax_threefry_partitionable
    assert not jax.config.jax_threefry_partitionable
  finally:
    jax.config.update("jax_threefry_partitionable", before)


def test_a_chunk_is_held_by_one_and_let_go_when_its_owner_dies(tmp_path):
  path = tmp_path / "lock"
  program = (
    "import pathlib, sys, time\n"
    "from ptq_jax.audit import work\n"
    "with work.locked(pathlib.Path(sys.argv[1])):\n"
    "  print('held', flush=True)\n"
    "  time.sleep(600)\n"
  )
  root = pathlib.Path(__file__).resolve().parents[2]
  owner = subprocess.Popen(
    [sys.executable, "-c", program, str(path)], cwd=root, stdout=subprocess.PIPE, text=True
  )
  assert owner.stdout.readline() == "held\n"
  with pytest.raises(work.Busy), work.locked(path, wait=False):
    pass
  owner.kill()
  owner.wait()
  with work.locked(path, wait=False):
    pass


@pytest.mark.parametrize(
  ("error", "hint"),
  [
    (OSError(errno.EMFILE, "Too many open files"), False),
    (OSError(errno.ENOLCK, "No locks available"), True),
    (NotImplementedError("no flock"), True),
  ],
)
def test_a_lock_that_cannot_be_had_says_why(tmp_path, monkeypatch, error, hint):
  def acquire(self, **_):
    raise error

  monkeypatch.setattr("filelock.FileLock.acquire", acquire)
  with pytest.raises(OSError, match="cannot be locked") as raised, work.locked(tmp_path / "lock"):
    pass
  assert str(error) in str(raised.value)
  assert ("file system with locks" in str(raised.value)) == hint


def test_halved_programs_are_written_down(tmp_path):
  begun = settle(tmp_path, together=4)
  fewer = work.run_apart(tmp_path, begun.chunks[1])
  assert fewer.together == 2
  assert [chunk.together for chunk in settle(tmp_path).chunks] == [4, 2]


@pytest.mark.parametrize(
  ("text", "environment", "expected"),
  [
    (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (0, 1)),
    ("2/3", {}, (2, 3)),
    ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
    ("auto", {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "8"}, (2, 8)),
    ("auto", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
    ("auto", {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, (3, 4)),
    (
      "auto",
      {
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_MIN": "3",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
      },
      (2, 4),
    ),
  ],
)
def test_shards(text, environment, expected):
  assert work.parse_shard(text, environment) == expected


@pytest.mark.parametrize(
  ("text", "sentence"),
  [("4/4", "parts count from 0"), ("1", "write I/N"), ("auto", "finds no scheduler's variables")],
)
def test_odd_shards(text, sentence):
  with pytest.raises(ValueError, match=sentence):
    work.parse_shard(text, {})


SLURM = {"SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, None),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "1,5"),
    (SLURM | {"SLURM_NTASKS_PER_NODE": "8"}, "1"),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2,3"}, None),
    (SLURM | {"SLURM_NTASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "1,3,5,7"),
  ],
)
def test_the_tasks_of_a_node_share_all_of_its_gpus(environment, expected):
  assert work.own_gpus(environment) == expected


def test_more_tasks_than_gpus_are_refused():
  with pytest.raises(ValueError, match="4 tasks on a node with 2 GPUs"):
    work.own_gpus({"SLURM_GPUS_ON_NODE": "2", "SLURM_LOCALID": "3", "SLURM_NTASKS_PER_NODE": "4"})


def test_ten_thousand_models_on_256_hosts(tmp_path):
  """Stub stages: some hosts die in between, the others go on, and restarts end it."""
  chunks = [Chunk("shadows", first, first + 16, 2) for first in range(0, 10_000, 16)]
  shards = [work.Shard(index, 256) for index in range(256)]
  owned = [shard.of(chunks) for shard in shards]
  assert sorted(chunk for part in owned for chunk in part) == chunks
  assert max(map(len, owned)) - min(map(len, owned)) <= 1
  done, again = set(), []
  rng = np.random.default_rng(0)

  def host(part):
    for chunk in part:
      if chunk.name in done:
        continue
      if rng.random() < 0.1:
        again.append(part)
        return
      done.add(chunk.name)

  for part in owned:
    host(part)
  while again:
    host(again.pop())
  assert len(done) == len(chunks)


def test_processes_without_shards_take_what_is_free(tmp_path):
  """Threads stand for processes: every chunk is worked on once, whoever comes first."""
  chunks, done, lock = [Chunk("shadows", i, i + 1) for i in range(12)], [], threading.Lock()

  def process():
    for chunk in chunks:
      try:
        with work.locked(tmp_path / chunk.name, wait=False), lock:
          if chunk not in done:
            done.append(chunk)
      except work.Busy:
        pass

  threads = [threading.Thread(target=process) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(done) == chunks


def test_who_has_just_got_a_lock_is_named(tmp_path, monkeypatch):
  """A lock is held before its file says by whom."""
  path = tmp_path / "lock"
  path.touch()
  monkeypatch.setattr(work.time, "sleep", lambda seconds: path.write_text("process 7 on there\n"))
  assert work._owner(path) == "process 7 on there"
  monkeypatch.setattr(work.time, "sleep", lambda seconds: None)
  path.write_text("")
  assert work._owner(path) == "somebody"
