"""Perplexity, and the one that the published pre-training scripts print."""

import math

LARGEST = 700.0  # e^710 overflows


def perplexity(loss: float) -> float:
    """e^loss, of a mean loss in nats."""
    return math.exp(min(loss, LARGEST))


def published_perplexity(loss: float, batches: int) -> float:
    """e^(loss n / (n + 1)) of n batches, as GaLore's script prints it.

    It counts batches from one and so divides the sum of n losses by n + 1; Fira,
    Q-GaLore, LDAdam, SubTrack++ and COAP have it from there. (It takes the mean of
    batches, not of tokens; where windows have no padding the two are the same.)
    """
    return perplexity(loss * batches / (batches + 1))
