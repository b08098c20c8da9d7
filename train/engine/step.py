"""One training step and one evaluation step: pure functions, to be jitted.

A batch is {"tokens": int (B, T)} and may have "weights": float (B, T), the weight of
each token as a prediction's target; the first token of a window is never one. Where
examples share a window it has "segment_ids" and "positions": int (B, T), as
`models.forward` takes them; then the first token of each example has weight 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import lowrank_optax as lro
from lowrank_optax.core.trees import squared_norm
from models import LlamaConfig, Params
from models.cross_entropy import head_cross_entropy
from models.params import draw_params, embed, finish, run_layer
from train.config.sizes import large_layers
from train.engine.layer_metrics import layer_metrics
from train.engine.optimizer import Optimizer, Parts, Tree, joined, parted
from train.engine.weight_sharding import Shards, look_up, shard_rows, sharded_weights

Batch = dict[str, jax.Array]
LossSums = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]

LOGIT_TOKENS = 2048
"""How many tokens' logits there are at a time on a device."""


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: () int32, steps done, skipped ones included.
      params: the model's weights, as stored.
      opt_state: the optimizer's state, in `Parts`.
      until_refresh: () int32, steps until all bases are due; 0: at the next.
      skipped: () int32, steps at which a gradient was not finite; layer by layer, that
        of any layer or of the rest.
      skipped_in_a_row: () int32, how many of the last steps were skipped.
    """

    step: jax.Array
    params: Params
    opt_state: Tree
    until_refresh: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Work(NamedTuple):
    """The static parts of a step.

    Attributes:
      model: the model's configuration.
      optimizer: the optimizer.
      key: decides how weights of few bits are rounded.
      weight_dtype: how weights are stored.
      microbatches: parts of a batch that go through the model one after the other.
      layerwise: whether each layer is updated when the backward pass has its gradient.
    """

    model: LlamaConfig
    optimizer: Optimizer
    key: jax.Array
    weight_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    microbatches: int = 1
    layerwise: bool = False

    @property
    def shards(self) -> Shards:
        """How the weights are sharded."""
        return Shards(self.optimizer.square, self.model.compute_dtype)


def init_weights(work: Work, key: jax.Array) -> Params:
    """The weights before the first step, as stored."""
    return draw_params(work.model, key, partial(store_weights, work))


def store_weights(work: Work, params: Params) -> Params:
    """Stores weights, which may be stored in another way, as this work does."""
    weights = work.shards.shard(lro.weights.dense(params))
    return lro.weights.store(weights, work.weight_dtype)


def init_state(work: Work, params: Params) -> TrainState:
    """The state before the first step; runs under jit and eval_shape."""
    # Arrays of their own: one in several places could not be donated.
    step, until, skipped, in_a_row = (jnp.zeros([], jnp.int32) for _ in range(4))
    opt_state = work.optimizer.tx.init(dense(work, params))
    return TrainState(step, params, opt_state, until, skipped, in_a_row)


def dense(work: Work, params: Params) -> Params:
    """The weights as the model takes them."""
    return lro.weights.dense(params, work.model.compute_dtype)


def targets_of(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The token to predict at each position, and its weight."""
    tokens = batch["tokens"]
    weights = batch.get("weights", jnp.ones(tokens.shape, jnp.float32))
    # Rolled in, and the last position gets weight 0: slicing it off would cut a batch
    # into odd lengths.
    targets, weights = (jnp.roll(x, -1, axis=1) for x in (tokens, weights))
    return targets, weights.at[:, -1].set(0.0)


def inputs_of(work: Work, batch: Batch) -> jax.Array:
    """The tokens that the model reads, padding outside of its vocabulary as token 0."""
    tokens = batch["tokens"]
    if "weights" not in batch:
        return tokens
    outside = (tokens < 0) | (tokens >= work.model.vocab_size)
    return jnp.where(outside & (batch["weights"] == 0), 0, tokens)


def places_of(batch: Batch) -> dict[str, jax.Array]:
    """The example and the position of each token; none if a row is one text."""
    return {x: batch[x] for x in ("segment_ids", "positions") if x in batch}


def embedded(work: Work, rest: Params, batch: Batch) -> jax.Array:
    """The input of the first layer, (B, T, D)."""
    weights = work.shards.gather({"embed": rest["embed"]})
    embedding = weights["embed"]["embedding"]
    tokens = inputs_of(work, batch)
    return look_up(partial(embed, work.model, weights), embedding, tokens)


def through_layer(
    work: Work, layer: Params, x: jax.Array, places: dict[str, jax.Array]
) -> jax.Array:
    """Applies one layer, whose weights are gathered while it is computed."""
    gather = work.shards.gather if sharded_weights() else None
    return shard_rows(run_layer(work.model, layer, x, gather, **places))


def head_loss(work: Work, rest: Params, x: jax.Array, batch: Batch) -> jax.Array:
    """The weighted sum of the cross-entropy, in nats, from the head's input."""
    tied = work.model.tie_embeddings
    kernel = rest["embed"]["embedding"].T if tied else rest["head"]["kernel"]
    spread = work.shards.spread(kernel, tied)
    return head_cross_entropy(
        shard_rows(x),
        kernel,
        *targets_of(batch),
        compute_dtype=work.model.compute_dtype,
        block_tokens=LOGIT_TOKENS * spread.groups,
        spread=spread,
    )


def loss_sums(work: Work, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums of the weighted next-token cross-entropy, in nats, and of the weights.

    Two sums, so that a mean over several batches is exact: add up both, divide once.
    `params` are as stored, or as the model takes them.
    """

    def body(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return through_layer(work, dense(work, layer), x, places), None

    places = places_of(batch)
    rest = dense(work, parted(params).rest)
    x = embedded(work, rest, batch)
    x, _ = jax.lax.scan(body, x, params["layers"])
    loss = head_loss(work, rest, finish(work.model, rest, x), batch)
    return loss, jnp.sum(targets_of(batch)[1])


def mean_gradient(
    loss_sums: LossSums, params: Params, batch: Batch, microbatches: int
) -> tuple[jax.Array, Params]:
    """Token-weighted mean loss and its gradient, over microbatches in turn.

    Every part's loss is divided by the weight of all tokens, so that the sum over parts
    does not depend on which tokens each has. (Dividing the gradient afterwards would
    read and write it once more.)
    """
    weight = jnp.sum(targets_of(batch)[1])
    mean = jax.value_and_grad(lambda params, part: loss_sums(params, part)[0] / weight)
    if microbatches == 1:
        return mean(params, batch)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, mean(params, part)), None

    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(mean, params, batch)
    )
    parts = jax.tree.map(partial(_split, microbatches), batch)
    return jax.lax.scan(add, zero, parts)[0]


def _split(parts: int, x: jax.Array) -> jax.Array:
    """(B, T) -> (parts, B / parts, T); each part has rows of every device."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


class Taken(NamedTuple):
    """Loss, new weights and state, and squared gradient norm of a step."""

    loss: jax.Array
    params: Params
    opt_state: Tree
    squared: jax.Array


def train_step(
    work: Work, state: TrainState, batch: Batch, *, refresh: bool
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step; bind `work`, jit with `refresh` static, donate the state.

    A step whose gradient is not finite changes nothing but the counts. `refresh` says
    whether all bases are chosen anew; staggered refreshes are part of all other steps.
    Returns the new state, and the metrics.
    """
    by_layer = work.layerwise and work.microbatches == 1
    take = layerwise_step if by_layer else full_step
    key = jax.random.fold_in(work.key, state.step)
    taken = take(work, key, state, batch, refresh)
    optimizer = work.optimizer
    skipped = optimizer.skipped(taken.opt_state) > optimizer.skipped(state.opt_state)
    # A refresh that was skipped is due again at once.
    until = state.until_refresh - 1
    if refresh:
        until = jnp.where(skipped, 0, (optimizer.refresh_every or 1) - 1)
    new_state = TrainState(
        step=state.step + 1,
        params=taken.params,
        opt_state=taken.opt_state,
        until_refresh=until,
        skipped=state.skipped + skipped,
        skipped_in_a_row=skipped * (state.skipped_in_a_row + 1),
    )
    metrics = {
        "loss": taken.loss,
        "grad_norm": jnp.sqrt(taken.squared),
        "learning_rate": optimizer.learning_rate(state.opt_state),
        "refreshes": optimizer.refreshes(taken.opt_state),
        "skipped": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
        **layer_metrics(taken.opt_state),
    }
    return new_state, metrics


def full_step(
    work: Work, key: jax.Array, state: TrainState, batch: Batch, refresh: bool
) -> Taken:
    """Computes all gradients, then all updates, and applies all or none.

    With `layerwise` and microbatches only S^T G is summed over them, and norms are
    those of S^T G.
    """
    if work.layerwise:
        state, loss, gradient, bases = projected_gradient(work, state, batch, refresh)
    else:
        params = dense(work, state.params)
        sums = partial(loss_sums, work)
        loss, gradient = mean_gradient(sums, params, batch, work.microbatches)
        gradient, bases = work.shards.shard(gradient), None
    gradient, accept, squared = work.optimizer.checked(gradient)
    method, old, steps = work.optimizer.method, parted(state.params), parted(gradient)
    of_layers = steps.layers
    if bases is not None:
        of_layers = lro.training.Projected(of_layers, bases)
    layers, layers_state = lro.training.update_layers(
        method,
        of_layers,
        state.opt_state.layers,
        old.layers,
        block=work.shards.parts() if large_layers(work.model) else None,
        load=partial(dense, work),
        apply_updates=added,
        operands=(key,),
        refresh=refresh,
        accept=accept,
    )
    updates, rest_state = method.update(
        steps.rest,
        state.opt_state.rest,
        dense(work, old.rest),
        refresh=refresh,
        accept=accept,
    )
    rest = added(old.rest, updates, None, key)
    return Taken(
        loss, joined(Parts(layers, rest)), Parts(layers_state, rest_state), squared
    )


def projected_gradient(
    work: Work, state: TrainState, batch: Batch, refresh: bool
) -> tuple[TrainState, jax.Array, Params, dict[str, jax.Array]]:
    """The state, the mean loss, S^T G of the whole batch, and the bases S chosen.

    The backward pass projects each layer's gradient when it has it.
    """
    method, old = work.optimizer.method, parted(state.params)
    load, weight = partial(dense, work), jnp.sum(targets_of(batch)[1])
    layers = lro.training.LayerSums.open(
        method, old.layers, state.opt_state.layers, load=load, refresh=refresh
    )
    rest = dense(work, old.rest)

    def add(carry: Any, part: Batch, *, first: bool) -> tuple[Any, None]:
        layer = lro.training.sum_in_backward(
            lambda weights, x, at: through_layer(work, weights["layers"], x, at),
            method,
            load=load,
            refresh=refresh,
            first=first,
        )

        def loss(rest: Params) -> jax.Array:
            return loss_through(work, layer, layers, rest, part) / weight

        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(rest)), None

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, rest)
    parts = jax.tree.map(partial(_split, work.microbatches), batch)
    # At a refresh the first chooses the bases; otherwise one program does for all.
    start = int(refresh)
    if refresh:
        zeros, _ = add(zeros, jax.tree.map(lambda x: x[0], parts), first=True)
    (loss, of_rest), _ = jax.lax.scan(
        partial(add, first=False), zeros, jax.tree.map(lambda x: x[start:], parts)
    )
    params, own, sums = layers.close()
    state = state._replace(
        params=joined(Parts(params, old.rest)),
        opt_state=Parts(own, state.opt_state.rest),
    )
    return state, loss, joined(Parts(sums.low, of_rest)), sums.bases


def loss_through(
    work: Work,
    layer: Callable[..., jax.Array],
    layers: Any,
    rest: Params,
    batch: Batch,
) -> jax.Array:
    """The weighted sum of the cross-entropy, through layers that are references."""

    def body(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return layer(index, layers, x, places), None

    places = places_of(batch)
    x = embedded(work, rest, batch)
    x, _ = jax.lax.scan(body, x, jnp.arange(work.model.num_layers))
    return head_loss(work, rest, finish(work.model, rest, x), batch)


def layerwise_step(
    work: Work, key: jax.Array, state: TrainState, batch: Batch, refresh: bool
) -> Taken:
    """The backward pass updates each layer; the rest is updated afterwards.

    Each layer is clipped by its own norm, the rest by its own. A layer, or the rest,
    whose gradient is not finite is skipped by itself.
    """
    old, method = parted(state.params), work.optimizer.checked_method
    layers = lro.training.Layers.open(old.layers, state.opt_state.layers, key)
    layer = lro.training.update_in_backward(
        lambda weights, x, at: through_layer(work, weights["layers"], x, at),
        method,
        load=partial(dense, work),
        apply_updates=added,
        refresh=refresh,
    )

    def mean_loss(rest: Params) -> jax.Array:
        total = loss_through(work, layer, layers, rest, batch)
        return total / jnp.sum(targets_of(batch)[1])

    rest = dense(work, old.rest)
    loss, gradient = jax.value_and_grad(mean_loss)(rest)
    updates, rest_state = method.update(
        gradient, state.opt_state.rest, rest, refresh=refresh
    )
    done = layers.close()
    squared = jnp.sum(done.squares) + squared_norm(gradient)
    new = Parts(done.params, added(old.rest, updates, None, key))
    return Taken(loss, joined(new), Parts(done.state, rest_state), squared)


def added(
    params: Params, updates: Tree, layer: jax.Array | None, key: jax.Array
) -> Params:
    """Adds updates to the weights; each layer rounds with its own key."""
    if layer is not None:
        key = jax.random.fold_in(key, layer)
    return lro.weights.add_updates(params, updates, key)
