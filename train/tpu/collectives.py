"""The messages between chips of a compiled program, read off its text.

A compiler for TPUs rarely leaves a collective as one instruction: it hides an
all-gather behind products, as a chain of fusions that hold a copy of it each, makes a
reduce-scatter of an all-reduce in a fusion with a cut, and sums up many tensors in one.
But whatever becomes of a collective, all pieces of it have its channel and size. So
these are counted, not instructions:

  * once in a loop's body, or outside all loops, however many pieces it has there, in
    smaller loops too (an all-gather may be hidden behind several);
  * as often as the loop runs, where its condition is "counter < constant": such a loop
    is taken to count from 0 by ones, as JAX's scans do. A loop whose length the data
    decide counts as one turn, and is named (`Traffic.unknown_loops`);
  * of a conditional, the branch that sends the most.

Bytes are those that one chip sends if the chips pass them round in a ring, which is the
least that any way of doing it sends: of n chips an all-gather of s bytes sends each
s (n - 1) / n, so do a reduce-scatter and an all-to-all, an all-reduce twice that, and a
permute s. Sizes are as the program has them, padding included.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)

COMBINED = "1"
"""The channel of whatever was made of several collectives, which has no pieces."""

Computations = dict[str, dict[str, str]]
"""Of a program, by name: of each the instructions, by name."""

HEAD = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
OPERATION = re.compile(r"(?<=[\])}] )([a-z][a-z0-9-]*)\(%?([^\s,)]*)")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply)=%?([^\s,)}]+)")


class Moved(NamedTuple):
    """One collective.

    Attributes:
      kind: of `KINDS`.
      sent: bytes that a chip sends each time.
      times: how often it runs in a step.
    """

    kind: str
    sent: float
    times: int = 1


class Traffic(NamedTuple):
    """All that a program moves.

    Attributes:
      moved: its collectives, by channel and size.
      unknown_loops: names of loops of unknown length that move something.
    """

    moved: Mapping[str, Moved]
    unknown_loops: frozenset[str] = frozenset()

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in a step."""
        return math.fsum(x.sent * x.times for x in self.moved.values())

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """How many of each kind run in a step, and the bytes that a chip sends."""
        of = {
            kind: [x for x in self.moved.values() if x.kind == kind] for kind in KINDS
        }
        return {
            kind: (sum(x.times for x in found), sum(x.sent * x.times for x in found))
            for kind, found in of.items()
            if found
        }


def traffic_of(text: str) -> Traffic:
    """Reads the traffic of a program from its HLO text (`Compiled.as_text()`)."""
    program: Computations = {}
    name = entry = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name, program[head[1]] = head[1], {}
            entry = name if line.startswith("ENTRY") else entry
        elif instruction := INSTRUCTION.match(line):
            program[name][instruction[1]] = instruction[2]
    return _of(program, entry)


def _of(program: Computations, name: str) -> Traffic:
    """Sums the traffic of one run of a computation."""
    moved: dict[str, Moved] = {}
    unknown: set[str] = set()
    for part in _parts(program, name):
        for key, one in part.moved.items():
            # What has pieces in several places is one that goes on meanwhile.
            moved[key] = one._replace(times=1) if key in moved else one
        unknown |= part.unknown_loops
    return Traffic(moved, frozenset(unknown))


def _parts(program: Computations, name: str) -> Iterator[Traffic]:
    for own, text in program[name].items():
        operation = OPERATION.search(text)
        kind = operation[1].removesuffix("-start") if operation else ""
        if kind in KINDS:
            found = re.search(r"channel_id=(\d+)", text)
            channel = own if found is None or found[1] == COMBINED else found[1]
            moved = _moved(program, name, own)
            yield Traffic({f"{channel} {moved.kind} {moved.sent:g}": moved})
        elif kind == "while":
            yield _loop(program, own, text)
        elif kind == "conditional":
            branches = (_of(program, branch) for branch in _branches(text))
            yield max(branches, key=lambda x: x.sent)
        else:
            yield from (_of(program, called) for called in CALLED.findall(text))


def _moved(program: Computations, name: str, own: str) -> Moved:
    text = program[name][own]
    kind = _operation(text)
    shape = text.partition(f" {kind}(")[0]
    if kind.endswith("-start"):  # its shape holds operands too
        kind = kind.removesuffix("-start")
        shape = _shape_when_done(program[name], own, f"{kind}-done")
    size = bytes_of(shape)
    if kind == "collective-permute":
        return Moved(kind, size)
    chips = group_size(text)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        size *= chips  # what it takes
    rounds = 2 if kind == "all-reduce" else 1
    return Moved(kind, rounds * size * (chips - 1) / chips)


def _operation(text: str) -> str:
    found = OPERATION.search(text)
    return found[1] if found else ""


def _shape_when_done(body: Mapping[str, str], start: str, done: str) -> str:
    """Finds the shape of a start's "-done"; "" if there is none."""
    end = re.compile(rf"(.*) {done}\(%?{re.escape(start)}[,)]")
    found = (end.match(text) for text in body.values())
    return next((x[1] for x in found if x), "")


def _loop(program: Computations, own: str, text: str) -> Traffic:
    body = _of(program, _named("body", text))
    turns = turns_of(program[_named("condition", text)])
    moved = {
        key: x._replace(times=x.times * (turns or 1)) for key, x in body.moved.items()
    }
    unknown = {own} if moved and turns is None else set()
    return Traffic(moved, body.unknown_loops | unknown)


def turns_of(condition: Mapping[str, str]) -> int | None:
    """How often a loop runs; None unless its condition is "counter < constant"."""
    compare = re.compile(r" compare\(%?(\S+), %?(\S+)\), direction=LT")
    found = [x for x in map(compare.search, condition.values()) if x]
    if len(found) != 1:
        return None
    counter, limit = (condition.get(x, "") for x in found[0].groups())
    constant = re.search(r" constant\((\d+)\)", limit)
    return int(constant[1]) if constant and "get-tuple-element(" in counter else None


def _named(field: str, text: str) -> str:
    found = re.search(rf"\b{field}=%?([^\s,]+)", text)
    return found[1] if found else ""


def _branches(text: str) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", text):
        return [x.strip().lstrip("%") for x in several[1].split(",")]
    return [_named("true_computation", text), _named("false_computation", text)]


def bytes_of(shape: str) -> float:
    """Of an array or a tuple of them: "(f32[8,128]{1,0}, bf16[])" has 4098."""
    return sum(
        math.prod(int(x) for x in sizes.split(",") if x) * _width(dtype)
        for dtype, sizes in ARRAY.findall(shape)
    )


def _width(dtype: str) -> float:
    bits = re.search(r"\d+", dtype.replace("pred", "pred8"))
    return int(bits[0]) / 8 if bits else 0


def group_size(text: str) -> int:
    """How many chips take part in a collective: those of its first group.

    Groups are written {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}, where it
    may be a part of an axis, 'b':(1)2, and the order of the devices may come between.

    Raises:
      ValueError: they are written in another way.
    """
    of_mesh = r"mesh\S+(?: device_ids=\S+)? \{[^}]*\}"
    found = re.search(rf"replica_groups=({of_mesh}|\S+)", text)
    groups = found[1] if found else ""
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if tiled := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(tiled[1])
    mesh, _, axes = groups.partition(" ")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    if not named:
        raise ValueError(f"the groups of a collective cannot be read: {text}")
    return math.prod(int(part) if part else sizes[name] for name, part in named)
