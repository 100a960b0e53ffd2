"""Your own data and model: defaults that suit any, to be changed by flags.

What: 16 networks, each target once, all methods at 1.58, 2 and 4 bit. Nothing is augmented.
Command: bash launch/run audit --workdir runs/mine --config.data.name=npz \\
  --config.data.path=X.npz --config.model.name=package.module:factory
  This config is the one in use whenever data.name or model.name is given and --config is not.
Hardware and time: yours.
"""

from ptq_jax import settings


def get_config(arg=""):
  """The settings that differ from `settings.audit_defaults`; --help lists all."""
  settings.parse_arg(arg, {})
  config = settings.audit_defaults()
  config.name = "own"
  return config
