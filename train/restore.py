"""A run's checkpoint in use: in a notebook, as the start of a new run, for text."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import lowrank_optax as lro
from models import LlamaConfig, Params
from models.params import draw_params
from train.checkpoint import brief, seals_of
from train.checksum import checksums
from train.config import Config, from_json, model_config, resolved
from train.noise import quiet
from train.tokenizer import Tokenizer, open_tokenizer
from train.writing import write_bytes


class Run(NamedTuple):
    """What a run has learnt.

    Attributes:
      config: the run's own, resolved.
      model: the shape of its LLaMA.
      weights: on the default device, as `models.forward` and `models.generate` take
        them; those kept in int8 are in the model's compute dtype, others as they are
        kept.
      tokenizer: the run's; None if it was trained on token files without one.
      step: how many steps were done.
    """

    config: Config
    model: LlamaConfig
    weights: Params
    tokenizer: Tokenizer | None
    step: int


def load_run(folder: str | Path, step: int | None = None) -> Run:
    """A run as one of its checkpoints has it; changes nothing in its folder.

    The devices may be others than those it was trained on, and the run may still be
    going on.

    Args:
      folder: the run's folder, the trainer's `--out`; "FOLDER@STEP" names the step too.
      step: of the checkpoint; None for the newest.

    Raises:
      FileNotFoundError: the folder holds no run, or no such checkpoint.
      ValueError: its config is of another version.

    Example:
      run = load_run("runs/tiny-grass_jump")
      tokens = jnp.asarray([run.tokenizer.encode("The American people")])
      logits = models.forward(run.model, run.weights, tokens)
    """
    folder, named = run_and_step(str(folder))
    step = checked_step(folder, named if step is None else step)
    config = read_config(folder)
    model = model_config(config.model)
    stored = load_weights(folder, step)
    weights = lro.dense(jax.tree.map(jax.numpy.asarray, stored), model.compute_dtype)
    kept = kept_tokenizer(folder)
    return Run(config, model, weights, kept and open_tokenizer(kept), step)


def load_weights(folder: Path, step: int) -> Any:
    """The weights of a checkpoint as they are kept, in the host's memory.

    Raises:
      ValueError: it is damaged.
    """
    config = read_config(folder)
    shards = config.optimizer.block_shards or 1
    store = partial(lro.store_weights, dtype=config.model.weight_dtype, shards=shards)
    draw = partial(draw_params, model_config(config.model), store=store)
    like = {"params": jax.eval_shape(draw, jax.random.key(0))}
    restore = ocp.args.PyTreeRestore(
        item=like,
        restore_args=jax.tree.map(
            lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), like
        ),
        partial_restore=True,  # the weights alone, of all that a step changes
    )
    path = (folder / "checkpoints" / str(step)).absolute()
    # Not by a CheckpointManager, which would tidy up what a run is writing just now.
    with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        try:
            weights = checkpointer.restore(path / "state", args=restore)["params"]
            whole = seals_of(path)["state"]
        except Exception as error:  # damaged files give errors of every class
            raise _damaged(folder, step, brief(error)) from error
    found = checksums(weights)
    if any(whole[f".params{name}"] != value for name, value in found.items()):
        raise _damaged(folder, step, "it does not hold what was saved")
    return weights


def _damaged(folder: Path, step: int, why: str) -> ValueError:
    others = [s for s in saved_steps(folder) if s != step]
    return ValueError(
        f"the checkpoint of step {step} in {folder} cannot be used: {why}; name "
        f"another, FOLDER@STEP, of {others}"
    )


def run_and_step(name: str) -> tuple[Path, int | None]:
    """The folder and the step that RUN_FOLDER or RUN_FOLDER@STEP names."""
    folder, _, step = name.rpartition("@")
    if step.isdigit() and folder and not Path(name).exists():
        return Path(folder).expanduser(), int(step)
    return Path(name).expanduser(), None


def checked_step(folder: Path, step: int | None) -> int:
    """The step, which has a checkpoint; the newest for None.

    Raises:
      FileNotFoundError: the folder holds no run, or no such checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run: it has no config.json")
    there = saved_steps(folder)
    if not there:
        raise FileNotFoundError(
            f"{folder} has no checkpoint; train it with --checkpoint-every above 0"
        )
    if step is not None and step not in there:
        raise FileNotFoundError(
            f"{folder} has no checkpoint of step {step}; it has {there}"
        )
    return there[-1] if step is None else step


def saved_steps(folder: Path) -> list[int]:
    """Those of a run's complete checkpoints, in order."""
    names = (path.name for path in (folder / "checkpoints").glob("*/"))
    return sorted(int(name) for name in names if name.isdigit())


def read_config(folder: Path) -> Config:
    """A run's resolved config."""
    path = folder / "config.json"
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def kept_tokenizer(folder: Path) -> Path | None:
    """The file of a run's tokenizer, if it has one."""
    found = (folder / f"tokenizer{suffix}" for suffix in (".json", ".model"))
    return next(filter(Path.is_file, found), None)


def keep_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Make a tokenizer a run's, unless it has one: process 0 writes a file of it."""
    if tokenizer is None or jax.process_index() or kept_tokenizer(folder):
        return
    write_bytes(folder / f"tokenizer{tokenizer.suffix}", tokenizer.content)


def pinned(config: Config) -> Config:
    """A resolved config whose `init_from` names the step, as a run stores it.

    Which is the newest one may change: a run that is resumed has the one of its start.

    Raises:
      FileNotFoundError: the folder holds no run, or no such checkpoint.
    """
    if config.init_from is None:
        return config
    folder, step = run_and_step(config.init_from)
    own: Path = resolved(config, "out")
    if config.resume and (own / "config.json").is_file():
        began = read_config(own).init_from
        if began is not None and step is None and run_and_step(began)[0] == folder:
            return dataclasses.replace(config, init_from=began)
    if not config.resume:
        # That run may be going on, and the processes look one after the other.
        newest = multihost_utils.broadcast_one_to_all(checked_step(folder, step))
        step = int(newest)
    name = folder if step is None else f"{folder}@{step}"
    return dataclasses.replace(config, init_from=str(name))


def tokenizer_file(config: Config) -> str | None:
    """The tokenizer that a resolved and pinned config names, or inherits.

    A run that goes on has its own, if the file that it was given is gone; one that
    begins with another's weights has that one's, unless it names one.

    Raises:
      ValueError: a run that goes on is given another tokenizer than its own.
    """
    own = kept_tokenizer(resolved(config, "out")) if config.resume else None
    given = None if config.data.tokenizer is None else Path(config.data.tokenizer)
    if own and given and given.is_file() and given.read_bytes() != own.read_bytes():
        raise ValueError(
            f"tokenizer {given} is not the one that the run began with, which is "
            f"{own}: put that back, or leave it out"
        )
    if own is None and config.data.tokenizer is None and config.init_from is not None:
        own = kept_tokenizer(run_and_step(config.init_from)[0])
    return config.data.tokenizer if own is None else str(own)


def check_start(config: Config, tokenizer: Tokenizer | None) -> None:
    """Whether a run can begin with the weights that it names, in a model of its shape.

    Says so if it cannot tell whether both have the same tokenizer.

    Raises:
      FileNotFoundError: there are no such weights.
      ValueError: the model has another shape, or the text another tokenizer.
    """
    if config.init_from is None:
        return
    if config.resume and saved_steps(resolved(config, "out")):
        return  # They were needed at its first step alone.
    folder, step = run_and_step(config.init_from)
    checked_step(folder, step)
    there, here = read_config(folder).model, config.model
    for flag, field in (("--size", "size"), ("--vocab-size", "vocab_size")):
        old, new = getattr(there, field), getattr(here, field)
        if old != new:
            raise ValueError(
                f"init_from: {folder} has {field} {old}, and this run {new}; the "
                f"weights do not fit: give {flag} {old}"
            )
    kept = kept_tokenizer(folder)
    if kept is None or tokenizer is None:
        if jax.process_index() == 0:
            print(
                f"init_from: {folder} or this run has no tokenizer, so whether a token "
                "means the same in both is not known"
            )
    elif open_tokenizer(kept).content != tokenizer.content:
        raise ValueError(
            f"init_from: {folder} has another tokenizer than this run, so its weights "
            f"would read other tokens; leave out --tokenizer, or give {kept}"
        )


def weights_for(config: Config) -> Any:
    """The weights that `init_from` of a pinned config names, in the host's memory.

    They are as that run kept them.
    """
    folder, step = run_and_step(resolved(config, "init_from"))
    return load_weights(folder, checked_step(folder, step))
