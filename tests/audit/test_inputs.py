"""A whole audit of vectors, and what is refused of vectors and token ids before it begins."""

import csv
import re

import flax.linen as nn
import numpy as np
import pytest

from ptq_jax import audit, settings, storage
from ptq_jax.attack import confidence
from ptq_jax.audit import preflight
from ptq_jax.report import records
from tests.audit.conftest import unchecked

LABELS = np.random.default_rng(1).integers(0, 2, 120)
METHODS = ("nearest", "adaround", "brecq", "obc")
SMALL = {
  "train.models": 6,
  "train.epochs": 40,
  "train.batch_size": 10,
  "train.learning_rate": 0.05,
  "quantize.methods": METHODS,
  "quantize.levels": (4,),
  "quantize.calibration_size": 20,
  "attack.attacks": ("lira_online_pooled",),
  "attack.fprs": (0.1,),
  "attack.resamples": 20,
  "report.figures": False,
}


def vectors():
  """Features of very different scale, one constant; labels of chance must be learned by heart.

  The second row is a copy of the first.
  """
  x = np.random.default_rng(0).normal(7, np.logspace(-2, 3, 12), (120, 12)).astype(np.float32)
  x[:, 3], x[0, 4], x[1] = 0.1, 0.0, x[0]
  x[1, 4] = -0.0
  return x[:80], LABELS[:80], x[80:], LABELS[80:]


def tokens():
  x = np.random.default_rng(0).integers(0, 12, (120, 4))
  return x[:80], LABELS[:80], x[80:], LABELS[80:]


def config(model, **changes):
  made = settings.load("own")
  made.model.name = model
  options = {"mlp": {"hidden": (32,)}, "transformer": {"width": 4, "depth": 0, "num_heads": 1}}
  made.model.update(options[model])
  made.update_from_flattened_dict(SMALL | changes)
  return made


def test_an_audit_of_vectors(tmp_path):
  given = vectors()
  with unchecked():
    result = audit.run(config("mlp"), workdir=tmp_path, data=given)
  found = {
    r["method"]: r for r in records.select(result.records, "leakage") if r["members"] == "all"
  }
  assert found.keys() == {"none", *METHODS}
  full = records.select(result.records, "leakage", method="none")[0]
  assert full["auc"]["low"] > 0.5
  [run] = records.select(result.records, "run")
  assert (run["data"]["inputs"], run["data"]["image_shape"]) == ("vectors", [12])
  assert run["data"]["duplicates"]["pool_pairs"] == 1
  assert records.select(result.records, "warning", about="copies")
  with open(tmp_path / "exposure.csv") as file:
    assert sorted(int(row["example"]) for row in csv.DictReader(file)) == list(range(80))

  # Its networks run, on vectors alone.
  network = audit.load_quantized(tmp_path, "brecq-4-4", number=3)
  scores = confidence.logit_scaled(np.asarray(network(given[0])), given[1])
  [path] = (tmp_path / "scores" / "brecq-4-4").glob("*.npz")
  np.testing.assert_allclose(storage.load_arrays(path)["scores"][3, :, 0], scores, atol=1e-3)
  kernel = np.asarray(network.variables["params"]["stem"]["dense"]["kernel"])
  assert all(len(np.unique(column)) <= 4 for column in kernel.T)
  for wrong in (given[0][:, :4], np.zeros((3, 12), np.uint8), np.tile(tokens()[0], 3)):
    with pytest.raises(
      ValueError, match=r"takes vectors, float32 \['N', 12\], as its audit did; got"
    ):
      network(wrong)

  # The same command goes on, or is given more models; other numbers are another audit.
  again = preflight.open_audit(config("mlp"), tmp_path, **opened(given))
  assert preflight.computed(again)
  with pytest.raises(ValueError, match="data changed; use another --workdir"):
    preflight.open_audit(config("mlp"), tmp_path, **opened((given[0] * 2, *given[1:])))
  grown = preflight.open_audit(config("mlp", **{"train.models": 8}), tmp_path, **opened(given))
  assert [chunk.name for chunk in grown.work.chunks] == [
    again.work.chunks[0].name,
    "shadows-00006-00008",
  ]


def opened(data):
  from ptq_jax.data import load

  return {"given_data": load.from_arrays(*data)}


class Positions(nn.Module):
  """Looks up ids in a table of ten rows."""

  num_classes: int

  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(self.num_classes)(nn.Embed(10, 3, name="words")(tokens).mean(axis=1))


@pytest.mark.parametrize(
  ("model", "data", "changes", "sentence"),
  [
    *(
      (
        "mlp",
        vectors,
        {key: ("shift1",)},
        f"{key} is shift1, but arrays holds vectors; only images",
      )
      for key in preflight.AUGMENTATIONS
    ),
    ("transformer", tokens, {"train.augmentation": ("flip",)}, "arrays holds tokens; only images"),
    (
      "mlp",
      vectors,
      {"report.show_images": True, "report.figures": True},
      "report.show_images is True, but arrays holds vectors, no images; set it to False",
    ),
    ("transformer", vectors, {}, "model 'transformer' takes token ids (it has a vocabulary)"),
    (
      "mlp",
      tokens,
      {},
      "MLP has no table (flax.linen.Embed) to look token ids up in; pass float32",
    ),
    (
      "transformer",
      tokens,
      {"model.vocabulary": 9},
      "the table 'stem/tokens' has rows 0 to 8, but the token ids ask for row 11",
    ),
    (Positions, tokens, {}, "the table 'words' has rows 0 to 9, but the token ids ask for row 11"),
    (Positions, vectors, {}, "Positions cannot take vectors of shape (12,) (mlp takes vectors): "),
  ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, model, data, changes, sentence):
  given = None if isinstance(model, str) else model
  made = config("mlp" if given else model)
  with made.model.unlocked():
    made.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
    audit.run(made, workdir=tmp_path, data=data(), model=given)
  assert len(str(caught.value).splitlines()) == 1
  assert not list(tmp_path.rglob("*.npz"))


def test_what_was_taken_otherwise_is_said(tmp_path):
  x_train, y_train, x_test, y_test = vectors()
  data = (x_train > 7, y_train, x_test > 7, y_test)
  said = []
  made = config("mlp", **{"quantize.methods": ()})
  preflight.open_audit(made, tmp_path, listener=lambda e: said.append(e.sentence), **opened(data))
  assert "x_train are bool; they are taken as vectors of the numbers 0 and 1." in said
