"""How an experiment is written: its runs, a run being the flags in which it differs.

There are three scales of the same question: "minutes" for a laptop's CPU, "hour" for
one GPU, "full" as the paper has it (ours: LLaMA-130M).
"""

import ast
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

from train.config.presets import Flags

Scale = Literal["minutes", "hour", "full"]


def flags(text: str) -> Flags:
    """The flags "optimizer=adamw b2=0.98 clip_norm=None", their values as Python's."""
    return {name: _value(value) for name, value in map(_pair, text.split())}


def grid(text: str) -> list[Flags]:
    """Every combination of the values in "optimizer=galore,fira basis=svd,sara"."""
    axes = {name: map(_value, x.split(",")) for name, x in map(_pair, text.split())}
    return [
        dict(zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def around(center: str, moves: str) -> list[Flags]:
    """A run, and those that differ from it in one flag: a value of "b2=0.9,0.99"."""
    axes = [flag for word in moves.split() for flag in grid(word)]
    return [flags(center), *(flags(center) | flag for flag in axes)]


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def with_all(runs: Sequence[Flags], **common: Any) -> list[Flags]:
    """Adds the flags `common` to every run; a run's own value wins."""
    return [{**common, **run} for run in runs]


def presets(*names: str, axes: str = "") -> list[Flags]:
    """Published settings, each with every combination of the axes."""
    return grid(f"preset={','.join(names)} {axes}")


# The tiny model and the text that come with the trainer.
MINUTES = flags("steps=60 rank=32 refresh_every=10 log_every=5")
# 39.3 M tokens: the work of docs/results/losses_60m.md.
HOUR = flags(
    "size=60m batch_size=128 seq_len=256 steps=1200 rank=128 refresh_every=200 "
    "clip_norm=None eval_every=0"
)
# For what is large in full; the rank is GaLore's at this size.
LARGER = flags("size=130m steps=2000 rank=256")
SHARED: dict[Scale, Flags] = {"minutes": MINUTES, "hour": HOUR, "full": {}}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs that answer one question.

    Attributes:
      about: what it is, and where it is from.
      small: the flags of each run at the scales minutes and hour.
      full: the same as the paper has it.
      at_hour: flags added to all runs at the scale hour.
      minutes: the flags of each run at the scale minutes, where `small` has too many.
      best_of: a flag, where the runs are tries: each is made with seed 0, and the best
        of each value of the flag with the other seeds too.
      seeds: how often each is run at the scale hour, with seeds 0, 1, ...
      against: flags and their values: every run is compared with the one that has
        these values and is otherwise alike, seed by seed.
      measured: prefixes of metrics ("overlap") that are drawn over the steps.
      weights_over: so many subspaces at the end of a run, at most half of its steps;
        the spectrum of what the weights move meanwhile is drawn.
    """

    about: str
    small: Sequence[Flags]
    full: Sequence[Flags]
    at_hour: Flags = dataclasses.field(default_factory=dict)
    minutes: Sequence[Flags] = ()
    best_of: str | None = None
    seeds: int = 3
    against: Flags | None = None
    measured: tuple[str, ...] = ()
    weights_over: int | None = None

    def runs(self, scale: Scale) -> list[Flags]:
        """The flags of each run, but for those that all runs of a scale share."""
        if scale == "hour":
            return with_all(self.small, **self.at_hour)
        if scale == "minutes":
            return [*(self.minutes or self.small)]
        return [*self.full]
