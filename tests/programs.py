"""What a traced program consists of, counted in its equations and not in how it is printed."""

import jax


def count(jaxpr, primitive: str) -> int:
  """How often a primitive stands in a program and in everything that it calls."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  found = 0
  for equation in jaxpr.eqns:
    found += equation.primitive.name == primitive
    inner = jax.tree.leaves(equation.params, is_leaf=is_program)
    found += sum(count(each, primitive) for each in inner if is_program(each))
  return found


def is_program(value) -> bool:
  """Whether it is a jaxpr, open or closed."""
  return hasattr(getattr(value, "jaxpr", value), "eqns")
