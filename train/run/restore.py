"""Weights from a run's checkpoint: for a notebook, a new run, or text."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

import lowrank_optax as lro
from models import LlamaConfig, Params
from models.params import draw_params
from train.config.config import Config, model_config
from train.data.chat import Chat
from train.data.tokenizer import Tokenizer
from train.host.paths import AnyPath, for_orbax
from train.host.quiet import quiet
from train.run.checkpoint import brief, stored_checksums
from train.run.checksum import checksums
from train.run.own_chat import own_chat
from train.run.own_tokenizer import own_tokenizer
from train.run.stored import checked_step, read_config, run_and_step, saved_steps


class LoadedRun(NamedTuple):
    """A trained model.

    Attributes:
      config: the run's own, resolved.
      model: the shape of its LLaMA.
      weights: on the default device, as `models.forward` and `models.generate` take
        them; int8 weights are in the model's compute dtype, others as stored.
      tokenizer: the run's; None if it was trained on token files without one.
      step: how many steps were done.
      chat: of a run that was trained on examples, what writes and encodes prompts.
      folder: the run's.
    """

    config: Config
    model: LlamaConfig
    weights: Params
    tokenizer: Tokenizer | None
    step: int
    chat: Chat | None
    folder: AnyPath


def load_run(folder: str | AnyPath, step: int | None = None) -> LoadedRun:
    """Loads a run from one of its checkpoints; changes nothing in its folder.

    The devices may differ from those of the training, and the run may be going on.

    Args:
      folder: the run's folder, the trainer's `--out`; "FOLDER@STEP" names the step too.
      step: of the checkpoint; None for the newest.

    Raises:
      FileNotFoundError: the folder holds no run, or no such checkpoint.
      ValueError: its config is of another version, its tokenizer is not the one that
        it was trained with, or the checkpoint is damaged.

    Example:
      import jax.numpy as jnp
      from models import forward
      from train.run.restore import load_run

      run = load_run("runs/tiny-grass_jump")
      tokens = jnp.asarray([run.tokenizer.encode("The American people")])
      logits = forward(run.model, run.weights, tokens)
    """
    folder, named = run_and_step(str(folder))
    step = checked_step(folder, named if step is None else step)
    config, tokenizer = read_config(folder), own_tokenizer(folder)
    model = model_config(config.model)
    stored = load_weights(folder, step)
    weights = lro.weights.dense(
        jax.tree.map(jax.numpy.asarray, stored), model.compute_dtype
    )
    chat = own_chat(folder, config, tokenizer)
    return LoadedRun(config, model, weights, tokenizer, step, chat, folder)


def load_weights(folder: AnyPath, step: int) -> Params:
    """Loads a checkpoint's weights as stored, into the host's memory.

    Raises:
      ValueError: it is damaged.
    """
    config = read_config(folder)
    store = partial(lro.weights.store, dtype=config.model.weight_dtype)
    draw = partial(draw_params, model_config(config.model), store=store)
    like = {"params": jax.eval_shape(draw, jax.random.key(0))}
    restore = ocp.args.PyTreeRestore(
        item=like,
        restore_args=jax.tree.map(
            lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), like
        ),
        partial_restore=True,  # the weights alone, of all that a step changes
    )
    path = folder / "checkpoints" / str(step)
    # Not by a CheckpointManager, which would tidy up what a run is writing just now.
    with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        try:
            weights = checkpointer.restore(for_orbax(path) / "state", args=restore)[
                "params"
            ]
            stored = stored_checksums(path)["state"]
        except Exception as error:  # damaged files give errors of every class
            raise _damaged(folder, step, brief(error)) from error
    found = checksums(weights)
    if any(stored[f".params{name}"] != value for name, value in found.items()):
        raise _damaged(folder, step, "it does not hold what was saved")
    return weights


def _damaged(folder: AnyPath, step: int, why: str) -> ValueError:
    others = [s for s in saved_steps(folder) if s != step]
    return ValueError(
        f"the checkpoint of step {step} in {folder} cannot be used: {why}; name "
        f"another, FOLDER@STEP, of {others}"
    )
