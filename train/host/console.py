"""Lines on the screen; of several processes the first alone prints them."""

import sys

import jax


def say(text: str) -> None:
    """Prints a line at once."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning to the error output at once."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
