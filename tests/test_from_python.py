"""The examples of README's section "From Python", as a reader would type them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq_jax import audit, quantize, storage
from ptq_jax.attack import confidence
from ptq_jax.metrics import roc
from ptq_jax.quantize import grid, nearest, pack, walk
from ptq_jax.report import records
from tests.audit.conftest import unchecked


class Mine(nn.Module):
  num_classes: int
  hidden: int = 3

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(self.hidden, name="first")(x.reshape(len(x), -1)))
    return nn.Dense(self.num_classes, name="last")(x)


class Pulled:
  """A quantizer of one's own: rounds a second time, pulled against what the first got wrong."""

  @staticmethod
  def quantize_stacked(keys, model, variables, images, *, plans, **options):
    del keys

    @jax.jit
    def solve(job):
      error = job.nearest - job.weights[None]
      own = jnp.maximum(jnp.diagonal(job.hessians, axis1=-2, axis2=-1), 1e-6)
      others = job.hessians[None] @ error / own[None, ..., None] - error
      return grid.nearest(job.weights[None] - 0.5 * others, job.grids)

    return nearest.each_layer(solve, model, variables, images, plans=plans, **options)

  quantize_params = staticmethod(walk.for_one_model(quantize_stacked))


def made_data():
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  images = (
    rng.integers(0, 120, (60, 4, 4, 1), dtype=np.uint8)
    + (60 * labels).astype(np.uint8)[:, None, None, None]
  )
  return images[:40], labels[:40], images[40:], labels[40:]


@pytest.fixture
def pulled():
  quantize.register("pulled", Pulled)
  yield
  quantize._METHODS.pop("pulled")


def test_quantize_a_flax_model():
  """Variables in, variables of the same tree out; and their true size."""
  images = made_data()[0] / np.float32(255)
  model = Mine(num_classes=3)
  variables = model.init(jax.random.key(0), images)
  method = quantize.METHODS["nearest"]  # or adaround, brecq, obc
  quantized, info = method.quantize_params(
    jax.random.key(1), model, variables, images, levels={"last": 256, "*": 3}
  )
  grids = {path: found for record in info for path, found in record.grids.items()}
  packed = pack.pack(quantized, grids)
  assert jax.tree.structure(quantized) == jax.tree.structure(variables)
  assert pack.size(packed).total < sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  assert all(len(np.unique(row)) <= 3 for row in quantized["params"]["first"]["kernel"].T)


def test_an_audit_of_ones_own_model_data_and_quantizer(tmp_path, pulled):
  with unchecked():
    result = audit.run(
      data=made_data(),
      model=Mine,
      workdir=tmp_path / "mine",
      models=6,
      epochs=3,
      batch_size=10,
      methods=("nearest", "pulled"),
      levels=(3,),
      figures=False,
      **{"attack.resamples": 10, "attack.attacks": ("lira_online_pooled",), "attack.fprs": (0.1,)},
    )
  frame = result.frame()
  assert set(frame.method) == {"none", "nearest", "pulled"}
  units = records.select(result.records, "unit", method="pulled")
  assert any(unit["error_after"] < unit["error_nearest"] for unit in units)
  assert {"method", "levels", "attacker", "attack", "metric", "value", "low", "high"} <= {*frame}
  assert {"member_accuracy", "scores targets members mean"} <= {*frame.metric}
  assert "<pre>" in result._repr_html_()
  assert result.page.read_text().startswith("<!doctype html>")

  # Run a network of the finished audit.
  train, labels, *_ = made_data()
  for name, number in (("nearest-3-3", 0), ("pulled-3-3", 5)):
    network = audit.load_quantized(result.workdir, name, number=number, model=Mine)
    [path] = (result.workdir / "scores" / name).glob("*.npz")
    scores = confidence.logit_scaled(np.asarray(network(train)), labels)
    arrays = storage.load_arrays(path)
    np.testing.assert_allclose(arrays["scores"][number, :, 0], scores, atol=1e-3)
    named = np.argmax(network(train), axis=-1) == labels
    assert arrays["member_accuracy"][number] == pytest.approx(named[network.members].mean())
    assert network.members.shape == labels.shape
    assert network.members.sum() == 20
    kernel = network.variables["params"]["first"]["kernel"]
    assert all(len(np.unique(column)) <= 3 for column in kernel.T)
  other = audit.load_quantized(
    result.workdir, records.Variant("pulled", 3, 3), number=4, model=Mine(num_classes=3)
  )
  np.testing.assert_array_equal(other.members, ~network.members)  # pairs are complementary
  assert network(train).shape == (40, 3)
  for wrong, sentence in (
    ({"variant": "obc-3-3"}, "has no variant 'obc-3-3'; it has nearest-3-3, pulled-3-3"),
    ({"number": 6}, "has no network 6 among its shadows"),
    ({"model": None}, "was given its model, .*:Mine; give it again"),
    (
      {"model": Mine(num_classes=3, hidden=4)},
      "does not fit: params/first/bias has shape .4,., an",
    ),
  ):
    chosen = {"variant": "pulled-3-3", "model": Mine} | wrong
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
      audit.load_quantized(result.workdir, **chosen)
  [codes] = (result.workdir / "quantized" / "pulled-3-3").glob("*.npz")
  codes.write_bytes(codes.read_bytes()[:-1] + b"x")
  with pytest.raises(storage.CorruptFileError, match="is damaged; run the audit again"):
    audit.load_quantized(result.workdir, "pulled-3-3", model=Mine)


def test_an_audit_of_saved_scores(tmp_path):
  rng = np.random.default_rng(0)
  half = rng.permuted(np.tile(np.arange(240) % 2 == 0, (4, 1)), axis=1)
  members = np.stack([half, ~half], axis=1).reshape(8, 240)
  scores = rng.normal(size=(8, 240)) + 3 * members
  chosen = {"attack.resamples": 60, "attack.fprs": (0.1, 0.01),
            "attack.attacks": ("lira_online_pooled",)}  # fmt: skip
  result = audit.run_scores(
    {"scores": scores, "members": members}, workdir=tmp_path, figures=False, **chosen
  )
  frame = result.frame().set_index("metric")
  assert frame.value["auc"] > 0.9
  assert roc.auc(scores[0], members[0]) > 0.9
  with pytest.raises(ValueError, match=r"holds results of other scores \(arrays\)"):
    audit.run_scores({"scores": -scores, "members": members}, workdir=tmp_path)
  with pytest.raises(ValueError, match="the arrays has no array 'members'; it has scores"):
    audit.run_scores({"scores": scores}, workdir=tmp_path)


@pytest.mark.parametrize(
  ("name", "method", "sentence"),
  [
    ("obc", Pulled, "there is a method 'obc' already"),
    ("my-own", Pulled, "cannot be called 'my-own'"),
    ("own", object(), "method 'own' has no function quantize_params"),
  ],
)
def test_what_is_no_quantizer_is_refused(name, method, sentence):
  with pytest.raises(ValueError, match=sentence):
    quantize.register(name, method)
