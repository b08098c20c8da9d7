"""Faults done to real runs: `python -m tests.helpers.faults --help`."""

import contextlib
import dataclasses
import io
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tests.helpers import faults_of_one, faults_of_places
from tests.helpers.workshop import (
    FEWER,
    FLAGS,
    SAVE_EVERY,
    STEPS,
    Outcome,
    Run,
    Workshop,
    alike,
    fill,
    last_step,
    prepare,
    same,
    small_disk,
    two,
    without_times,
)
from train.config.command_line import parse
from train.host.errors import STOPPED
from train.run.checkpoint import stored_checksums

DESCRIPTION = """Kill, stop, starve and deceive training runs, and see whether each goes
on with the same bits afterwards as a run that was left alone. Prints a table of what
was tried and survived; the exit status is 1 if anything was not. CPU.

Examples:
  python -m tests.helpers.faults               all of it, an hour on two cores
  python -m tests.helpers.faults --share 0.05  a twentieth of it
  python -m tests.helpers.faults --only kills disks
  python -m tests.helpers.faults --platform cuda --share 0.2 --only stops"""


@dataclasses.dataclass(frozen=True)
class Faults:
    """What is tried.

    Attributes:
      share: part of the full number of each.
      only: kinds of fault, by their names; all, if there are none.
      seed: of what is random: when, and where.
      platform: where the runs compute, as JAX names it: cpu, cuda. Two processes at
        once are for a CPU.
    """

    share: float = 1.0
    only: tuple[str, ...] = ()
    seed: int = 0
    platform: str = "cpu"


# --- faults: each yields an outcome for each time that it was tried ---


def kills(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGKILL at any time, many in one run, saves under way included."""
    out = work.fresh()
    for _ in range(count):
        resume = ["--resume"] if (out / "config.json").exists() else []
        run = Run(work, out, *resume)
        # From before the first step of this life to some saves later.
        run.wait_for(last_step(out) + work.random.randint(0, 2 * SAVE_EVERY))
        time.sleep(work.random.uniform(0, 0.2))
        run.signal(signal.SIGKILL)
        problem = run.wrong(run.end(), 0, -signal.SIGKILL)
        if (out / "summary.json").exists():
            yield problem or same(out, work.bits)
            out = work.fresh()
        else:
            yield problem
    if (out / "config.json").exists() and (problem := work.finished(out)):
        yield problem


def stops(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGTERM or SIGINT to a run: it saves, says so, and goes on with --resume."""
    for i in range(count):
        out = work.fresh()
        run = Run(work, out)
        run.wait_for(work.random.randint(1, STEPS - 4))
        asked = time.monotonic()
        run.signal(signal.SIGTERM if i % 3 else signal.SIGINT)
        problem = run.wrong(run.end(60), STOPPED, 0)
        if time.monotonic() - asked > 60:
            problem = problem or "took more than a minute"
        yield problem or work.finished(out)


def stops_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGTERM to one of two processes: both save and end; both, or one, go on."""
    expected = work.bits_of_two
    for i in range(count):
        out = work.fresh()
        pair = two(work, out)
        pair[0].wait_for(work.random.randint(1, 14))
        pair[i % 2].signal(signal.SIGTERM)
        problems = [run.wrong(run.end(60), STOPPED, 0) for run in pair]
        together = i % 3 != 1
        alone = (work, out, *FEWER, "--resume")
        again = two(work, out, "--resume") if together else [Run(*alone)]
        problems += [run.wrong(run.end(), 0) for run in again]
        problem = next(filter(None, problems), None)
        # One process goes on with what two have done on the same data.
        yield problem or (same if together else alike)(out, expected)


def damages(work: Workshop, count: int) -> Iterator[Outcome]:
    """A file of the newest checkpoint damaged: none is loaded with other numbers."""
    from train.run.checksum import checksums

    for _ in range(count):
        out = work.fresh()
        shutil.copytree(work.alone, out)
        newest = out / "checkpoints" / str(STEPS)
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        # Most of them in the arrays, where most of the bytes are.
        sizes = [1 + path.stat().st_size for path in files]
        path = work.random.choices(files, sizes if work.random.random() < 0.7 else None)
        told = damage(path[0], work.random)
        restored = restored_state(work, out)
        if isinstance(restored, str):
            yield f"{told}: {restored}"
            continue
        seals = stored_checksums(work.alone / "checkpoints" / str(int(restored.step)))
        same = checksums(restored) == seals["state"]
        yield None if same else f"{told}: other numbers, and not a word"


def damage(path: Path, draw: random.Random) -> str:
    """Do it; what was done."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "zeros", "cut", "emptied", "zeroed", "gone"])
    place = draw.randrange(len(content)) if content else 0
    if kind == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        end = min(place + 4096, len(content))
        content[place:end] = bytes(end - place)
    elif kind == "cut":
        del content[place:]
    elif kind == "emptied":
        content.clear()
    elif kind == "zeroed":
        content[:] = bytes(len(content))
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{kind} at {place} of {path.relative_to(path.parents[3])}"


def restored_state(work: Workshop, out: Path) -> Any:
    """The state that a resume of `out` begins with, or what was said instead."""
    from train.config.config import Config
    from train.config.resolve import resolve
    from train.engine.mesh import make_mesh
    from train.run.checkpoint import CheckpointError, Checkpoints
    from train.run.first_state import initial
    from train.run.loop import work_of
    from train.run.start import open_text

    argv = [*FLAGS, *work.data, "--out", str(out), "--resume"]
    config = resolve(parse(Config, "", argv, "faults"))
    mesh = make_mesh(config)
    _, key = jax.random.split(jax.random.key(config.seed))
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        jax.set_mesh(mesh),
        Checkpoints(out, config.report.keep) as checkpoints,
    ):
        _, like = initial(work_of(config, key), mesh)
        batches = iter(open_text(config).train)
        try:
            restored = checkpoints.restore_newest(like, batches)
        except CheckpointError as error:
            return str(error)
    assert restored is not None
    told = "cannot be used" in said.getvalue()
    if restored.state.step != STEPS and not told:
        return "an older checkpoint without a word"
    return restored.state


def disks(work: Workshop, count: int) -> Iterator[Outcome]:
    """A disk that is full for a while, or until the run ends: it never hangs."""
    for i in range(count):
        with small_disk(work) as disk:
            out, filler = disk / "run", disk / "filler"
            run = Run(work, out)
            run.wait_for(work.random.randint(1, STEPS - 8))
            fill(filler)
            if i % 2:  # room again, while it goes on
                run.wait_for(last_step(out) + 8)
                time.sleep(0.5)
                filler.unlink()
            problem = run.wrong(run.end(), 0, 1)
            filler.unlink(missing_ok=True)
            yield problem or work.finished(out)


def changed_inputs(work: Workshop, count: int) -> Iterator[Outcome]:
    """Data, config or folder that changed before a resume: refused with a sentence."""
    del count  # each is tried once
    original = work.text.read_bytes()
    lines = original.splitlines(keepends=True)
    config = (work.alone / "config.json").read_text()
    texts = {
        "a byte": original.replace(b"a", b"e", 1),
        "the last byte of a text": original[:-4] + b"z" + original[-3:],
        "a document less": b"".join(lines[:-1]),
        "a document more": original + lines[0],
        "another order": b"".join(reversed(lines)),
        "cut short": b"".join(lines[:30]),
        "no text at all": b"",
    }
    moved = work.folder / "moved" / work.text.name
    moved.parent.mkdir()
    moved.write_bytes(original)
    unnoticed = "the text in another folder: unnoticed"
    found = refused(work, "the text in another folder", "--source", str(moved))
    yield None if found == unnoticed else f"moved data was refused: {found}"
    for name, content in texts.items():
        work.text.write_bytes(content)
        yield refused(work, name)
        work.text.write_bytes(original)
    other = work.folder / "other.jsonl"
    other.write_bytes(b"".join(lines[:40]))
    token = work.alone / "tokenizer.json"
    swapped = work.folder / "swapped.json"
    swapped.write_text(token.read_text().replace('"<|endoftext|>"', '"<eos>"'))
    flags = {
        "another file": ("--source", str(other)),
        "another held-out part": ("--eval-source", str(other)),
        "another tokenizer": ("--tokenizer", str(swapped)),
        "another seed": ("--seed", "1"),
        "another rate": ("--learning-rate", "0.1"),
        "more steps": ("--steps", str(2 * STEPS)),
        "another batch": ("--batch-size", "16"),
        "another method": ("--optimizer", "galore"),
    }
    for name, given in flags.items():
        yield refused(work, name, *given)
    folders = {
        "a config that is lost": lambda out: (out / "config.json").unlink(),
        "an empty config": lambda out: (out / "config.json").write_text(""),
        "a config that is cut": lambda out: (out / "config.json").write_text(
            config[: len(config) // 2]
        ),
        "a fingerprint that is lost": lambda out: (out / "data.json").unlink(),
        "an empty fingerprint": lambda out: (out / "data.json").write_text(""),
        # In what the command says: of what it does not say, config.json decides.
        "another's config": lambda out: (out / "config.json").write_text(
            config.replace('"rank": 8', '"rank": 9')
        ),
        "no folder": shutil.rmtree,
    }
    for name, change in folders.items():
        yield refused(work, name, change=change)


def refused(
    work: Workshop,
    name: str,
    *flags: str,
    change: Callable[[Path], Any] = lambda out: None,
) -> Outcome:
    """None if a resume with this change ends with a sentence, and the folder stays."""
    from train.main import main

    out = work.fresh()
    shutil.copytree(work.alone, out)
    change(out)
    before = without_times(out) if out.exists() else []
    said = io.StringIO()
    argv = [*FLAGS, *work.data, "--out", str(out), "--resume", *flags]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(argv)
    except SystemExit as end:
        message = str(end.code)
    except Exception as error:
        return f"{name}: a traceback: {error!r}"
    else:
        return f"{name}: unnoticed"
    if not message.startswith("error: "):
        return f"{name}: {message}"
    same = before == (without_times(out) if out.exists() else [])
    return None if same else f"{name}: refused, but the folder has changed"


def pairs_in_one_folder(work: Workshop, count: int) -> Iterator[Outcome]:
    """Two runs at once in one folder: one works, one is refused."""
    for i in range(count):
        out = work.fresh()
        resumed = ("--resume",) if i % 2 else ()
        if resumed:
            first = Run(work, out)
            first.wait_for(SAVE_EVERY + 1)
            first.signal(signal.SIGKILL)
            first.end()
        pair = [Run(work, out, *resumed) for _ in range(2)]
        statuses = [run.end() for run in pair]
        wrong = [r.wrong(s, 0, 1) for r, s in zip(pair, statuses, strict=True)]
        if sorted(map(str, statuses)) != ["0", "1"]:
            wrong.append(f"statuses {statuses}")
        yield next(filter(None, wrong), None) or same(out, work.bits)


class Kind(NamedTuple):
    """A kind of fault, and how often it is tried."""

    fault: Callable[[Workshop, int], Iterator[Outcome]]
    times: int


KINDS = {
    "kills": Kind(kills, 100),
    "stops": Kind(stops, 20),
    "stops_of_two": Kind(stops_of_two, 20),
    "deaths_of_one_of_two": Kind(faults_of_one.deaths_of_one_of_two, 4),
    "freezes_of_one_of_two": Kind(faults_of_one.freezes_of_one_of_two, 2),
    "errors_of_one_of_two": Kind(faults_of_one.errors_of_one_of_two, 2),
    "checkpoints_of_one_of_two": Kind(faults_of_one.checkpoints_of_one_of_two, 8),
    "no_checkpoint_in_common": Kind(faults_of_one.no_checkpoint_in_common, 2),
    "disks_of_one_of_two": Kind(faults_of_one.disks_of_one_of_two, 4),
    "damages": Kind(damages, 100),
    "disks": Kind(disks, 20),
    "hangups": Kind(faults_of_places.hangups, 4),
    "outputs": Kind(faults_of_places.outputs, 10),
    "moved_folders": Kind(faults_of_places.moved_folders, 6),
    "names_taken": Kind(faults_of_places.names_taken, 4),
    "changed_inputs": Kind(changed_inputs, 20),
    "pairs_in_one_folder": Kind(pairs_in_one_folder, 10),
}


class Tried(NamedTuple):
    """What became of one kind."""

    name: str
    outcomes: list[Outcome]
    seconds: float

    @property
    def survived(self) -> int:
        return sum(outcome is None for outcome in self.outcomes)


def run_faults(faults: Faults, folder: Path) -> list[Tried]:
    prepare(folder, faults.platform)
    jax.config.update("jax_platforms", faults.platform)
    work = Workshop(folder, faults.seed)
    tried = []
    for name in faults.only or KINDS:
        kind, outcomes, start = KINDS[name], [], time.monotonic()
        for outcome in kind.fault(work, max(1, round(faults.share * kind.times))):
            outcomes.append(outcome)
            if outcome is not None:
                print(f"{name}, {len(outcomes)}: {outcome}", file=sys.stderr)
        tried.append(Tried(name, outcomes, time.monotonic() - start))
        print(line(tried[-1]), flush=True)
    return tried


def line(tried: Tried) -> str:
    what = (KINDS[tried.name].fault.__doc__ or "").split("\n")[0].rstrip(".")
    numbers = (len(tried.outcomes), tried.survived, f"{tried.seconds:.0f}")
    return " | ".join(map(str, ("", what, *numbers, ""))).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Try what the command line says; None reads it from `sys.argv`."""
    faults = parse(Faults, DESCRIPTION, argv, "python -m tests.helpers.faults")
    print("| what | tried | survived | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tried = run_faults(faults, Path(folder))
    if any(x.survived < len(x.outcomes) for x in tried):
        sys.exit(1)


if __name__ == "__main__":
    main()
