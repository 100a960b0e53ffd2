"""CIFAR-100 with ResNet-18: the study of arXiv 2512.15335, and faster versions of it.

Data: prepared once, in a Python that has TensorFlow for it, by
    import tensorflow_datasets as tfds
    tfds.builder("cifar100", file_format="array_record").download_and_prepare()
  If it does not lie in TensorFlow Datasets' own folder: --config.data.data_dir=DIR.
Command: bash launch/run audit --config configs/cifar100.py:protocol=fast --workdir runs/cifar100

protocol=fast (default): 16 models, each the target of the others, with recipe=fast: 20 epochs
  instead of 160, Muon for the kernels of convolutions, a triangular learning rate; bfloat16 on
  accelerators. Leakage is less than after 160 epochs. To train takes 27 PFLOP
  by count; to score all variants as much again.
protocol=paper: 64 shadows and 10 targets, 160 epochs, and 20 000 steps of AdaRound and BRECQ for
  every unit of every model. To train takes 1 EFLOP by count:
  for several accelerators (launch/slurm.sh, k8s.yaml).
protocol=small: resnet8 on 8000 images, 16 models, 32 quantized variants of each; two CPU cores,
  three quarters of an hour: accuracy 23.7 %, AUC .891, TPR 9.7 % at 0.1 % FPR in full precision,
  2.5 to 4.0 % at 1.58 bit with AdaRound, BRECQ and OBC (best attacker). The table is in
  BUILD_NOTES.md.
protocol=deep: resnet18 of width 8 on 4000 images of 16x16 (it just fits its 2000 members), 12
  models, 100 members calibrate: where low precision costs members their fit; 12 minutes.
protocol=smoke: resnet8 on 200 images, six models; two CPU cores, one to two minutes, most of it
  compilation. The numbers mean nothing.
recipe=fast or paper: how each model is trained, if not as the protocol has it, such as
  configs/cifar100.py:protocol=paper,recipe=fast for the paper's many models without a cluster.
Operations are counted, not timed: bash launch/run sweep --dry_run --config ... --sweep seed=0 does
that for any config, and bench train says how many a second a device manages.

The paper's numbers, LiRA online, test accuracy % / TPR at 0.1% FPR of one target (about +-4 %
relative), at 4, 2 and 1.58 bit: full precision 70.05/.368 (AUC .946); AdaRound 70.05/.371,
68.10/.201, 62.35/.003; BRECQ 70.04/.365, 69.64/.293, -/.001; OBC 70.05/.365, 68.07/.229,
65.47/.019.
`protocols.paper` says which quirks of the paper's code protocol=paper has and which it has not.
"""

from configs import protocols


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  # Half as many epochs again as on CIFAR-10: after 16, 40 % of the members are classified right.
  return protocols.study(arg, data="cifar100", small_epochs=24)
