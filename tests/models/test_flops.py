"""Multiply-adds against published numbers and a count by hand."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from ptq_jax import models
from ptq_jax.models import flops

PUBLISHED = {  # multiply-adds of one image: (32x32, CIFAR stem), in millions, to the digits given
  "resnet18": (555.42, 0.01),
  "resnet50": (1297.8, 0.1),
  "resnet20": (40.81, 0.01),
  "wide_resnet28_10": (5243, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_multiply_adds(name):
  expected, digits = PUBLISHED[name]
  model = models.make(name, num_classes=10)
  found = flops.multiply_adds(model, image_shape=(32, 32, 3)) / 1e6
  assert found == pytest.approx(expected, abs=digits)


def test_an_image_twice_as_large_costs_four_times_as_much():
  model = models.make("resnet18", num_classes=200)
  small, large = (flops.multiply_adds(model, image_shape=(s, s, 3)) for s in (32, 64))
  classifier = 512 * 200
  assert large - classifier == 4 * (small - classifier)


class Mixed(nn.Module):
  """Strided, grouped, dilated and dense layers."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 5), strides=(2, 1), padding="VALID")(x)
    x = nn.Conv(6, (3, 3), feature_group_count=3, kernel_dilation=2)(x)
    return nn.Dense(7)(x.reshape(len(x), -1))


def test_by_hand():
  first = 4 * 6 * (3 * 5 * 2 * 6)  # 10 x 10 -> 4 x 6 pixels
  second = 4 * 6 * (3 * 3 * 2 * 6)  # two of six inputs for each output
  dense = 4 * 6 * 6 * 7
  counted = {"image_shape": (10, 10, 2)}
  assert flops.multiply_adds(Mixed(), **counted) == first + second + dense
  assert flops.forward(Mixed(), **counted) == 2 * (first + second + dense)
  assert flops.training(Mixed(), **counted) == 6 * (first + second + dense)


def test_looking_up_a_table_costs_nothing():
  class Table(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Embed(3, 4)(jnp.zeros(len(x), int)) + nn.Dense(4)(x.reshape(len(x), -1))

  assert flops.multiply_adds(Table(), image_shape=(4, 4, 1)) == 16 * 4
