"""Faults done to real runs: `python -m tests.helpers.faults --help`."""

import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.config.command_line import parse
from train.host.errors import STOPPED
from train.records.metrics import Record, read_metrics
from train.run.checkpoint import stored_checksums

DESCRIPTION = """Kill, stop, starve and deceive training runs, and see whether each goes
on with the same bits afterwards as a run that was left alone. Prints a table of what
was tried and survived; the exit status is 1 if anything was not. CPU.

Examples:
  python -m tests.helpers.faults               all of it, 45 minutes on two cores
  python -m tests.helpers.faults --share 0.05  a twentieth of it
  python -m tests.helpers.faults --only kills disks
  python -m tests.helpers.faults --platform cuda --share 0.2 --only stops"""

PATIENCE_S = 240
"""A process that has not ended by then hangs."""

TIMES = {"ms_per_step", "tokens_per_s"}
STEPS, SAVE_EVERY = 40, 4
FLAGS = (
    *("--optimizer", "grass_jump", "--rank", "8", "--refresh-every", "7"),
    *("--layerwise", "on"),
    *("--steps", str(STEPS), "--batch-size", "8", "--seq-len", "16"),
    *("--log-every", "3", "--eval-every", "20", "--checkpoint-every", str(SAVE_EVERY)),
    *("--vocab-size", "300", "--weight-decay", "0.1", "--sample-tokens", "0"),
)

# Two processes on one machine wait for each other a hundred times in a step.
FEWER = ("--steps", "20", "--eval-every", "10")

Outcome = str | None
"""What went wrong, if anything did."""


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


# --- runs ---

_context = multiprocessing.get_context("forkserver")


def devices_flag(devices: int) -> str:
    """What makes a CPU so many devices, in XLA_FLAGS."""
    return f"--xla_force_host_platform_device_count={devices}"


def _trainer(argv: Sequence[str], log: Path, devices: int) -> None:
    os.environ["XLA_FLAGS"] = devices_flag(devices)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from train.main import main

    try:
        main(argv)
    finally:  # what Python does at its own end, and a fork does not
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()


class Run:
    """A trainer in a process of its own, in a folder; `devices` are a CPU's."""

    def __init__(
        self, work: "Workshop", out: Path, *flags: str, devices: int = 1
    ) -> None:
        work.count += 1
        self.out, self._log = out, work.folder / f"{work.count}.log"
        argv = [*FLAGS, *work.data, "--out", str(out), *flags]
        args = (argv, self._log, devices)
        self._process = _context.Process(target=_trainer, args=args)
        self._process.start()

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait_for(self, step: int) -> None:
        """Until a record of a step from `step` on is there, or the process is not."""
        end = time.monotonic() + PATIENCE_S
        while self.alive and last_step(self.out) < step and time.monotonic() < end:
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, number)

    def end(self, patience: float = PATIENCE_S) -> int | None:
        """The exit status; None for a process that hung, and was killed."""
        self._process.join(patience)
        if self.alive:
            self._process.kill()
            self._process.join()
            return None
        return self._process.exitcode

    def wrong(self, status: int | None, *expected: int) -> Outcome:
        if status is None:
            return f"hung\n{self.log}"
        if status not in expected:
            return f"status {status}\n{self.log}"
        if "Traceback" in self.log and signal.SIGKILL not in map(abs, expected):
            return f"a traceback\n{self.log}"
        return None


def last_step(out: Path) -> int:
    records = read_metrics(out) if out.exists() else []
    return records[-1]["step"] if records else 0


def without_times(out: Path) -> list[Record]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out)]


class Bits(NamedTuple):
    """What a finished run computed: every record, and every bit of the last state."""

    records: list[Record]
    seals: dict[str, Any]


def bits(out: Path) -> Bits:
    records = without_times(out)
    return Bits(
        records, stored_checksums(out / "checkpoints" / str(records[-1]["step"]))
    )


class Workshop:
    """A folder with a text, and runs on it that were left alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.count = folder, 0
        self.random = random.Random(seed)
        self.text = folder / "text.jsonl"
        write_text(self.text)
        self.data = (
            *("--source", str(self.text), "--cache-dir", str(folder / "cache")),
        )

    @functools.cached_property
    def alone(self) -> Path:
        """The folder of a run."""
        return self.finished_in(self.folder / "alone")

    @functools.cached_property
    def bits(self) -> Bits:
        return bits(self.alone)

    @functools.cached_property
    def bits_of_two(self) -> Bits:
        """Of a run of two processes: two devices add up a gradient in another order."""
        out = self.folder / "two"
        return bits(left_alone(out, *two(self, out)))

    def finished_in(self, out: Path, *flags: str, devices: int = 1) -> Path:
        """The folder, in which a run has come to its end."""
        return left_alone(out, Run(self, out, *flags, devices=devices))

    def fresh(self, name: str = "run") -> Path:
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        return out

    def finished(self, out: Path) -> Outcome:
        """Whether a run in `out` goes on to its end, to the bits of the one alone."""
        run = Run(self, out, "--resume")
        return run.wrong(run.end(), 0) or same(out, self.bits)


def left_alone(out: Path, *runs: Run) -> Path:
    for run in runs:
        if problem := run.wrong(run.end(), 0):
            raise RuntimeError(f"a run that was left alone: {problem}")
    return out


def same(out: Path, expected: Bits) -> Outcome:
    found = bits(out)
    if found.records != expected.records:
        return "other metrics than the run that was left alone"
    if found.seals != expected.seals:
        return "another state than the run that was left alone"
    return None


def alike(out: Path, expected: Bits) -> Outcome:
    """Whether losses are the same to rounding, which 20 steps make no larger."""
    pairs = zip(without_times(out), expected.records, strict=True)
    far = [a["step"] for a, b in pairs if abs(a["loss"] - b["loss"]) > 1e-3]
    return f"other losses at steps {far}" if far else None


def write_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfg", k=5)) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=120)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


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


def two(work: Workshop, out: Path, *flags: str) -> list[Run]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--distributed", "--coordinator", f"127.0.0.1:{port}")
    meeting += ("--process-count", "2", "--process-id")
    return [Run(work, out, *FEWER, *flags, *meeting, str(i)) for i in range(2)]


def deaths_of_one_of_two(work: Workshop, count: int) -> Iterator[Outcome]:
    """SIGKILL to one of two processes ends the other within a minute."""
    for i in range(count):
        out = work.fresh()
        pair = two(work, out)
        pair[0].wait_for(SAVE_EVERY + 1)
        pair[i % 2].signal(signal.SIGKILL)
        pair[i % 2].end()
        hung = pair[1 - i % 2].end(60) is None
        pair = two(work, out, "--resume")
        problems = [run.wrong(run.end(), 0) for run in pair]
        problem = "the other went on for a minute" if hung else None
        problem = problem or problems[0] or problems[1]
        yield problem or same(out, work.bits_of_two)


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
    from train.run.loop import initial, work_of
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
            else:
                problem = run.wrong(run.end(), 0, 1)
                filler.unlink()
            yield problem or work.finished(out)


@contextlib.contextmanager
def small_disk(work: Workshop) -> Iterator[Path]:
    """A file system of 24 MB; needs the right to mount one."""
    disk = work.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


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
    "deaths_of_one_of_two": Kind(deaths_of_one_of_two, 4),
    "damages": Kind(damages, 100),
    "disks": Kind(disks, 20),
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


def prepare(folder: Path, platform: str = "cpu") -> None:
    """What a process loads is loaded once, and programs are compiled once."""
    _context.set_forkserver_preload(["train.main"])
    os.environ |= {
        "JAX_PLATFORMS": platform,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if platform == "cpu":  # one device, and quickly compiled
        os.environ |= {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Workshop]:
    """For tests: the environment is what it was when the block ends."""
    before = dict(os.environ)
    prepare(folder)
    try:
        yield Workshop(folder, seed=0)
    finally:
        os.environ.clear()
        os.environ.update(before)


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
    return (
        f"| {what} | {len(tried.outcomes)} | {tried.survived} | {tried.seconds:.0f} |"
    )


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
