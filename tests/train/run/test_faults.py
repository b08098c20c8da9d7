"""Faults done to real runs, a few of each (python -m tests.helpers.faults: many)."""

import shutil
import subprocess

import pytest

from tests.helpers.faults import KINDS
from tests.helpers.marks import slow_but
from tests.helpers.workshop import workshop

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("faults")) as work:
        yield work


def may_mount(folder) -> bool:
    if shutil.which("mount") is None:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


TIMES = {
    "kills": 1,
    "stops": 1,
    "stops_of_two": 1,
    "freezes_of_one_of_two": 1,
    "errors_of_one_of_two": 1,
    "checkpoints_of_one_of_two": 1,
    "no_checkpoint_in_common": 1,
    "disks_of_one_of_two": 1,
    "damages": 6,
    "disks": 1,
    "hangups": 1,
    "outputs": 4,
    "moved_folders": 2,
    "names_taken": 2,
    "changed_inputs": 20,
    "pairs_in_one_folder": 1,
}


# One kind each: a process, one of two, checkpoints, and what a run reads.
EACH = ["kills", "stops_of_two", "checkpoints_of_one_of_two", "damages"]
EACH += ["changed_inputs"]


@pytest.mark.parametrize("name", slow_but(EACH, TIMES))
def test_a_run_survives(name, work, tmp_path):
    if name == "disks" and not may_mount(tmp_path):
        pytest.skip("no right to mount a small file system here")
    outcomes = list(KINDS[name].fault(work, TIMES[name]))
    assert len(outcomes) >= TIMES[name]
    assert outcomes == [None] * len(outcomes)
