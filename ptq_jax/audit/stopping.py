"""Stops that a user or a scheduler asks for, taken at the next good moment."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


class Stopped(KeyboardInterrupt):
  """The user or the machine's scheduler asked the program to stop."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


def stop(number, _frame) -> None:
  """A signal handler that raises `Stopped`."""
  raise Stopped(number)


@contextlib.contextmanager
def raised(seconds: float = 3) -> Iterator[None]:
  """Inside, Ctrl-C and SIGTERM raise `Stopped`: for a program, in its main thread.

  What is raised amid a callback of the garbage collector or of a library may be forgotten there (of
  twenty audits stopped while JAX traced, one went on). So it is raised again until it gets out.

  Args:
    seconds: from one time to the next.
  """
  timers: list[threading.Timer] = []

  def raise_again(number, frame):
    timers.append(threading.Timer(seconds, os.kill, (os.getpid(), number)))
    timers[-1].daemon = True
    timers[-1].start()
    stop(number, frame)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, raise_again)
  try:
    yield
  finally:
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, stop)
    for timer in timers:
      timer.cancel()


@contextlib.contextmanager
def deferred(say: Callable[[str], None]) -> Iterator[Callable[[], Stopped | None]]:
  """Inside, a first Ctrl-C or SIGTERM does not raise: the function yielded returns it instead.

  So a loop can save its state at the next good moment and raise then; a stop that came after the
  last such moment raises at the end of the block. A second one raises at once. In a thread other
  than the main one signals cannot be caught, and nothing is.

  Args:
    say: told that the stop was heard.
  """
  asked: list[Stopped] = []

  def remember(number, frame):
    if asked:
      stop(number, frame)
    asked.append(Stopped(number))
    say(f"{asked[0]}: saving, then stopping; once more stops at once.")

  if threading.current_thread() is not threading.main_thread():
    yield lambda: None
    return
  before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield lambda: asked[0] if asked else None
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if asked:
    raise asked[0]
