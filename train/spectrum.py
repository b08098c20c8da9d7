"""What changed between two checkpoints: `python -m train.spectrum --help`."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import lowrank_optax as lro
from train.config.config import parse
from train.records.plots import draw_spectra
from train.run.restore import load_weights
from train.run.spectra import Spectrum, spectra
from train.run.stored import checked_step, run_and_step

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
        weights = lro.weights.dense(load_weights(folder, step), "float32")
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
