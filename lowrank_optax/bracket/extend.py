"""A further stage for an optimizer that is put together already."""

from collections.abc import Callable

import optax


class Extensible(optax.GradientTransformationExtraArgs):
    """A transformation with one `low_rank` in it, and what makes it anew.

    Attributes:
      extended: from a stage to the same with that stage behind its others.
    """

    extended: Callable[[optax.GradientTransformation], "Extensible"]


def extensible(
    tx: optax.GradientTransformationExtraArgs,
    extended: Callable[[optax.GradientTransformation], Extensible],
) -> Extensible:
    """`tx`, to which `add_stage` can add."""
    made = Extensible(*tx)
    made.extended = extended
    return made


def add_stage(
    tx: optax.GradientTransformation, stage: optax.GradientTransformation
) -> Extensible:
    """The same optimizer with one more stage, the last one inside its `low_rank`.

    For a stage that looks on, `measure_subspace` above all: it finds everything that
    the others have set in the Frame, and needs no place in the method's own signature.
    The state is another, with the new stage's in it.

    Args:
      tx: `low_rank` itself, or a named optimizer, before anything of optax is put
        around it (in `optax.inject_hyperparams`: inside the function that it calls).
      stage: what is added.

    Raises:
      ValueError: a transformation that is neither.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.recipes.subtrack(0.002, rank=2, refresh_every=100)
      >>> tx = lro.add_stage(tx, lro.measure_subspace())
      >>> params = {"mlp": {"kernel": jnp.ones((8, 16))}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> round(float(lro.measurements(state)["mlp/kernel"].energy), 3)
      1.0
    """
    if not isinstance(tx, Extensible):
        raise ValueError(
            "add_stage() goes around low_rank() or a named optimizer such as galore(), "
            "which have stages; add the stage first, and put other wrappers around it"
        )
    return tx.extended(stage)
