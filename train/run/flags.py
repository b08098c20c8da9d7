"""The flags of a run; of one that goes on, its config.json has what is not given."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from train.config.command_line import parse
from train.config.config import Config, resolved
from train.config.presets import PRESETS, with_flags
from train.config.resolve import with_folder
from train.host.paths import run_folder
from train.host.processes import ProcessConfig
from train.run.start import with_shape_of_run
from train.run.stored import read_config


def parse_run(description: str, argv: Sequence[str] | None, prog: str) -> Config:
    """Returns the config of `python -m train` from its command line.

    Raises:
      ValueError: it goes on with a run whose config.json cannot be read.
    """
    words = sys.argv[1:] if argv is None else argv
    return parse(Config, description, words, prog, _begun(words))


def _begun(words: Sequence[str]) -> Config | None:
    """The config of the run that a command line goes on with, if there is one."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--resume", "--resume-or-start"):
        look.add_argument(flag, action="store_true")
    for flag in ("--resume-from", "--out", "--preset"):
        look.add_argument(flag)
    for flag in ("--size", "--optimizer", "--basis", "--init-from"):
        look.add_argument(flag, default=argparse.SUPPRESS)
    look.add_argument("--model", dest="shape_from", default=argparse.SUPPRESS)
    given = vars(look.parse_known_args([_with_dashes(word) for word in words])[0])
    resume = [given.pop(f"resume{x}") for x in ("", "_or_start", "_from")]
    out, preset = given.pop("out"), PRESETS.get(given.pop("preset"), {})
    if not any(resume):
        return None
    if out is None:
        try:
            named = with_shape_of_run(with_flags(Config(), {**preset, **given}))
            out = resolved(with_folder(named), "out")
        except (KeyError, ValueError):
            return None  # whoever parses all flags says what is wrong
    folder = run_folder(str(out))
    if not (folder / "config.json").is_file():
        return None
    return dataclasses.replace(
        read_config(folder),
        out=None,  # as given, or by default
        resume=False,
        resume_or_start=False,
        resume_from=None,
        processes=ProcessConfig(),
    )


def _with_dashes(word: str) -> str:
    """ "--resume-from=3" of "--resume_from=3": both are taken."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
