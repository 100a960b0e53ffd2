"""Scores, areas and rates of the public LiRA code, reproduced."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax.attack import confidence, lira, threshold
from ptq_jax.metrics import roc

REFERENCE = dict(np.load(pathlib.Path(__file__).parent / "data" / "lira.npz"))
SHADOWS = (REFERENCE["shadow_scores"], REFERENCE["shadow_in"], REFERENCE["target_scores"])
ATTACKS = {
  "online": lambda: lira.online(*SHADOWS),
  "online_fixed_variance": lambda: lira.online(*SHADOWS, variance="reference"),
  "offline": lambda: lira.offline(*SHADOWS, tail="density"),
  "offline_fixed_variance": lambda: lira.offline(*SHADOWS, tail="density", variance="reference"),
  "global": lambda: threshold.loss_threshold(SHADOWS[2]),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_reproduces_scores_and_metrics(name):
  scores, members = ATTACKS[name](), REFERENCE["target_in"]
  np.testing.assert_allclose(scores, REFERENCE[f"{name}_score"], rtol=1e-10, atol=1e-10)
  expected = {
    "auc": roc.auc(scores, members),
    "balanced_accuracy": roc.balanced_accuracy(scores, members),
    "tpr_at_0.1pct": roc.tpr_at_fpr(scores, members, fpr=0.001, rule="below"),
    "tpr_at_1pct": roc.tpr_at_fpr(scores, members, fpr=0.01, rule="below"),
  }
  for metric, value in expected.items():
    assert value == pytest.approx(float(REFERENCE[f"{name}_{metric}"]), abs=1e-12), metric


def test_confidence_reproduces_scores():
  logits, labels = REFERENCE["logits"], REFERENCE["labels"][:, None]
  # The public code subtracts and exponentiates in float32 before it changes to float64.
  np.testing.assert_allclose(
    confidence.logit_scaled(logits, labels), REFERENCE["logit_scaled"], atol=5e-6, rtol=0
  )
  on_device = confidence.logit_scaled(jnp.asarray(logits), jnp.asarray(labels))
  assert on_device.dtype == jnp.float32
  np.testing.assert_allclose(on_device, REFERENCE["logit_scaled"], atol=2e-5, rtol=0)
