"""The benchmark of more shadows, on made scores."""

import re

import numpy as np
import pytest

from launch.benchmarks import shadows
from ptq_jax import storage
from ptq_jax.attack import protocol
from ptq_jax.metrics import roc

NAME = "lira_online_pooled"
RNG = np.random.default_rng(0)
HALVES = np.tile(np.arange(60) % 2 == 0, (6, 1))
RNG.permuted(HALVES, axis=1, out=HALVES)
MEMBERS = np.stack([HALVES, ~HALVES], axis=1).reshape(12, 60)
PLAIN = RNG.normal(size=(12, 60, 1)) + 2.0 * MEMBERS[..., None]
COARSE = PLAIN + RNG.normal(size=PLAIN.shape)


@pytest.fixture
def workdir(tmp_path):
  """An audit of 12 models in two chunks, in full precision and quantized."""
  storage.save_arrays(tmp_path / "membership.npz", shadows=MEMBERS)
  for variant, scores in (("full_precision", PLAIN), ("obc-3-3", COARSE)):
    for first, last in ((0, 8), (8, 12)):
      path = tmp_path / "scores" / variant / f"shadows-{first:05d}-{last:05d}.npz"
      storage.save_arrays(path, scores=scores[first:last])
  return tmp_path


def table(capsys, *arguments):
  shadows.main([f"--workdir={arguments[0]}", "--resamples=20", *arguments[1:]])
  lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("| :--")]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_row_is_about_the_same_targets(workdir, capsys):
  figure = workdir / "shadows.png"
  _, *rows = table(capsys, workdir, "--variants", "obc-3-3", f"--figure={figure}")
  assert [row[:3] for row in rows if row[2] in ("as is", "matched")] == [
    ["full_precision", "6", "as is"],
    ["full_precision", "10", "as is"],
    ["obc-3-3", "6", "as is"],
    ["obc-3-3", "6", "matched"],
    ["obc-3-3", "10", "as is"],
    ["obc-3-3", "10", "matched"],
  ]
  found = protocol.leave_one_out(COARSE, MEMBERS, attacks=(NAME,))[NAME]
  areas = [roc.auc(row, inside) for row, inside in zip(found, MEMBERS, strict=True)][:8]
  by_name = {tuple(row[:3]): row for row in rows}
  assert by_name["obc-3-3", "10", "matched"][3] == f"{np.mean(areas):.3f}"
  assert by_name["obc-3-3", "10", "as is"][5] == by_name["obc-3-3", "6", "matched"][6] == ""
  for name in ("as is", "matched"):
    more, fewest = (float(by_name["obc-3-3", count, name][4].split()[0]) for count in ("10", "6"))
    gain = float(by_name["obc-3-3", "10", name][6].split()[0])
    assert gain == pytest.approx(more - fewest, abs=0.011)
  numbers = re.findall(r"-?[\d.]+", by_name["obc-3-3", "10", "matched"][5])
  assert float(numbers[1]) <= float(numbers[0]) <= float(numbers[2])
  assert figure.read_bytes()[:4] == b"\x89PNG"


def test_what_it_cannot_read_is_said(workdir, capsys):
  with pytest.raises(SystemExit, match="no scores of brecq-3-3"):
    table(capsys, workdir, "--variants", "brecq-3-3")
  storage.save_arrays(workdir / "membership.npz", shadows=MEMBERS, targets=MEMBERS)
  with pytest.raises(SystemExit, match="needs a leave-one-out audit"):
    table(capsys, workdir)
  (workdir / "membership.npz").unlink()
  with pytest.raises(SystemExit, match="is missing; bash launch/run attack makes it"):
    table(capsys, workdir)
