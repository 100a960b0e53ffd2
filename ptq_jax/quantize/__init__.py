"""Post-training quantization of weights: methods behind one signature.

Every module in `METHODS` has `quantize_params(key, model, variables, images, *, levels, ...)` for
one model and `quantize_stacked(keys, model, variables, images, *, plans, ...)` for many.
"""

from types import MappingProxyType

from ptq_jax.quantize import adaround, brecq, nearest, obc

METHODS = MappingProxyType({"nearest": nearest, "adaround": adaround, "brecq": brecq, "obc": obc})
"""Modules by the name that configs and result tables use."""
