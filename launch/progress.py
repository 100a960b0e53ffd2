"""One live line per stage: what is done, how fast, how long it still takes; and TensorBoard."""

import pathlib
import sys
import time

from ptq_jax.audit.events import Event, Listener

TENSORBOARD = "Also write loss and accuracy by epoch for TensorBoard, into WORKDIR/tensorboard."


def listener(workdir: pathlib.Path, tensorboard: bool) -> Listener:
  """What prints progress and, if asked to, keeps loss and accuracy for TensorBoard.

  Raises:
    ValueError: if TensorBoard's files cannot be written for want of a package.
  """
  return TensorBoard(Lines(), workdir / "tensorboard") if tensorboard else Lines()


class TensorBoard:
  """A listener that writes a run per chunk, steps counted in updates, and hands everything on."""

  def __init__(self, then: Listener, folder: pathlib.Path):
    try:
      from tensorboardX import SummaryWriter
    except ImportError as error:
      sentence = "--tensorboard needs another package: pip install tensorboardX."
      raise ValueError(sentence) from error
    self._then, self._folder, self._make, self._writers = then, folder, SummaryWriter, {}

  def __call__(self, event: Event) -> None:
    """Writes what an event has measured, and all of it when its stage has ended."""
    if event.measured:
      chunk, step, values = event.measured
      if chunk not in self._writers:
        # what a stopped run wrote past its checkpoint is replaced
        self._writers[chunk] = self._make(str(self._folder / chunk), purge_step=step, flush_secs=10)
      for name, value in values.items():
        self._writers[chunk].add_scalar(f"train/{name}", value, step)
    if event.ended:
      while self._writers:
        self._writers.popitem()[1].close()
    self._then(event)


class Lines:
  """A listener that prints to a stream.

  On a terminal the line of a stage is rewritten in place; elsewhere a new line is printed every ten
  seconds.
  """

  def __init__(self, stream=None):
    self._stream = stream or sys.stderr
    self._live = self._stream.isatty()
    self._stage = ""
    self._printed = 0.0
    self._starts = {}  # of stages; one may go on within another
    self._width = 0

  def __call__(self, event: Event) -> None:
    """Prints an event, or keeps it for later."""
    now = time.monotonic()
    if event.sentence:
      self._clear()
      self._write(event.sentence + "\n")
      return
    if event.stage != self._stage:
      self._stage, self._printed = event.stage, now
    if event.done == event.before:
      self._starts[event.stage] = now
    start = self._starts.setdefault(event.stage, now)
    if event.ended or now - self._printed > (0.2 if self._live else 10):
      self._printed = now
      self._show(event, now - start)

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
