"""Handwritten digits: a whole audit in minutes on a CPU, with data that scikit-learn brings along.

What: 16 small convolutional networks (24 000 parameters), each trained on a random half of 1498
images of 8x8 pixels, quantized with every method, every model target once (leave-one-out).
Command: bash launch/run audit
Hardware and time: 2 CPU cores, about 3 minutes; expected numbers stand in README.md.
Argument: --config=configs/digits.py:models=32,epochs=60 sets the two most used values.
"""

from ml_collections import config_dict

from ptq_jax import settings


def get_config(arg=""):
  """All settings of the audit; override any as --config.section.key=value."""
  args = settings.parse_arg(arg, {"models": 16, "epochs": 40})
  return config_dict.create(
    name="digits",
    seed=0,
    data=dict(
      name="digits",
      data_dir=config_dict.placeholder(str),  # of TensorFlow Datasets
      path=config_dict.placeholder(str),  # of npz, tiny_imagenet and image_folder
      pool_size=config_dict.placeholder(int),  # None: the whole training split
      test_size=config_dict.placeholder(int),
      image_size=config_dict.placeholder(int),
    ),
    model=dict(name="convnet", width=16),
    train=dict(
      models=args["models"],  # shadows, even
      targets=0,  # 0: every model is target once, the others are its shadows
      epochs=args["epochs"],
      batch_size=64,
      learning_rate=0.1,
      momentum=0.9,
      nesterov=False,
      weight_decay=5e-4,
      schedule="cosine",
      label_smoothing=0.0,
      augmentation=("shift1",),
      models_per_chunk=16,  # memory only, no result depends on it
      checkpoint_minutes=1.0,
    ),
    queries=dict(
      views=2,
      augmentation=("shift1",),
      batch_size=500,
    ),
    quantize=dict(
      methods=("nearest", "adaround", "brecq", "obc"),
      levels=(3, 4, 16),
      last_layer_levels=("same", 256),  # "same", a number of levels, or "full" precision
      overrides=(),  # such as ("stem/*=256",)
      calibration_size=512,
      calibration_augmentation=("shift1",),
      calibrate_on="members",
      adaround=dict(),  # options of quantize_stacked
      brecq=dict(),
      obc=dict(),
      nearest=dict(),
    ),
    attack=dict(
      attacks=("lira_online", "lira_offline", "loss_threshold"),
      variance="per_example",
      fprs=(0.01, 0.001),
      rule="at_most",
      resamples=1000,
      confidence=0.95,
    ),
  )
