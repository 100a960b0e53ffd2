"""CIFAR-100 with ResNet-18: the study of arXiv 2512.15335, and faster versions of it.

Data: prepared once, in a Python that has TensorFlow for it, by
    import tensorflow_datasets as tfds
    tfds.builder("cifar100", file_format="array_record").download_and_prepare()
  If it does not lie in TensorFlow Datasets' own folder: --config.data.data_dir=DIR.
Command: bash launch/run audit --config configs/cifar100.py:protocol=fast --workdir runs/cifar100

protocol=fast (default): 16 models, each the target of the others, in 24 epochs instead of 160, with
  Nesterov momentum, a triangular learning rate, larger batches and bfloat16. Leakage is less than
  after 160 epochs. For one accelerator: to train takes 32 PFLOP, two minutes at
  300 TFLOP/s; to score all variants as much again.
protocol=paper: 64 shadows and 10 targets, 160 epochs, and 20 000 steps of AdaRound and BRECQ for
  every unit of every model. For several accelerators (--distributed): to train takes 1 EFLOP, an
  hour at 300 TFLOP/s.
protocol=smoke: resnet8 on 200 images, six models; two CPU cores, one to two minutes, most of it
  compilation. The numbers mean nothing.
Times are computed, not measured; bash launch/run sweep --dry_run --config ... --sweep seed=0 counts
the operations of any config.

The paper's numbers, LiRA online, test accuracy % / TPR at 0.1% FPR of one target (about +-4 %
relative), at 4, 2 and 1.58 bit: full precision 70.05/.368 (AUC .946); AdaRound 70.05/.371,
68.10/.201, 62.35/.003; BRECQ 70.04/.365, 69.64/.293, -/.001; OBC 70.05/.365, 68.07/.229,
65.47/.019.
configs/cifar10.py says which quirks of the paper's code protocol=paper has and which it has not.
"""

from configs import cifar10


def get_config(arg=""):
  """What `configs/cifar10.py` says, of other data."""
  return cifar10.get_config(arg, data="cifar100")
