"""Lines on the screen, of several processes by the first."""

import sys

import jax


def say(text: str) -> None:
    """Prints a line at once; of several processes the first alone does."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str, each: bool = False) -> None:
    """Prints a warning to the error output at once; the first process, or each."""
    if each or jax.process_index() == 0:
        several = each and jax.process_count() > 1
        own = f"process {jax.process_index()}: " if several else ""
        print(f"warning: {own}{text}", file=sys.stderr, flush=True)
