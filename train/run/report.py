"""Files that a finished run leaves: numbers, a loss curve, a sample, memory."""

import json
from typing import Any

import jax

import lowrank_optax as lro
from models import count_params
from train.config.config import (
    Config,
    ReportConfig,
    label,
    model_config,
    resolved,
    title,
)
from train.data.dataset import Data
from train.engine.layer_metrics import measures
from train.engine.memory import describe, device_peak
from train.host.atomic import write_text
from train.host.paths import AnyPath
from train.records.metrics import mean_ms, read_metrics
from train.records.perplexity import perplexity, published_perplexity
from train.records.plots import draw_measured, draw_run, draw_subspaces
from train.run.loop import Trained
from train.run.sampling import continued, prompt_tokens


def summarize(config: Config, trained: Trained) -> dict[str, Any]:
    """The numbers of a finished run, from its metrics file and its state.

    `ms_per_step`, `tokens_per_s` and `train_s`, the time of all steps, know nothing of
    compilation, evaluation, saving, and of the first step of each kind, which also
    loads its program; None if there were no others. The bytes of a state are those of
    all devices together, the others those of one.
    """
    records = read_metrics(resolved(config, "out"))
    if not records or records[-1]["step"] != config.steps:
        raise OSError(
            f"{resolved(config, 'out')}/metrics.jsonl lacks the last steps, which "
            "could not be written: make room, and go on from the checkpoint before, by "
            "--resume-from"
        )
    last, ms_per_step = records[-1]["step"], mean_ms(records)
    tokens = config.batch_size * config.seq_len
    weights = jax.eval_shape(lambda: trained.weights)
    memory = lro.memory_report(trained.work.optimizer.tx, weights)
    return {
        "optimizer": label(config.optimizer),
        "learning_rate": config.optimizer.learning_rate,
        "steps": last,
        "train_loss": records[-1]["loss"],
        "eval_loss": records[-1]["eval_loss"],
        "ppl": perplexity(records[-1]["eval_loss"]),
        "ppl_published": published_perplexity(
            records[-1]["eval_loss"], records[-1]["eval_batches"]
        ),
        "state_bytes": memory.state_bytes,
        "adamw_bytes": memory.adamw_bytes,
        "step_bytes": trained.program.step_bytes,
        "device_peak_bytes": device_peak(),
        "compile_s": trained.program.compile_s,
        "train_s": ms_per_step and ms_per_step / 1e3 * last,
        "ms_per_step": ms_per_step,
        "tokens_per_s": ms_per_step and 1e3 * tokens / ms_per_step,
        "skipped": records[-1]["skipped"],
        "curve": [[r["step"], r["loss"]] for r in records],
    }


def finish(config: Config, data: Data, trained: Trained, wall_s: float) -> None:
    """Writes numbers, memory.txt, pictures and sample.txt; prints the outcome."""
    folder: AnyPath = resolved(config, "out")
    weights = jax.eval_shape(lambda: trained.weights)
    state = lro.memory_report(trained.work.optimizer.tx, weights)
    memory = f"{state}\n\n{describe(trained.program.memory, trained.program.adamw)}"
    summary = {**summarize(config, trained), "wall_s": wall_s}
    main = jax.process_index() == 0
    if main:
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_text(folder / "memory.txt", memory + "\n")
        heading = f"{work_title(config)}, {title(config.optimizer)}"
        draw_run(read_metrics(folder), folder / "loss.png", heading)
        draw_run_subspaces(config)
    why = "there is no tokenizer"
    if config.report.sample_tokens == 0:
        why = "none was asked for (--sample-tokens 0)"
    try:
        sample = sample_text(config, data, trained)  # all processes together
    except Exception as error:  # of the device's memory, for one; the run is done
        sample, why = None, f"{type(error).__name__}: {error}"
    if not main:
        return
    if sample is not None:
        write_text(folder / "sample.txt", sample + "\n")
    print(memory)
    print(f"\n{f'no text sample: {why}' if sample is None else sample}\n")
    speed = summary["tokens_per_s"]
    print(
        f"{summary['optimizer']}: {summary['steps']} steps, held-out loss "
        f"{summary['eval_loss']:.4f} (perplexity {summary['ppl']:.2f}), "
        f"{'' if speed is None else f'{speed:.0f} tokens/s, '}"
        f"{wall_s:.0f} s in all; see {folder}"
    )


def draw_run_subspaces(config: Config) -> None:
    """Draws what a resolved config's run measures: subspace.png, and layers.png."""
    if measures(config.optimizer):
        folder: AnyPath = resolved(config, "out")
        heading = f"{work_title(config)}, {title(config.optimizer)}"
        records = read_metrics(folder)
        draw_subspaces(records, folder / "subspace.png", heading)
        if any("layer_energy" in name for record in records for name in record):
            runs = {config.optimizer.name: records}
            draw_measured(runs, "layer_energy", folder / "layers.png", heading)


def work_title(config: Config) -> str:
    """ "LLaMA-tiny (1.8M weights), 16 x 128 tokens a step", of a resolved config."""
    weights = count_params(model_config(config.model)) / 1e6
    return (
        f"{config.model.name} ({weights:,.1f}M weights), "
        f"{config.batch_size} x {config.seq_len} tokens a step"
    )


def check_prompt(config: ReportConfig, data: Data) -> None:
    """ValueError for a prompt that the model could not continue at the end."""
    if data.tokenizer is not None and config.sample_tokens:
        prompt_tokens(data.tokenizer, config.prompt, data.chat)


def sample_text(config: Config, data: Data, trained: Trained) -> str | None:
    """The prompt and its continuation; None without a tokenizer, or of length 0."""
    steps = config.report.sample_tokens
    if data.tokenizer is None or steps == 0:
        return None
    return continued(
        trained.work.model,
        trained.weights,
        data.tokenizer,
        config.report.prompt,
        chat=data.chat,
        tokens=steps,
        seed=config.seed,
    )
