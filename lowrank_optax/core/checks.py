"""Checks of arguments that several modules share."""


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless the argument `name` is an int of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")
