"""The arrows between packages: who may import whom, and absl only at the border."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "ptq_jax"

ALLOWED = {
  "base": set(),
  "trees": {"base"},
  "settings": {"base", "trees"},
  "storage": {"base", "trees"},
  "data": {"base", "trees"},
  "models": {"base", "trees"},
  "attack": {"base", "trees"},
  "metrics": {"base", "trees"},
  "train": {"base", "trees", "data", "models"},
  "quantize": {"base", "trees", "models", "metrics"},
  "report": {"base", "trees", "metrics"},
}
ALLOWED["audit"] = set(ALLOWED)
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
  """Every module that a file imports, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name):
  """The part of the package a dotted name belongs to: "ptq_jax.data.load" -> "data"."""
  return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
  own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
  if own == "__init__":
    assert not list(imported(path))
    return
  used = {part(name) for name in imported(path) if name.startswith("ptq_jax.")}
  assert used - {own} <= ALLOWED[own]


def test_quantize_uses_only_distortion_of_the_metrics():
  names = [name for path in (PACKAGE / "quantize").glob("*.py") for name in imported(path)]
  metrics = [name for name in names if name.startswith("ptq_jax.metrics")]
  assert all(name.startswith("ptq_jax.metrics.distortion") for name in metrics)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_flags_and_configs_stay_at_the_border(path):
  outer = {name.split(".")[0] for name in imported(path)} & {"absl", "ml_collections"}
  assert not outer or path.name == "settings.py"


def test_configs_share_their_protocols_and_nothing_else():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    siblings = {name for name in imported(path) if name.startswith("configs")}
    assert siblings <= {"configs.protocols"}
