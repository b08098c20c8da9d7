"""Changes between two checkpoints: `python -m train.spectrum --help`."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from train.config.command_line import parse
from train.records.markdown import Row, markdown
from train.records.plots import draw_spectra
from train.run.spectra import Spectrum, spectra, weights_of

DESCRIPTION = """How many directions the weights of attention and MLP took between two
checkpoints: the normalised singular values of their difference, and its effective rank.

Examples:
  python -m train.spectrum runs/tiny-grass_jump@200 runs/tiny-grass_jump@300
  python -m train.spectrum runs/galore@200 runs/galore --out galore.png"""


@dataclasses.dataclass(frozen=True)
class SpectrumConfig:
    """The checkpoints to compare.

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
    rows: list[Row] = []
    for kind, spectrum in found.items():
        rank = float(np.mean(spectrum.ranks))
        shape, share = "x".join(map(str, spectrum.shape)), rank / min(spectrum.shape)
        numbers = {"rank": f"{rank:.1f}", "share": f"{share:.0%}"}
        rows.append({"layers": kind, "shape": shape, **numbers})
    columns = {"layers": "layers", "shape": "shape"}
    columns |= {"rank": "effective rank", "share": "of the smaller side"}
    return markdown(rows, columns)


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
