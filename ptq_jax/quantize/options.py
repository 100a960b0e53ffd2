"""Values that options of the methods may have, and the sentence about one that makes no sense."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

Range = tuple[Callable[[Any], bool], str]
"""What a value must fulfil, and that in words."""

CHOICES = {
  ("grid_options", "search"): ("mse", "minmax"),
  ("adaround", "form"): ("auto", "mini_batch", "second_moment"),
  ("adaround", "stop"): ("plateau", "never"),
  ("brecq", "form"): ("auto", "mini_batch"),
  ("brecq", "stop"): ("plateau", "never"),
  ("brecq", "loss"): ("mse", "fisher"),
  ("obc", "batchnorm"): ("members", "all", "none"),
}
"""Values of options that are words."""

MOST_NORM = 20
"""Largest power of an error that tells errors apart."""


def check(method: str, options: Mapping[str, Any], *, prefix: str = "") -> None:
  """Checks the options of a method; those that no method here has may be anything.

  Args:
    method: a key of `METHODS`.
    options: by name; some are mappings or named tuples of further ones.
    prefix: of their names, for messages.
  Raises:
    ValueError: for the first value that makes no sense.
  """
  for key, value in _flat(options):
    option = key.rpartition(".")[2]
    words = CHOICES.get((method, key)) or CHOICES.get(("grid_options", option))
    fits, demand = _range(option, words)
    if not fits(value):
      raise ValueError(f"{prefix}{key} is {value!r}; it must be {demand}.")


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Options by dotted name."""
  for key, value in options.items():
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, Mapping) and key != "group_size":
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def is_number(value: Any) -> bool:
  """Whether it is a finite number, of Python, NumPy or JAX."""
  if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
    value = value.item()
  if isinstance(value, bool | np.bool_):
    return False
  if isinstance(value, int | np.integer):
    return True
  return isinstance(value, float | np.floating) and math.isfinite(value)


def at_least(least: int | float) -> Range:
  """Numbers from one on."""
  return lambda value: is_number(value) and value >= least, f"at least {least}"


def between(test: Callable[[Any], bool], words: str) -> Range:
  """Numbers that pass a test."""
  return lambda value: is_number(value) and test(value), words


def _whole(least: int) -> Range:
  """Whole numbers from one on."""
  return between(lambda v: v >= least and v % 1 == 0, f"a whole number of at least {least}")


def _or_none(rule: Range) -> Range:
  fits, words = rule
  return lambda value: value is None or fits(value), f"{words}, or None"


def _range(option: str, words: tuple[str, ...] | None) -> Range:
  """Of an option by its own name."""
  if words:
    return lambda value: value in words, f"one of {', '.join(words)}"
  if option in ("symmetric", "include_zero", "strict"):
    return lambda value: isinstance(value, bool | np.bool_), "True or False"
  if option in ("memory_bytes", "block_size"):
    return _or_none(_whole(1))
  if option == "group_size":  # patterns are looked at with the layers
    one, words = _or_none(_whole(1))
    many = Mapping | list | tuple
    return lambda value: isinstance(value, many) or one(value), f"{words}, or sizes by pattern"
  if option == "norm":
    return between(lambda value: 0 < value <= MOST_NORM, f"above 0 and at most {MOST_NORM}")
  if option in ("learning_rate", "beta_start", "beta_end"):
    return between(lambda value: value > 0, "above 0")
  if option == "warmup":
    return between(lambda value: 0 <= value < 1, "in [0, 1)")
  if option == "decay_rates":

    def rates(pair):
      return len(pair) == 2 and all(is_number(rate) and 0 <= rate < 1 for rate in pair)

    return rates, "two numbers in [0, 1)"
  if option in ("weight", "damping"):
    return at_least(0)
  if option in ("num_steps", "batch_size", "sweeps"):
    return _whole(0 if option == "sweeps" else 1)
  return lambda value: True, ""  # units and calibration_size, which are looked at elsewhere
