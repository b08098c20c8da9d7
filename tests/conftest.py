"""Eight virtual CPU devices for every test, and quick compiles; before jax's import."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile hundreds of small programs that each run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # On a busy machine a device may be long in coming.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

# A program that was compiled is there for all workers, and runs that tests start. The
# first process, whose workers and runs inherit the name, removes the folder at its end.
_compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _compiled.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

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
