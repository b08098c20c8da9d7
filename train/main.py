"""The command line of the trainer."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from train.config.config import resolved
from train.config.resolve import resolve, with_folder
from train.engine.mesh import make_mesh
from train.engine.optimizer import check_meant, check_optimizer
from train.host.atomic import check_writable
from train.host.errors import ended_by_signals, usage_errors
from train.host.processes import join_processes
from train.records.trackers import check_installed
from train.run.errors import run_errors
from train.run.flags import parse_run
from train.run.folder import check_folder, own_folder, resumed_if_there
from train.run.loop import train
from train.run.report import check_prompt, finish
from train.run.start import (
    check_rates,
    check_start,
    open_text,
    pinned,
    with_shape_of_run,
)

DESCRIPTION = """Train a LLaMA on text with a low-rank optimizer, or with AdamW.

Examples:
  python -m train                                    a small model, minutes on a CPU
  python -m train --optimizer spectral_adam          the lowest loss of those measured
  python -m train --optimizer adamw --out runs/adamw
  python -m train --optimizer galore --basis sara --rank 32 --refresh-every 50
  python -m train --out runs/tiny-grass_jump --resume  with the run's own flags
  python -m train --schedule wsd --steps 200 --out runs/w
  python -m train --out runs/w --resume-from 180 --steps 400
  python -m train --track wandb --out runs/tracked     (or trackio, or both)
  python -m train --init-from runs/tiny-grass_jump --source more.txt --out runs/more
  python -m train --init-from hf:FOLDER --source more.txt    published weights
  python -m train --init-from runs/more --windows examples --source chat.jsonl \\
    --chat-template plain --out runs/chat              answers to prompts
  python -m train --size 60m --batch-size 128 --seq-len 256 --microbatches 4
  mpirun -n 2 python -m train --distributed          two processes
  python -m train.compare --help                     several optimizers, same work
  python -m train.sample --help                      text from a trained model
  python -m train.export --help                      a run for transformers
  python -m train.spectrum --help                    what changed between checkpoints
  python -m train.bench --help                       what a step costs

A run leaves in its folder: config.json, data.json, tokenizer.json, metrics.jsonl,
tensorboard/, checkpoints/, loss.png, memory.txt, sample.txt and summary.json; with
--measure also subspace.png and layers.png, with --windows examples
chat_template.jinja, and with --track wandb.json, trackio.json and wandb/.
SIGTERM and Ctrl-C end a step and save a checkpoint; --resume goes on from it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; None reads it from `sys.argv`."""
    start = time.perf_counter()
    with ended_by_signals(), ExitStack() as stack:
        with usage_errors():
            config = parse_run(DESCRIPTION, argv, "python -m train")
            join_processes(config.processes)
            config = with_folder(with_shape_of_run(config))
            check_writable(resolved(config, "out"))
            check_installed(config.report.track)
            config = resumed_if_there(config)
            if not config.resume and config.resume_from is None:
                check_meant(config.optimizer, [config.optimizer])
            config = pinned(resolve(config))
            check_folder(config)
            check_rates(config)
            check_optimizer(config)
            mesh = make_mesh(config)
            data = open_text(config)
            check_prompt(config.report, data)
            check_start(config, data.tokenizer)
            stack.enter_context(own_folder(config, data.fingerprint))
        with run_errors():
            trained = train(config, data, mesh)
            finish(config, data, trained, time.perf_counter() - start)
        if trained.unsaved is not None:
            sys.exit(f"error: {trained.unsaved}")
