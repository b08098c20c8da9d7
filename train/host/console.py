"""Lines for whoever looks on; of several processes the first alone prints them."""

import sys

import jax


def say(text: str) -> None:
    """Print a line at once."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """The same on the error output, as a warning."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
