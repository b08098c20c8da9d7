"""Eight virtual CPU devices for every test, and quick compiles; before jax's import."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile hundreds of small programs that each run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # The older way to generate code takes half the time.
    + " --xla_cpu_use_fusion_emitters=false"
    # On a busy machine a device may be long in coming.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _free_programs() -> Iterator[None]:
    """Programs of a module's tests are let go with it.

    Each maps memory several times over, of which Linux allows a process 65,530 maps: a
    worker that has compiled for half an hour would crash.
    """
    yield
    jax.clear_caches()
