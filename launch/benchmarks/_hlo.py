"""What a compiled program moves through memory, read from its optimised HLO.

`cost_analysis()` of a compiled program counts the body of a loop once, counts memory on the chip
like memory beside it, and is missing for some platforms; the text is there for all of them.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {
  "pred": 8,
  "token": 0,
  "opaque": 0,
}  # of one entry; others have them in their name: bf16, s32

FREE = frozenset((
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
  "replica-id", "iota", "copy-done", "async-done", "async-update", "slice-done", "add-dependency",
  "opt-barrier",
))  # fmt: skip
"""Instructions that move nothing, or whose start was counted."""

CUTS = frozenset(("dynamic-slice", "slice", "gather"))
"""Instructions that read no more of their first operand than they give."""

MOVES = FREE | frozenset((
  "copy", "copy-start", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice",
  "concatenate", "pad", "broadcast", "reverse", "fusion", "call",
))  # fmt: skip
"""Instructions that compute nothing."""


CALLS = r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"


class Buffer(NamedTuple):
  """One array of an instruction's result."""

  size: int  # bytes, with the padding of its tiles
  beside: bool  # in the memory beside the chip, not in a scratch memory on it


class Instruction(NamedTuple):
  """One line of the program."""

  name: str
  opcode: str
  buffers: tuple[Buffer, ...]
  operands: tuple[str, ...]
  called: tuple[str, ...]  # names of computations
  attributes: str  # what stands behind the operands
  content: str  # between the parentheses
  is_root: bool


class Traffic(NamedTuple):
  """Of one run of a program."""

  moved: float  # bytes read and written in memory beside the chip
  copied: float  # the part of it that only copies, transposes, pads or concatenates
  kernels: float  # instructions that move anything

  def __add__(self, other):
    return Traffic(*map(sum, zip(self, other, strict=True)))

  def times(self, count: float) -> "Traffic":
    return Traffic(*(count * part for part in self))


class Program:
  """Computations of an optimised HLO module by name.

  Args:
    text: of `compiled.as_text()`.
    unknown_trips: how often a loop is taken to run whose length does not stand in the program.
  """

  def __init__(self, text: str, *, unknown_trips: int = 1):
    self._unknown_trips = unknown_trips
    self.computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
      head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
      if head:
        current = self.computations.setdefault(head[2], [])
        self.entry = head[2] if head[1] else getattr(self, "entry", head[2])
      elif line.startswith("  ") and " = " in line:
        current.append(_instruction(line))
    self._traffic = functools.cache(self._of_computation)

  def traffic(self) -> Traffic:
    """Of one run from the entry."""
    return self._traffic(self.entry)

  def loops(self) -> list[int]:
    """How often each loop runs that the entry reaches; 0: unknown."""
    return [
      self.trips(one) or 0
      for name in self._reached(self.entry)
      for one in self.computations[name]
      if one.opcode == "while"
    ]

  def instructions(self) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that the entry reaches, and how often it runs; not those in fusions."""
    yield from self._running(self.entry, 1)

  def trips(self, loop: Instruction) -> int | None:
    """How often a `while` runs, where it can be read: told, or the only bound in its condition."""
    told = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if told:
      return int(told[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]
    bounds = [
      one.content
      for name in self._reached(condition)
      for one in self.computations[name]
      if one.opcode == "constant" and one.content.isdigit()
    ]
    return int(bounds[0]) if len(bounds) == 1 else None

  def _reached(self, name):
    yield name
    for one in self.computations[name]:
      for called in one.called:
        yield from self._reached(called)

  def _running(self, name, count):
    for one in self.computations[name]:
      if one.opcode == "while":
        count_inside = count * (self.trips(one) or self._unknown_trips)
        yield from self._running(_body(one), count_inside)
      elif one.opcode in ("call", "conditional", "async-start"):
        for called in one.called:
          yield from self._running(called, count)
      else:
        yield one, count

  def _of_computation(self, name):
    values = {one.name: one for one in self.computations[name]}
    total = Traffic(0, 0, 0)
    for one in self.computations[name]:
      if one.opcode == "while":
        total += self._traffic(_body(one)).times(self.trips(one) or self._unknown_trips)
      elif one.opcode in ("call", "async-start") and one.called:
        total += self._traffic(one.called[0])
      elif one.opcode == "conditional":
        total += max(self._traffic(branch) for branch in one.called)
      elif one.opcode not in FREE:
        read, written = self._read(one, values), self._written(one, values)
        copied = read + written if read and written and self.only_moves(one) else 0
        total += Traffic(read + written, copied, 1)
    return total

  def _read(self, one, values):
    """Bytes that an instruction reads."""
    given = [_beside(values[name]) for name in one.operands if name in values]
    if one.opcode in CUTS:
      return min(given[0], _beside(one)) + sum(given[1:])
    if one.opcode in ("dynamic-update-slice", "scatter"):
      return sum(given[1:])
    if one.opcode == "fusion":
      inside = self.computations[one.called[0]]
      return sum(
        min(size, self._read_of_parameter(inside, index)) for index, size in enumerate(given)
      )
    return sum(given)

  def _read_of_parameter(self, computation, index):
    """Bytes that a fusion reads of its parameter: all, or what is cut out of it."""
    names = [p.name for p in computation if p.opcode == "parameter" and p.content == str(index)]
    if not names:
      return math.inf
    return self._read_of(computation, names[0])

  def _read_of(self, computation, name):
    total = 0
    for user in computation:
      if name not in user.operands:
        continue
      if user.opcode in CUTS and user.operands[0] == name:
        total += sum(buffer.size for buffer in user.buffers)
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        continue
      elif user.opcode == "bitcast":
        total += self._read_of(computation, user.name)
      elif user.opcode == "fusion":
        place = user.operands.index(name)
        total += self._read_of_parameter(self.computations[user.called[0]], place)
      else:
        return math.inf
    return total

  def _written(self, one, values):
    """Bytes that an instruction writes."""
    if one.opcode in ("dynamic-update-slice", "scatter"):
      return min(_beside(one), _beside(values[one.operands[-1 if one.opcode == "scatter" else 1]]))
    if one.opcode == "copy-start":  # its result is (destination, source, a flag)
      return one.buffers[0].size * one.buffers[0].beside
    if one.opcode == "fusion":
      return min(_beside(one), self._written_by(self.computations[one.called[0]]))
    return _beside(one)

  def _written_by(self, computation):
    """Bytes that a fusion writes: its results, or the parts of them that it updates in place."""
    values = {one.name: one for one in computation}
    root = next(one for one in computation if one.is_root)
    results = [values[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for result in results:
      while result.opcode == "bitcast" and result.operands[0] in values:
        result = values[result.operands[0]]
      if result.opcode == "dynamic-update-slice":
        result = values[result.operands[1]]
      total += sum(buffer.size for buffer in result.buffers)
    return total

  def only_moves(self, one):
    """Whether it computes nothing: a copy, or a fusion of nothing but moves."""
    if one.opcode not in MOVES:
      return False
    inside = [each for name in one.called for each in self.computations[name]]
    return all(map(self.only_moves, inside))


def of(compiled, *, unknown_trips: int = 1) -> Program:
  """The program that `jax.jit(...).lower(...).compile()` made."""
  return Program(compiled.as_text(), unknown_trips=unknown_trips)


def _beside(one):
  return sum(buffer.size for buffer in one.buffers if buffer.beside)


def _body(loop):
  return re.search(r"body=%?([\w.\-]+)", loop.attributes)[1]


def _instruction(line):
  is_root = line.lstrip().startswith("ROOT ")
  name, rest = line.split(" = ", 1)
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  stop = _closing(rest, start)
  content, attributes = rest[start + 1 : stop], rest[stop + 1 :]
  called = [name for _, name in re.findall(CALLS, attributes)]
  branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
  called += re.findall(r"[\w.\-]+", branches[1]) if branches else []
  opcode = rest[:start]
  return Instruction(
    name.split()[-1].lstrip("%"),
    opcode,
    tuple(map(_buffer, re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", kind))),
    tuple(re.findall(r"%([\w.\-]+)", content)),
    tuple(called),
    attributes,
    content,
    is_root,
  )


def _closing(text, start):
  """Position of the parenthesis that closes the one at `start`."""
  depth = 0
  for position in range(start, len(text)):
    depth += (text[position] == "(") - (text[position] == ")")
    if not depth:
      return position
  raise ValueError(f"a parenthesis is not closed: {text[:80]!r}.")


def _buffer(found):
  """From ("bf16", "128,32", "0,1:T(8,128)(2,1)S(1)")."""
  kind, dims, layout = found
  bits = BITS.get(kind) if kind in BITS else int(re.search(r"\d+", kind)[0])
  sizes = [int(size) for size in dims.split(",") if size]
  order, _, rest = layout.partition(":")
  tile = re.match(r"T\(([\d,]+)\)", rest)
  if tile:
    minor = [int(axis) for axis in order.split(",") if axis]
    tiles = [int(size) for size in tile[1].split(",")][::-1]
    for axis, size in zip(minor, tiles, strict=False):
      sizes[axis] = -(-sizes[axis] // size) * size
  return Buffer(math.prod(sizes) * bits // 8, not re.search(r"S\([1-9]", rest))
