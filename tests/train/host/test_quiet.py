"""Messages of orbax that `quiet` silences, and others that it keeps."""

import asyncio
import gc
import logging

import pytest

from train.host.quiet import quiet


def failed_task(file: str) -> asyncio.Task[None]:
    """A task of a function in `file` that raised, which nobody has asked for."""
    names: dict = {}
    exec(compile("async def fail(): raise ValueError('no room')", file, "exec"), names)

    async def run() -> asyncio.Task[None]:
        task = asyncio.create_task(names["fail"]())
        await asyncio.sleep(0)
        return task

    return asyncio.run(run())


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    gc.collect()
    return [entry.getMessage() for entry in caplog.records]


def test_a_task_of_orbax_that_is_collected_later_does_not_complain(caplog) -> None:
    with caplog.at_level(logging.ERROR):
        with quiet():
            task = failed_task("site-packages/orbax/serialization.py")
        del task
        assert complaints(caplog) == []


def test_another_task_complains_outside_alone(caplog) -> None:
    with caplog.at_level(logging.ERROR):
        with quiet():
            failed_task("mine.py")
            assert complaints(caplog) == []
        failed_task("mine.py")
        (message,) = complaints(caplog)
    assert "never retrieved" in message
    assert "mine.py" in message
