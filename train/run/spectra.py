"""Singular values of the change of weights between two checkpoints."""

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import lowrank_optax as lro
from lowrank_optax.core.paths import with_paths
from models import Params
from train.engine.layer_metrics import kind_of
from train.engine.optimizer import parted, smaller_sides
from train.run.restore import load_weights
from train.run.stored import checked_step, run_and_step


class Spectrum(NamedTuple):
    """Spectra of the matrices of one kind, one for each layer.

    Attributes:
      shape: of a matrix.
      values: (layers, m), singular values, descending, each layer's over its largest;
        all 0 if nothing changed.
      ranks: (layers,), effective ranks.
    """

    shape: tuple[int, ...]
    values: np.ndarray
    ranks: np.ndarray


def effective_rank(values: np.ndarray) -> float:
    """exp(-sum_i p_i log p_i) with p = sigma / sum(sigma); 0 for a matrix of zeros.

    (Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality".) k equal singular values give k, whatever their size.
    """
    p = values / (np.sum(values) or 1)
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p)))) if len(p) else 0.0


def singular_values(difference: np.ndarray) -> np.ndarray:
    """The singular values of a matrix, (m,) float64, descending.

    They come from the smaller Gram matrix, in float64: values under 1e-8 of the largest
    are rounding, as in float32 weights.
    """
    d = difference.astype(np.float64)
    d = d if d.shape[0] <= d.shape[1] else d.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(d @ d.T), 0))[::-1]


def weights_of(name: str) -> tuple[str, Params]:
    """Loads RUN or RUN@STEP: its name with the step, and its weights on the host."""
    folder, step = run_and_step(name)
    step = checked_step(folder, step)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        weights = lro.weights.dense(load_weights(folder, step), "float32")
    return f"{folder}@{step}", jax.device_get(weights)


def spectra(before: Any, after: Any) -> dict[str, Spectrum]:
    """Spectra of W_after - W_before by kind of layer (SARA paper, 4.3, Figure 4).

    Both are trees of weights as in `models`, on the host.

    Raises:
      ValueError: they are of models of different shapes.
    """
    old, new = (_by_path(parted(weights).layers) for weights in (before, after))
    shapes = [{path: w.shape for path, w in x.items()} for x in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the checkpoints are of models of different shapes: {shapes[0]} and "
            f"{shapes[1]}; name two of one model"
        )
    paths = smaller_sides(parted(before).layers)
    matrices = [(path, i) for path in paths for i in range(len(old[path]))]

    def values_of(matrix: tuple[str, int]) -> np.ndarray:
        path, i = matrix
        return singular_values(new[path][i] - old[path][i])

    found: dict[str, list[np.ndarray]] = defaultdict(list)
    # One core a matrix: threads of one factorisation wait for each other, which on a
    # busy machine takes ten times as long as no threads.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        values = pool.map(values_of, matrices)
        bar = tqdm(matrices, unit="matrix", disable=None)
        for (path, _), one in zip(bar, values, strict=True):
            found[path].append(one)
    return {
        kind_of(path): Spectrum(
            shape=old[path].shape[1:],
            values=np.stack([x / (x[0] or 1) for x in values]),
            ranks=np.array([effective_rank(x) for x in values]),
        )
        for path, values in found.items()
    }


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x, np.float32) for path, x in with_paths(tree)}
