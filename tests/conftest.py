"""Eight virtual CPU devices for every test, and quick compiles; before jax's import."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile hundreds of small programs that each run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # XLA's older emitters, which compile in half the time, one program on one core.
    + " --xla_cpu_use_fusion_emitters=false"
    + " --xla_cpu_parallel_codegen_split_count=1"
    # On a busy machine a device may be long in coming.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import gc
import signal
from collections.abc import Iterator

import hypothesis
import jax
import pytest

pytest.register_assert_rewrite("tests.helpers")
# The runs that tests start inherit it; under nohup it would be ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# How long an example takes says nothing on a machine that other workers keep busy.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("tests")

# Traced programs are many objects that live on: to look through them for cycles as
# often as Python does by itself takes a twentieth of the time.
gc.set_threshold(200_000, 50, 100)


def pytest_configure(config: pytest.Config) -> None:
    """A program that was compiled is there for all workers, and runs that tests start.

    They inherit where.
    """
    if hasattr(config, "workerinput"):
        return
    folder = tempfile.TemporaryDirectory(prefix="compiled-")
    config.add_cleanup(folder.cleanup)
    settings = {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _free_programs() -> Iterator[None]:
    """Frees the compiled programs of the modules before, if they are many.

    Each maps memory, and Linux allows a process 65,530 maps: a worker that has compiled
    for half an hour would crash. A few are kept: the small ones of operations by
    themselves are the same in every module.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 2000:
        jax.clear_caches()
