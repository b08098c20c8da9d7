"""A trained model for other programs: `python -m train.export --help`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train.config.command_line import parse
from train.run.exporting import DType, export
from train.run.restore import load_run

DESCRIPTION = """Write a run for transformers and lm-eval, in a folder like those of
Hugging Face transformers.

Examples:
  python -m train.export runs/tiny-grass_jump --to exported
  python -m train.export runs/tiny-grass_jump@200 --to exported --dtype bfloat16
  python -m train --init-from hf:exported --out runs/more

The folder has config.json, generation_config.json, the weights in safetensors files,
and the tokenizer with its chat template. It appears when it is complete."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The run to write, and the folder.

    Attributes:
      run: a run's folder, for its newest checkpoint, or FOLDER@STEP.
      to: the new folder.
      dtype: of the weights. Default: that of the run; int8 becomes the dtype that it
        computed in.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    to: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    dtype: DType | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says; None reads it from `sys.argv`."""
    config = parse(ExportConfig, DESCRIPTION, argv, "python -m train.export")
    try:
        run = load_run(config.run)
        export(run, config.to, config.dtype)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote step {run.step} of {config.run} to {config.to}")


if __name__ == "__main__":
    main()
