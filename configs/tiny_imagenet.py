"""TinyImageNet with ResNet-18: the study of arXiv 2512.15335, and faster versions of it.

Data: the official tiny-imagenet-200.zip (200 classes, 64x64 pixels), or the folder in it; say where
  with --config.data.path=tiny-imagenet-200.zip.
Command: bash launch/run audit --config configs/tiny_imagenet.py:protocol=fast \\
  --workdir runs/tiny_imagenet --config.data.path=tiny-imagenet-200.zip

protocol=fast (default): 16 models, each the target of the others, in 24 epochs instead of 160, with
  Nesterov momentum, a triangular learning rate, larger batches and bfloat16. Leakage is less than
  after 160 epochs. For one accelerator: to train takes 256 PFLOP, a quarter of
  an hour at 300 TFLOP/s; to score all variants as much again.
protocol=paper: 64 shadows and 10 targets, 160 epochs, and 20 000 steps of AdaRound and BRECQ for
  every unit of every model. For several accelerators (--distributed): to train takes 7.9 EFLOP,
  seven hours at 300 TFLOP/s.
protocol=smoke: resnet8 on 200 images, six models; two CPU cores, one to two minutes, most of it
  compilation. The numbers mean nothing.
Times are computed, not measured; bash launch/run sweep --dry_run --config ... --sweep seed=0 counts
the operations of any config.

The paper's last layer has 256 levels here at every bit width.
configs/cifar10.py says which quirks of the paper's code protocol=paper has and which it has not.
"""

from configs import cifar10


def get_config(arg=""):
  """What `configs/cifar10.py` says, of other data, with 256 levels in the last layer throughout."""
  config = cifar10.get_config(arg, data="tiny_imagenet")
  lasts = config.quantize.last_layer_levels
  config.quantize.last_layer_levels = tuple(256 if last == "usual" else last for last in lasts)
  if config.model.name == "resnet8":  # the small protocols
    config.data.image_size = 32
  return config
