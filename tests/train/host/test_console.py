"""What is printed may be lost, and nothing else is."""

import os
import subprocess
import sys

import pytest

from tests.helpers.repository import ROOT

PROGRAM = """
import logging, sys, threading, traceback, warnings
from tqdm import tqdm
from train.host.console import say, warn
from train.host.output import keep_output
keep_output()
for _ in range(3):
    say("r\\u00e9sum\\u00e9 \\udce6" * 5000)
    warn("w" * 10_000)
    warnings.warn("one")
    logging.error("two")
    list(tqdm(range(9), mininterval=0))
threading.Thread(target=lambda: 1 / 0).start()
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
with open(sys.argv[1], "w") as file:
    file.write("all of it")
assert sys.stdout.isatty() is False
"""

# Each as a shell says it; the reader of the pipe is gone at once.
LOST = {
    "full": '"$@" > /dev/full 2>&1',
    "error output full": '"$@" 2> /dev/full > "$0.log"',
    "closed": '"$@" <&- >&- 2>&-',
    "no reader": '{ "$@" 2>&1; echo $? > "$0.end"; } | true; exit $(cat "$0.end")',
    "ascii": 'PYTHONIOENCODING=ascii:strict "$@" > "$0.log" 2>&1',
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Of each the exit status, after all were run at once, and its file."""
    folder = tmp_path_factory.mktemp("outputs")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = {
        name: subprocess.Popen(
            ["sh", "-c", line, file, sys.executable, "-c", PROGRAM, file], env=env
        )
        for name, line in LOST.items()
        for file in [str(folder / name)]
    }
    return folder, {name: process.wait(120) for name, process in running.items()}


@pytest.mark.parametrize("name", LOST)
def test_a_program_goes_on_without_its_output(name, ended):
    folder, statuses = ended
    assert statuses[name] == 0
    assert (folder / name).read_text() == "all of it"


def test_what_ascii_lacks_is_escaped(ended):
    said = (ended[0] / "ascii.log").read_text(encoding="ascii")
    assert "r\\xe9sum\\xe9 \\udce6" in said
    assert said.count("ZeroDivisionError") == 2
    assert said.count("warning: www") == 3


def test_the_other_output_is_whole(ended):
    said = (ended[0] / "error output full.log").read_text(errors="surrogateescape")
    assert len(said.splitlines()) == 3
