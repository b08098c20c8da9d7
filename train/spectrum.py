"""What changed between two checkpoints: `python -m train.spectrum --help`."""

import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import lowrank_optax as lro
from lowrank_optax.layout import path_of
from train.config import parse
from train.measure import kind_of
from train.optimizer import parted, smaller_sides
from train.picture import draw_spectra
from train.restore import checked_step, load_weights, run_and_step

DESCRIPTION = """How many directions the weights of attention and MLP took between two
checkpoints: the normalised singular values of their difference, and its effective rank.

Examples:
  python -m train.spectrum runs/tiny-grass_jump@200 runs/tiny-grass_jump@300
  python -m train.spectrum runs/galore@200 runs/galore --out galore.png"""


@dataclasses.dataclass(frozen=True)
class SpectrumConfig:
    """Which checkpoints.

    Attributes:
      before: a run's folder, for its newest checkpoint, or FOLDER@STEP.
      after: another, of the same run or of one with the same model.
      out: the picture.
    """

    before: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN@STEP")]
    after: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN@STEP")]
    out: Path = Path("spectrum.png")


class Spectrum(NamedTuple):
    """Of the matrices of one kind, one for each layer.

    Attributes:
      shape: of a matrix.
      values: (layers, m), singular values, descending, each layer's over its largest;
        all 0 where nothing changed.
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
    """Those of a matrix, (m,) float64, descending.

    From the smaller Gram matrix, in float64: what is under 1e-8 of the largest is
    rounding, as it is in float32 weights.
    """
    d = difference.astype(np.float64)
    d = d if d.shape[0] <= d.shape[1] else d.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(d @ d.T), 0))[::-1]


def spectra(before: Any, after: Any) -> dict[str, Spectrum]:
    """Of W_after - W_before, by the kind of layer (SARA paper, section 4.3, Figure 4).

    Args:
      before: the weights, a tree as `models` has it, on the host.
      after: the same of another checkpoint.

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
    rows = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(keys): np.asarray(x, np.float32) for keys, x in rows}


def table(found: Mapping[str, Spectrum]) -> str:
    """Means over the layers, as Markdown."""
    lines = [
        "| layers | shape | effective rank | of the smaller side |",
        "|---|---|---|---|",
    ]
    for kind, spectrum in found.items():
        rank, m = np.mean(spectrum.ranks), min(spectrum.shape)
        shape = "x".join(map(str, spectrum.shape))
        lines.append(f"| {kind} | {shape} | {rank:.1f} | {rank / m:.0%} |")
    return "\n".join(lines)


def weights_of(name: str) -> tuple[str, Any]:
    """FOLDER@STEP of a checkpoint that is there, and its weights on the host."""
    folder, step = run_and_step(name)
    step = checked_step(folder, step)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        weights = lro.dense(load_weights(folder, step), "float32")
    return f"{folder}@{step}", jax.device_get(weights)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and draw; None reads the command line from `sys.argv`."""
    config = parse(SpectrumConfig, DESCRIPTION, argv, "python -m train.spectrum")
    try:
        (before, old), (after, new) = map(weights_of, (config.before, config.after))
        if before == after:
            raise ValueError(f"{before} is named twice: name two checkpoints")
        found = spectra(old, new)
        title = f"{after} minus {before}"
        means = {kind: np.mean(x.values, axis=0) for kind, x in found.items()}
        draw_spectra(means, config.out, title)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{title}:\n\n{table(found)}\n\nsee {config.out}")


if __name__ == "__main__":
    main()
