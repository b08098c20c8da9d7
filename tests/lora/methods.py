"""LoRA, and the trainer's own methods, as programs that one loop can run."""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from models import Params, bind
from models.cross_entropy import head_cross_entropy
from tests.lora.adapters import adapt
from tests.lora.rate import scaled_by_rate, unit_rate, with_rate
from train.config.config import Config
from train.engine.memory import StepMemory
from train.engine.mesh import by_row, like_batch, on_mesh, replicated, to_devices
from train.engine.step import (
    LOGIT_TOKENS,
    Batch,
    Work,
    inputs_of,
    mean_gradient,
    places_of,
    store_weights,
    targets_of,
)
from train.run.first_state import initial
from train.run.loop import Program, build_program, kinds_of_steps, work_of


class Method(NamedTuple):
    """A way to fine-tune, compiled once for all rates and seeds.

    Attributes:
      program: its step, its loss and its memory.
      start: (seed, rate) to the state before the first step.
      weights: what `program.loss_sums` takes, of a state.
      trained: how many numbers it trains.
    """

    program: Program
    start: Callable[[int, float], Any]
    weights: Callable[[Any], Any]
    trained: int

    @property
    def peak(self) -> int:
        """The most that a step of either kind needs, in bytes."""
        return max(memory.peak or 0 for memory in self.program.memory.values())


class LoraState(NamedTuple):
    """Adapters and their optimizer's state, which change, and all other weights."""

    lora: Any
    opt_state: Any
    frozen: Any


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def of_trainer(run: Config, mesh: Mesh, weights: Params) -> Method:
    """A method of the trainer, by the engine that `python -m train` has.

    Args:
      run: a resolved run of it; its rate and its seed are not read.
      mesh: of one device.
      weights: to begin with, on the host.
    """

    def work(seed: int) -> Work:
        made = work_of(unit_rate(run), jax.random.key(seed))
        return made._replace(optimizer=scaled_by_rate(made.optimizer))

    def given(shardings: Callable[[Any], Any]) -> Params:
        return on_mesh(shardings(weights), weights)

    @cache
    def make(seed: int) -> Callable[[jax.Array], Any]:
        return initial(work(seed), mesh, given)[0]

    def start(seed: int, rate: float) -> Any:
        return with_rate(make(seed)(jax.random.key(seed)), rate)

    own = work(0)
    like = initial(own, mesh, given)[1]
    program = build_program(run, mesh, own, like, kinds_of_steps(own.optimizer))
    return Method(program, start, lambda state: state.params, count(weights))


def of_lora(
    run: Config, mesh: Mesh, weights: Params, rank: int, alpha: float
) -> Method:
    """LoRA, with the trainer's loss, schedule and clipping.

    Args:
      run: a resolved run with AdamW, of which the adapters get the same options.
      mesh: of one device.
      weights: to begin with, on the host; they are stored as the run stores weights.
      rank: of the adapters.
      alpha: the adapters' outputs are multiplied by alpha / rank.
    """
    work = work_of(unit_rate(run), jax.random.key(0))
    work = work._replace(optimizer=scaled_by_rate(work.optimizer))
    tx = optax.chain(work.optimizer.clip, work.optimizer.method)
    everywhere = replicated(mesh)

    def adapted(weights: Params, key: jax.Array) -> Any:
        model = adapt(bind(work.model, store_weights(work, weights)), rank, alpha, key)
        return nnx.split(model, nnx.LoRAParam, ...)

    def begin(weights: Params, key: jax.Array) -> LoraState:
        _, lora, frozen = adapted(weights, key)
        return LoraState(lora, tx.init(lora), frozen)

    model = nnx.eval_shape(lambda: nnx.merge(*adapted(weights, jax.random.key(0))))
    graph = nnx.split(model, nnx.LoRAParam, ...)[0]

    def sums(lora: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, lora, frozen)
        tied = work.model.tie_embeddings
        loss = head_cross_entropy(
            model.hidden(inputs_of(work, batch), **places_of(batch)),
            model.embed.embedding[...].T if tied else model.head.kernel[...],
            *targets_of(batch),
            compute_dtype=work.model.compute_dtype,
            block_tokens=LOGIT_TOKENS,
        )
        return loss, jnp.sum(targets_of(batch)[1])

    def take(
        lora: Any, opt_state: Any, frozen: Any, batch: Batch
    ) -> tuple[Any, Any, jax.Array]:
        def of_lora(lora: Any, part: Batch) -> tuple[jax.Array, jax.Array]:
            return sums(lora, frozen, part)

        loss, gradient = mean_gradient(of_lora, lora, batch, 1)
        updates, opt_state = tx.update(gradient, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    began = time.perf_counter()
    jitted_begin = jax.jit(begin, out_shardings=everywhere)
    like = jax.eval_shape(begin, weights, jax.random.key(0))
    jitted = jax.jit(
        take,
        in_shardings=(everywhere, everywhere, everywhere, by_row(mesh)),
        out_shardings=everywhere,
        donate_argnums=(0, 1),
    )
    compiled = jitted.lower(*like, like_batch(run)).compile()
    memory: Any = compiled.memory_analysis()

    def step(state: LoraState, batch: Batch, refresh: bool) -> tuple[LoraState, Any]:
        lora, opt_state, loss = compiled(*state, batch)
        return LoraState(lora, opt_state, state.frozen), {"loss": loss}

    def start(seed: int, rate: float) -> LoraState:
        state = jitted_begin(weights, jax.random.key(seed))
        return state._replace(opt_state=with_rate(state.opt_state, rate))

    temporaries = memory.temp_size_in_bytes
    lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes
    program = Program(
        step=step,
        loss_sums=jax.jit(lambda state, batch: sums(state.lora, state.frozen, batch)),
        put=partial(to_devices, mesh),
        refresh_every=None,
        compile_s=time.perf_counter() - began,
        memory={
            False: StepMemory(
                weights=bytes_of((like.lora, like.frozen)),
                state=bytes_of(like.opt_state),
                gradients=bytes_of(like.lora),
                temporaries=temporaries,
                peak=lasting - memory.alias_size_in_bytes + temporaries,
            )
        },
    )
    return Method(program, start, lambda state: state, count(like.lora))
