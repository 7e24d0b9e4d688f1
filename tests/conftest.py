"""Every test sees 8 CPU devices and strict ranks; set before JAX looks for devices."""

import gc
import os
import sys
from importlib import metadata

FLAGS = ["--xla_force_host_platform_device_count=8"]
if not any("aot" in argument for argument in sys.argv) and metadata.version("jaxlib").startswith("0.10."):
    # Programs that run once: compiled in a tenth of the time, to the same meaning. XLA aborts on a flag it does not
    # know, and later versions have dropped one of these.
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that stay: looking at all of them again costs a sixth

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file():
    """A worker that goes through all files would hold some thousand compiled programs."""
    yield
    jax.clear_caches()
