"""A whole audit: train shadows, quantize them, attack, report; `run` does all of it from Python."""

from ptq_jax.audit.events import Event
from ptq_jax.audit.loading import Network, load_quantized
from ptq_jax.audit.running import Comparison, Result, compare, run, run_scores
from ptq_jax.audit.stopping import Stopped

__all__ = [
  "Comparison",
  "Event",
  "Network",
  "Result",
  "Stopped",
  "compare",
  "load_quantized",
  "run",
  "run_scores",
]
