"""Another stage for a finished optimizer."""

from collections.abc import Callable

import optax

from lowrank_optax.core.checks import transformation


class Extensible(optax.GradientTransformationExtraArgs):
    """A transformation with one `low_rank` in it that can be rebuilt with more stages.

    Attributes:
      extended: from a stage to the same transformation with that stage at the end.
    """

    extended: Callable[[optax.GradientTransformation], "Extensible"]


def extensible(
    tx: optax.GradientTransformationExtraArgs,
    extended: Callable[[optax.GradientTransformation], Extensible],
) -> Extensible:
    """`tx` as an `Extensible`."""
    made = Extensible(*tx)
    made.extended = extended
    return made


def add_stage(
    tx: optax.GradientTransformation, stage: optax.GradientTransformation
) -> Extensible:
    """The same optimizer with one more stage, the last one inside its `low_rank`.

    For a stage that only reads, such as `measure_subspace`: it finds everything that
    the others have set in the Frame. The new stage's state becomes part of the state.

    Args:
      tx: `low_rank` or a named optimizer, before optax wraps it (with
        `optax.inject_hyperparams`: inside the function that it calls).
      stage: the new stage.

    Raises:
      ValueError: any other transformation.

    Example:
      >>> tx = lro.recipes.subtrack(0.002, rank=2, refresh_every=100)
      >>> tx = lro.add_stage(tx, lro.measure_subspace())
      >>> params = {"mlp": {"kernel": jnp.ones((8, 16))}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> round(float(lro.measurements(state)["mlp/kernel"].energy), 3)
      1.0
    """
    if not isinstance(tx, Extensible):
        raise ValueError(
            "add_stage() extends low_rank() or a named optimizer such as galore(); add "
            "the stage first, and put other wrappers around the result"
        )
    transformation("add_stage(tx, stage)", stage, "measure_subspace()")
    return tx.extended(stage)
