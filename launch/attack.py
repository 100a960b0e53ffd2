"""Attacks every variant of every target and writes what it found.

    bash launch/run attack --config configs/digits.py --workdir runs/digits

Reads the scores in WORKDIR, writes WORKDIR/results.jsonl. Every quantized target meets two
attackers: one whose shadows stay in full precision, and one who quantized them like the target.

    bash launch/run attack --scores shadows.npz --targets targets.npz --workdir runs/mine

attacks scores that any framework saved, and reports. shadows.npz holds `scores` float[M, E, V]
(or [M, E]; higher means member, such as the logit-scaled confidence) and `members` bool[M, E];
targets.npz the same of T targets, on the same examples. Without --targets every shadow is target
once. For a "class_threshold" among attack.attacks, shadows.npz also needs `labels` int[E]. A file
may say what its models are: `method`, `levels`, `last_layer_levels`, `accuracy` float[M] on test
data, `member_accuracy` float[M] on what each model trained on. Folders that tensorflow/privacy's
LiRA (experiment*/scores, keep.npy) or Privacy Meter (signals, models) wrote are read, too. Without
--workdir the results go to runs/scores-NAME.
"""

import pathlib

from launch import flags, progress
from ptq_jax import storage
from ptq_jax.audit import attacking, preflight, reporting, running, saved_scores, work

OPTIONS = {
  "scores": "An .npz file or a folder of shadow scores to attack instead of an audit's.",
  "targets": "With --scores: an .npz file of target scores.",
}
"""Further flags."""


def run(config, workdir, *, shard, models=None, scores=None, targets=None) -> None:
  """The stage alone, or an attack on saved scores."""
  listener, command = progress.Lines(), flags.command_line()
  if targets and not scores:
    raise ValueError("--targets needs --scores, the scores of the shadows.")
  if not scores:
    audit = preflight.open_audit(config, workdir, trained=models, shard=shard, listener=listener)
    with work.pinned_randomness():
      attacking.attack(audit, command=command)
    return
  for key in flags.overridden():
    running.require_scores_use(key)
  if models:
    raise ValueError("--models has no use for saved scores; leave it out.")
  if not flags.given("workdir"):
    workdir = pathlib.Path("runs", f"scores-{pathlib.Path(scores).stem}")
  with work.pinned_randomness():
    saved_scores.attack(config, storage.require_writable(workdir), scores, targets, command=command)
    found = reporting.report(workdir, options=config.report, listener=listener)
    print(reporting.summary(found, workdir), flush=True)


def main() -> None:
  flags.launch(run, description=__doc__, options=OPTIONS)


if __name__ == "__main__":
  main()
