"""Models that are a chain of units: stem, blocks, head.

A unit's input is the output of the unit before it, so one unit can run alone. BRECQ reconstructs
unit by unit (arXiv 2102.05426, section 3.2).
"""

import flax.linen as nn

from ptq_jax.base import Array, ArrayLike, Float, Shaped


class Chain(nn.Module):
  """Base of the models here: `setup` defines `stem`, the list `blocks`, and `head`.

  `num_blocks` is the length of that list. Unit `name` is the submodule of that name: its variables
  are `variables["params"][name]` and `variables["batch_stats"][name]`.
  """

  def units(self) -> list[str]:
    """Names of the units in the order in which they run."""
    return ["stem", *(f"blocks_{i}" for i in range(self.num_blocks)), "head"]

  def run_unit(self, x, name: str, train: bool = False):
    """Runs one unit alone: `model.apply(variables, x, name, method="run_unit")`.

    Raises:
      ValueError: if there is no unit of that name.
    """
    if name not in self.units():
      raise ValueError(f"no unit {name!r}; the units are {self.units()}.")
    kind, _, index = name.partition("_")
    unit = self.blocks[int(index)] if kind == "blocks" else getattr(self, kind)
    return unit(x, train)

  def __call__(
    self, images: Shaped[ArrayLike, "n ..."], train: bool = False
  ) -> Float[Array, "n C"]:
    """Logits: all units in order."""
    x = images
    for name in self.units():
      x = self.run_unit(x, name, train)
    return x
