"""Which layer gets how many levels, and the record of what was done to each unit.

A plan is a dict from layer path to levels; None keeps the layer in full precision.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from ptq_jax.base import ArrayLike, Float, Int
from ptq_jax.models.units import Kept, Layer
from ptq_jax.quantize import grid
from ptq_jax.quantize.grid import Grid

FULL = "full"
"""Says "full precision" where None already means "as the rest"."""

LAST_LAYER_SWEEP = (3, 4, 8, 16, 256, FULL)
"""Levels of the last layer in the sweep of arXiv 2512.15335, from coarsest to full precision."""

GRID_OPTIONS = ("symmetric", "search", "norm", "include_zero", "group_size")
"""Options of `grid.fit` that a method takes."""

Levels = int | None
"""2 to 256, or None: full precision."""

Plan = dict[str, Levels]
"""Levels per layer path, every layer of the model listed, in execution order."""

Value = TypeVar("Value")


class Record(NamedTuple):
  """What quantizing did to one unit (or layer), for P plans and M models.

  The arrays are [P, M]; for one model under one plan they are scalars.
  """

  name: str
  """Path of the layer or name of the unit."""
  error_before: Float[ArrayLike, "..."]
  """Output error of nearest rounding on the calibration set: mean over images and pixels of the
  squared error summed over channels."""
  error_after: Float[ArrayLike, "..."]
  """The same after the method; never above `error_before`."""
  steps: Int[ArrayLike, "..."]
  """Optimisation steps taken; 0 for full precision and for methods that do not iterate."""
  seconds: Float[ArrayLike, "..."]
  """Wall-clock time, the time of a batch shared equally by what was in it."""
  grids: Mapping[str, Grid]
  """Per layer path the grid its weights lie on, leading axes [P, M]; levels 0: full precision."""


class Records(list[Record]):
  """Records of the layers or units of a model; `print` shows a table.

  Of several plans there is a table each. Errors are means over the models, seconds their sum.
  """

  def __str__(self) -> str:
    num_plans = np.shape(self[0].error_before)[0] if self and np.ndim(self[0].error_before) else 0
    if not num_plans:
      return self._table(...)
    return "\n\n".join(f"plan {p}\n{self._table(p)}" for p in range(num_plans))

  def _table(self, p) -> str:
    rows = [("layer", "levels", "error before", "error after", "seconds")]
    for record in self:
      counts = {
        int(n) for each in record.grids.values() for n in np.ravel(np.asarray(each.levels)[p])
      }
      levels = ", ".join(str(n) if n else FULL for n in sorted(counts))
      parts = record.error_before, record.error_after, record.seconds
      before, after, seconds = (np.asarray(part)[p] for part in parts)
      rows.append(
        (record.name, levels, f"{before.mean():.4g}", f"{after.mean():.4g}", f"{seconds.sum():.2f}")
      )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
      aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
      lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


Progress = Callable[[str, int, int], None]
"""Called after every layer or unit with its name, how much is done, and of how much."""


def make(
  layers: Sequence[Layer],
  *,
  levels: Levels,
  last_layer_levels: int | Literal["full"] | None = None,
  first_layer_levels: int | Literal["full"] | None = None,
  overrides: Mapping[str, Levels] | None = None,
) -> Plan:
  """Levels for every layer of a model.

  Args:
    layers: in execution order, see `models.units.layers`.
    levels: of every layer not named below; None: full precision.
    last_layer_levels: of the last layer that runs, the classifier; None: as the rest; "full": full
      precision. `first_layer_levels` likewise.
    overrides: levels by path pattern ("blocks_0/*", see `fnmatch`); they win over all the above,
      later patterns over earlier ones.
  Raises:
    ValueError: levels outside 2..256, or a pattern that matches no layer.
  """
  plan: Plan = {layer.path: levels for layer in layers}
  paths = list(plan)
  for path, chosen in ((paths[0], first_layer_levels), (paths[-1], last_layer_levels)):
    if chosen is not None:
      plan[path] = None if chosen == FULL else chosen
  for pattern, chosen in (overrides or {}).items():
    matches = _matches(pattern, paths)
    if not matches:
      raise ValueError(f"override {pattern!r} matches no layer; the layers are {paths}.")
    plan |= dict.fromkeys(matches, chosen)
  check(plan, layers)
  return plan


def resolve(
  layers: Sequence[Layer],
  levels: Levels | Mapping[str, Levels],
  last_layer_levels: int | Literal["full"] | None = None,
) -> Plan:
  """The plan that a caller's `levels` mean: one number for all layers, or levels by path.

  Paths may be patterns (`fnmatch`), of which the first that matches counts:
  `{"head/*": 16, "*": 3}`.

  Raises:
    ValueError: a plan that misses a layer or names one that is not there; see `make`.
  """
  if not isinstance(levels, Mapping):
    return make(layers, levels=levels, last_layer_levels=last_layer_levels)
  plan = by_pattern(levels, layers)
  check(plan, layers)
  if last_layer_levels is not None:
    plan[layers[-1].path] = None if last_layer_levels == FULL else last_layer_levels
    check(plan, layers)
  return plan


def by_pattern(
  values: Mapping[str, Value], layers: Sequence[Layer], *, what: str = "plan"
) -> dict[str, Value]:
  """The value of every layer: that of the first pattern (`fnmatch`) which matches its path.

  Args:
    what: the values, in the message.
  Raises:
    ValueError: a pattern that matches no layer, or a layer that no pattern matches.
  """
  paths = [layer.path for layer in layers]
  found: dict[str, Value] = {}
  for pattern, value in values.items():
    matches = _matches(pattern, paths)
    _require_same(what, set() if matches else {pattern}, paths)
    found = dict.fromkeys(matches, value) | found
  _require_same(what, set(paths) - set(found), paths)
  return {path: found[path] for path in paths}


def grid_options(
  layers: Sequence[Layer], plans: Sequence[Plan], options: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
  """The options of `grid.fit` for every layer, by path.

  Args:
    options: for all layers, but `group_size` may be sizes by path pattern, see `by_pattern`:
      `{"head/*": None, "*": 64}`.
  Raises:
    ValueError: an option that there is not, what `by_pattern` refuses, or a group size that does
      not divide the inputs of a layer that a plan quantizes.
  """
  if not isinstance(options, Mapping | None):
    raise ValueError(f"grid_options is {options!r}; give options of grid.fit by name.")
  options = dict(options or {})
  if unknown := sorted(set(options) - set(GRID_OPTIONS)):
    known = ", ".join(GRID_OPTIONS)
    raise ValueError(f"grid_options has {unknown[0]!r}; the options of a grid are {known}.")
  sizes = options.pop("group_size", None)
  if not isinstance(sizes, Mapping):
    sizes = {layer.path: sizes for layer in layers}
  sizes, found = by_pattern(sizes, layers, what="group_size"), {}
  for layer in layers:
    quantized = any(chosen[layer.path] is not None for chosen in plans)
    size = sizes[layer.path] if quantized else None
    if size is not None:
      grid.check_group_size(size, layer.num_rows, f"layer {layer.path!r}")
    found[layer.path] = options | {"group_size": size}
  return found


def check(plan: Mapping[str, Levels], layers: Sequence[Layer]) -> None:
  """Raises ValueError unless the plan gives every layer, and nothing else, levels in 2..256."""
  paths = [layer.path for layer in layers]
  _require_same("plan", set(plan) ^ set(paths), paths)
  for chosen in plan.values():
    if np.ndim(chosen):
      raise ValueError(f"levels of a layer are {chosen}; give one whole number, or None.")
    if chosen is not None:
      grid.check_levels(chosen)


def _matches(pattern, paths) -> list[str]:
  """The paths that a pattern means: the path that it is, or those that it matches."""
  return [pattern] if pattern in paths else [p for p in paths if fnmatch.fnmatchcase(p, pattern)]


def _require_same(what, odd, paths):
  """Raises ValueError for the first of the odd paths or patterns, if there is one."""
  if odd:
    raise ValueError(f"{what} and layers differ at {min(odd)!r}; the layers are {paths}.")


def kept_records(kept: Sequence[Kept], *, num_plans: int, num_models: int) -> list[Record]:
  """Records of weights that stay in full precision: no error, levels 0."""
  shape = (num_plans, num_models)
  nothing, none = np.zeros(shape), np.zeros(shape, int)
  return [
    Record(one.path, nothing, nothing, none, nothing, {one.path: Grid(nothing + 1, nothing, none)})
    for one in kept
  ]


def bits_per_weight(
  plan: Mapping[str, Levels], layers: Sequence[Layer], kept: Sequence[Kept] = ()
) -> float:
  """log2(levels), weighted by the layers' numbers of weights; full precision counts 32 bits.

  Args:
    kept: weights that are no layer's and stay in full precision, see `units.survey`.
  """
  sizes = [math.prod(layer.kernel_shape) for layer in layers]
  sizes += [math.prod(one.shape) for one in kept]
  bits = [32.0 if plan[layer.path] is None else math.log2(plan[layer.path]) for layer in layers]
  return float(np.average(bits + [32.0] * len(kept), weights=sizes))
