"""The folder of a run: whose run it is, and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp

from train.config import Config, resolved, to_json
from train.optimizer import why_steps_matter
from train.step import TrainState

# What may differ between a run and its resumption: where and how it is run, and what
# it reports. All else decides what the next step does.
FREE = ("out", "resume", "data.cache_dir", "report.", "processes.")
# And whether it is taken layer by layer, if nothing is clipped: the checkpoints are
# alike, and the steps the same to rounding (but for one that is skipped).
CLIP = "optimizer.clip_norm"


def check_folder(config: Config) -> None:
    """Whether a resolved config may run in its folder; changes nothing.

    Raises:
      FileExistsError: a new run, but the folder holds one already.
      FileNotFoundError: `resume`, but the folder holds no run.
      ValueError: `resume`, but the run there has another configuration; the message
        names the fields.
    """
    path = resolved(config, "out") / "config.json"
    if config.resume:
        if not path.exists():
            raise FileNotFoundError(
                f"{path.parent} holds no run to resume; leave out --resume to start one"
            )
        check_same_run(json.loads(path.read_text()), json.loads(to_json(config)), path)
    elif path.exists() and jax.process_index() == 0:
        raise FileExistsError(
            f"{path.parent} holds a run already; go on with it by --resume, or give "
            "another folder to --out"
        )


def store_config(config: Config) -> None:
    """Make a resolved config's folder this run's: the config is kept there as JSON."""
    if jax.process_index() == 0:
        folder: Path = resolved(config, "out")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(to_json(config))


def check_same_run(stored: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    """ValueError unless the two configs agree on all that is not FREE."""
    old, new = _flat(stored), _flat(given)
    same = all(x.get(CLIP, ...) is None for x in (old, new))
    same &= all(x.get("microbatches") == 1 for x in (old, new))
    free = (*FREE, "layerwise") if same else FREE
    fixed = why_steps_matter(stored["optimizer"])
    if fixed is None and old.get("steps", 0) <= new["steps"]:
        free = (*free, "steps")
    why = {
        "steps": f" ({fixed or 'a run can be made longer, not shorter'}; begin a new "
        f"one with the weights of this: --init-from {path.parent} --out ANOTHER)",
        "layerwise": " (a layer is clipped by its own norm, or all by one; and of "
        "microbatches the first chooses the bases, or all do)",
    }
    differences = [
        f"  {field}: {old.get(field, 'absent')} there, {new.get(field, 'absent')} here"
        + why.get(field, "")
        for field in sorted(old.keys() | new.keys())
        if not field.startswith(free) and old.get(field) != new.get(field)
    ]
    if differences:
        raise ValueError(
            f"{path} is of a run with another configuration; give the same values, or "
            "start a new run in another --out:\n" + "\n".join(differences)
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


class Checkpoints:
    """Saves and restores a training state together with the data iterator's.

    Saving is asynchronous; leaving the `with` block waits for what is pending. A
    checkpoint appears under its final name only when it is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator) -> None:
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(data),
        )
        self._manager.save(step, args=args)

    def restore(self, step: int, like: Any, data: grain.DatasetIterator) -> TrainState:
        """The state saved at `step`; puts the iterator where it was then.

        `like` is a tree of `jax.ShapeDtypeStruct` with shardings: without them the
        state would come back only on the devices it was saved from.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like),
            data=grain.checkpoint.CheckpointRestore(data),
        )
        return self._manager.restore(step, args=args)["state"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
