"""What a quantization tells: a table of its records, and its progress."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from ptq_jax import trees
from ptq_jax.models import units
from ptq_jax.quantize import METHODS, adaround, plan
from ptq_jax.quantize.grid import Grid
from tests import fresh


def test_records_print_as_a_table():
  def record(name, *grids):
    return plan.Record(name, 12.3456, 1.5, 400, 0.25, {str(i): g for i, g in enumerate(grids)})

  eight, full = Grid(1, 0, 8), Grid(1, 0, 0)
  table = str(plan.Records([record("stem/conv", eight), record("block", full, eight)]))
  assert table.splitlines() == [
    "layer       levels  error before  error after  seconds",
    "stem/conv        8         12.35          1.5     0.25",
    "block      full, 8         12.35          1.5     0.25",
  ]


def test_a_table_for_every_plan_with_means_over_models():
  numbers = np.array([[1.0, 3.0], [5.0, 5.0]])
  grids = {"head": Grid(numbers, numbers, np.array([[3, 3], [0, 0]]))}
  text = str(plan.Records([plan.Record("head", numbers, numbers / 2, numbers, numbers, grids)]))
  assert [line.split() for line in text.split("\n")] == [
    ["plan", "0"],
    ["layer", "levels", "error", "before", "error", "after", "seconds"],
    ["head", "3", "2", "1", "4.00"],
    [],
    ["plan", "1"],
    ["layer", "levels", "error", "before", "error", "after", "seconds"],
    ["head", "full", "5", "2.5", "10.00"],
  ]


class Two(nn.Module):
  """Two layers of one shape."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name="last")(nn.relu(nn.Dense(4, name="first")(x)))


FEW = {
  "nearest": {},
  "adaround": {"second_moment": adaround.SECOND_MOMENT._replace(num_steps=25), "sweeps": 0},
}


@pytest.mark.parametrize("name", FEW)
def test_progress_is_told_to_the_end(name):
  model, images = Two(), np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
  variables = fresh.stacked(model, images[0], num_models=1)
  layers = units.layers(model, trees.take(variables, 0), images[0])
  plans = [plan.make(layers, levels=levels) for levels in (3, 4)]
  told, keys = [], jax.random.split(jax.random.key(0), 1)
  _, records = METHODS[name].quantize_stacked(
    keys,
    model,
    variables,
    images,
    plans=plans,
    progress=lambda *about: told.append(about),
    **FEW[name] | ({"memory_bytes": 1} if name == "adaround" else {}),
  )
  total = {"nearest": 2, "adaround": 4}[name]  # layers, or units of two pairs, one at a time
  assert [done for _, done, _ in told] == list(range(1, total + 1))
  assert {whole for *_, whole in told} == {total}
  assert [name for name, *_ in told[:2]] == ["first", "last"]
  assert str(records).startswith("plan 0\nlayer")
