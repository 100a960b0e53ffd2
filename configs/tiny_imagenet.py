"""TinyImageNet with ResNet-18: the study of arXiv 2512.15335, and faster versions of it.

Data: the official tiny-imagenet-200.zip (200 classes, 64x64 pixels), or the folder in it; say where
  with --config.data.path=tiny-imagenet-200.zip.
Command: bash launch/run audit --config configs/tiny_imagenet.py:protocol=fast \\
  --workdir runs/tiny_imagenet --config.data.path=tiny-imagenet-200.zip

protocol=fast (default): 16 models, each the target of the others, with recipe=fast: 20 epochs
  instead of 160, Muon for the kernels of convolutions, a triangular learning rate; bfloat16 on
  accelerators. Leakage is less than after 160 epochs. To train takes 213 PFLOP,
  twelve minutes at 300 TFLOP/s; to score all variants as much again.
protocol=paper: 64 shadows and 10 targets, 160 epochs, and 20 000 steps of AdaRound and BRECQ for
  every unit of every model. For several accelerators (--distributed): to train takes 7.9 EFLOP,
  seven hours at 300 TFLOP/s.
recipe=fast or paper: how each model is trained, if not as the protocol has it, such as
  configs/tiny_imagenet.py:protocol=paper,recipe=fast for the paper's many models without a cluster.
protocol=smoke: resnet8 on 200 images, six models; two CPU cores, one to two minutes, most of it
  compilation. The numbers mean nothing.
Times are computed, not measured; bash launch/run sweep --dry_run --config ... --sweep seed=0 counts
the operations of any config.

The paper's last layer has 256 levels here at every bit width.
configs/cifar10.py says which quirks of the paper's code protocol=paper has and which it has not.
"""

from ptq_jax import settings


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  chosen = settings.parse_arg(arg, {"protocol": "fast", "recipe": ""})
  protocol, recipe = chosen["protocol"], chosen["recipe"]
  if protocol not in PROTOCOLS:
    raise ValueError(f"protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
  if recipe and recipe not in RECIPES:
    raise ValueError(f"recipe is {recipe!r}; choose one of {', '.join(RECIPES)}.")
  config = settings.audit_defaults()
  config.name = f"tiny_imagenet {protocol}" + (f", {recipe} recipe" if recipe else "")
  config.data.name = "tiny_imagenet"
  for section, key in (
    (config.train, "augmentation"),
    (config.queries, "augmentation"),
    (config.quantize, "calibration_augmentation"),
  ):
    section[key] = ("flip", "crop4")
  PROTOCOLS[protocol](config)
  if recipe:
    RECIPES[recipe](config)
  return config


def fast_recipe(config):
  """An eighth of the paper's steps; configs/cifar10.py says what it reaches there."""
  config.train.epochs = 20
  config.train.batch_size = 128
  config.train.optimizer = "muon"
  config.train.muon = dict(learning_rate=0.05, weight_decay=0.05, momentum=0.9)
  config.train.learning_rate = 0.3
  config.train.momentum = 0.9
  config.train.nesterov = True
  config.train.weight_decay = 1.7e-4
  config.train.schedule = "triangular"
  config.train.label_smoothing = 0.0


def paper_recipe(config):
  """Values that are defaults anyway stand here too, for it is a protocol."""
  config.train.epochs = 160
  config.train.batch_size = 128
  config.train.optimizer = "sgd"
  config.train.learning_rate = 0.1
  config.train.momentum = 0.9
  config.train.nesterov = False
  config.train.weight_decay = 5e-4
  config.train.schedule = "cosine"
  config.train.label_smoothing = 0.0


def fast(config):
  """The fast recipe, and leave-one-out instead of 10 targets."""
  fast_recipe(config)
  config.model = dict(name="resnet18", dtype="auto")
  config.train.models = 16
  config.quantize.last_layer_levels = ("same", 256)
  config.quantize.calibration_size = 1024
  # With 14 shadows a variance per example is a coarse guess; the pooled one is steady.
  lira = ("lira_online_pooled", "lira_online", "lira_offline_pooled")
  config.attack.attacks = (*lira, "rmia_online", "loss_threshold")


def paper(config):
  """The paper's protocol; here, too, with values that are defaults anyway."""
  paper_recipe(config)
  config.model = dict(name="resnet18", dtype="float32")
  config.train.models = 64
  config.train.targets = 10
  config.queries.views = 2
  config.quantize.methods = ("adaround", "brecq", "obc")
  config.quantize.levels = (3, 4, 16)
  config.quantize.last_layer_levels = (256,)
  config.quantize.calibration_size = 2048
  config.quantize.calibrate_on = "members"
  common = dict(batch_size=32, warmup=0.2, beta_start=20.0, beta_end=2.0, decay_rates=(0.9, 0.999))
  config.quantize.adaround = dict(
    calibration_size=1024,
    form="mini_batch",
    stop="never",
    mini_batch=dict(num_steps=20_000, learning_rate=1e-3, weight=1e-3, **common),
    grid_options=dict(include_zero=False),
  )
  config.quantize.brecq = dict(
    calibration_size=1024,
    loss="mse",  # in the BRECQ paper "fisher"
    form="mini_batch",
    stop="never",
    schedule=dict(num_steps=20_000, learning_rate=1e-3, weight=0.01, **common),
    grid_options=dict(include_zero=False),
  )
  config.quantize.obc = dict(calibration_size=2048, damping=0.0, batchnorm="all")
  lira = ("lira_online", "lira_online_reference")
  lira += ("lira_offline_density", "lira_offline_density_reference")
  config.attack.attacks = (*lira, "loss_threshold")


def smoke(config):
  """Every stage on next to nothing."""
  config.data.pool_size = 200
  config.data.test_size = 100
  config.data.image_size = 32
  config.model = dict(name="resnet8", width=4, dtype="float32")
  config.train.models = 6
  config.train.models_per_chunk = 6
  config.train.epochs = 4
  config.train.batch_size = 25
  config.quantize.levels = (3, 16)
  config.quantize.last_layer_levels = (256,)
  config.quantize.calibration_size = 32
  config.attack.fprs = (0.1, 0.01)
  config.attack.resamples = 100


PROTOCOLS = {"fast": fast, "paper": paper, "smoke": smoke}
RECIPES = {"fast": fast_recipe, "paper": paper_recipe}
