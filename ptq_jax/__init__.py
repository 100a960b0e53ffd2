"""Membership leakage of post-training-quantized image classifiers, in JAX.

Import the modules and read the calls as sentences: `lira.online(...)`, `roc.tpr_at_fpr(...)`,
`adaround.quantize_params(...)`.
"""

__version__ = "0.1.0"
