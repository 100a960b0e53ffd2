"""One live line per stage: what is done, how fast, how long it still takes."""

import sys
import time


class Progress:
  """Counts units of work and prints a line with the time left; a context manager.

  On a terminal the line is rewritten in place; elsewhere a new line is printed every ten seconds.
  """

  def __init__(self, stage: str, total: float, *, done: float = 0, stream=None):
    self.stage, self.total, self.done = stage, total, done
    self._stream = stream or sys.stderr
    self._live = self._stream.isatty()
    self._start = self._printed = time.monotonic()
    self._before = done  # work of an earlier run tells nothing about the speed of this one
    self._note = ""
    self._width = 0

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception) -> None:
    self._print(final=exception[0] is None)
    self._stream.write("\n" if self._live else "")
    self._stream.flush()

  def advance(self, amount: float, note: str = "") -> None:
    """Adds finished work; `note` says in a few words what it was."""
    self.done += amount
    self._note = note or self._note
    if time.monotonic() - self._printed > (0.2 if self._live else 10):
      self._print()

  def say(self, sentence: str) -> None:
    """Prints a sentence on a line of its own."""
    self._stream.write(("\r" + " " * self._width + "\r" if self._live else "") + sentence + "\n")
    self._stream.flush()

  def _print(self, final=False):
    elapsed = time.monotonic() - self._start
    share = min(self.done / self.total, 1.0) if self.total else 1.0
    worked = self.done - self._before
    if final:
      rest = f"took {duration(elapsed)}"
    elif worked > 0:
      rest = f"{duration(elapsed / worked * (self.total - self.done))} left"
    else:
      rest = "starting"
    line = f"{self.stage:<14} {share:4.0%}  {rest}" + (f"  {self._note}" if self._note else "")
    self._printed = time.monotonic()
    padded = line.ljust(self._width)
    self._width = len(line)
    self._stream.write(f"\r{padded}" if self._live else f"{line}\n")
    self._stream.flush()


def duration(seconds: float) -> str:
  """Seconds as people say them.

  >>> duration(3.2), duration(75), duration(7500)
  ('3 s', '1 min 15 s', '2 h 5 min')
  """
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3600:
    return f"{seconds // 60} min {seconds % 60} s"
  return f"{seconds // 3600} h {seconds % 3600 // 60} min"
