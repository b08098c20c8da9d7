"""Runs lm-eval on a folder of weights, offline: on a few texts and questions.

    python -m tests.lm_eval_folder FOLDER

The folder is as transformers reads it, with a tokenizer. The tasks are those of
docs/trainer/evaluation.md. It needs the extra `eval`, and no network.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.repository import ROOT

PAGE = ROOT / "docs" / "trainer" / "evaluation.md"
TEXTS = (
    {"text": "The sky is blue, and the grass is green."},
    {"text": "Fellow citizens, the state of the Union is good."},
)
QUESTIONS = (
    {"question": "Two and two are", "answers": ["four", "six"], "right": 0},
    {"question": "The sky is", "answers": ["green", "blue"], "right": 1},
)


def write_tasks(
    folder: Path, texts: Sequence[Mapping], questions: Sequence[Mapping]
) -> None:
    """Writes the tasks of the page, and their data."""
    blocks = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    for name, task in blocks:
        (folder / name).write_text(task)
    for name, lines in (("texts", texts), ("questions", questions)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content)


def evaluate(
    folder: Path,
    texts: Sequence[Mapping] = TEXTS,
    questions: Sequence[Mapping] = QUESTIONS,
) -> dict[str, Any]:
    """The results of both tasks as lm-eval stores them.

    Raises:
      FileNotFoundError: the folder lacks a file that lm-eval needs.
      subprocess.CalledProcessError: lm-eval failed; its output says why.
    """
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; see {PAGE.name}")
    with tempfile.TemporaryDirectory() as work:
        write_tasks(Path(work), texts, questions)
        weights = f"pretrained={folder.resolve()},dtype=float32"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", weights, "--device", "cpu"]
        command += ["--tasks", "texts", "questions", "--include_path", "."]
        command += ["--output_path", "results"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{work}/cache"}
        subprocess.run(command, cwd=work, env={**os.environ, **offline}, check=True)
        (path,) = Path(work, "results").rglob("results*.json")
        return json.loads(path.read_text())["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        evaluate(parser.parse_args().folder)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
