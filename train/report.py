"""What a finished run leaves behind: numbers, a loss curve, a sample, memory."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_optax as lro
from models import generate
from train.config import Config, label, resolved
from train.data import Data
from train.loop import Trained
from train.memory import describe, device_peak
from train.metrics import read_metrics
from train.picture import draw_run


def summarize(config: Config, trained: Trained) -> dict[str, Any]:
    """The numbers of a finished run, read from its metrics file and its state.

    `train_s` is the time of all steps, without compilation, evaluation and saving;
    `ms_per_step` and `tokens_per_s` leave out the first step too, which also loads
    the program. Bytes are those of one device.
    """
    records = read_metrics(resolved(config, "out"))
    steps = [0, *(r["step"] for r in records)]
    took = [
        r["ms_per_step"] / 1e3 * (step - before)
        for r, before, step in zip(records, steps, steps[1:], strict=False)
    ]
    timed = slice(1 if len(records) > 1 else 0, None)
    ms_per_step = 1e3 * sum(took[timed]) / (steps[-1] - steps[timed][0])
    weights = jax.eval_shape(lambda: trained.weights)
    memory = lro.memory_report(trained.work.optimizer.tx, weights)
    return {
        "optimizer": label(config.optimizer),
        "learning_rate": config.optimizer.learning_rate,
        "steps": steps[-1],
        "train_loss": records[-1]["loss"],
        "eval_loss": records[-1]["eval_loss"],
        "ppl": math.exp(min(records[-1]["eval_loss"], 700.0)),  # e^710 overflows
        "state_bytes": memory.state_bytes,
        "adamw_bytes": memory.adamw_bytes,
        "step_bytes": trained.program.step_bytes,
        "device_peak_bytes": device_peak(),
        "compile_s": trained.program.compile_s,
        "train_s": sum(took),
        "ms_per_step": ms_per_step,
        "tokens_per_s": 1e3 * config.batch_size * config.seq_len / ms_per_step,
        "skipped": records[-1]["skipped"],
        "curve": [[r["step"], r["loss"]] for r in records],
    }


def finish(config: Config, data: Data, trained: Trained, wall_s: float) -> None:
    """Print the outcome; write summary.json, loss.png, memory.txt and sample.txt."""
    sample = sample_text(config, data, trained)
    if jax.process_index() != 0:
        return
    folder: Path = resolved(config, "out")
    weights = jax.eval_shape(lambda: trained.weights)
    state = lro.memory_report(trained.work.optimizer.tx, weights)
    memory = f"{state}\n\n{describe(trained.program.memory, trained.program.adamw)}"
    summary = {**summarize(config, trained), "wall_s": wall_s}
    (folder / "memory.txt").write_text(memory + "\n")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_run(read_metrics(folder), folder / "loss.png")
    if sample is not None:
        (folder / "sample.txt").write_text(sample + "\n")
    print(memory)
    print(f"\n{sample}\n" if sample else "\nno text sample: there is no tokenizer\n")
    print(
        f"{summary['optimizer']}: {summary['steps']} steps, held-out loss "
        f"{summary['eval_loss']:.4f} (perplexity {summary['ppl']:.2f}), "
        f"{summary['tokens_per_s']:.0f} tokens/s, {wall_s:.0f} s in all; see {folder}"
    )


def sample_text(config: Config, data: Data, trained: Trained) -> str | None:
    """The prompt and the model's continuation; None without a tokenizer, or length."""
    steps = config.report.sample_tokens
    if data.tokenizer is None or steps == 0:
        return None
    prompt = jnp.asarray([data.tokenizer.encode(config.report.prompt)], jnp.int32)
    key = jax.random.key(config.seed)
    tokens = generate(
        trained.work.model,
        trained.weights,
        prompt,
        steps=steps,
        key=key,
        temperature=0.8,
    )
    return data.tokenizer.decode(tokens[0].tolist())
