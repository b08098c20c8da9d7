"""The names that every example in a docstring may use."""

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace: dict[str, Any]) -> None:
    # Imported here: tests/conftest.py chooses JAX's devices before its first import.
    import jax
    import jax.numpy as jnp
    import optax

    import lowrank_optax as lro

    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, lro=lro)
