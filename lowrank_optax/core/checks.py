"""Checks of arguments that several modules share."""

import optax

from lowrank_optax.core.aliases import Number


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless the argument `name` is an int of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raises ValueError unless the argument `name` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_fraction(name: str, value: Number) -> None:
    """ValueError for a number outside [0, 1], where it is known."""
    if (isinstance(value, (int, float)) and 0 <= value <= 1) or hasattr(value, "dtype"):
        return
    raise ValueError(f"{name}={value!r}: pass a number from 0 to 1")


def check_limit(limit: Number) -> None:
    """ValueError for a `limit` that is no number of at least one, where it is known."""
    if (isinstance(limit, (int, float)) and limit >= 1) or hasattr(limit, "dtype"):
        return
    raise ValueError(
        f"limit={limit!r}: pass the largest growth of a norm from step to step, a "
        "number of at least 1, such as 1.01; below 1 every step would be shorter than "
        "the one before"
    )


def transformation(
    where: str, value: object, example: str = "optax.scale_by_adam()"
) -> optax.GradientTransformationExtraArgs:
    """`value` with support for extra arguments.

    Raises:
      ValueError: in the name of `where`, for what has no `init` and `update`.
    """
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise ValueError(
            f"{where} needs a transformation such as {example}, not {found(value)}"
        )
    return optax.with_extra_args_support(value)  # pyright: ignore[reportArgumentType]


def found(value: object) -> str:
    """Describes a wrong argument; a function may have been passed and not called."""
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return f"the function {name} itself; call it: {name}(...)"
    text = repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"
