"""Turns shards of text into token files, one by one: the work of `train.prepare`."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.documents import TfdsDocuments, fingerprint_of, open_tfds, text_files
from train.data.files import content_suffix
from train.data.fingerprint import Fingerprint, of_files
from train.data.text_formats import TEXT_SUFFIXES, BadLines, OnBadLines, read_texts
from train.data.tokenizer import Tokenizer, document_tokens, open_tokenizer
from train.host.atomic import written_whole
from train.host.paths import AnyPath

OnPart = Callable[[float], object]
"""Called with the further part of a shard that is done; all parts sum to 1."""

_SMALL_FILES = 2**26


class Job(NamedTuple):
    """How texts become tokens, and where these go.

    Attributes:
      out: the folder of the token files.
      tokenizer: the file of the tokenizer.
      text_field: the field that holds the text.
      bad_lines: what happens to text that cannot be read.
      documents: take only so many of each shard, the first ones; None for all.
      data_dir: the folder of prepared TFDS data sets; None for TFDS's default.
    """

    out: Path
    tokenizer: Path
    text_field: str = "text"
    bad_lines: OnBadLines = "error"
    documents: int | None = None
    data_dir: str | None = None


class TextShard(NamedTuple):
    """The texts that become one token file.

    Attributes:
      name: of the token file, without suffix; sorted by name, token files are in the
        order of the texts.
      files: the text files, in order.
      data_set: NAME or NAME@SPLIT of TFDS, instead of files.
      start, stop: the range of its records.
    """

    name: str
    files: tuple[AnyPath, ...] = ()
    data_set: str = ""
    start: int = 0
    stop: int = 0


class Counts(NamedTuple):
    """The contents of a token file, and what was skipped for it (`BadLines`)."""

    documents: int
    tokens: int
    skipped: int
    first_skipped: list[str]


def plan(sources: Sequence[str], records: int, job: Job) -> list[TextShard]:
    """The shards of the sources, in order.

    Each file is one; consecutive small `.txt` files share one, up to 64 MiB, and so do
    `records` records of a TFDS data set.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: as `open_documents`.
    """
    shards: dict[TextShard, None] = {}
    for source in sources:
        if source.startswith("tfds:"):
            name = source.removeprefix("tfds:")
            count = len(_data_set(name, job.text_field, job.data_dir))
            for start in range(0, count, records):
                stop = min(start + records, count)
                shards[TextShard(f"{name}.{start}", (), name, start, stop)] = None
        else:
            for files in _grouped(text_files(source)):
                shards[TextShard(_stem(files[0]), files)] = None
    digits = max(5, len(str(len(shards) - 1)))

    def numbered(i: int, shard: TextShard) -> TextShard:
        plain = re.sub(r"[^\w.-]+", "-", shard.name)
        return shard._replace(name=f"{i:0{digits}}-{plain}")

    return [numbered(i, shard) for i, shard in enumerate(shards)]


def _grouped(paths: Sequence[AnyPath]) -> Iterator[tuple[AnyPath, ...]]:
    group: list[AnyPath] = []
    size = 0
    for path in paths:
        if content_suffix(path) not in TEXT_SUFFIXES:
            raise ValueError(
                f"{path} is not a text file: expected {', '.join(TEXT_SUFFIXES)}"
            )
        small = content_suffix(path) == ".txt"
        own = path.stat().st_size if small else _SMALL_FILES
        if group and size + own > _SMALL_FILES:
            yield tuple(group)
            group, size = [], 0
        group.append(path)
        size += own
    if group:
        yield tuple(group)


def _stem(path: AnyPath) -> str:
    """ "c4-train.00000-of-01024" of "c4-train.00000-of-01024.json.gz"."""
    name = path.name
    if content_suffix(path) != path.suffix:
        name = name.removesuffix(path.suffix)
    return name.removesuffix(content_suffix(path))


def fingerprint(shard: TextShard, job: Job) -> Fingerprint:
    """Fingerprint of what the shard is read from."""
    if shard.files:
        return of_files(shard.files)
    source = f"tfds:{shard.data_set}"
    documents = _data_set(shard.data_set, job.text_field, job.data_dir)
    there = fingerprint_of(source, documents)
    return {"records": [shard.start, shard.stop], "sha256": there["sha256"]}


def token_file(shard: TextShard, job: Job) -> Path:
    """The shard's token file: `.u16` if all ids are below 2**16, else `.u32`."""
    small = _tokenizer(job.tokenizer).vocab_size <= 2**16
    return job.out / f"{shard.name}{'.u16' if small else '.u32'}"


def tokenize(job: Job, shard: TextShard, on_part: OnPart) -> Counts:
    """Writes the token file of a shard: each document's tokens, and the end token.

    Numbers are little-endian. Documents are tokenized one at a time. The file appears
    when it is complete, and not at all if there are no documents.

    Raises:
      OSError: it cannot be written.
      ModuleNotFoundError, ValueError: the shard cannot be read (`read_texts`).
    """
    tokenizer, path = _tokenizer(job.tokenizer), token_file(shard, job)
    dtype = np.dtype("<u2" if path.suffix == ".u16" else "<u4")
    bad = BadLines(job.bad_lines)
    documents = tokens = 0
    left = 1.0

    def report(part: float) -> None:
        nonlocal left
        left -= part
        on_part(part)

    with written_whole(path) as file:
        for text in itertools.islice(_texts(job, shard, bad, report), job.documents):
            ids = document_tokens(tokenizer, text).astype(dtype)
            file.write(ids.tobytes())
            documents += 1
            tokens += len(ids)
    on_part(left)
    if not documents:
        path.unlink()
    return Counts(documents, tokens, bad.count, bad.first)


def _texts(job: Job, shard: TextShard, bad: BadLines, on_part: OnPart) -> Iterator[str]:
    size = sum(path.stat().st_size for path in shard.files) or 1
    for path in shard.files:
        yield from read_texts(path, job.text_field, bad, lambda n: on_part(n / size))
    for number in range(shard.start, shard.stop):
        try:
            text = _data_set(shard.data_set, job.text_field, job.data_dir)[number]
        except ValueError as error:
            bad.meet(error)
        else:
            yield text
        on_part(1 / (shard.stop - shard.start))


@functools.lru_cache(maxsize=8)
def _data_set(name: str, field: str, data_dir: str | None) -> TfdsDocuments:
    return open_tfds(name, field, data_dir)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return open_tokenizer(path)
