"""Fits the Newton-Schulz steps of `spectral_residual` to spectra of residuals.

    python -m tests.polar_fit --size 60m --source train.u16 --steps 200 600
    python -m tests.polar_fit --size tiny --steps 20 --last 40 --count 2

`spectral_adam` trains the model; at the steps given, the singular values of
R = G - S S^T G of all its matrices are taken, over their Schatten-8 norms. Then `count`
odd quintics minimize the mean of (p(s) - 1)^2. (docs/results/polar_factor.md)
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import least_squares

from lowrank_optax.bases.rule import BasisState
from lowrank_optax.core.newton_schulz import FITTED, MUON
from train.config.config import Config, ModelConfig, OptimizerConfig
from train.config.resolve import resolve
from train.engine.step import (
    dense,
    init_state,
    init_weights,
    loss_sums,
    mean_gradient,
    train_step,
)
from train.run.loop import work_of

KINDS = {"attention": "qkvo", "mlp": ("gate", "up", "down")}
GRID = np.linspace(0, 1, 800)


def batches(source: str | None, vocabulary: int, shape: tuple[int, int]) -> Iterator:
    """Windows of a file of 16-bit tokens in random order, or random tokens."""
    rng = np.random.default_rng(0)
    if source is None:
        while True:
            yield rng.integers(0, vocabulary, shape)
    tokens = np.fromfile(source, np.uint16)
    windows = tokens[: len(tokens) // shape[1] * shape[1]].reshape(-1, shape[1])
    order = rng.permutation(len(windows))
    for i in range(0, len(order) - shape[0], shape[0]):
        yield windows[order[i : i + shape[0]]].astype(np.int32)


def spectra_of(work: Any, state: Any, batch: Any) -> list[jax.Array]:
    """The residuals' singular values, (L, m) of each kernel, the last r about zero."""
    sums = partial(loss_sums, work)
    _, gradient = mean_gradient(sums, dense(work, state.params), batch, 1)
    found = jax.tree.leaves(
        state.opt_state.layers, is_leaf=lambda x: isinstance(x, BasisState)
    )
    bases = next(x for x in found if isinstance(x, BasisState)).basis["layers"]
    product = partial(jnp.einsum, precision="highest")
    out = []
    for part, names in KINDS.items():
        for name in names:
            g = gradient["layers"][part][name]["kernel"]
            g = jnp.swapaxes(g, 1, 2) if g.shape[1] > g.shape[2] else g
            g, s = g / jnp.max(jnp.abs(g)), bases[part][name]["kernel"]
            r = g - product("bmr,brk->bmk", s, product("bmr,bmk->brk", s, g))
            values = jnp.linalg.eigvalsh(product("bmk,bnk->bmn", r, r))
            out.append(jnp.sqrt(jnp.maximum(values, 0))[:, s.shape[-1] :])
    return out


def collect(args: argparse.Namespace) -> np.ndarray:
    """All singular values, each over its matrix' Schatten-8 norm."""
    optimizer = OptimizerConfig(name="spectral_adam", rank=args.rank, clip_norm=None)
    model, (rows, length) = ModelConfig(size=args.size), args.batch
    config = Config(
        steps=args.last,
        batch_size=rows,
        seq_len=length,
        layerwise="off",
        model=model,
        optimizer=optimizer,
    )
    work = work_of(resolve(config), jax.random.key(0))
    every = work.optimizer.refresh_every or 1
    make = jax.jit(lambda key: init_state(work, init_weights(work, key)))
    step = jax.jit(partial(train_step, work), static_argnames="refresh")
    state, look, found = make(jax.random.key(1)), jax.jit(partial(spectra_of, work)), []
    source = batches(args.source, work.model.vocab_size, (rows, length))
    for i, tokens in zip(range(max(args.steps) + 1), source, strict=False):
        batch = {"tokens": jnp.asarray(tokens)}
        if i in args.steps:
            found += [np.float64(x) for x in look(state, batch)]
        state, _ = step(state, batch, refresh=i % every == 0)
    return np.concatenate(
        [(x / np.sum(x**8, 1, keepdims=True) ** 0.125).ravel() for x in found]
    )


def composed(coefficients: np.ndarray, s: np.ndarray) -> np.ndarray:
    for a, b, c in coefficients.reshape(-1, 3):
        s = a * s + b * s**3 + c * s**5
    return s


def fit(s: np.ndarray, count: int) -> np.ndarray:
    """Coefficients (count, 3): near one on s, below 1.2 and not small in between."""

    def errors(coefficients: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            p, between = composed(coefficients, s), composed(coefficients, GRID)
            floor = 0.3 * np.minimum(GRID / 0.1, 1)
            high, low = np.maximum(between - 1.2, 0), np.maximum(floor - between, 0)
            parts = (p - 1) / len(s) ** 0.5, 9 * high / 28, 3 * low / 28
        return np.clip(np.nan_to_num(np.concatenate(parts), nan=1e3), -1e3, 1e3)

    best = None
    for seed in range(4):
        noise = 1 + 0.2 * (seed > 0) * np.random.default_rng(seed).normal(
            size=3 * count
        )
        found = least_squares(errors, np.tile(MUON, count) * noise, max_nfev=300)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return best.x.reshape(-1, 3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--source", help="16-bit tokens; default: random ones")
    parser.add_argument("--batch", type=int, nargs=2, default=(8, 64))
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--last", type=int, default=1200, help="of the schedule")
    parser.add_argument("--count", type=int, default=3, help="Newton-Schulz steps")
    args = parser.parse_args(argv)
    s = collect(args)
    quantiles = np.quantile(s, [0.01, 0.25, 0.5, 0.75, 0.99]).round(3)
    print(f"{s.size} singular values, quantiles {quantiles.tolist()}")
    # A sample, since 60M has 40,000 of them.
    found = fit(np.sort(s)[:: max(1, s.size // 2000)], args.count)
    for name, coefficients in (("fitted", found), ("default", np.array(FITTED))):
        p = composed(coefficients, s)
        cosine = p.mean() / np.sqrt(np.mean(p**2))
        print(f"{name}: {coefficients.round(4).tolist()}")
        print(
            f"mean {p.mean():.3f}, mean square error {np.mean((p - 1) ** 2):.3f}, "
            f"cosine with a vector of ones {cosine:.3f}"
        )


if __name__ == "__main__":
    main()
