"""CIFAR-10 with ResNet-18: the study of arXiv 2512.15335, and faster versions of it.

Data: prepared once, in a Python that has TensorFlow for it, by
    import tensorflow_datasets as tfds
    tfds.builder("cifar10", file_format="array_record").download_and_prepare()
  If it does not lie in TensorFlow Datasets' own folder: --config.data.data_dir=DIR.
Command: bash launch/run audit --config configs/cifar10.py:protocol=fast --workdir runs/cifar10

protocol=fast (default): 16 models, each the target of the others, with recipe=fast: 20 epochs
  instead of 160, Muon for the kernels of convolutions, a triangular learning rate; bfloat16 on
  accelerators. Leakage is less than after 160 epochs. To train takes 27 PFLOP
  by count; to score all variants as much again.
protocol=paper: 64 shadows and 10 targets, 160 epochs, and 20 000 steps of AdaRound and BRECQ for
  every unit of every model. To train takes 1 EFLOP by count:
  for several accelerators (launch/slurm.sh, k8s.yaml).
protocol=small: resnet8 on 8000 images, 16 models, 32 quantized variants of each; two CPU cores,
  half an hour: accuracy 59.7 %, AUC .862, TPR 7.4 % at 0.1 % FPR in full precision, 3.0 to 3.6 %
  at 1.58 bit with AdaRound, BRECQ and OBC (best attacker). The table is in BUILD_NOTES.md.
protocol=smoke: resnet8 on 200 images, six models; two CPU cores, one to two minutes, most of it
  compilation. The numbers mean nothing.
recipe=fast or paper: how each model is trained, if not as the protocol has it, such as
  configs/cifar10.py:protocol=paper,recipe=fast for the paper's many models without a cluster.
Operations are counted, not timed: bash launch/run sweep --dry_run --config ... --sweep seed=0 does
that for any config, and bench train says how many a second a device manages.

The paper's numbers, LiRA online, AUC / TPR at 0.1% FPR of one target (about +-10 % relative), after
100 epochs (--config.train.epochs=100): full precision .723/.070; 2 bit: AdaRound .719/.077, BRECQ
.707/.056, OBC .702/.052.

`protocols.paper` says which quirks of the paper's code protocol=paper has and which it has not.
"""

from configs import protocols


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  return protocols.study(arg, data="cifar10", small_epochs=16)
