"""A whole audit: train shadows, quantize them, attack, report; `run` does all of it from Python."""

from ptq_jax.audit.events import Event
from ptq_jax.audit.running import Result, run
from ptq_jax.audit.stopping import Stopped

__all__ = ["Event", "Result", "Stopped", "run"]
