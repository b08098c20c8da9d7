"""Step: Adam-mini, one second moment for a block of numbers."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.core.layout import Rules, match, path_of
from lowrank_optax.core.moments import register_moments
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
"""Adam itself for biases, one second moment for a norm and for a token."""


class AdamMiniState(NamedTuple):
    """State of `scale_by_adam_mini`.

    Attributes:
      count: () int32, the steps done.
      mu: M, like the updates.
      nu: V, one number per block: an update's shape divided by its block's, axis by
        axis.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam_mini(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    *,
    blocks: Blocks | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with one second moment per block b of an array (Adam-mini).

        M <- b1 M + (1 - b1) G,   v_b <- b2 v_b + (1 - b2) mean over b of G^2
        M^ / (sqrt(v^_b) + eps),   M^ = M / (1 - b1^t),   v^ = v / (1 - b2^t)

    (Zhang et al. 2024, "Adam-mini: Use Fewer Learning Rates To Gain More",
    Algorithm 1.) Blocks of one number give `optax.scale_by_adam`.

    Inside `in_subspace` the default blocks give a projected matrix (*batch, r, n) one v
    for each of the n columns of each matrix, over the r rows: its state is rn + n
    numbers in place of 2rn. See `adam_mini_blocks`. In `rotate_moments` M turns by
    eq. 7 and v stays as it is: over a whole column it is |S^T g|^2 / r, which does not
    depend on the basis of the subspace, so that nothing is to be turned; for a new
    subspace, and for smaller blocks, it is last period's estimate.

    Args:
      b1: decay rate of M.
      b2: decay rate of v; the paper's 0.95 for language models.
      eps: added to sqrt(v).
      blocks: from a leaf's path ("layers/mlp/up/kernel") and its shape, as this
        transformation sees it, to the shape of its blocks, one divisor for each axis;
        `adam_mini_blocks()` by default. Asked at init.

    Raises:
      ValueError: at init, blocks that do not divide an array.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> state = lro.steps.scale_by_adam_mini().init({"kernel": jnp.ones((3, 8, 16))})
      >>> optax.tree.get(state, "nu")["kernel"].shape
      (3, 1, 16)
    """
    blocks = adam_mini_blocks() if blocks is None else blocks

    def init(params: optax.Params) -> AdamMiniState:
        def second(keys: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
            path, shape = path_of(keys), tuple(jnp.shape(x))
            block = tuple(blocks(path, shape))
            if len(block) != len(shape) or any(
                b < 1 or d % b for d, b in zip(shape, block, strict=True)
            ):
                raise ValueError(
                    f"{path}: blocks of shape {block} do not divide the shape {shape}"
                )
            counts = [d // b for d, b in zip(shape, block, strict=True)]
            return shard_along(jnp.zeros(counts, x.dtype), spec_of(x), of=x)

        return AdamMiniState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=jax.tree_util.tree_map_with_path(second, params),
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


def _split(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """Each axis of size d with k blocks becomes two, (k, d / k)."""
    if not x.size:
        return x.reshape([s for d in x.shape for s in (d, 1)])
    return x.reshape(
        [s for d, k in zip(x.shape, counts, strict=True) for s in (k, d // k)]
    )


def _within(v: jax.Array) -> tuple[int, ...]:
    """The axes inside a block after `_split`."""
    return tuple(range(1, 2 * v.ndim, 2))


# v over a whole column is |S^T g|^2 / r: the same in every basis of the subspace.
register_moments(AdamMiniState, first="mu")


def adam_mini_blocks(heads: Heads = (), *, rules: Rules = ADAM_MINI_RULES) -> Blocks:
    """The blocks of Adam-mini, chosen by a leaf's path.

    A rule's value is one of

    - "element": one v per number, as in Adam;
    - "row": one v per vector along the last axis;
    - "column": one v per index of the last axis, over the axis before it;
    - an int h: one v per h consecutive indices of the last axis, over the axis before
      it, which is an attention head of size h.

    Axes before those are batch axes, each index with its own v. The first rule found in
    the path counts, those of `rules` before those of `heads`, so that the bias of a
    query is a bias; where none is found, a vector is one "row" and every other leaf
    goes by "column".

    The paper (Partition III, and the package adam-mini 1.1.1) takes one v per output
    row of torch's (out, in) weights, which is a column of JAX's (in, out), for values,
    MLP and output layer; one per head for queries and keys; one per token of the
    embedding; one per tensor of the rest; and Adam for biases. A projected matrix
    (*batch, r, n) has lost its smaller side: its columns are the outputs only where
    these are the larger side, and the inputs otherwise (`Frame.columns`). "Per output"
    becomes "per column" all the same, over the r coordinates. No paper says how the
    blocks go with a projection; this is our reading. Heads exist only where the columns
    are the outputs: `check_heads` refuses others. A leaf cannot tell from its shape
    whether it was projected, so give an embedding that was the rule "column".

    Args:
      heads: pairs (regular expression, h), for queries and keys.
      rules: pairs (regular expression, value).

    Returns:
      For `scale_by_adam_mini`, a function (path, shape) to the shape of a block.

    Raises:
      ValueError: for a value that is none of these.

    Example:
      >>> import lowrank_optax as lro
      >>> blocks = lro.steps.adam_mini_blocks(heads=[(r"attn/[qk]/", 64)])
      >>> blocks("layers/attn/q/kernel", (12, 128, 768))
      (1, 128, 64)
      >>> blocks("layers/mlp/up/kernel", (12, 128, 2048))
      (1, 128, 1)
      >>> blocks("embed/embedding", (32000, 768))
      (1, 768)
    """
    for pattern, kind in (*rules, *heads):
        if kind not in ("element", "row", "column") and not _is_size(kind):
            raise ValueError(
                f'{pattern!r}: {kind!r} is not "element", "row", "column" or the size '
                "of a head"
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
    """A stage that does nothing but refuse `heads` that a projection takes apart.

    A head is h consecutive outputs. They stay together in the columns of (r, n) where
    the outputs are the larger side of the weight; otherwise they are what the
    projection mixes, and the columns are inputs. Stands anywhere in the chain inside
    `low_rank`.

    Args:
      heads: as `adam_mini_blocks` takes them.

    Raises:
      ValueError: at init, for a matrix found by `heads` whose columns are the inputs,
        or no multiple of h.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> heads = [("attn/[qk]", 4)]
      >>> step = lro.steps.scale_by_adam_mini(blocks=lro.steps.adam_mini_blocks(heads))
      >>> tx = lro.low_rank(optax.chain(lro.dominant_svd(), lro.project(),
      ...     lro.steps.check_heads(heads), lro.in_subspace(step), lro.project_back()),
      ...     rank=2, refresh_every=200)
      >>> state = tx.init({"attn": {"q": jnp.ones((8, 8))}})
      >>> optax.tree.get(state, "nu")["attn"]["q"].shape
      (1, 2)
    """

    def init(params: optax.Params) -> optax.OptState:
        for frame in frames_of(params):
            head = match((*heads, ("", None)), frame.path, "heads")
            n = frame.low_shape[-1]
            if head is not None and frame.columns == "input":
                raise ValueError(
                    f"{frame.path}: its columns are the {n} inputs; the outputs, which "
                    "heads are made of, are the smaller side and are projected away; "
                    "leave it out of `heads`"
                )
            if head is not None and n % head:
                raise ValueError(
                    f"{frame.path}: {n} columns are no multiple of the head size {head}"
                )
        return optax.EmptyState()

    return simple_stage(init, lambda frames, state: (frames, state))


def _is_size(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0
