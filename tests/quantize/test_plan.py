"""Levels per layer, and what is refused."""

import math

import pytest

from ptq_jax.models.units import Layer
from ptq_jax.quantize import plan

LAYERS = [
  Layer("stem/conv", "conv", (3, 3, 3, 8)),
  Layer("blocks_0/conv1", "conv", (3, 3, 8, 8)),
  Layer("blocks_0/conv2", "conv", (3, 3, 8, 8)),
  Layer("head/classifier", "dense", (8, 10)),
]


def chosen(**options):
  return list(plan.make(LAYERS, **options).values())


def test_ends_and_overrides():
  assert chosen(levels=4) == [4, 4, 4, 4]
  assert chosen(levels=4, last_layer_levels=256) == [4, 4, 4, 256]
  assert chosen(levels=4, last_layer_levels="full") == [4, 4, 4, None]
  assert chosen(levels=None, first_layer_levels=16) == [16, None, None, None]
  patterns = {"blocks_*": 8, "*/conv2": None}
  assert chosen(levels=3, last_layer_levels=16, overrides=patterns) == [3, 8, None, 16]
  assert chosen(levels=3, last_layer_levels=16, overrides={"head/*": 5}) == [3, 3, 3, 5]


def test_a_pattern_that_matches_nothing_lists_the_paths():
  with pytest.raises(ValueError, match=r"'block_\*' matches no layer.*blocks_0/conv1"):
    plan.make(LAYERS, levels=4, overrides={"block_*": 8})


@pytest.mark.parametrize("levels", [1, 0, -3, 257])
def test_levels_out_of_range(levels):
  with pytest.raises(ValueError, match=r"levels must be a whole number from 2 to 256"):
    plan.make(LAYERS, levels=levels)
  with pytest.raises(ValueError, match=r"levels must be a whole number from 2 to 256"):
    plan.make(LAYERS, levels=4, overrides={"stem/*": levels})


def test_resolve_takes_numbers_and_plans():
  assert plan.resolve(LAYERS, 3, 256) == plan.make(LAYERS, levels=3, last_layer_levels=256)
  ready = plan.make(LAYERS, levels=3)
  assert plan.resolve(LAYERS, ready) == ready
  assert plan.resolve(LAYERS, ready, "full") == ready | {"head/classifier": None}


def test_plans_must_name_the_layers():
  with pytest.raises(ValueError, match="plan and layers differ at 'head/classifier'"):
    plan.check({layer.path: 3 for layer in LAYERS[:3]}, LAYERS)
  with pytest.raises(ValueError, match="plan and layers differ at 'tail'"):
    plan.resolve(LAYERS, plan.make(LAYERS, levels=3) | {"tail": 3})


def test_group_sizes_go_by_pattern_as_levels_do():
  plans = [plan.make(LAYERS, levels=3, first_layer_levels="full")]
  patterns = {"head/classifier": None, "*/conv2": 9, "blocks_?/*": 24, "*": 7}
  found = plan.grid_options(LAYERS, plans, {"norm": 2.0, "group_size": patterns})
  assert [each["group_size"] for each in found.values()] == [None, 24, 9, None]  # 7 is not used
  assert {each["norm"] for each in found.values()} == {2.0}
  assert list(plan.grid_options(LAYERS, plans, None)) == [layer.path for layer in LAYERS]
  for sizes, message in (
    ({"head/*": 4}, "group_size and layers differ at 'blocks_0/conv1'; the layers are"),
    ({"tail": 4, "*": None}, "group_size and layers differ at 'tail'; the layers are"),
    ({"head/*": 3, "*": None}, "group_size is 3, which does not divide the 8 inputs of an output"),
    ({"*": 4.0}, "group_size is 4.0, which does not"),
    ("64", "group_size is '64', which does not"),
    (True, "group_size is True, which does not"),
  ):
    with pytest.raises(ValueError, match=message):
      plan.grid_options(LAYERS, plans, {"group_size": sizes})


def test_a_path_is_no_pattern():
  layers = [Layer(name, "dense", (8, 8)) for name in ("a1", "a[1]")]
  assert plan.resolve(layers, {"a[1]": 3, "a1": 4}) == {"a1": 4, "a[1]": 3}
  assert plan.make(layers, levels=3, overrides={"a[1]": 4}) == {"a1": 3, "a[1]": 4}


def test_bits_per_weight_counts_weights():
  layers = [LAYERS[-1], Layer("other", "dense", (8, 30))]
  assert plan.bits_per_weight({"head/classifier": None, "other": 16}, layers) == (32 + 3 * 4) / 4
  assert plan.bits_per_weight(plan.make(LAYERS, levels=3), LAYERS) == pytest.approx(math.log2(3))
