"""Published settings by name, to begin from; and what is best here.

Pre-training, as METHOD-SIZE. Sources: the pre-training scripts of GaLore, Fira and
APOLLO, and Tables 5 and 6 of the SARA paper. What all have in common: C4 by the t5-base
tokenizer, one document a window (`--windows documents`), weight decay 0, b1 0.9, b2
0.999, a tenth of the steps with a rising rate, then a cosine to a tenth of the peak.

What differs here: weights are float32 unless `--weight-dtype` says so (the
scripts have bfloat16 ones), and Adam's eps is 1e-8 (theirs is 1e-6).

Fine-tuning, as METHOD-WORK, without a size: the weights have one. Sources: GaLore's
command for RoBERTa on GLUE, and the settings of LLaMA-3-8B-Instruct on instructions in
APOLLO's repository, for both methods (docs/choosing/fine_tuning.md).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

SIZES = ("60m", "130m", "350m", "1b", "7b")

# Of GaLore's scripts.
STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
TOKENS = {"60m": 1.5e9, "130m": 2.2e9, "350m": 6.0e9, "1b": 13.4e9}  # SARA's Table 1, 2

Flags = dict[str, Any]
"""Options of a run by their names, as the command line has them."""

C = TypeVar("C")


def _galore(size: str) -> Flags:
    """GaLore's scripts/benchmark_c4; at 1b the paper's rank (the script has 1024)."""
    large = size == "7b"
    return {
        "optimizer": "galore",
        "rank": RANKS[size],
        "refresh_every": 500 if large else 200,
        "scale": 0.25,
        "learning_rate": 0.005 if large else 0.01,
        "clip_norm": 1.0 if large else None,
        "seq_len": 256,
        "steps": STEPS[size],
    }


def _fira(size: str) -> Flags:
    """Fira's scripts: GaLore's, but for the scale at 1b, and 7b."""
    large = {"rank": 64, "steps": 10_000} if size == "7b" else {}
    scale = {"scale": 0.0625} if size == "1b" else {}
    return {**_galore(size), "optimizer": "fira", **scale, **large}


def _apollo(size: str) -> Flags:
    """APOLLO's scripts."""
    ranks = {"60m": 128, "130m": 192, "350m": 256, "1b": 256, "7b": 256}
    return {
        **_galore(size),
        "optimizer": "apollo",
        "rank": ranks[size],
        "refresh_every": 200,
        "scale": 1.0,
        "learning_rate": 0.01,
    }


def _sara(size: str) -> Flags:
    """GaLore with SARA: Table 5, whose windows have 512 tokens.

    The steps are the tokens of Tables 1 and 2 over those of a batch; warm-up as the
    table has it.
    """
    warmup = {"60m": 1000, "130m": 2000, "350m": 6000, "1b": 10_000}[size]
    steps = round(TOKENS[size] / (512 * 512))
    return {
        **_galore(size),
        "basis": "sara",
        "seq_len": 512,
        "steps": steps,
        "warmup": warmup / steps,
    }


def _fira_sara(size: str) -> Flags:
    """Fira with SARA: Table 6, the settings of Table 5."""
    return {**_sara(size), "optimizer": "fira"}


def _adamw(size: str) -> Flags:
    """The full-rank baseline of SARA's section 4.1, on the work of its GaLore runs."""
    of_galore = ("basis", "rank", "refresh_every", "scale")
    shared = {k: v for k, v in _sara(size).items() if k not in of_galore}
    rate = 0.0025 if size == "60m" else 0.001
    return {**shared, "optimizer": "adamw", "learning_rate": rate}


def _spectral_adam(size: str) -> Flags:
    """The best on 39 M tokens (docs/results/losses_60m.md); not tried on more."""
    return {
        "optimizer": "spectral_adam",
        "rank": RANKS[size],
        "refresh_every": 10,
        "learning_rate": {"60m": 4.5e-3, "130m": 3e-3}[size],
        "b2": {"60m": 0.98, "130m": 0.99}[size],
        "clip_norm": None,
        "batch_size": 128,
        "seq_len": 256,
        "steps": 1200,
    }


# GaLore's command for MRPC of GLUE. Its rate falls in a straight line to 0, without a
# warm-up: so does wsd's, if all but a thousandth of the steps are its decay.
_FINE_TUNING: Flags = {
    "optimizer": "galore",
    "rank": 4,
    "refresh_every": 500,
    "scale": 4.0,
    "learning_rate": 3e-5,
    "schedule": "wsd",
    "warmup": 0,
    "decay": 0.999,
    "final": 0.0,
    "weight_decay": 0.0,
    "clip_norm": None,
    "batch_size": 16,
    "seq_len": 512,
}

# What both settings for LLaMA-3-8B-Instruct share.
_INSTRUCTIONS: Flags = {
    "rank": 128,
    "refresh_every": 200,
    "learning_rate": 1e-5,
    "warmup": 0.1,
    "final": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "batch_size": 1,
    "seq_len": 2048,
}


def _of(make: Any, name: str, sizes: tuple[str, ...]) -> dict[str, Flags]:
    common = {"batch_size": 512, "warmup": 0.1, "final": 0.1, "weight_decay": 0.0}
    return {f"{name}-{s}": {"size": s, **common, **make(s)} for s in sizes}


PRESETS: dict[str, Flags] = {
    **_of(_galore, "galore", SIZES),
    **_of(_fira, "fira", SIZES),
    **_of(_apollo, "apollo", SIZES),
    **_of(_sara, "galore-sara", SIZES[:4]),
    **_of(_fira_sara, "fira-sara", SIZES[:3]),
    **_of(_adamw, "adamw", SIZES[:4]),
    **_of(_spectral_adam, "spectral-adam", SIZES[:2]),
    "galore-fine-tuning": _FINE_TUNING,
    "galore-instructions": {"optimizer": "galore", "scale": 2.0, **_INSTRUCTIONS},
    "apollo-instructions": {"optimizer": "apollo", "scale": 32.0, **_INSTRUCTIONS},
}


def from_preset(default: C, argv: Sequence[str]) -> C:
    """A config with its defaults, or with those of the `--preset` in a command line.

    Defaults that are of a run with this preset stay: some may be its own flags.
    """
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--preset")
    name = look.parse_known_args(argv)[0].preset
    # A name that is none is refused by whoever parses all of it.
    if name not in PRESETS or vars(default).get("preset") == name:
        return default
    return with_flags(default, {"preset": name, **PRESETS[name]})


def with_flags(config: C, flags: Flags) -> C:
    """A config, with parts, that has these options; names are the command line's.

    Raises:
      ValueError: an option that no part has, or a value that it refuses.
    """
    left = dict(flags)
    given: dict[str, Any] = {}
    this: Any = config
    for field in dataclasses.fields(this):
        part = getattr(config, field.name)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            names = {f.name for f in dataclasses.fields(part)}
            # On the command line the optimizer's name is --optimizer.
            own = {"optimizer": "name"} if field.name == "optimizer" else {}
            taken = {k: own.get(k, k) for k in left if own.get(k, k) in names}
            values = {name: left.pop(key) for key, name in taken.items()}
            given[field.name] = dataclasses.replace(part, **values)
        elif field.name in left:
            given[field.name] = left.pop(field.name)
    if left:
        raise ValueError(f"no run has the options {sorted(left)}")
    return dataclasses.replace(this, **given)
