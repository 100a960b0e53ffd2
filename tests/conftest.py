"""Settings for every test: a shared compilation cache, and rank promotion is an error."""

import ctypes
import gc
import os
import pathlib

import jax
import pytest

# Most of the tests' time is compiling. Programs this small gain nothing from LLVM's passes, from
# generating code in parallel or from XLA's newer emitter of fusions: without them it takes less
# than half of the processor time (BUILD_NOTES.md). XLA ends the process at a flag that it does not
# know, such as the last one in JAX 0.12. Launched programs inherit them.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
  QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK_COMPILE} {os.environ.get('XLA_FLAGS', '')}"

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBC = ctypes.CDLL(None) if os.name == "posix" else None
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # launched programs inherit it
# A traceback for every operation of a program is a tenth of the time of tests that compile.
os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "0"

jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Tracing makes many objects that live: looking through all of them for cycles as often as Python
# does takes a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

MEMORY_BYTES = 1.6e9
"""A worker that holds more forgets its programs."""


def forget():
  """Compiled programs are kept on disk; in memory those of all modules take gigabytes."""
  jax.clear_caches()
  gc.collect()
  if hasattr(LIBC, "malloc_trim"):  # without it, glibc keeps three quarters of what is free
    LIBC.malloc_trim(0)


def held_bytes():
  """Memory that this process holds; 0 where nobody says."""
  statm = pathlib.Path("/proc/self/statm")
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


LONGEST = ("tests/launch", "tests/audit", "tests/quantize", "tests/models", "tests/test_", "tests")
"""Modules in the order of their times: whoever comes last must not have the longest."""


def pytest_collection_modifyitems(items):
  def rank(item):
    path = item.path.relative_to(ROOT).as_posix()
    return next((i for i, start in enumerate(LONGEST) if path.startswith(start)), len(LONGEST))

  items.sort(key=rank)


@pytest.fixture(autouse=True)
def stay_small():
  """Modules share what was traced and compiled, as long as there is room."""
  yield
  if held_bytes() > MEMORY_BYTES:
    forget()


@pytest.fixture
def key():
  return jax.random.key(0)
