"""The environment that compiling for absent TPUs and GPUs needs, set before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with "cuda,cpu" jax looks for a driver and fails
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud's metadata server who we are
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu else locks out a second process

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module")
def least_effort():
    """Whole TPU programs in a third of the time; their temporaries are some 3% larger than what users compile."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)
