"""Keeps checkpoints for the case that a run diverges."""

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from train.records.metrics import Record, is_healthy


class KeepHealthy(PreservationPolicy):
    """Preserves the newest checkpoint at which the run was healthy.

    That is the newest with a finite held-out loss, if any, else with a finite gradient
    at its step: a run that diverged may have only broken newer ones. And what else is
    asked for, `also`.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = {record["step"]: record for record in records}
        self.also: set[int] = set()

    def add(self, record: Record) -> None:
        self._records[record["step"]] = record

    def newest(self, steps: Sequence[int]) -> int | None:
        """The newest healthy one of these steps, which are in order."""
        records = {s: self._records[s] for s in steps if s in self._records}
        well = [step for step, record in records.items() if is_healthy(record)]
        evaluated = [step for step in well if "eval_loss" in records[step]]
        return max(evaluated or well, default=None)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = self.newest(steps)
        return [step == newest or step in self.also for step in steps]
