"""Eight virtual CPU devices for every test, and quick compiles; before jax's import."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile hundreds of small programs that each run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
