"""Distortion against its definitions by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.metrics import distortion

ORIGINAL = np.array([[3.0, -4.0], [0.0, 1.0]], np.float32)
APPROXIMATION = np.array([[2.0, -4.0], [0.5, 1.0]], np.float32)


def test_known_values():
  pair = (ORIGINAL, APPROXIMATION)
  assert float(distortion.squared_error(*pair)) == pytest.approx(1.25)
  assert float(distortion.mean_squared_error(*pair)) == pytest.approx(1.25 / 4)
  assert float(distortion.relative_error(*pair)) == pytest.approx(1.25 / 26)
  assert float(distortion.sqnr(*pair)) == pytest.approx(10 * np.log10(26 / 1.25), rel=1e-6)
  assert float(distortion.max_error(*pair)) == 1.0
  assert float(distortion.agreement(*pair)) == 1.0
  assert float(distortion.agreement(ORIGINAL, -APPROXIMATION)) == 0.0


def test_exact_and_hopeless():
  zeros = jnp.zeros((2, 2))
  assert float(distortion.relative_error(ORIGINAL, ORIGINAL)) == 0.0
  assert float(distortion.sqnr(ORIGINAL, ORIGINAL)) == np.inf
  assert float(distortion.relative_error(ORIGINAL, zeros)) == pytest.approx(1.0)
  assert float(distortion.relative_error(zeros, zeros)) == 0.0
  assert float(distortion.relative_error(zeros, ORIGINAL)) == np.inf
