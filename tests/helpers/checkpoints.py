"""A run's folder, as the run itself begins it."""

from pathlib import Path

from train.config.command_line import parse
from train.config.config import Config, resolved, to_json
from train.config.resolve import resolve
from train.host.atomic import write_text


def config_of(folder: Path, *argv: str) -> Config:
    return resolve(parse(Config, "", ["--out", str(folder), *argv], "python -m train"))


def store(config: Config) -> None:
    """As a run does that begins in its folder."""
    folder = resolved(config, "out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", to_json(config))
