"""SCALE, column-normalised SGD with momentum on the head: no subspace."""

import jax
import optax

from lowrank_optax.core.layout import TRANSFORMER_MATRICES, DimensionNumbers, Rules
from lowrank_optax.core.typing import Mask
from lowrank_optax.full_rank.normalize import momentum_of, normalize_outputs
from lowrank_optax.optimizers.assemble import whole_optimizer
from lowrank_optax.steps.rest import with_rest

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
    Optimizer Design for LLM Pretraining"; equations in `normalize_outputs` and
    `momentum_of`). It has no subspace, and no rank. State of a matrix: none; of the
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
      ValueError: a `momentum` that is no regular expression; and as `whole_matrices`
        does.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"mlp": {"kernel": jnp.ones((16, 64))}, "head": jnp.ones((16, 99))}
      >>> tx = lro.scale_sgd(1e-3)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    stages = optax.chain(momentum_of(momentum, b1), normalize_outputs())
    return whole_optimizer(
        with_rest(stages, rest),
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        dimension_numbers=dimension_numbers,
    )
