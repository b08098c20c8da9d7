"""The command line of the trainer."""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import jax
from upath import UPath

from train.checkpoint import CheckpointError
from train.config import Config, parse, resolved
from train.data import Data, open_data
from train.folder import check_folder, going_on, own_folder
from train.loop import DataError, train
from train.mesh import make_mesh
from train.optimizer import check_meant, check_optimizer
from train.place import Place
from train.processes import join_processes
from train.report import check_prompt, finish
from train.resolve import resolve, with_folder
from train.restore import check_start, pinned, tokenizer_file
from train.stopping import ended_by_signals
from train.writing import write_bytes

DESCRIPTION = """Train a LLaMA on text with a low-rank optimizer, or with AdamW.

Examples:
  python -m train                                    a small model, minutes on a CPU
  python -m train --optimizer adamw --out runs/adamw
  python -m train --optimizer galore --basis sara --rank 32 --refresh-every 50
  python -m train --out runs/tiny-grass_jump --resume
  python -m train --init-from runs/tiny-grass_jump --source more.txt --out runs/more
  python -m train --size 60m --batch-size 128 --seq-len 256 --microbatches 4
  mpirun -n 2 python -m train --distributed          two processes
  python -m train.compare --help                     several optimizers, same work
  python -m train.sample --help                      text from a trained model
  python -m train.spectrum --help                    what changed between checkpoints
  python -m train.bench --help                       what a step costs

A run leaves in its folder: config.json, data.json, tokenizer.json, metrics.jsonl,
tensorboard/, checkpoints/, loss.png, memory.txt, sample.txt and summary.json; with
--measure also subspace.png.
SIGTERM and Ctrl-C end a step and save a checkpoint; --resume goes on from it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; None reads it from `sys.argv`."""
    start = time.perf_counter()
    config = parse(Config, DESCRIPTION, argv, "python -m train")
    with ended_by_signals(), ExitStack() as stack:
        with usage_errors():
            join_processes(config.processes)
            check_meant(config.optimizer, [config.optimizer])
            config = with_folder(config)
            check_writable(resolved(config, "out"))
            config = pinned(resolve(going_on(config)))
            check_folder(config)
            check_optimizer(config)
            mesh = make_mesh(config)
            data = open_text(config)
            check_prompt(config.report, data.tokenizer)
            check_start(config, data.tokenizer)
            stack.enter_context(own_folder(config, data.fingerprint))
        with run_errors():
            trained = train(config, data, mesh)
            finish(config, data, trained, time.perf_counter() - start)
        if trained.unsaved is not None:
            sys.exit(f"error: {trained.unsaved}")


@contextmanager
def usage_errors() -> Iterator[None]:
    """What a user can put right ends the program with its message, no traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {said(error)}")


@contextmanager
def run_errors() -> Iterator[None]:
    """What ends a run that was in order ends the program with its message too."""
    try:
        yield
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {said(error)}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"error: the device's memory does not suffice ({str(error).splitlines()[0]}"
            "); lower --batch-size or --seq-len, or spend less on a step: "
            "--microbatches 4, --layerwise on, --remat full, --weight-dtype bfloat16"
        )


def said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # the system's own
        return f"{error.filename}: {error.strerror}"
    return str(error)


def check_writable(folder: Place) -> None:
    """OSError unless the folder can be made, or written to; changes nothing."""
    if isinstance(folder, UPath):
        probe = folder / f"writable-{jax.process_index()}"
        try:
            write_bytes(probe, b"")
            probe.unlink()
        except OSError as error:
            raise PermissionError(
                f"out: {folder} cannot be written to ({error.strerror}); check its "
                "name and your credentials, or give another"
            ) from error
        return
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"out: {nearest} is a file, so {folder} cannot be a folder; give another"
        )
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise PermissionError(
            f"out: {nearest} cannot be written to ({error.strerror}); give another"
        ) from error


def open_text(config: Config) -> Data:
    """The data of a resolved config, this process' share of it."""
    return open_data(
        dataclasses.replace(config.data, tokenizer=tokenizer_file(config)),
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=resolved(config.model, "vocab_size"),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
