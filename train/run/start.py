"""The start of a run: its data, its tokenizer, and its first weights."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import lowrank_optax as lro
from models import (
    Params,
    check_pretrained,
    init_params,
    load_pretrained,
    pretrained_config,
)
from train.config.config import Config, model_config, resolved
from train.config.shape import COMPUTED, PUBLISHED, published_folder
from train.data.dataset import Data, open_data
from train.data.sources import holds_tokens
from train.data.tokenizer import Tokenizer
from train.engine.mesh import on_mesh
from train.engine.optimizer import make_schedule
from train.host.paths import AnyPath, to_path
from train.records.metrics import Record, read_metrics
from train.run.own_tokenizer import own_tokenizer
from train.run.restore import load_weights
from train.run.stored import (
    checked_step,
    read_config,
    run_and_step,
    saved_steps,
    stored_tokenizer,
)

Shardings = Callable[[Any], Any]
"""A tree of weights to a tree of shardings."""


def open_text(config: Config) -> Data:
    """Opens the data of a resolved config, this process' share of it."""
    return open_data(
        dataclasses.replace(
            config.data,
            tokenizer=tokenizer_file(config),
            chat_template=chat_template_file(config),
        ),
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=resolved(config.model, "vocab_size"),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def pinned(config: Config) -> Config:
    """A resolved config whose `init_from` names the step, as a run stores it.

    The newest checkpoint may change; a run that is resumed needs the one of its start.

    Raises:
      FileNotFoundError: the folder holds no run, or no such checkpoint.
    """
    if config.init_from is None:
        return config
    if (published := published_folder(config.init_from)) is not None:
        return dataclasses.replace(config, init_from=f"{PUBLISHED}{published}")
    folder, step = run_and_step(config.init_from)
    own: AnyPath = resolved(config, "out")
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


def begun_from(config: Config) -> AnyPath | None:
    """The folder that `init_from` names, of a run or of published weights."""
    if config.init_from is None:
        return None
    published = published_folder(config.init_from)
    return run_and_step(config.init_from)[0] if published is None else published


def with_shape_of_run(config: Config) -> Config:
    """Takes a published shape from the run that `init_from` names.

    Sizes that have a name are named again.
    """
    if config.init_from is None or published_folder(config.init_from) is not None:
        return config
    own, path = config.model, run_and_step(config.init_from)[0] / "config.json"
    if own.shape_from is not None or own.size != "tiny" or not path.is_file():
        return config  # `check_start` says what is wrong there
    there = read_config(path.parent).model
    if there.shape is None:
        return config
    shape = {"shape_from": there.shape_from, "shape": there.shape}
    return dataclasses.replace(config, model=dataclasses.replace(own, **shape))


def tokenizer_file(config: Config) -> str | None:
    """The tokenizer that a resolved and pinned config names, or inherits.

    A resumed run has its own, if the file that it was given is gone. A run that starts
    with given weights has the tokenizer in their folder, unless it names one.

    Raises:
      ValueError: a resumed run is given another tokenizer than its own.
    """
    own = stored_tokenizer(resolved(config, "out")) if config.resume else None
    given = config.data.tokenizer and to_path(config.data.tokenizer)
    if own and given and given.is_file() and given.read_bytes() != own.read_bytes():
        raise ValueError(
            f"tokenizer {given} is not the one that the run began with, which is "
            f"{own}: put that back, or leave it out"
        )
    folder = begun_from(config)
    if own is None and config.data.tokenizer is None and folder is not None:
        own = stored_tokenizer(folder)
        if own is None and published_folder(config.init_from) is not None:
            _check_needs_no_tokenizer(config)
    return config.data.tokenizer if own is None else str(own)


def chat_template_file(config: Config) -> str | None:
    """The chat template that a resolved config names; None for the tokenizer's own.

    A resumed run has its own beside its tokenizer, if the file it was given is gone.
    """
    given = config.data.chat_template
    if given is None or not given.endswith(".jinja") or to_path(given).is_file():
        return given
    own = resolved(config, "out") / "chat_template.jinja"
    return None if config.resume and own.is_file() else given


def check_start(config: Config, tokenizer: Tokenizer | None) -> None:
    """Checks whether a run can start with the weights that `init_from` names.

    It prints a line if it cannot tell whether both runs have the same tokenizer.

    Raises:
      FileNotFoundError: there are no such weights.
      ValueError: the model has another shape, or the text another tokenizer.
    """
    if config.init_from is None:
        return
    if config.resume and saved_steps(resolved(config, "out")):
        return  # They were needed at its first step alone.
    if (published := published_folder(config.init_from)) is not None:
        _check_published(config, published)
        return
    folder, step = run_and_step(config.init_from)
    checked_step(folder, step)
    there, here = read_config(folder).model, config.model
    for flag, field in (
        *(("--size", "size"), ("--model", "shape_from")),
        ("--vocab-size", "vocab_size"),
    ):
        old, new = getattr(there, field), getattr(here, field)
        if old != new and not (field != "vocab_size" and there.base == here.base):
            raise ValueError(
                f"init_from: {folder} has {field} {old}, and this run {new}; the "
                f"weights do not fit: give {flag} {old}"
            )
    theirs = own_tokenizer(folder)
    if theirs is None or tokenizer is None:
        if jax.process_index() == 0:
            print(
                f"init_from: {folder} or this run has no tokenizer, so whether a token "
                "means the same in both is not known"
            )
    elif theirs.content != tokenizer.content:
        raise ValueError(
            f"init_from: {folder} has another tokenizer than this run, so its weights "
            f"would read other tokens; leave out --tokenizer, or give "
            f"{stored_tokenizer(folder)}"
        )


def _check_needs_no_tokenizer(config: Config) -> None:
    """FileNotFoundError for text: a tokenizer that is trained has other tokens."""
    sources = (config.data.source, config.data.eval_source or config.data.source)
    if not all(map(holds_tokens, sources)):
        raise FileNotFoundError(
            f"init_from: {begun_from(config)} has neither tokenizer.json nor "
            "tokenizer.model, without which the weights cannot read text: download "
            "it, or give the file to --tokenizer"
        )


def _check_published(config: Config, folder: Path) -> None:
    """ValueError unless the weights in the folder are those of the run's model."""
    check_pretrained(folder)
    here, there = model_config(config.model), pretrained_config(folder)
    for name, value in dataclasses.asdict(there).items():
        if name not in COMPUTED and value != dataclasses.asdict(here)[name]:
            raise ValueError(
                f"init_from: {folder} has {name}={value}, and this run "
                f"{getattr(here, name)}; the weights do not fit: leave out --size, "
                "--model and --vocab-size"
            )


def _matrices(weights: Params) -> frozenset[str]:
    """The paths of weights that are stored in 8 bits, which all of them decide."""

    def quantized(x: object) -> bool:
        return isinstance(x, lro.weights.QuantizedWeights)

    stored = jax.eval_shape(partial(lro.weights.store, dtype="int8"), weights)
    leaves = jax.tree_util.tree_leaves_with_path(stored, is_leaf=quantized)
    return frozenset(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in leaves
        if quantized(x)
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _in_8_bits(matrices: frozenset[str], path: str, weight: jax.Array) -> Any:
    """A leaf as a run stores it, whose layers are rounded one at a time."""

    def store(x: jax.Array) -> Any:
        return lro.weights.store({path: x}, "int8", matrices.__contains__)[path]

    return jax.lax.map(store, weight) if path.startswith("layers/") else store(weight)


def check_rates(config: Config) -> None:
    """Checks whether the steps done had the learning rates that they would have now.

    Of a run that is resumed with more steps, those of its decay did not.

    Raises:
      ValueError: the checkpoint to go on from is of such a step; it names another.
    """
    if not config.resume or config.optimizer.schedule != "wsd":
        return
    folder: AnyPath = resolved(config, "out")
    rate = make_schedule(config.optimizer, config.steps)
    records = [r for r in read_metrics(folder) if "learning_rate" in r]
    rates = np.array([record["learning_rate"] for record in records])
    done = np.array([record["step"] for record in records], int)
    suspect = np.flatnonzero(~np.isclose(rates, rate(done - 1), 1e-4))

    def was_another(record: Record) -> bool:
        # Of the steps before it, some that were skipped did not move the schedule.
        counts = np.arange(record["step"] - 1 - record["skipped"], record["step"])
        return not np.isclose(record["learning_rate"], rate(counts), 1e-4).any()

    differ = [records[i]["step"] for i in suspect if was_another(records[i])]
    first, steps = min(differ, default=config.steps + 1), saved_steps(folder)
    begin = max(steps, default=0) if config.resume_from is None else config.resume_from
    if begin < first:
        return
    earlier = max((step for step in steps if step < first), default=None)
    raise ValueError(
        f"{folder}: step {first} was taken with another learning rate than a run of "
        f"{config.steps} steps has there, so it cannot go on from step {begin}; "
        + (
            "no checkpoint is from before that: begin a new run with the weights of "
            f"this, --init-from {folder} --out ANOTHER"
            if earlier is None
            else f"go on from the last checkpoint before, --resume-from {earlier}"
        )
    )


def weights_for(config: Config, shardings: Shardings) -> Params:
    """Loads the weights that `init_from` of a pinned config names onto the devices.

    They are as stored there; of published ones each device's part alone is read.
    """
    if (published := published_folder(config.init_from)) is not None:
        model = model_config(config.model)
        like = jax.eval_shape(partial(init_params, model), jax.random.key(0))
        dtype = config.model.weight_dtype
        load = partial(load_pretrained, published, sharding=shardings(like))
        if dtype != "int8":
            return load(dtype=dtype)
        # Rounded once, from what the files have.
        return load(dtype=None, store=partial(_in_8_bits, _matrices(like)))
    folder, step = run_and_step(resolved(config, "init_from"))
    weights = load_weights(folder, checked_step(folder, step))
    return on_mesh(shardings(weights), weights)
