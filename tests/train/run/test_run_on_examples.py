"""A run on examples: its folder, its template, its answers."""

import json
from pathlib import Path

import jax
import pytest

import train.export
import train.main
import train.sample
from models import SIZES, LlamaConfig
from tests.helpers.chat import named_template, said, write_lines, write_tokenizer
from train.config.config import Config
from train.engine.mesh import make_mesh
from train.records.metrics import read_metrics
from train.run.restore import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    """The flags of a run that was made, its template in a file of the user's."""
    folder = tmp_path_factory.mktemp("chat")
    records = [{"messages": said(f"say {i}", f"{i} {i}")} for i in range(60)]
    write_lines(folder / "chat.jsonl", records)
    (folder / "mine.jinja").write_text(named_template("chatml").source)
    flags = [
        *("--windows", "examples", "--source", str(folder / "chat.jsonl")),
        *("--tokenizer", str(write_tokenizer(folder)), "--optimizer", "adamw"),
        *("--chat-template", str(folder / "mine.jinja"), "--vocab-size", "300"),
        *("--size", "tiny", "--seq-len", "64", "--batch-size", "4", "--steps", "2"),
        *("--warmup", "0", "--log-every", "1", "--sample-tokens", "4"),
        *("--prompt", "say <|im_end|>", "--out", str(folder / "run")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        mesh = make_mesh(Config(), jax.devices()[:1])
        patch.setattr(train.main, "make_mesh", lambda config: mesh)
        model = LlamaConfig(300, 16, 24, num_heads=2, num_layers=2)
        patch.setitem(SIZES, "tiny", model)
        train.main.main(flags)
        yield flags


def out(flags: list[str]) -> Path:
    return Path(flags[-1])


def test_it_learns_and_keeps_its_template(run):
    assert [record["step"] for record in read_metrics(out(run))] == [1, 2]
    assert read_metrics(out(run))[-1]["eval_loss"] > 0
    stored = (out(run) / "chat_template.jinja").read_text()
    assert stored == named_template("chatml").source
    tokens = json.loads((out(run) / "tokenizer_config.json").read_text())
    assert tokens == {"bos_token": "", "eos_token": "</s>"}


def test_the_prompt_is_a_user_s_turn(run, capsys):
    text = (out(run) / "sample.txt").read_text()
    assert text.startswith("user\nsay <|im_end|>\nassistant\n")
    train.sample.main([str(out(run)), "--prompt", "say 7", "--tokens", "2"])
    assert capsys.readouterr().out.startswith("user\nsay 7\nassistant\n")
    loaded = load_run(out(run))
    start = loaded.tokenizer.decode(loaded.chat.prompt("say 7"))
    assert start == "user\nsay 7\nassistant\n"


def test_an_export_ends_where_the_template_does(run, tmp_path):
    loaded = load_run(out(run))
    train.export.main([str(out(run)), "--to", str(tmp_path / "exported")])
    ids = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert loaded.chat.end != loaded.tokenizer.eos_id
    assert ids["eos_token_id"] == [loaded.tokenizer.eos_id, loaded.chat.end]
    settings = (tmp_path / "exported" / "tokenizer_config.json").read_text()
    assert json.loads(settings)["chat_template"] == named_template("chatml").source


def test_it_goes_on_with_its_own_template_alone(run):
    again = [*run, "--resume"]
    with pytest.raises(SystemExit, match=r"chat_template: sha256 \w+ there"):
        train.main.main([*again, "--chat-template", "mistral"])
    with pytest.raises(SystemExit, match="--train-on: answers there, all here"):
        train.main.main([*again, "--train-on", "all"])
    Path(run[run.index("--chat-template") + 1]).unlink()
    train.main.main(["--resume", "--out", str(out(run))])
