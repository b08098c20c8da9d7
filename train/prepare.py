"""Turns text into token files, once: `python -m train.prepare --help`.

Worker processes import this module: it imports no JAX.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import filelock
import tyro
from tqdm import tqdm

from train.config.command_line import check_numbers, parse
from train.data.fingerprint import Fingerprint, of_tokenizer
from train.data.secrets import check_no_password
from train.data.text_formats import BadLines, OnBadLines
from train.data.tokenize_shards import (
    Counts,
    Job,
    TextShard,
    fingerprint,
    plan,
    token_file,
    tokenize,
)
from train.data.tokenizer import Tokenizer, open_tokenizer
from train.host.atomic import Appender, write_bytes, write_text
from train.host.errors import ended_by_signals, usage_errors
from train.host.workers import each_done

DESCRIPTION = """Tokenize text once, in parallel, for any number of runs: a token file
for each shard of a data set such as C4 or SlimPajama, as it is published.

Examples:
  python -m train.prepare 'c4/c4-train.*.json.gz' --tokenizer t5/spiece.model \\
    --out tokens/c4 --shards 8
  python -m train.prepare 'SlimPajama/train/chunk1/*.jsonl.zst' \\
    --tokenizer llama/tokenizer.model --out tokens/slimpajama --bad-lines skip
  python -m train.prepare 'wiki/*.parquet' --text-field article \\
    --tokenizer tokenizer.json --out tokens/wiki --workers 4
  python -m train.prepare 'tfds:c4/en@train[:1%]' --tokenizer t5/spiece.model \\
    --out tokens/c4

Then:
  python -m train --source 'tokens/c4/*.u16' --vocab-size 32100 \\
    --tokenizer tokens/c4/tokenizer.model --windows documents

The folder gets a token file for each shard: the tokens of its documents one after the
other, each ended by the tokenizer's end token, as the trainer itself would join them
(.u16: uint16 for a vocabulary of up to 65,536; .u32: uint32). Beside them the
tokenizer, shards.jsonl (what is done already) and, when all is, manifest.json: how many
documents and tokens, what was skipped and where. The number of workers changes none of
it. A command that was stopped, or killed, goes on where it was if it is run again: a
shard that is done, and whose input is what it was, is not done again."""

Json = dict[str, Any]
"""A JSON object: the manifest, or a line of the journal."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """The texts to tokenize, and the folder of the tokens.

    Attributes:
      sources: files, as paths, globs or URLs (gs://, s3://): .jsonl or .json (a
        document a line; .json also an array), .txt (a document each), all plain, .gz,
        .xz or .zst, or Parquet (a document a row); or tfds:NAME, tfds:NAME@SPLIT.
      tokenizer: a SentencePiece .model or tokenizers .json file.
      out: folder for the token files.
      text_field: the field that holds the text, in files of records and TFDS data sets.
      bad_lines: error: a line or row without text, or a file that is damaged or cut
        short, ends the work with its name and place; skip: it is left out, counted, and
        named in the manifest.
      shards: take only so many, the first ones.
      documents: take only so many of each shard, the first ones.
      records: how many of a TFDS data set are a shard.
      workers: processes. Default: one for each core.
      data_dir: folder of prepared TFDS data sets, if not the default one.
    """

    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE ...")
    ]
    tokenizer: str
    out: str
    text_field: str = "text"
    bad_lines: OnBadLines = "error"
    shards: int | None = None
    documents: int | None = None
    records: int = 200_000
    workers: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: name at least one")
        for name in (*self.sources, self.tokenizer):
            check_no_password("sources and tokenizer", name)
        if "://" in self.out:
            raise ValueError(
                f"out: {self.out} is not on this machine; give a folder here, and copy "
                "the token files when they are done"
            )
        numbers = ("shards", "documents", "records", "workers")
        check_numbers(self, positive=numbers)


def prepare(config: PrepareConfig) -> Json:
    """Tokenizes what is not done yet; returns the manifest.

    Raises:
      BlockingIOError: another command is at work in the folder.
      ChildProcessError: a worker was ended from outside.
      FileNotFoundError, ModuleNotFoundError: a source, or the package it needs.
      OSError: a file cannot be written.
      ValueError: a file cannot be read or holds a bad line; or the folder holds the
        tokens of other work.
    """
    out = Path(config.out).expanduser()
    tokenizer = open_tokenizer(config.tokenizer)
    job = Job(
        out,
        out / f"tokenizer{tokenizer.suffix}",
        config.text_field,
        config.bad_lines,
        config.documents,
        config.data_dir,
    )
    shards = plan(config.sources, config.records, job)[: config.shards]
    with _own(out):
        journal = Journal(job, tokenizer)
        write_bytes(job.tokenizer, tokenizer.content)
        _check_nothing_else(shards, job)
        inputs = {shard.name: fingerprint(shard, job) for shard in shards}
        left = [s for s in shards if not journal.has(s, inputs[s.name])]
        if left:
            (out / "manifest.json").unlink(missing_ok=True)
        workers = min(config.workers or _cores(), max(len(left), 1))
        work = functools.partial(tokenize, job)
        with (
            Progress(len(shards), len(left), out) as progress,
            closing(each_done(work, left, workers, progress.advance)) as results,
        ):
            for shard, counts in results:
                journal.write(shard, inputs[shard.name], counts)
                progress.done(counts)
        manifest = journal.manifest(shards)
        write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def _cores() -> int:
    """The number of cores that this process may use."""
    there = getattr(os, "sched_getaffinity", None)  # not on a Mac
    return len(there(0)) if there else os.cpu_count() or 1


@contextmanager
def _own(out: Path) -> Iterator[None]:
    """Makes the folder, and locks it."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / "lock", blocking=False):
            for left in out.glob("*.tmp"):  # by one that was killed
                left.unlink()
            yield
    except filelock.Timeout as error:
        raise BlockingIOError(
            f"another is at work in {out}: wait for it or stop it, or give another "
            "folder to --out"
        ) from error


def _check_nothing_else(shards: Sequence[TextShard], job: Job) -> None:
    own = {token_file(shard, job) for shard in shards}
    others = sorted({*job.out.glob("*.u16"), *job.out.glob("*.u32")} - own)
    if others:
        raise ValueError(
            f"{job.out} has {len(others)} token files that are not of these shards, "
            f"{others[0].name} first: remove them, or give another folder to --out"
        )


class Journal:
    """The finished shards, in `shards.jsonl`: a line for the options, then one a shard.

    Raises:
      ValueError: the file has other options, or cannot be read.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self._job = job
        self._asked = {
            "tokenizer": {**of_tokenizer(tokenizer), "eos_id": tokenizer.eos_id},
            "text_field": job.text_field,
            "documents_of_a_shard": job.documents,
        }
        path = job.out / "shards.jsonl"
        content = path.read_bytes() if path.exists() else b""
        content = content[: content.rfind(b"\n") + 1]  # a line may have been cut short
        try:
            asked, *rows = map(json.loads, content.splitlines()) if content else [{}]
            self._rows: Json = {row["file"]: row for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): remove it, to begin again"
            ) from error
        if self._rows:
            self._check(asked, path)
        else:  # nothing is done: the options may be others
            content = b""
        self._lines = Appender(path, len(content))
        if not content:
            self._append(self._asked)

    def _check(self, asked: Json, path: Path) -> None:
        different = [k for k, v in self._asked.items() if asked.get(k) != v]
        if different:
            raise ValueError(
                f"{path} is of work with another {' and '.join(different)}: give the "
                "same, or another folder to --out"
            )

    def _append(self, row: Json) -> None:
        self._lines.append(json.dumps(row).encode() + b"\n")

    def has(self, shard: TextShard, given: Fingerprint) -> bool:
        """Whether the shard is done, from this input, and its token file there."""
        path = token_file(shard, self._job)
        row = self._rows.get(path.name)
        if row is None or row["input"] != given:
            return False
        if row["skipped"] and self._job.bad_lines == "error":
            return False
        width = 2 if path.suffix == ".u16" else 4
        size = path.stat().st_size if path.exists() else 0
        return size == width * row["tokens"]

    def write(self, shard: TextShard, given: Fingerprint, counts: Counts) -> None:
        """Records that a shard is done."""
        name = token_file(shard, self._job).name
        row = {"file": name, "input": given, **counts._asdict()}
        self._append(row)
        self._rows[name] = row

    def manifest(self, shards: Sequence[TextShard]) -> Json:
        """The options, the totals, and a row for each shard."""
        rows = [self._rows[token_file(shard, self._job).name] for shard in shards]
        names = ("documents", "tokens", "skipped")
        totals = {name: sum(row[name] for row in rows) for name in names}
        return {**self._asked, "token_files": len(rows), **totals, "shards": rows}


class Progress:
    """Shows progress: a bar on a terminal, lines elsewhere."""

    def __init__(self, shards: int, left: int, out: Path):
        self._shards, self._documents, self._tokens = shards, 0, 0
        self._done = shards - left
        if self._done:
            print(
                f"{out}: {self._done} of {shards} shards are done already", flush=True
            )
        self._start = time.perf_counter()
        self._bar = tqdm(
            desc="tokenizing",
            total=shards,
            initial=self._done,
            disable=None,
            bar_format="{l_bar}{bar}| {n:.1f} of {total} shards [{elapsed}<{remaining}"
            "{postfix}]",
        )

    def advance(self, part: float) -> None:
        """Counts a further part of a shard."""
        self._bar.update(min(part, self._shards - self._bar.n))  # a sum of fractions

    def done(self, counts: Counts) -> None:
        """Counts a finished shard."""
        self._done += 1
        self._documents += counts.documents
        self._tokens += counts.tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        said = f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:,.0f}/s"
        self._bar.set_postfix_str(said, refresh=False)
        if self._bar.disable:
            print(f"{self._done} of {self._shards} shards: {said}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is not None:
            print(
                f"{self._done} of {self._shards} shards are done; the same command "
                "goes on from there",
                file=sys.stderr,
                flush=True,
            )


def conclusion(config: PrepareConfig, manifest: Json) -> str:
    """Says what was written, and how to train on it."""
    out, kind = Path(config.out).expanduser(), manifest["tokenizer"]
    suffix = ".u16" if kind["vocab_size"] <= 2**16 else ".u32"
    return (
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {out}. "
        f"To train on them:\n  python -m train --source '{out}/*{suffix}' --vocab-size "
        f"{kind['vocab_size']} --tokenizer {out}/tokenizer{kind['kind']}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare as the command line says; None reads it from `sys.argv`."""
    config = parse(PrepareConfig, DESCRIPTION, argv, "python -m train.prepare")
    with ended_by_signals(), usage_errors():
        manifest = prepare(config)
    skipped = BadLines("skip")
    for row in manifest["shards"]:
        skipped.add(row["skipped"], row["first_skipped"])
    if skipped.count:
        print(f"warning: {skipped}", file=sys.stderr, flush=True)
    print(conclusion(config, manifest), flush=True)


if __name__ == "__main__":
    main()
