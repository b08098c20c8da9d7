"""The tokenizer of a run, if it is the one that the run was trained with."""

from train.data.fingerprint import of_tokenizer, read_fingerprint
from train.data.tokenizer import Tokenizer, open_tokenizer
from train.host.console import warn
from train.host.paths import AnyPath
from train.run.stored import stored_tokenizer


def own_tokenizer(folder: AnyPath) -> Tokenizer | None:
    """Opens the tokenizer in a run's folder; None if the run has none.

    Raises:
      ValueError: it is not the one whose digest is in data.json; or either file cannot
        be read.
    """
    path, data = stored_tokenizer(folder), folder / "data.json"
    if path is None:
        return None
    tokenizer = open_tokenizer(path)
    if not data.is_file():
        warn(f"{folder} has no data.json, so whether {path.name} is its own is unknown")
    elif read_fingerprint(data)["tokenizer"] != of_tokenizer(tokenizer):
        raise ValueError(
            f"{path} is not the tokenizer that the run was trained with, whose digest "
            f"is in {data}: put that back (other tokens would mean other words)"
        )
    return tokenizer
