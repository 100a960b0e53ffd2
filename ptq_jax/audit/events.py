"""How an audit tells what it does: events that it hands to a function of the caller's."""

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Measured(NamedTuple):
  """What was measured while training, means over models."""

  chunk: str
  step: int  # updates of each model since the beginning
  values: Mapping[str, float]  # "loss" in nats, "accuracy" in [0, 1]


class Event(NamedTuple):
  """Where a stage is, or something to be said."""

  stage: str
  done: float = 0.0  # units of work, of this run and those before it
  total: float = 0.0
  before: float = 0.0  # units of work that others did: they tell nothing about this run's speed
  note: str = ""  # in a few words what was done last
  sentence: str = ""  # to be said once, on a line of its own
  measured: Measured | None = None
  ended: bool = False


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
  """A listener that does nothing."""


def listener(given: Listener | None) -> Listener:
  """What was given, or `silent` for None.

  Raises:
    ValueError: for anything that cannot be called.
  """
  if given is None:
    return silent
  if not callable(given):
    raise ValueError(f"progress is {given!r}; give a function of an audit.Event, or None.")
  return given


class Stage:
  """Counts the work of a stage and tells the listener; a context manager."""

  def __init__(self, listener: Listener, name: str, total: float | int, *, done: float | int = 0):
    self._listener = listener
    self._now = Event(name, done, total, before=done)

  def __enter__(self) -> "Stage":
    self._listener(self._now)
    return self

  def __exit__(self, kind, *exception) -> None:
    if kind is None:
      self._listener(self._now._replace(ended=True))

  def advance(self, amount: float | int, note: str = "", measured: Measured | None = None) -> None:
    """Adds finished work; `note` says in a few words what it was."""
    self._now = self._now._replace(done=self._now.done + amount, note=note or self._now.note)
    self._listener(self._now._replace(measured=measured))

  def skip(self, amount: float | int) -> None:
    """Adds work that turns out to be done, by a run before or another process."""
    before = self._now.before + amount
    self._now = self._now._replace(done=self._now.done + amount, before=before)
    self._listener(self._now)

  def say(self, sentence: str) -> None:
    """Tells a sentence."""
    self._listener(self._now._replace(sentence=sentence))
