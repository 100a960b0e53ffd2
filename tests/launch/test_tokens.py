"""A whole audit of token ids with the transformer of the zoo, launched as README says."""

import numpy as np
import pytest

from ptq_jax import audit, storage
from ptq_jax.attack import confidence
from ptq_jax.report import records


def test_an_audit_of_tokens(launch, tmp_path):
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 40, (120, 4)), rng.integers(0, 2, 120)
  x[100, 0] = 40  # the largest id is in the test split alone
  np.savez(tmp_path / "set.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
  done = launch(
    "audit", "--workdir=mine", "--config.data.name=npz",
    "--config.data.path=set.npz", "--config.model.name=transformer", "--config.model.width=4",
    "--config.model.depth=0", "--config.model.num_heads=1", "--config.train.models=6",
    "--config.train.epochs=40", "--config.train.batch_size=10",
    "--config.train.learning_rate=0.05", "--config.quantize.methods=('nearest','brecq','obc')",
    "--config.quantize.levels=4", "--config.quantize.calibration_size=20",
    "--config.attack.attacks=lira_online_pooled", "--config.attack.resamples=20",
    "--config.attack.fprs=0.1", "--config.report.figures=False", where=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "80 token sequences of npz in the pool" in done.stdout
  assert "'stem/position' [1, 4, 4]" in done.stderr  # stays in full precision, and is listed
  found = storage.read_records(tmp_path / "mine" / "results.jsonl")
  leaks = records.select(found, "leakage")
  assert {leak["method"] for leak in leaks} == {"none", "nearest", "brecq", "obc"}
  assert leaks[0]["method"] == "none"
  assert leaks[0]["auc"]["low"] > 0.5
  units = records.select(found, "unit", method="brecq")
  assert [unit["unit"] for unit in units] == ["stem", "head", "stem/position"]
  told = [caution["message"] for caution in records.select(found, "warning")]
  assert not any("stem/tokens" in message for message in told)  # to the nearest is best there

  network = audit.load_quantized(tmp_path / "mine", "obc-4-4", number=2)
  assert network.model.vocabulary == 41
  table = np.asarray(network.variables["params"]["stem"]["tokens"]["embedding"])
  assert all(len(np.unique(column)) <= 4 for column in table.T)
  scores = confidence.logit_scaled(np.asarray(network(x[:80])), y[:80])
  [path] = (tmp_path / "mine" / "scores" / "obc-4-4").glob("*.npz")
  np.testing.assert_allclose(storage.load_arrays(path)["scores"][2, :, 0], scores, atol=1e-3)
  with pytest.raises(ValueError, match=r"table 'stem/tokens' has rows 0 to 40, .* row 41"):
    network(np.full((2, 4), 41))
  with pytest.raises(ValueError, match="the tokens hold the id -1"):
    network(np.full((2, 4), -1))
