"""Named optimizers that are another one with other parts."""

from collections.abc import Sequence

import jax
import optax

from lowrank_optax.bases.dct import dct_columns
from lowrank_optax.bases.grassmann import grassmann_track
from lowrank_optax.bases.lazy import lazy_refresh
from lowrank_optax.bases.momentum import correlation_aware
from lowrank_optax.bases.pca import online_pca
from lowrank_optax.bases.random import gaussian, random_after
from lowrank_optax.bases.rows import sample_rows
from lowrank_optax.bases.singular import dominant_svd, sara_sample
from lowrank_optax.bases.storage import quantize_basis
from lowrank_optax.bases.switching import switch_basis, track_gram
from lowrank_optax.core.aliases import Mask
from lowrank_optax.core.layout import (
    TRANSFORMER_MATRICES,
    DimensionNumbers,
    Rank,
    Rules,
    Square,
)
from lowrank_optax.full_rank.normalize import normalize_by_output_rms, trace_matching
from lowrank_optax.full_rank.row_column import scale_by_racs
from lowrank_optax.optimizers.assemble import (
    basis_or,
    low_rank_optimizer,
    one_of,
    whole_optimizer,
)
from lowrank_optax.recovery.compensation import compensate_columns
from lowrank_optax.recovery.feedback import error_feedback
from lowrank_optax.recovery.limiter import clip_step_growth
from lowrank_optax.recovery.projection import project, project_back
from lowrank_optax.recovery.published import scale_by_uncorrected_adam
from lowrank_optax.recovery.residual import recover_residual, sign_residual
from lowrank_optax.recovery.scaling import scale_by_shape
from lowrank_optax.steps.adafactor import scale_by_adafactor
from lowrank_optax.steps.adam_mini import (
    adam_mini_blocks,
    check_heads,
    scale_by_adam_mini,
)
from lowrank_optax.steps.orthogonal import Polar, scale_by_polar_factor
from lowrank_optax.steps.quantize import quantize_moments
from lowrank_optax.steps.rest import with_rest
from lowrank_optax.steps.rotation import rotate_moments
from lowrank_optax.steps.subspace import (
    in_full_space,
    in_subspace,
    per_matrix,
    reset_moments,
)


def alice(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int | None = None,
    keep: float = 0.3125,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 0.3,
    residual_scale: float | jax.Array = 0.4,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.9,
    b3: float | jax.Array | None = 0.999,
    eps: float | jax.Array = 1e-8,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Alice: leading directions and a draw of the others, the lost part normalised.

    W <- W - lr scale (S M / sqrt(V) + residual_scale C): at a refresh S keeps the
    leading directions of a power step and draws the others from its complement; Adam's
    moments are left as they are; and C is what the projection lost, each column over
    its running norm (Gong et al. 2025, "Towards Efficient Optimizer Design for LLM via
    Structured Fisher Approximation with a Low-Rank Extension", Algorithm 4; equations
    in `switch_basis`, `track_gram` and `compensate_columns`). `b3=None` is Alice-0,
    whose basis follows the gradient of the refresh alone. State of a matrix: mr + 2nr +
    n + 1 numbers, and r^2 with tracking; two products a step.

    When to choose it: where the head is trained so too, for the lowest losses that its
    paper reports of low-rank methods, most of it by the compensation (its Table 5); a
    refresh without an SVD. When not: where micro-batches are summed in the subspace,
    for it needs the gradient; without tuning, for it has the most numbers of all.

    As in the paper M and V are not corrected for bias, and no weight is decayed; eps is
    ours, which has none. Leaves of full rank take Adam's step (0.9, 0.999, corrected),
    as they do in its experiments; the paper does not say with which learning rate, and
    here it is `learning_rate`. So embedding, norms and head do by default.

    Published, 60M to 350M: learning_rate=0.02, refresh_every=200, and the defaults;
    1.3B: scale=0.25, residual_scale=0.2.

    Args:
      key: a seed or a typed key for the draws; required unless `basis` is given.
      keep: how many directions stay, an int or a fraction of the rank (`switch_basis`).
      basis: another basis rule in place of the switch; only `switch_basis` follows what
        is tracked.
      scale: alpha, on the matrices' step.
      residual_scale: alpha_c, on the lost part besides.
      limit: the largest growth of the lost part's norm from step to step.
      b1: decay rate of M, and of the lost part's column norms.
      b3: decay rate of the running mean of G~ G~^T; None for none.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate, rank, refresh_every, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: neither or both of `key` and `basis`; another `keep` than
        `switch_basis` takes; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.alice(0.02, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = one_of(key, basis, lambda key: switch_basis(key, keep=keep))
    where = optax.chain(rule, project())
    if b3 is not None:
        where = track_gram(where, decay=b3)
    step = in_subspace(scale_by_uncorrected_adam(b1, b2, eps))
    back = compensate_columns(
        limit, scale=scale, residual_scale=residual_scale, decay=b1
    )
    return low_rank_optimizer(
        with_rest(optax.chain(where, step, back), rest),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def coap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    recompute_every: int = 5,
    step_size: float | jax.Array = 0.1,
    scale: float | jax.Array = 0.25,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """COAP: GaLore with a basis that is corrected by gradient steps between sketches.

    At a refresh the basis takes a gradient step that lowers the reconstruction error
    and raises the momentum's correlation with the gradient; at every
    `recompute_every`-th it is recomputed from a sketch (Xiao et al. 2025, "COAP";
    equations and deviations in `correlation_aware`). The moments are left as they are,
    the released default. State of a matrix: mr + 2nr numbers; two products a step.

    Deviation: Adam's moments are corrected for bias before eps is added; the released
    code corrects the step size.

    When to choose it: a cheap refresh without an SVD. When not: with very small
    gradients, whose squares scale its steps (the mean loss of a language model is such
    a case; then only the recomputations move it).

    Args:
      recompute_every: refreshes from one recomputation to the next.
      step_size: of the basis' gradient step.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.coap(0.01, rank=4, refresh_every=40)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = correlation_aware(step_size, recompute_every=recompute_every)
    step = in_subspace(optax.scale_by_adam(b1, b2, eps))
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


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 1,
    feedback: bool = False,
    scale: float | jax.Array = 1.0,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """DCT-AdamW: Adam on the cosine transform's columns that the gradient is long in.

    S_t = r columns of the DCT matrix, chosen by one product; Adam's moments go with
    their columns (Modoranu et al. 2025, "FFT-based Dynamic Subspace Selection";
    equations in `dct_columns`). State of a matrix: 2nr numbers and r integers, and mn
    with feedback; two products a step, and at a refresh one of m x m and n.

    When to choose it: a basis that follows the gradient without any factorisation, and
    is not stored. When not: where the top of the spectrum is what counts, which a fixed
    matrix only comes near to.

    As the released code with `rotate_subspace` (read, not run beside it), on the
    smaller side of every matrix; its feedback can be kept in 4 or 8 bits too.

    Args:
      refresh_every: steps between two choices; 1 in the released code.
      feedback: whether what the projection lost is added to the next gradient.
      scale: on the matrices' step; 1 in the source.
      learning_rate, rank, b1, b2, eps, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.dct_adamw(0.002, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    where = optax.chain(dct_columns(), project())
    if feedback:
        where = error_feedback(where, b1=0.0)  # the turn loses whole rows of M
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(
        optax.chain(where, step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def flora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int,
    b1: float | jax.Array = 0.9,
    scale: float | jax.Array = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """FLora: momentum compressed by a random projection that is redrawn now and then.

        U = G / sqrt(V),  V Adafactor's factored second moment of G, in full space
        M <- S_t^T S_{t-1} M   at a refresh,    M <- b1 M + (1 - b1) S_t^T U
        W <- W - lr scale S_t M,               S_t Gaussian, from its key

    (Hao et al. 2024, "FLora: Low-Rank Adapters Are Secretly Gradient Compressors",
    section 2.4, with Adafactor as its experiments.) State of a matrix: nr + m + n
    numbers; two products a step.

    When to choose it: a first moment at Adafactor's memory. When not: with a small rank
    and a large rate; a Gaussian projection of rank r is noisy, ||S S^T|| being about
    m / r.

    Deviation: the released optax code projects the transferred momentum with the old
    key both ways; here it goes into the new projection, as the paper writes.

    Args:
      key: a seed or a typed key for the projections.
      b1: decay rate of M.
      scale: on the matrices' step; 1 in the source.
      learning_rate, rank, refresh_every, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.flora(0.01, rank=4, refresh_every=1000, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    # Any matrix is factored, as the paper has it; optax spares small ones.
    second = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    before = in_full_space(per_matrix(second))
    step = rotate_moments(optax.ema(b1, debias=False))
    return low_rank_optimizer(
        optax.chain(before, gaussian(key), project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def golore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    switch_step: int | jax.Array,
    key: jax.Array | int,
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
    """GoLore: GaLore whose subspace is random in the end.

    At a refresh the basis is the gradient's leading singular vectors before
    `switch_step` and uniformly random from it on; the first moment turns with it, M <-
    S_t^T S_{t-1} M, the second stays (He et al. 2025, "Subspace Optimization for Large
    Language Models with Convergence Guarantees"; equations in `random_after`). State
    of a matrix: mr + 2nr numbers; two products a step.

    When to choose it: where GaLore stalls late because noise fills its subspace. When
    not: for the whole run (a random subspace alone misses most of the gradient);
    `grass_jump` gives that part back, `basis=sara_sample(key)` in `galore` samples.

    Deviation: the released code turns M for one step and forgets it; here it is kept,
    as in the paper. Scale 0.25 is GaLore's; the released script takes 1.

    Args:
      switch_step: the first step of random bases; the source takes a half to 0.8 of
        the run.
      key: a seed or a typed key for the random bases.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.golore(
      ...     0.01, rank=4, refresh_every=200, switch_step=8000, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps), moments="first")
    rule = random_after(switch_step, key)
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


def grass_sparse(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int,
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
    """Grass: Adam on r sampled rows of the gradient.

    At a refresh r rows are drawn by their norm, without replacement, and Adam starts
    anew on them; a step moves these rows alone (Muhamed et al. 2024, "Grass: Compute
    Efficient Low-Memory LLM Training with Structured Sparse Gradients"; equations in
    `sample_rows`). State of a matrix: 2nr numbers, r integers, a count; no
    product.

    When to choose it: the cheapest update, where most rows may wait. When not: for
    speed per token: `frugal(basis=coordinates(key))` moves the other rows too.

    The source projects to save gradient memory as well; here the full gradient comes
    in. Rows are those of the canonical orientation, along the smaller side. No code
    is published; scale 0.25 is GaLore's.

    Args:
      key: a seed or a typed key for the samples.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.grass_sparse(0.01, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = reset_moments(optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(
        optax.chain(sample_rows(key), project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def msgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    key: jax.Array | int | None = None,
    basis: optax.GradientTransformation | None = None,
    scale: float | jax.Array = 1.0,
    b1: float | jax.Array = 0.9,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """MSGD-SARA: momentum SGD in a sampled subspace, with momentum re-projection.

        M <- S_t^T S_{t-1} M   at a refresh
        M <- b1 M + (1 - b1) S_t^T G_t,    W <- W - lr scale S_t M

    (SARA paper, section 3.3: the method of Theorem 3.4, which converges at
    O(1 / T + 1 / sqrt(T)); its beta_1 is 1 - b1 here.) State of a matrix: mr + nr
    numbers; two products a step.

    When to choose it: to study convergence, and where SGD trains. When not: for
    transformers, which want Adam's second moment; then `galore(basis=sara_sample)`.

    Args:
      key: a seed or a typed key for SARA's samples; required unless `basis` is given.
      basis: another basis rule in place of `sara_sample(key)`.
      scale: on the matrices' step; 1 in the paper.
      learning_rate, rank, refresh_every, b1, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: neither or both of `key` and `basis`; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.msgd(0.1, rank=4, refresh_every=200, key=0)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = one_of(key, basis, sara_sample)
    step = rotate_moments(optax.ema(b1, debias=False))
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


NEVER = 2**31 - 1


def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    optimizer_of_basis: optax.GradientTransformation | None = None,
    penalty: float | jax.Array = 0.0,
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
    """Online subspace descent: GaLore with a basis trained by online PCA.

    The basis P takes one step of an optimizer of its own on the reconstruction loss
    ||P P^T G^ - G^||_F^2 at every step; nothing is ever factorised after step 0
    (Liang et al. 2024, "Memory-Efficient LLM Training with Online Subspace Descent";
    equations in `online_pca`, whose state reports loss and orthonormality drift).
    State of a matrix: 3mr + 2nr + 2 numbers (P with Adam's moments; loss and drift);
    four products a step.

    When to choose it: where no factorisation after the first step can be afforded. When
    not: for stability (the SARA paper, Table 3, finds it unstable and below GoLore); P
    drifts from orthonormal without a penalty.

    Args:
      optimizer_of_basis: any optax optimizer for P, learning rate and sign included;
        by default `optax.adamw(1 / 200, weight_decay=0.01)` (see `online_pca`).
      penalty: lambda on ||P^T P - I||_F^2; 0 in the released code.
      learning_rate, rank, scale, b1, b2, eps, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.online_subspace_descent(0.01, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = online_pca(optimizer_of_basis, penalty=penalty)
    step = in_subspace(optax.scale_by_adam(b1, b2, eps))
    return low_rank_optimizer(
        optax.chain(rule, project(), step, project_back(scale)),
        learning_rate,
        rank=rank,
        refresh_every=NEVER,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    bits: int = 4,
    threshold: float | jax.Array = 0.4,
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
    """Q-GaLore: 4-bit bases, 8-bit moments, fewer refreshes where a basis stands still.

    GaLore with its basis stored in `bits` bits, Adam's moments in eight, and each
    leaf's refresh interval doubled while its bases stay similar (Zhang et al. 2024,
    "Q-GaLore"; equations in `quantize_basis`, `quantize_moments`, `lazy_refresh`).
    State of a matrix: bits mr / 8 + 2nr bytes, and scales; two products a step.

    When to choose it: GaLore at a quarter of its memory. When not: where the subspace
    should be left before it freezes, which a lazy refresh hastens.

    The source also stores weights in 8 bits with stochastic rounding: here
    `store` and `apply_updates`, with any optimizer.

    Args:
      basis: a basis rule to store in few bits; `dominant_svd()` by default.
      bits: 4 or 8.
      min_size: moments with fewer numbers stay as they are.
      threshold: the mean similarity from which on a leaf's interval doubles.
      learning_rate, rank, refresh_every, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: bits other than 4 and 8; and as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.q_galore(0.01, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    rule = quantize_basis(basis_or(basis, dominant_svd), bits=bits)
    rule = lazy_refresh(rule, threshold=threshold)
    adam = optax.scale_by_adam(b1, b2, eps)
    step = in_subspace(quantize_moments(adam, min_size=min_size))
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


def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 5,
    scale: float | jax.Array = 0.05,
    limit: float | jax.Array = 1.01,
    b2: float | jax.Array = 0.9,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
) -> optax.GradientTransformationExtraArgs:
    """RACS: the gradient with its rows and its columns scaled, and no momentum.

    W <- W - lr scale diag(q)^(-1/2) G diag(s)^(-1/2), its norm limited to grow by
    `limit` a step, q and s running means of a rank-one fit of the squared gradient
    (Gong et al. 2025, "Structured Fisher Approximation", Algorithm 1; equations in
    `scale_by_racs`). It has no subspace, and no rank. State of a matrix:
    m + n + 1 numbers; ten sums over the gradient a step, and no product.

    When to choose it: next to no state, as a baseline for what has more. When not:
    where micro-batches are summed in a subspace, for there is none; with small batches,
    whose noise no momentum averages.

    Leaves of full rank take Adam's step, as the last layer does in the paper: so
    embedding, norms and head do by default. Published: learning_rate=0.02 and the
    defaults; scale=0.02 at 1.3B.

    Args:
      iterations: of the fit.
      scale: alpha, on the matrices' step.
      limit: the step's largest growth from step to step.
      b2: decay rate of q and s, beta in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      square: which side of a square matrix the fit begins with, its "input" or its
        "output" axis (`low_rank`).
      learning_rate, weight_decay, mask, dimension_numbers: as in `galore`.

    Raises:
      ValueError: iterations below 1; and as `full_matrices` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.racs(0.02)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    stage = scale_by_racs(limit, scale=scale, decay=b2, iterations=iterations)
    return whole_optimizer(
        with_rest(stage, rest),
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        dimension_numbers=dimension_numbers,
        square=square,
    )


# Norms and biases have full rank, everything else is a matrix: embedding and head too.
WEIGHT_MATRICES: Rules = (*TRANSFORMER_MATRICES[:2], ("", "matrix"))


HEAD = r"(?i)(^|/)(lm_)?(head|logits)(_dense)?(/(kernel|weight|w))?$"


def scale_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: str = HEAD,
    b1: float | jax.Array = 0.9,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = WEIGHT_MATRICES,
) -> optax.GradientTransformationExtraArgs:
    """SCALE: SGD with every output's weights normalised, and momentum on the head.

    W <- W - lr C(G), C(G)_ij = G_ij / sqrt(mean_i G_ij^2), i over the inputs of output
    j; of the head C(M), M <- b1 M + (1 - b1) G (Glentis et al. 2025, "A Minimalist
    Optimizer Design for LLM Pretraining"; equations in `normalize_by_output_rms` and
    `trace_matching`). It has no subspace, and no rank. State of a matrix: none; of the
    head its mn numbers. No product.

    When to choose it: a baseline that is hard to beat for how little it keeps: every
    method with more state should be compared with it. When not: with small batches,
    whose noise no momentum averages.

    Embedding and head are matrices here, as in the released code, which divides by the
    root mean square where the paper writes the norm; so does this, with its learning
    rate of 1e-3. Norms and biases take Adam's step, as there.

    Args:
      momentum: a regular expression: matrices by their paths that have momentum; by
        default an output head. Where none is found, as with tied embeddings, none has.
      b1: decay rate of that momentum.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      dimension_numbers: which leaves are matrices, and which of their axes inputs and
        outputs (`low_rank`); by default every leaf of two axes but norms and biases.
      learning_rate, weight_decay, mask: as in `galore`.

    Raises:
      ValueError: a `momentum` that is no regular expression; and as `full_matrices`
        does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "head": jnp.ones((16, 99))}
      >>> tx = lro.recipes.scale_sgd(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    stages = optax.chain(trace_matching(momentum, b1), normalize_by_output_rms())
    return whole_optimizer(
        with_rest(stages, rest),
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        dimension_numbers=dimension_numbers,
    )


def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    step_size: float | jax.Array | None = 10.0,
    scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.01,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: a tracked subspace, rotated moments, the residual given back.

    At a refresh S follows the gradient of the estimation error along a rank-one
    geodesic, and Adam's moments turn with it; every step gives the residual back,
    rescaled (SubTrack++, as the GrassWalk paper compares with it, sections 2 and 5;
    equations in `grassmann_track`, `rotate_moments`, `recover_residual`). State of a
    matrix: mr + 2nr + 1 numbers; two products a step.

    When to choose it: where the gradient's subspace turns slowly and is worth following
    with a cheap refresh. When not: for a basis that explores; then `grass_walk`.

    Deviations: every matrix is tracked (the released code tracks only those with fewer
    rows than columns); the moments turn by eqs. 7 and 8 at the refresh itself (the
    released code multiplies V by 1 - b2 at every interval, and M by S_t^T S_0); bias
    correction, eps and the residual are the paper's (released: as `fira`'s published
    variant).

    Args:
      step_size: eta of `grassmann_track`; None chooses the angle by a line search.
      learning_rate, rank, refresh_every, scale, limit, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.subtrack(0.002, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    step = rotate_moments(optax.scale_by_adam(b1, b2, eps))
    back = recover_residual(limit, scale=scale)
    return low_rank_optimizer(
        optax.chain(grassmann_track(step_size), project(), step, back),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    refresh_every: int = 200,
    basis: optax.GradientTransformation | None = None,
    method: Polar = "eigh",
    scale: float | jax.Array = 1.0,
    residual_scale: float | jax.Array = 1.0,
    limit: float | jax.Array = 1.1,
    b1: float | jax.Array = 0.95,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = TRANSFORMER_MATRICES,
    square: Square = "input",
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SUMO: momentum in the subspace, orthogonalised, and the rest of the gradient.

        M <- S_t^T S_{t-1} M   at a refresh
        M <- b1 M + S_t^T G_t,   O = (M M^T)^(-1/2) M, its norm limited
        W <- W - lr scale sqrt(max(m, n)) (S O + residual_scale (G - S S^T G))

    (Refael et al. 2025, "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating
    Memory-Efficient LLM Training", Algorithm 1 and section 3.2; equations in
    `scale_by_polar_factor`, `clip_step_growth`, `scale_by_shape`.) State of a matrix:
    mr + nr + 1 numbers; three products a step, and two r x r eigendecompositions.

    When to choose it: Muon's step at half of GaLore's moments, with small ranks. When
    not: at large ranks, whose eigendecompositions every step pays for
    (`method="newton_schulz"` does not, and is inexact where the moment is ill
    conditioned, as it is here); on micro-batches summed in the subspace, for it needs
    the gradient.

    What is ours where the paper leaves it open: Algorithm 1 takes m >= n and projects
    the m rows; here, as everywhere, the smaller side. The factor sqrt(max(m, n)) is in
    the text and not in Algorithm 1; it is on the whole step. No value of its decay is
    given: 0.95 is Muon's. The limiter, optional there, bites only while M's rank grows,
    for ||O|| is sqrt(r) otherwise. Its bases are of a randomized SVD or an SVD: here of
    an SVD, else `basis=dominant_svd(decomposition="randomized", key=key)`. Leaves of
    full rank take Adam's step: so embedding, norms and head do by default.

    Args:
      basis: the basis rule, of orthonormal bases; `dominant_svd()` by default.
      method: of the polar factor, "eigh", "svd" or "newton_schulz"
        (`scale_by_polar_factor`).
      scale: on the matrices' step, besides sqrt(max(m, n)).
      residual_scale: on the part of the gradient outside of the subspace besides.
      limit: the largest growth of the step's norm from step to step; the paper's 1.1.
      b1: decay rate of M, mu in the paper.
      rest: the step for leaves of full rank; `optax.scale_by_adam()` by default.
      learning_rate, rank, refresh_every, weight_decay, mask, dimension_numbers,
        square, precision: as in `galore`.

    Raises:
      ValueError: another method; a basis that is not orthonormal; and as `low_rank`
        does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.sumo(0.002, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    stages = optax.chain(
        basis_or(basis, dominant_svd),
        project(),
        rotate_moments(optax.chain(optax.trace(b1), scale_by_polar_factor(method))),
        clip_step_growth(limit),
        sign_residual(residual_scale, step="sgd"),
        scale_by_shape(scale),
    )
    return low_rank_optimizer(
        with_rest(stages, rest),
        learning_rate,
        rank=rank,
        refresh_every=refresh_every,
        dimension_numbers=dimension_numbers,
        square=square,
        precision=precision,
        weight_decay=weight_decay,
        mask=mask,
    )


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
      >>> tx = lro.recipes.galore_adafactor(0.01, rank=4, refresh_every=200)
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
      >>> tx = lro.recipes.galore_adam_mini(0.01, rank=4, refresh_every=200)
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
    leaves' moments are stored so too. State of a matrix: 4mr + 2nr (1 + 4 / b) bytes,
    in blocks of b = block_size / 2 to block_size numbers; two products a step.

    When to choose it: most of what is left of the moments is saved, at little cost.
    When not: while you compare methods: it rounds.

    Deviation: the released code rounds the low-rank update to the weight's dtype, and
    stores moments by bitsandbytes' kernels.

    Args:
      block_size: numbers that share a scale.
      min_size: arrays with fewer numbers stay as they are.
      learning_rate, rank, refresh_every, basis, scale, b1, b2, eps, weight_decay, mask,
        dimension_numbers, square, precision: as in `galore`.

    Raises:
      ValueError: as `low_rank` does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "norm": jnp.ones(16)}
      >>> tx = lro.recipes.galore_adam8bit(0.01, rank=4, refresh_every=200)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    inner = quantize_moments(
        optax.scale_by_adam(b1, b2, eps),
        block_size=block_size,
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
