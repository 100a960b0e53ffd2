"""The smallest audit that runs every stage: to see that an installation works, and for tests.

What: 8 tiny networks on 200 handwritten digits, quantized with every method at two precisions. The
numbers mean nothing.
Command: bash launch/run audit --config smoke
Hardware and time: 2 CPU cores, under a minute.
Argument: --config=configs/smoke.py:models=16 sets the number of models.
"""

from ptq_jax import settings


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  args = settings.parse_arg(arg, {"models": 8})
  config = settings.audit_defaults()
  config.name = "smoke"
  config.data.pool_size = 200
  config.data.test_size = 50
  config.model.width = 4
  config.train.models = args["models"]
  config.train.epochs = 4
  config.train.batch_size = 20
  config.train.models_per_chunk = 4
  config.quantize.levels = (3, 16)
  config.quantize.last_layer_levels = ("same",)
  config.quantize.calibration_size = 40
  config.attack.fprs = (0.1, 0.01)
  config.attack.resamples = 100
  return config
