"""Step: Adam-mini, one second moment per block of numbers."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.aliases import Number
from lowrank_optax.core.moments import register_moments
from lowrank_optax.core.paths import map_with_paths
from lowrank_optax.core.rules import Rules, match
from lowrank_optax.core.sharding import shard_along, spec_of
from lowrank_optax.core.stage import simple_stage
from lowrank_optax.core.trees import frames_of

Blocks = Callable[[str, tuple[int, ...]], tuple[int, ...]]
Heads = Rules  # (regular expression, head_dim) pairs

ADAM_MINI_RULES: Rules = (
    (r"(?i)bias", "element"),
    (r"(?i)scale|norm|(^|/)ln_", "row"),
    (r"(?i)embed|(^|/)w[tp]e(/|$)", "row"),
)
"""Plain Adam for biases; one second moment per norm vector and per token."""


class AdamMiniState(NamedTuple):
    """State of `scale_by_adam_mini`.

    Attributes:
      count: () int32, the number of steps.
      mu: M, like the updates.
      nu: v, one number per block: each axis has the update's size divided by the
        block's.
    """

    count: jax.Array
    mu: optax.Params
    nu: optax.Params


def scale_by_adam_mini(
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    *,
    blocks: Blocks | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales by Adam with one second moment per block b of an array (Adam-mini).

        M <- b1 M + (1 - b1) G,   v_b <- b2 v_b + (1 - b2) mean over b of G^2
        M^ / (sqrt(v^_b) + eps),   M^ = M / (1 - b1^t),   v^ = v / (1 - b2^t)

    (Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More",
    Algorithm 1.) Blocks of one number are `optax.scale_by_adam`. Inside `in_subspace`
    the default blocks are the columns of a projected matrix (*batch, r, n): its state
    is rn + n numbers instead of 2rn. Inside `rotate_moments` M is rotated and v is not.

    Args:
      b1: decay rate of M.
      b2: decay rate of v; the paper uses 0.95 for language models.
      eps: added to sqrt(v).
      blocks: maps a leaf's path ("layers/mlp/up/kernel") and its shape inside this
        transformation to the shape of a block, whose axes divide the leaf's; called at
        init. `adam_mini_blocks()` by default.

    Raises:
      ValueError: at init, for blocks that do not divide an array.

    Example:
      >>> state = lro.steps.scale_by_adam_mini().init({"kernel": jnp.ones((3, 8, 16))})
      >>> optax.tree.get(state, "nu")["kernel"].shape
      (3, 1, 16)
    """
    blocks = adam_mini_blocks() if blocks is None else blocks

    def init(params: optax.Params) -> AdamMiniState:
        def second(path: str, x: jax.Array) -> jax.Array:
            counts = _counts(blocks, path, tuple(x.shape))
            return shard_along(jnp.zeros(counts, x.dtype), spec_of(x), of=x)

        return AdamMiniState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=map_with_paths(second, params),
        )

    def update(
        updates: optax.Updates, state: AdamMiniState
    ) -> tuple[optax.Updates, AdamMiniState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)

        def second(g: jax.Array, v: jax.Array) -> jax.Array:
            mean = jnp.mean(jnp.square(_split(g, v.shape)), axis=_within(v))
            return ((1 - b2) * mean + b2 * v).astype(v.dtype)

        def step(m: jax.Array, v: jax.Array) -> jax.Array:
            root = jnp.sqrt(jnp.expand_dims(v, _within(v)))
            return (_split(m, v.shape) / (root + eps)).reshape(m.shape)

        nu = jax.tree.map(second, updates, state.nu)
        steps = jax.tree.map(
            step,
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return steps, AdamMiniState(count, mu, nu)

    return simple_stage(init, update)


def _counts(blocks: Blocks, path: str, shape: tuple[int, ...]) -> list[int]:
    """The number of blocks along each axis of a leaf."""
    block = tuple(blocks(path, shape))
    if len(block) != len(shape) or any(
        b < 1 or d % b for d, b in zip(shape, block, strict=True)
    ):
        raise ValueError(
            f"{path}: blocks of shape {block} do not divide the shape {shape}; "
            "return one divisor for each axis from `blocks`"
        )
    return [d // b for d, b in zip(shape, block, strict=True)]


def _split(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Splits each axis of size d with k blocks into two, (k, d / k)."""
    if not x.size:  # k may be 0, and d / k undefined
        return x.reshape([s for d in x.shape for s in (d, 1)])
    return x.reshape(
        [s for d, k in zip(x.shape, counts, strict=True) for s in (k, d // k)]
    )


def _within(v: jax.Array) -> tuple[int, ...]:
    """The axes inside a block after `_split`."""
    return tuple(range(1, 2 * v.ndim, 2))


# No second moment to rotate: v of a full column is |S^T g|^2 / r, which is the same in
# every orthonormal basis of the subspace. For smaller blocks, and for a new subspace, v
# is the estimate of the last period.
register_moments(AdamMiniState, first="mu")


def adam_mini_blocks(heads: Heads = (), *, rules: Rules = ADAM_MINI_RULES) -> Blocks:
    """Chooses Adam-mini's blocks by a leaf's path.

    The value of a rule is "element", one v per number, as in Adam; "row", one v per
    vector along the last axis; "column", one v per index of the last axis, over the
    axis before it; or an int h, one v per h consecutive columns, an attention head of
    size h. Axes before these are batch axes. The first rule that matches decides, and
    `rules` come before `heads`. Without a match, a vector is a "row" and any other leaf
    a "column".

    Deviation: the paper (Partition III) does not say how blocks combine with a
    projection. Here its "one v per output" becomes one v per column of a projected
    matrix (*batch, r, n), also where the columns are the weight's inputs. A projected
    embedding needs the rule "column", since a leaf's shape does not show whether it was
    projected.

    Args:
      heads: pairs (regular expression, h), for queries and keys.
      rules: pairs (regular expression, value).

    Returns:
      A function from (path, shape) to the shape of a block, for `scale_by_adam_mini`.

    Raises:
      ValueError: any other value.

    Example:
      >>> blocks = lro.steps.adam_mini_blocks(heads=[(r"attn/[qk]/", 64)])
      >>> blocks("layers/attn/q/kernel", (12, 128, 768))
      (1, 128, 64)
      >>> blocks("layers/mlp/up/kernel", (12, 128, 2048))
      (1, 128, 1)
      >>> blocks("embed/embedding", (32000, 768))
      (1, 768)
    """
    _check_heads(heads)
    for pattern, kind in (*rules, *heads):
        if kind not in ("element", "row", "column") and not _is_size(kind):
            raise ValueError(
                f'{pattern!r}: {kind!r} is not "element", "row", "column" or the size '
                "of a head, an int of at least 1"
            )

    def blocks(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        default = "row" if len(shape) == 1 else "column"
        kind = match((*rules, *heads, ("", default)), path, "adam_mini_blocks")
        if kind == "element" or not shape or not math.prod(shape):
            return (1,) * len(shape)
        if kind == "row":
            return (*(1,) * (len(shape) - 1), shape[-1])
        width = kind if _is_size(kind) else 1
        return (*(1,) * (len(shape) - 2), *shape[-2:-1], width)

    return blocks


def check_heads(heads: Heads) -> optax.GradientTransformationExtraArgs:
    """Checks at init that no projection mixes attention heads; changes no step.

    A head is h consecutive outputs. If the outputs are the weight's larger side, they
    remain columns of the projected (r, n). Otherwise the projection mixes them. The
    stage stands anywhere in the chain inside `low_rank`.

    Args:
      heads: pairs (regular expression, h), as in `adam_mini_blocks`.

    Raises:
      ValueError: at init, for a matching matrix whose columns are the inputs, or whose
        number of columns is not a multiple of h.

    Example:
      >>> heads = [("attn/[qk]", 4)]
      >>> step = lro.steps.scale_by_adam_mini(blocks=lro.steps.adam_mini_blocks(heads))
      >>> tx = lro.low_rank(optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.steps.check_heads(heads), lro.in_subspace(step), lro.project_back()),
      ...     rank=2, refresh_every=200)
      >>> state = tx.init({"attn": {"q": jnp.ones((8, 8))}})
      >>> optax.tree.get(state, "nu")["attn"]["q"].shape
      (1, 2)
    """

    _check_heads(heads)

    def init(params: optax.Params) -> optax.OptState:
        for frame in frames_of(params):
            head = match((*heads, ("", None)), frame.path, "heads")
            n = frame.low_shape[-1]
            if head is not None and frame.columns == "input":
                raise ValueError(
                    f"{frame.path}: the columns are the {n} inputs, because the "
                    "outputs, which form the heads, are the smaller side and are "
                    "projected; leave this path out of `heads`"
                )
            if head is not None and n % head:
                raise ValueError(
                    f"{frame.path}: {n} columns are not a multiple of the head size "
                    f"{head}; change it in `heads`"
                )
        return optax.EmptyState()

    return simple_stage(init, lambda frames, state: (frames, state))


def _check_heads(heads: Heads) -> None:
    if isinstance(heads, str) or not isinstance(heads, Sequence):
        raise ValueError(
            f"heads={heads!r}: pass pairs (regular expression, size of a head), such "
            'as [("attn/[qk]/", 64)]'
        )


def _is_size(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0
