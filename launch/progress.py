"""One live line per stage: what is done, how fast, how long it still takes."""

import sys
import time

from ptq_jax.audit.events import Event


class Lines:
  """A listener that prints to a stream.

  On a terminal the line of a stage is rewritten in place; elsewhere a new line is printed every ten
  seconds.
  """

  def __init__(self, stream=None):
    self._stream = stream or sys.stderr
    self._live = self._stream.isatty()
    self._stage = ""
    self._start = self._printed = 0.0
    self._width = 0

  def __call__(self, event: Event) -> None:
    """Prints an event, or keeps it for later."""
    now = time.monotonic()
    if event.sentence:
      self._clear()
      self._write(event.sentence + "\n")
      return
    if event.stage != self._stage:
      self._stage, self._start, self._printed = event.stage, now, now
    if event.ended or now - self._printed > (0.2 if self._live else 10):
      self._printed = now
      self._show(event, now - self._start)

  def _show(self, event, elapsed):
    share = min(event.done / event.total, 1.0) if event.total else 1.0
    worked = event.done - event.before
    if event.ended:
      rest = f"took {duration(elapsed)}"
    elif worked > 0:
      rest = f"{duration(elapsed / worked * (event.total - event.done))} left"
    else:
      rest = "starting"
    line = f"{event.stage:<14} {share:4.0%}  {rest}" + (f"  {event.note}" if event.note else "")
    padded = line.ljust(self._width)
    self._width = 0 if event.ended else len(line)
    self._write(
      (f"\r{padded}" if self._live else line) + ("" if self._live and not event.ended else "\n")
    )

  def _clear(self):
    if self._live and self._width:
      self._write("\r" + " " * self._width + "\r")
    self._width = 0

  def _write(self, text):
    self._stream.write(text)
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
