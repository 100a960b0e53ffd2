"""A whole audit, from raw data to a page: train_shadows, quantize, attack, report.

    bash launch/run audit
    python -m launch.audit --config configs/digits.py --workdir runs/digits

Run it again and it does nothing but print the table; kill it and run it again and it goes on. Run
it in several places on one workdir and they share the models out; whoever ends last attacks.
"""

import jax

from launch import flags, progress
from ptq_jax.audit import preflight, running
from ptq_jax.audit.layout import variant_name
from ptq_jax.report import records


def run(config, workdir, *, shard, models=None, verify=False, tensorboard=False) -> None:
  """All stages on one workdir, or a check of what is in it."""
  listener = progress.listener(workdir, tensorboard)
  audit = preflight.open_audit(config, workdir, trained=models, shard=shard, listener=listener)
  if verify:
    problems = preflight.verify(audit)
    print("\n".join(problems) or f"{workdir} is whole.", flush=True)
    raise SystemExit(flags.FAILURE if problems else 0)
  data, train = audit.dataset, config.train
  devices = jax.local_devices()
  examples = records.EXAMPLES[data.kind]
  against = f"{train.targets} targets" if train.targets else "each of them target once"
  print(
    f"{config.name}: {len(data.train_labels)} {examples} of {data.name} in the pool, "
    f"{train.models} models ({config.model.name}), {against}, {train.epochs} epochs.\n"
    f"Quantized as {', '.join(map(variant_name, audit.variants()))}.\n"
    f"Runs on {len(devices)} x {devices[0].device_kind} with JAX {jax.__version__}.\n"
    f"Everything goes to {workdir}.",
    flush=True,
  )
  result = running.run_stages(audit, command=flags.command_line())
  if not result.records:
    print("This process is done; others are at the rest, and the last of them attacks:", flush=True)
  print(result, flush=True)


def main() -> None:
  flags.launch(
    run,
    description=__doc__,
    switches={
      "verify": "Only check every file of the workdir and say what is wrong.",
      "tensorboard": progress.TENSORBOARD,
    },
  )


if __name__ == "__main__":
  main()
