"""One training step and one evaluation step: pure functions, to be jitted.

A batch is {"tokens": int (B, T)} and may have "weights": float (B, T), the weight of
each token as a prediction's target; the first token of a window is never one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models import LlamaConfig, Params, forward, init_params
from train.optimizer import Optimizer

Batch = dict[str, jax.Array]
LossSums = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: () int32, steps done, skipped ones included.
      params: the model's weights.
      opt_state: the optimizer's state.
      skipped_in_a_row: () int32, steps refused since the last one that was not.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    skipped_in_a_row: jax.Array


def init_state(
    model: LlamaConfig, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step; runs under jit and eval_shape."""
    params = init_params(model, key)
    zero = jnp.zeros([], jnp.int32)
    return TrainState(zero, params, tx.init(params), zero)


def loss_sums(
    model: LlamaConfig, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the next-token cross-entropy, in nats, and of the weights.

    Kept apart, so that a mean over several batches is exact: add up both, divide once.
    """
    tokens = batch["tokens"]
    weights = batch.get("weights", jnp.ones(tokens.shape, jnp.float32))
    # Targets are rolled in, and the last position gets weight 0, because slicing it
    # off would copy the logits, the largest array there is.
    targets, weights = (jnp.roll(x, -1, axis=1) for x in (tokens, weights))
    weights = weights.at[:, -1].set(0.0)
    logits = forward(model, params, tokens)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * weights), jnp.sum(weights)


def mean_gradient(
    loss_sums: LossSums, params: Params, batch: Batch, microbatches: int
) -> tuple[jax.Array, Params]:
    """Token-weighted mean loss and its gradient, over microbatches in turn.

    Sums of losses, weights and gradients are added up over the microbatches and
    divided once, so the result does not depend on how the tokens fall into them.
    """
    sums = jax.value_and_grad(loss_sums, has_aux=True)
    if microbatches == 1:
        (total, weight), gradient = sums(params, batch)
    else:

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, sums(params, part)), None

        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(sums, params, batch),
        )
        parts = jax.tree.map(partial(_split, microbatches), batch)
        ((total, weight), gradient), _ = jax.lax.scan(add, zero, parts)
    return total / weight, jax.tree.map(lambda g: g / weight, gradient)


def _split(parts: int, x: jax.Array) -> jax.Array:
    """(B, T) -> (parts, B / parts, T); each part has rows of every device's share."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def train_step(
    loss_sums: LossSums,
    optimizer: Optimizer,
    microbatches: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; bind the first three arguments, jit, and donate the state.

    A step whose gradient is not finite changes nothing but the counts.
    """
    loss, gradient = mean_gradient(loss_sums, state.params, batch, microbatches)
    updates, opt_state = optimizer.tx.update(gradient, state.opt_state, state.params)
    skipped = optimizer.skipped(opt_state)
    skipped_now = skipped - optimizer.skipped(state.opt_state)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        skipped_in_a_row=skipped_now * (state.skipped_in_a_row + 1),
    )
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradient),
        "update_norm": optax.tree.norm(updates),
        "learning_rate": optimizer.learning_rate(state.opt_state),
        "refreshes": optimizer.refreshes(opt_state),
        "skipped": skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }
    return new_state, metrics
