"""Stops that a user or a scheduler asks for, taken at the next good moment."""

import contextlib
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
def deferred(say: Callable[[str], None]) -> Iterator[Callable[[], Stopped | None]]:
  """Inside, a first Ctrl-C or SIGTERM does not raise: the function yielded returns it instead.

  So a loop can save its state at the next good moment and raise then. A second one raises at once.
  In a thread other than the main one signals cannot be caught, and nothing is.

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
