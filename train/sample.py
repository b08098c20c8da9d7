"""Text from a trained model: `python -m train.sample --help`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from train.config.command_line import check_numbers, check_seed, parse
from train.run.restore import load_run
from train.run.sampling import continued, prompt_tokens

DESCRIPTION = """Continue a text with the model of a run.

Examples:
  python -m train.sample runs/tiny-grass_jump
  python -m train.sample runs/tiny-grass_jump@200 --prompt "My fellow citizens"
  python -m train.sample runs/tiny-grass_jump --temperature 0 --tokens 20"""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text to continue, and how.

    Attributes:
      run: a run's folder, for its newest checkpoint, or FOLDER@STEP.
      prompt: the beginning of the text; of a run on examples, what a user says.
      tokens: how many tokens to add.
      temperature: above 1 for more surprise, below for less; 0: always the likeliest
        token.
      seed: another seed, another text.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    prompt: str = "The American people"
    tokens: int = 60
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, positive=("tokens",), not_negative=("temperature",))
        check_seed(self.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a text as the command line says; None reads it from `sys.argv`."""
    config = parse(SampleConfig, DESCRIPTION, argv, "python -m train.sample")
    try:
        run = load_run(config.run)
        if run.tokenizer is None:
            raise ValueError(f"{config.run} has no tokenizer: it was trained on tokens")
        prompt_tokens(run.tokenizer, config.prompt, run.chat)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        continued(
            run.model,
            run.weights,
            run.tokenizer,
            config.prompt,
            chat=run.chat,
            tokens=config.tokens,
            seed=config.seed,
            temperature=config.temperature,
        )
    )


if __name__ == "__main__":
    main()
