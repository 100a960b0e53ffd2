"""Compiled programs, read: one written by hand, and a training step for a CPU."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from launch.benchmarks import _hlo as hlo
from launch.benchmarks import compile as compiled
from launch.benchmarks import device
from launch.benchmarks._rows import Rows
from ptq_jax import models
from ptq_jax.data import augment
from ptq_jax.models import conv
from ptq_jax.train import fit, optimizer, shadows

BY_HAND = """HloModule by_hand

%moving (p0: f32[8,4]) -> f32[4,8] {
  %p0 = f32[8,4]{1,0} parameter(0)
  ROOT %t = f32[4,8]{1,0} transpose(%p0), dimensions={1,0}
}

%cutting (p0: f32[100,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[100,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
  ROOT %twice = f32[1,4]{1,0} add(%cut, %cut)
}

%body (c: (s32[], f32[8,4], f32[100,4])) -> (s32[], f32[8,4], f32[100,4]) {
  %c = (s32[], f32[8,4]{1,0}, /*index=2*/f32[100,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%c), index=1
  %pool = f32[100,4]{1,0} get-tuple-element(%c), index=2
  %row = f32[1,4]{1,0} fusion(%pool, %i), kind=kLoop, calls=%cutting
  %copied = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%moving
  %near = f32[8,4]{1,0:T(8,128)S(1)} copy-start(%x)
  ROOT %next = (s32[], f32[8,4]{1,0}, f32[100,4]{1,0}) tuple(%i, %x, %pool)
}

%condition (c: (s32[], f32[8,4], f32[100,4])) -> pred[] {
  %c = (s32[], f32[8,4]{1,0}, f32[100,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: (s32[], f32[8,4], f32[100,4]), padded: bf16[3,16]) -> bf16[3,16] {
  %a = (s32[], f32[8,4]{1,0}, f32[100,4]{1,0}) parameter(0)
  %padded = bf16[3,16]{1,0:T(8,128)(2,1)} parameter(1)
  %loop = (s32[], f32[8,4]{1,0}, f32[100,4]{1,0}) while(%a), condition=%condition, body=%body
  ROOT %negated = bf16[3,16]{1,0:T(8,128)(2,1)} negate(%padded)
}
"""


def test_bytes_of_a_program_written_by_hand():
  program = hlo.Program(BY_HAND)
  assert program.loops() == [5]
  row = 16 + 4 + 16  # cut out of the pool, its position, written
  copy, prefetch = 2 * 128, 128  # to a memory on the chip only the reading counts
  outside = 2 * 8 * 128 * 2  # bf16 [3, 16] lies in a tile of 8 x 128
  assert program.traffic() == hlo.Traffic(5 * (row + copy + prefetch) + outside, 5 * copy, 16)


def test_a_loop_of_unknown_length_runs_as_often_as_told():
  text = BY_HAND.replace("constant(5)", "parameter(1)")
  assert hlo.Program(text).loops() == [0]
  once, thrice = (hlo.Program(text, unknown_trips=n).traffic().kernels for n in (1, 3))
  assert (once, thrice) == (4, 10)
  told = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert hlo.Program(told).loops() == [7]


@functools.cache
def training(together):
  """The compiled program of three steps; kernels of the second layer are [3, 3, 8, 16]."""
  recipe = fit.Recipe(
    models.make("convnet", num_classes=3, width=8),
    optimizer.sgd(learning_rate=0.1, epochs=1, steps_per_epoch=3),
    augment.make(()),
    (0.5,),
    (0.25,),
    8,
    lowering="unrolled",
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), together))
  init = functools.partial(fit.init, recipe=recipe, image_shape=(8, 8, 1))
  described = (
    jax.eval_shape(jax.vmap(init), keys),
    keys,
    jax.ShapeDtypeStruct((640, 64), jnp.uint8),
    jax.ShapeDtypeStruct((640,), jnp.int32),
    jax.ShapeDtypeStruct((together, 3, 8), jnp.int32),
  )
  run = functools.partial(shadows._run.__wrapped__, recipe, None, (8, 8, 1))
  lowered = jax.jit(run, donate_argnums=0, compiler_options=conv.compiler_options()).lower(
    *described
  )
  return lowered.compile()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA:CPU makes")
def test_training_is_one_loop_that_updates_its_states_in_place():
  program, needs = hlo.of(training(1)), training(1).memory_analysis()
  assert program.loops().count(3) == 1
  parameters = 4 * (9 * 8 + 9 * 8 * 16 + 9 * 16 * 32)  # bytes of the kernels of the convolutions
  assert needs.alias_size_in_bytes > 2 * parameters  # with their momentum


def stacked_kernels(text, together):
  """Operations that write the second layer's kernels of all models, by name."""
  found = re.findall(rf"= f32\[{together},3,3,8,16\]\S* (\w[\w-]*)\(", text)
  return collections.Counter(found)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA:CPU makes")
def test_models_one_after_the_other_stack_no_kernels():
  """Two in a program are sliced and stacked again; one alone is copied once, by its update."""
  alone, both = (stacked_kernels(training(count).as_text(), count) for count in (1, 2))
  assert alone["concatenate"] == alone["transpose"] == alone["pad"] == 0
  assert alone["copy"] <= 1
  assert both["concatenate"] == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the rule for a CPU")
def test_the_rule_for_a_chip_names_what_can_be_set_beside_what_auto_takes(tmp_path):
  options, rows = device.parser().parse_args(["--quick"]), Rows(tmp_path / "rows", version="")
  speeds = {"as chosen": 50.0, "unrolled": 80.0, "patches": 100.0, "grouped": 40.0}
  for key, _ in device.measurements(options):
    if key[0] == "training":
      rows.add(key, {"seconds": 1.0, "images_per_s": speeds[key[4]]})
  big, small = device.rule(rows, options)
  chosen = "2 models: models_together=2 lowering=patches; auto's rule is models_together="
  assert big.endswith(f"{chosen}1, 0.50 as fast")
  assert small.endswith(f"{chosen}2 lowering=unrolled, 0.80 as fast")
  for key, _ in device.measurements(options):
    if key[0] == "training":
      rows.find(key)["images_per_s"] = 200.0 if key[3] == 1 else None
      rows.find(key)["seconds"] = 1.0 if key[3] == 1 else None
  assert "models_together=1 lowering=auto; " in device.rule(rows, options)[0]


def test_no_program_does_more_than_the_peak():
  chip = compiled.CHIPS["v5e"]
  assert compiled.share_of_peak(chip.tflops * 1e12, 4.0, chip) == 0.25
  assert compiled.share_of_peak(1e12, 0.0, chip) == 1  # all its arrays stay on the chip


def test_the_largest_instructions_are_those_that_do_the_work():
  def step(_, x):
    return jnp.tanh(x @ x)

  call = functools.partial(jax.jit(lambda x: jax.lax.fori_loop(0, 3, step, x)), jnp.ones((64, 64)))
  jax.block_until_ready(call())
  found = device.largest(call, count=3)
  assert 1 <= len(found) <= 3
  assert not [name for name, _ in found if name.startswith("while")]
  shares = [share for _, share in found]
  assert shares == sorted(shares, reverse=True)
  assert 0 < sum(shares) <= 1 + 1e-9
