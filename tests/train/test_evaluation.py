"""lm-eval on a folder of weights, by the tasks and the script of the page about it."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest

from tests.helpers.repository import ROOT
from tests.lm_eval_folder import evaluate

LLAMA = ROOT / "tests" / "golden" / "hf" / "llama2"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the extra eval is not installed",
)
def test_lm_eval_measures_what_the_recorded_logits_say(tmp_path):
    """A token is a word, so that texts are the recorded tokens."""
    shutil.copytree(LLAMA, tmp_path, dirs_exist_ok=True)
    recorded = np.load(tmp_path / "expected.npz")
    tokens, logits = recorded["tokens"][0], recorded["logits"][0].astype(np.float64)
    # None begins with another, as special tokens are found within words too.
    words = [f"t{i:02}" for i in range(logits.shape[-1])]
    write_tokenizer(tmp_path, words, begin=words[tokens[0]])

    def text(ids) -> str:
        return " ".join(words[i] for i in ids)

    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    questions = []
    for length, right in ((7, 0), (20, 0), (30, 1)):
        best, worst = log_p[length - 1].argmax(), log_p[length - 1].argmin()
        question = {"question": text(tokens[:length]), "right": right}
        questions.append(question | {"answers": [words[best], words[worst]]})
    rest = text(tokens[1:])
    results = evaluate(tmp_path, [{"text": rest}], questions)
    nats = -log_p[np.arange(len(tokens) - 1), tokens[1:]].sum()
    bits = results["texts"]["bits_per_byte,none"]
    # Sums in float32 of 39 terms near 5.
    assert bits == pytest.approx(nats / len(rest) / math.log(2), rel=1e-5)
    assert results["questions"]["acc,none"] == pytest.approx(2 / 3)


def write_tokenizer(folder, words, begin):
    """A tokenizer for texts of these words, which have ids in this order."""
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": words[0],
        },
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": begin, "eos_token": words[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
