"""Training by two processes, each with its rows of every batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from train.metrics import Record, read_metrics

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_in_two_processes(*flags: str) -> list[str]:
    """The output of each process, after both have ended well."""
    quick = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **quick}
    meeting = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}")
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "train", *flags, *meeting),
                *("--process-count", "2", "--process-id", str(index)),
            ],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def without_times(records: list[Record]) -> list[Record]:
    times = {"ms_per_step", "tokens_per_s"}
    return [{k: v for k, v in r.items() if k not in times} for r in records]


def test_two_processes_train_one_model_and_resume(tmp_path):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubcdfg"), 5)) for _ in range(50)]
    texts = [" ".join(rng.choice(words, 120)) for _ in range(40)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    folder = tmp_path / "run"
    flags = [
        *("--optimizer", "grass_jump", "--rank", "8", "--refresh-every", "5"),
        *("--steps", "12", "--batch-size", "4", "--seq-len", "16"),
        *("--log-every", "4", "--eval-every", "6", "--checkpoint-every", "6"),
        *("--vocab-size", "300", "--sample-tokens", "2", "--out", str(folder)),
        *("--source", str(tmp_path / "text.jsonl"), "--cache-dir", str(tmp_path)),
    ]
    first, second = train_in_two_processes(*flags)
    assert "held-out loss" in first
    assert "held-out loss" not in second
    whole = without_times(read_metrics(folder))
    assert [record["step"] for record in whole] == [1, 4, 6, 8, 12]
    assert whole[-1]["eval_loss"] < whole[0]["loss"] - 0.1

    # As if the run had been lost after its first checkpoint.
    shutil.rmtree(folder / "checkpoints" / "12")
    train_in_two_processes(*flags, "--resume")
    assert without_times(read_metrics(folder)) == whole
