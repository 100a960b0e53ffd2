"""Tables of embeddings, in which token ids are looked up.

For a row that there is not JAX gives NaN, or the last one, without a word.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptq_jax import trees
from ptq_jax.base import Int, Variables
from ptq_jax.models import call, units

COLLECTION = "rows_read"
"""Name of the Flax collection that carries out which rows are read."""


def require_rows(model: nn.Module, variables: Variables, tokens: Int[np.ndarray, "N L"]) -> None:
  """Checks that every row of a table that the model will ask for is there.

  The model runs once, on the largest id of each place: rows whose number grows with the ids are
  seen, those of `flax.linen.Embed`.

  Args:
    model: that takes token ids.
    variables: of one model; only shapes and dtypes matter.
    tokens: all that it is going to take.
  Raises:
    ValueError: for a row that there is not (the table is named), and a model without a table.
  """

  def note(module, path, inputs, outputs, options):
    del path, outputs, options
    if isinstance(module, nn.Embed):
      module.sow(COLLECTION, "rows", (inputs.min(), inputs.max(), module.num_embeddings))

  @jax.jit  # of the model only what makes rows of ids is left in the program
  def read(tokens):
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    with nn.intercept_methods(units.observer(note)):
      _, sown = call.apply(model, zeros, tokens, mutable=[COLLECTION])
    return sown.get(COLLECTION, {})

  found = trees.flatten(jax.device_get(read(np.max(tokens, axis=0, keepdims=True))))
  if not found:
    raise ValueError(
      f"{type(model).__name__} has no table (flax.linen.Embed) to look token ids up in; pass "
      "float32 if these are numbers."
    )
  for path, calls in found.items():
    for lowest, highest, rows in calls:
      if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        table = trees.join(trees.names(path)[:-1])
        raise ValueError(
          f"the table {table!r} has rows 0 to {rows - 1}, but the token ids ask for row {wrong}; "
          "make it larger (a factory with an argument `vocabulary` is given what is needed), or "
          "renumber the ids."
        )
