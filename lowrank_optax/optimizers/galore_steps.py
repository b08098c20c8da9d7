"""GaLore with other steps than Adam; with `basis=sara_sample(key)`, SARA's."""

from collections.abc import Sequence

import jax
import optax

from lowrank_optax.bases.singular import dominant_svd
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Square,
)
from lowrank_optax.core.typing import Mask
from lowrank_optax.optimizers.assemble import basis_or, low_rank_optimizer
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.steps.adafactor import scale_by_adafactor
from lowrank_optax.steps.adam_mini import (
    adam_mini_blocks,
    check_heads,
    scale_by_adam_mini,
)
from lowrank_optax.steps.quantize import quantize_moments
from lowrank_optax.steps.subspace import in_subspace, per_matrix


def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 0.25,
    b1: float | jax.Array | None = 0.9,
    decay_rate: float = 0.8,
    clip: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Adafactor: Adafactor on the gradient's projection.

    `galore` with `scale_by_adafactor` in the subspace, one matrix at a time (Zhao et
    al. 2024, "GaLore"; SARA paper, section 4, with b1 = 0.9). With b1 = None this is
    galore-torch 1.0's GaLoreAdafactor step for step. State of a matrix: mr + n + r
    numbers, and nr with b1; two products a step.

    When to choose it: half of Adam's moments, or with b1 = None next to none, at full
    precision; better than GaLore-Adam in the SARA paper's Table 1. When not: on work
    like the README's 60M runs, where Adam's two moments were a little better.

    Deviation: the released code averages after the learning rate, here before it; a
    constant rate makes no difference.

    Args:
      b1: decay rate of M; None for no momentum.
      decay_rate: of the second moment's schedule, 1 - t^-decay_rate.
      clip: the largest root mean square of a matrix's low-rank step.
      learning_rate, rank, refresh_every, basis, scale, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.galore_adafactor(0.01, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    inner = scale_by_adafactor(b1, decay_rate=decay_rate, clip=clip)
    step = in_subspace(per_matrix(inner))
    rule = basis_or(basis, dominant_svd)
    return low_rank_optimizer(
        optax.chain(rule, project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def galore_adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    heads: Sequence[tuple[str, int]] = (),
    scale: float | jax.Array = 0.25,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Adam-mini: Adam with one second moment per block of the projection.

    `galore` with `scale_by_adam_mini` in the subspace (Zhang et al. 2024, "Adam-mini";
    SARA paper, section 4, with b2 = 0.95). A projected matrix (r, n) has one second
    moment for each of its n columns, the axis that survives the projection, or for
    each head of a query or key projection that `heads` names; `adam_mini_blocks` has
    the other leaves' blocks. State of a matrix: mr + nr + n numbers; two products a
    step.

    When to choose it: nearly half of Adam's state in the subspace is saved. When not:
    where it must not cost loss (SARA paper, Table 1: behind GaLore-Adam).

    No code of this combination is published, and the SARA paper does not say which
    blocks it takes.

    Args:
      heads: pairs (regular expression, size of a head) for projections whose output
        axis survives, which is the larger side.
      learning_rate, rank, refresh_every, basis, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: heads that are projected away or do not fit; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.galore_adam_mini(0.01, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    inner = scale_by_adam_mini(b1, b2, eps, blocks=adam_mini_blocks(heads))
    step = optax.chain(check_heads(heads), in_subspace(inner))
    rule = basis_or(basis, dominant_svd)
    return low_rank_optimizer(
        optax.chain(rule, project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def galore_adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    block_size: int = 256,
    shards: int = 1,
    min_size: int = 4096,
    scale: float | jax.Array = 0.25,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Adam 8-bit: the projection's moments stored in one byte each.

    `galore` with `quantize_moments(optax.scale_by_adam())` (Dettmers et al. 2022,
    "8-bit Optimizers via Block-wise Quantization"; SARA paper, section 4). Full-rank
    leaves' moments are stored so too. State of a matrix: 4mr + 2nr (1 + 4 /
    block_size) bytes; two products a step.

    When to choose it: most of what is left of the moments is saved, at little cost.
    When not: while you compare methods: it rounds.

    Deviation: the released code rounds the low-rank update to the weight's dtype, and
    stores moments by bitsandbytes' kernels.

    Args:
      block_size: numbers that share a scale.
      shards: as in `quantize_moments`.
      min_size: arrays with fewer numbers stay as they are.
      learning_rate, rank, refresh_every, basis, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.galore_adam8bit(0.01, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    inner = quantize_moments(
        optax.scale_by_adam(b1, b2, eps),
        block_size=block_size,
        shards=shards,
        min_size=min_size,
    )
    rule = basis_or(basis, dominant_svd)
    return low_rank_optimizer(
        optax.chain(rule, project(), in_subspace(inner), project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )
