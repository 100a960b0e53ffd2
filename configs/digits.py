"""Handwritten digits: a whole audit in minutes on a CPU, with data that scikit-learn brings along.

What: 16 small convolutional networks (24 000 parameters), each trained on a random half of 1498
images of 8x8 pixels, quantized with every method, every model target once (leave-one-out).
Command: bash launch/run audit
Hardware and time: 2 CPU cores, about 3 minutes; expected numbers stand in README.md.
Argument: --config=configs/digits.py:models=32,epochs=60 sets the two most used values.
"""

from ptq_jax import settings


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  args = settings.parse_arg(arg, {"models": 16, "epochs": 40})
  config = settings.audit_defaults()
  config.name = "digits"
  config.model.width = 16
  config.train.models = args["models"]
  config.train.epochs = args["epochs"]
  config.train.models_per_chunk = 16
  config.train.checkpoint_minutes = 1.0
  config.attack.fprs = (0.01, 0.001)
  config.quantize.last_layer_levels = ("same", 256)
  for section, key in (
    (config.train, "augmentation"),
    (config.queries, "augmentation"),
    (config.quantize, "calibration_augmentation"),
  ):
    section[key] = ("shift1",)
  config.queries.views = 2
  return config
