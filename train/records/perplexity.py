"""Perplexity, and the one that the published pre-training scripts print."""

import math

LARGEST = 700.0  # e^710 overflows


def perplexity(loss: float) -> float:
    """e^loss, of a mean loss in nats."""
    return math.exp(min(loss, LARGEST))


def published_perplexity(loss: float, batches: int) -> float:
    """e^(loss n / (n + 1)) of n batches, as GaLore's script prints it.

    The script counts batches from one, and divides the sum of n losses by n + 1; Fira,
    Q-GaLore, LDAdam, SubTrack++ and COAP copy it. (It averages batches, not tokens;
    without padding the two are the same.)
    """
    return perplexity(loss * batches / (batches + 1))
