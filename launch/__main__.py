"""The tasks of this folder by name: `ptq-jax audit ...` where the package is installed.

    ptq-jax audit | train_shadows | quantize | attack | report | sweep | bench [flags]

--help after a task lists its flags. --config takes a file, or the name of a shipped config: digits,
smoke, own, cifar10, cifar100, tiny_imagenet.
"""

import importlib
import sys

TASKS = ("audit", "train_shadows", "quantize", "attack", "report", "sweep", "bench")

USER_ERROR = 2


def main() -> None:
  """Runs the task that the first argument names."""
  task, *arguments = sys.argv[1:] or ["--help"]
  if task in ("-h", "--help"):
    print(__doc__.strip())
    return
  if task == "--version":
    import ptq_jax

    print(ptq_jax.__version__)
    return
  if task not in TASKS:
    print(f"error: no task {task!r}; there are {', '.join(TASKS)}.", file=sys.stderr)
    sys.exit(USER_ERROR)
  sys.argv = [task, *arguments]
  importlib.import_module(f"launch.{task}").main()


if __name__ == "__main__":
  main()
