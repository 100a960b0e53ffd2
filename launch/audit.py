"""A whole audit, from raw data to a page: train_shadows, quantize, attack, report.

    bash launch/run audit
    python -m launch.audit --config configs/digits.py --workdir runs/digits

Run it again and it does nothing but print the table; kill it and run it again and it goes on.
"""

import jax

from launch import attack, quantize, report, train_shadows
from launch.workdir import open_audit, variant_name
from ptq_jax import settings


def run(config, workdir) -> None:
  """All stages on one workdir."""
  audit = open_audit(config, workdir)
  data, train = audit.dataset, config.train
  against = f"{train.targets} targets" if train.targets else "each of them target once"
  print(
    f"{config.name}: {len(data.train_labels)} images of {data.name} in the pool, "
    f"{train.models} models ({config.model.name}), {against}, {train.epochs} epochs.\n"
    f"Quantized as {', '.join(map(variant_name, audit.variants()))}.\n"
    f"Everything goes to {workdir}.",
    flush=True,
  )
  train_shadows.train(audit)
  quantize.quantize(audit)
  if jax.process_index() == 0:
    attack.attack(audit)
    report.report(audit.root)


def main() -> None:
  settings.launch(run, config="configs/digits.py", workdir="runs/digits", description=__doc__)


if __name__ == "__main__":
  main()
