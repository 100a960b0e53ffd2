"""Settings for every test: a shared compilation cache, and rank promotion is an error."""

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
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # launched programs inherit it

jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Compiled programs are kept on disk; in memory those of all modules take gigabytes."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def key():
  return jax.random.key(0)
