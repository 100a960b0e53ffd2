"""TinyImageNet with ResNet-18: the study of arXiv 2512.15335, and faster versions of it.

Data: the official tiny-imagenet-200.zip (200 classes, 64x64 pixels), or the folder in it; say where
  with --config.data.path=tiny-imagenet-200.zip.
Command: bash launch/run audit --config configs/tiny_imagenet.py:protocol=fast \\
  --workdir runs/tiny_imagenet --config.data.path=tiny-imagenet-200.zip

protocol=fast (default): 16 models, each the target of the others, with recipe=fast: 20 epochs
  instead of 160, Muon for the kernels of convolutions, a triangular learning rate; bfloat16 on
  accelerators. Leakage is less than after 160 epochs. To train takes 213 PFLOP
  by count; to score all variants as much again.
protocol=paper: 64 shadows and 10 targets, 160 epochs, and 20 000 steps of AdaRound and BRECQ for
  every unit of every model. To train takes 7.9 EFLOP by count:
  for several accelerators (launch/slurm.sh, k8s.yaml).
recipe=fast or paper: how each model is trained, if not as the protocol has it, such as
  configs/tiny_imagenet.py:protocol=paper,recipe=fast for the paper's many models without a cluster.
protocol=small: resnet8 on 8000 images scaled to 32x32, 16 models, for two CPU cores.
protocol=smoke: resnet8 on 200 images, six models; two CPU cores, one to two minutes, most of it
  compilation. The numbers mean nothing.
Operations are counted, not timed: bash launch/run sweep --dry_run --config ... --sweep seed=0 does
that for any config, and bench train says how many a second a device manages.

The paper's last layer has 256 levels here at every bit width.
`protocols.paper` says which quirks of the paper's code protocol=paper has and which it has not.
"""

from configs import protocols


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  config = protocols.study(
    arg,
    data="tiny_imagenet",
    last_layers=("same", 256),
    only=("fast", "paper", "small", "smoke"),
    small_epochs=24,
  )
  if config.name.startswith(("tiny_imagenet small", "tiny_imagenet smoke")):
    config.data.image_size = 32
  return config
