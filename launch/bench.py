"""Measures our code against a peer or a naive version in the same run and prints ratios.

    bash launch/run bench NAME [flags of that benchmark]

Each benchmark is a module of launch/benchmarks with its own --help: attack, compile, conv,
coverage, device, faults, kills, obc, quantize, shadows, train. Times on a shared machine are noisy:
quote the ratios, and the hardware they come from.
"""

import importlib
import pathlib
import sys

BENCHMARKS = sorted(
  path.stem for path in (pathlib.Path(__file__).parent / "benchmarks").glob("[a-z]*.py")
)


def main() -> None:
  """Runs the benchmark that the first argument names."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in ("-h", "--help"):
    print(__doc__)
    sys.exit(0)
  if name not in BENCHMARKS:
    print(f"error: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.", file=sys.stderr)
    sys.exit(2)  # as `launch.flags.USER_ERROR`; a bare machine lacks what that module imports
  importlib.import_module(f"launch.benchmarks.{name}").main(arguments)


if __name__ == "__main__":
  main()
