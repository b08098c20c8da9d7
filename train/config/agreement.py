"""Checks that a resumed run has the flags that it began with."""

from typing import Any

from train.config.methods import METHODS
from train.host.paths import AnyPath

Json = dict[str, Any]

# What may differ between a run and its resumption: where and how it is run, and what
# it reports. All else decides what the next step does. Data may have moved: whether it
# is the same is known by its fingerprint.
FREE = ("preset", "out", "resume", "report.", "mesh.", "processes.")
MOVED = ("data.source", "data.eval_source", "data.tokenizer", "data.data_dir")
MOVED += ("data.chat_template",)
FREE += (*MOVED, "data.cache_dir")
# How many documents were read is in the fingerprint.
FREE += ("data.bad_lines",)
# And whether it is taken layer by layer, if nothing is clipped: the checkpoints are
# alike, and the steps the same to rounding (but for one that is skipped).
CLIP = "optimizer.clip_norm"
# Where it falls is known by the rates of the steps that are done (`check_rates`).
DECAY = "optimizer.decay"
# Options that are newer than some runs, and what those did.
NEWER = {
    "optimizer.stagger": False,
    "model.shape_from": None,
    "model.shape": None,
    "data.example_field": None,
    "data.example_form": "auto",
    "data.train_on": "answers",
}


def check_same_run(stored: Json, given: Json, path: AnyPath) -> None:
    """ValueError, with the flags, unless two configs agree on all that is not FREE.

    Args:
      stored: of the run, as JSON.
      given: of its resumption.
      path: where the former is.
    """
    old, new = NEWER | _flat(stored), NEWER | _flat(given)
    same = all(x.get(CLIP, ...) is None for x in (old, new))
    same &= all(x.get("microbatches") == 1 for x in (old, new))
    free = (*FREE, DECAY, "layerwise") if same else (*FREE, DECAY)
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
        f"  {flag_of(field)}: {old.get(field, 'absent')} there, "
        f"{new.get(field, 'absent')} here" + why.get(field, "")
        for field in sorted(old.keys() | new.keys())
        if not field.startswith(free) and old.get(field) != new.get(field)
    ]
    if differences:
        raise ValueError(
            f"{path} is of a run with other flags; leave these out, or start a new run "
            "in another --out:\n" + "\n".join(differences)
        )


def why_steps_matter(optimizer: Json) -> str | None:
    """Why a run, by its optimizer as JSON, cannot have more steps; None if it can."""
    name = optimizer.get("name")
    if name in METHODS and "switch" in METHODS[name].reads():
        return f"{name} changes its subspace after a part of the steps"
    if optimizer.get("schedule", "cosine") != "cosine":
        return None
    if optimizer.get("warmup") == 0 and optimizer.get("final") == 1:
        return None
    return (
        "a cosine ends at the last step; steps can be added to runs that began with "
        "--schedule wsd or --schedule constant"
    )


def flag_of(field: str) -> str:
    """ "--vocab-size" of "model.vocab_size"."""
    own = {"optimizer.name": "--optimizer", "model.shape_from": "--model"}
    if field in own:
        return own[field]
    return "--" + field.rpartition(".")[2].replace("_", "-")


def _flat(config: Json, prefix: str = "") -> Json:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
