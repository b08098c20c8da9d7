"""Step: Adafactor."""

import optax

from lowrank_optax.core.aliases import Number


def scale_by_adafactor(
    b1: Number | None = 0.9, *, decay_rate: Number = 0.8, clip: Number = 1.0
) -> optax.GradientTransformation:
    """Scales by Adafactor, for `in_subspace(per_matrix(scale_by_adafactor()))`.

        V = R C / mean(R),   R, C: running means of G^2 over columns and over rows,
                             with decay 1 - t^-decay_rate
        U = G / sqrt(V),   U <- U / max(1, rms(U) / clip)
        M <- b1 M + (1 - b1) U                        unless b1 is None

    (Shazeer and Stern 2018, "Adafactor".) V is `optax.scale_by_factored_rms` with every
    matrix factored, whatever its size.

    Args:
      b1: decay rate of M; None for no momentum.
      decay_rate: exponent of the second moment's decay schedule.
      clip: the largest root mean square of a matrix's U.

    Example:
      >>> tx = lro.fira(0.003, rank=4, refresh_every=200,
      ...     step=lro.in_subspace(
      ...         lro.steps.per_matrix(lro.steps.scale_by_adafactor())))
    """
    stages = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=1),
        optax.clip_by_block_rms(clip),
    ]
    if b1 is not None:
        stages.append(optax.ema(b1, debias=False))
    return optax.chain(*stages)
