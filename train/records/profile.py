"""A step by its kernels, from a trace of JAX's profiler."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from train.records.markdown import Row, markdown

# What a kernel is, as far as its name says: of an XLA fusion, of a library, or of an
# operation. The first that fits counts. A CPU's ynn_fusion may be a product or not.
KINDS = {
    "collectives": r"nccl|all[-_]?(reduce|gather|to[-_]?all)|reduce[-_]?scatter"
    r"|collective|ragged",
    "attention": r"cudnn|flash|fmha|sdpa",
    "matrix products": r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitk|matmul|convolution"
    r"|(^|_)dot(_|\.|$)",
    "copies": r"memcpy|memset|^(wrapped_|loop_)?copy",
    "elementwise and reductions": r"(?<!ynn_)fusion|wrapped_|reduce|transpose|softmax"
    r"|convert|broadcast|slice|select|concatenate|scatter|gather",
}
OTHER = "other"


class Event(NamedTuple):
    """A kernel that ran, from start to end in nanoseconds."""

    name: str
    start: float
    end: float


class Kernel(NamedTuple):
    """Time and launches per step of the kernels of one name, or of one kind."""

    name: str
    ms: float
    launches: float


class Profile(NamedTuple):
    """A step by its kernels.

    Attributes:
      kernels: one for each name, the longest first.
      busy_ms: how long at least one kernel ran.
      wall_ms: how long a step took; under the profiler, so it may take longer.
    """

    kernels: list[Kernel]
    busy_ms: float
    wall_ms: float

    @property
    def kinds(self) -> list[Kernel]:
        """The sums by kind, the longest first."""
        return merged((kind_of(x.name), x) for x in self.kernels)


def read_trace(folder: Path, steps: int, wall_ms: float) -> Profile:
    """Reads the newest trace in a folder, of some steps of so many ms each."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda x: x.stat().st_mtime)
    return summed(lines_of(ProfileData.from_file(str(newest))), steps, wall_ms)


def lines_of(data: Any) -> list[list[Event]]:
    """The kernels of the first device: of each stream of a GPU, of each CPU thread."""
    planes = {plane.name: plane for plane in data.planes}
    for name, prefix in (
        ("/device:GPU:0", "Stream"),  # other lines group the same kernels
        ("/device:TPU:0", "XLA Ops"),
        ("/host:CPU", ""),
    ):
        if name not in planes:
            continue
        on_host = name == "/host:CPU"
        lines = [
            [
                Event(own_name(event.name), event.start_ns, event.end_ns)
                for event in line.events
                if not on_host or _is_operation(event)
            ]
            for line in planes[name].lines
            if (line.name or "").startswith(prefix)
        ]
        if any(lines):
            return lines
    return []


def _is_operation(event: Any) -> bool:
    """Whether an event of the host is an operation of XLA's first CPU device."""
    stats = dict(event.stats)
    return "hlo_op" in stats and stats.get("device_ordinal", 0) == 0


def own_name(name: str) -> str:
    """A TPU's name is the operation's whole text: "%fusion.3 = bf16[8] fusion(...)"."""
    return name.split(" = ")[0].removeprefix("%")


def summed(lines: Sequence[Iterable[Event]], steps: int, wall_ms: float) -> Profile:
    """Sums kernels by name, and divides by the steps in which they ran."""
    ordered = [sorted(line, key=lambda x: (x.start, -x.end)) for line in lines]
    each = (
        (name, Kernel(name, 1e-6 * own / steps, 1 / steps))
        for line in ordered
        for name, own in own_times(line)
    )
    every = itertools.chain.from_iterable(ordered)
    return Profile(merged(each), 1e-6 * busy(every) / steps, wall_ms)


def own_times(line: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Each event's time without that of the events inside it (a loop has its body's).

    The events are sorted by their starts, and of one start the longest first.
    """
    around: list[Event] = []
    inside: list[float] = []

    def close() -> tuple[str, float]:
        name, start, end = around.pop()
        return name, end - start - inside.pop()

    for event in line:
        while around and around[-1].end <= event.start:
            yield close()
        if around:
            inside[-1] += min(event.end, around[-1].end) - event.start
        around.append(event)
        inside.append(0.0)
    while around:
        yield close()


def busy(events: Iterable[Event]) -> float:
    """For how long there was at least one event."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda x: x.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def merged(each: Iterable[tuple[str, Kernel]]) -> list[Kernel]:
    """The sums of kernels by the names beside them, the longest first."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, kernel in each:
        sums[name][0] += kernel.ms
        sums[name][1] += kernel.launches
    kernels = (Kernel(name, ms, launches) for name, (ms, launches) in sums.items())
    return sorted(kernels, key=lambda x: -x.ms)


def kind_of(name: str) -> str:
    """Names the kind of a kernel: one of `KINDS`, or other."""
    name = name.lower()
    return next((kind for kind, x in KINDS.items() if re.search(x, name)), OTHER)


def tables(title: str, found: Profile, most: int = 15) -> str:
    """The longest kernels, and the kinds, as Markdown below a line on the step."""
    if not found.kernels:
        return f"{title}: the trace names no kernel of this device"
    first, rest = found.kernels[:most], found.kernels[most:]
    others = merged((f"{len(rest)} other kernels", kernel) for kernel in rest)
    total = sum(kernel.ms for kernel in found.kernels)

    def table(kernels: Iterable[Kernel], head: str) -> str:
        rows: list[Row] = [
            {
                "name": kernel.name[:70].replace("|", "/"),
                "ms": kernel.ms,
                "share": 100 * kernel.ms / total,
                "launches": kernel.launches,
            }
            for kernel in kernels
        ]
        columns = {"name": head, "ms": "ms a step", "share": "%"}
        return markdown(rows, columns | {"launches": "launches a step"})

    return (
        f"{title}: under the profiler a step takes {found.wall_ms:.2f} ms, and the "
        f"device is busy for {found.busy_ms:.2f} ms of them\n\n"
        f"{table([*first, *others], 'kernel')}\n\n{table(found.kinds, 'kind')}\n"
    )
