"""The text of every named template, and where its answers are; templates of files."""

import json

import pytest

from tests.helpers.chat import named_template, said, write_lines, write_tokenizer
from train.data.answers import render_example
from train.data.chat_template import ChatTemplate
from train.data.chat_template_files import CHAT_TEMPLATES, open_chat_template
from train.data.dataset import DataConfig, open_data
from train.data.examples import Example, TakeExample
from train.data.text_formats import TakeError
from train.run.stored import store_chat_template

TURNS = {"messages": said("Hi", "Hello.", "2 + 2?", "4", system="Be brief.")}
TASK = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
PLAIN_TASK = {"instruction": "Say hello.", "input": "", "output": "Hello"}
PROMPT = {"prompt": "2 + 2 =", "completion": " 4"}

# Answers stand between « and ».
EXPECTED = {
    ("chatml", "turns"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n«4<|im_end|>»\n"
    ),
    ("chatml", "task"): (
        "<|im_start|>user\nAdd.\n\n2 and 2<|im_end|>\n"
        "<|im_start|>assistant\n«4<|im_end|>»\n"
    ),
    ("llama2", "turns"): (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]« Hello. </s>»"
        "<s>[INST] 2 + 2? [/INST]« 4 </s>»"
    ),
    ("llama2", "task"): "<s>[INST] Add.\n\n2 and 2 [/INST]« 4 </s>»",
    ("llama3", "turns"): (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»"
    ),
    ("mistral", "turns"): (
        "<s>[INST] Be brief.\n\nHi [/INST]« Hello.</s>»[INST] 2 + 2? [/INST]« 4</s>»"
    ),
    ("alpaca", "turns"): (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n«Hello.</s>»\n\n"
        "### Instruction:\n2 + 2?\n\n### Response:\n«4</s>»"
    ),
    ("alpaca", "task"): (
        "<s>Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n"
        "### Response:\n«4</s>»"
    ),
    ("alpaca", "plain task"): (
        "<s>Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nSay hello.\n\n"
        "### Response:\n«Hello</s>»"
    ),
    ("plain", "prompt"): "<s>2 + 2 =« 4</s>»",
    ("plain", "turns"): "<s>Be brief.Hi«Hello.</s>»2 + 2?«4</s>»",
    ("llama3", "prompt"): (
        "<s><|start_header_id|>user<|end_header_id|>\n\n2 + 2 =<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»"
    ),
}
RECORDS = {"turns": TURNS, "task": TASK, "plain task": PLAIN_TASK, "prompt": PROMPT}


def shown(template: ChatTemplate, example: Example) -> str:
    text, answers = render_example(template, example)
    for start, stop in reversed(answers):
        text = f"{text[:start]}«{text[start:stop]}»{text[stop:]}"
    return text


@pytest.mark.parametrize(("name", "record"), EXPECTED)
def test_a_named_template_writes(name, record):
    example = TakeExample()(RECORDS[record])
    assert shown(named_template(name), example) == EXPECTED[name, record]


def test_every_named_template_is_tested_and_says_what_comes_before_an_answer():
    assert {name for name, _ in EXPECTED} == {*CHAT_TEMPLATES}
    assert ", ".join(CHAT_TEMPLATES) in " ".join(DataConfig.__doc__.split())
    prompts = {
        name: named_template(name).render(said("Hi"), add_generation_prompt=True)
        for name in ("chatml", "llama2", "llama3", "mistral", "plain")
    }
    assert prompts == {
        "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "llama2": "<s>[INST] Hi [/INST]",
        "llama3": (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        "mistral": "<s>[INST] Hi [/INST]",
        "plain": "<s>Hi",
    }


def test_of_a_completion_of_messages_only_its_answers_are_learned():
    example = TakeExample()(
        {"prompt": said("Hi", "Hello.", "2 + 2?"), "completion": said("", "4")[1:]}
    )
    assert "Hello.</s>[INST]" in shown(named_template("mistral"), example)
    assert shown(named_template("mistral"), example).endswith("[/INST]« 4</s>»")


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_turns_that_do_not_alternate_are_refused_by_templates_that_need_it(name):
    twice = Example([*said("Hi"), *said("Hi", "Hello")])
    with pytest.raises(ValueError, match=f"template {name} cannot .* must alternate"):
        render_example(named_template(name), twice)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_tools_and_their_calls_are_refused_and_not_dropped(name):
    template = named_template(name)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    calling = TakeExample()({"messages": [*said("Hi"), call]})
    offered = TakeExample()({"messages": said("Hi", "Hello"), "tools": [{"name": "a"}]})
    for example in (calling, offered):
        with pytest.raises(
            ValueError, match=f"{name} cannot .* neither tools nor tool"
        ):
            render_example(template, example)
    assert render_example(template, offered._replace(tools=[])).answers


BLOCKS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' %}"
    # As some drop the thoughts of earlier turns: no beginning of the text stays.
    "{% generation %}{{ m.content if loop.last else m.content.split('|')[1] }};"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_generation_blocks_are_the_answers_if_a_template_has_them():
    template = ChatTemplate("blocks", BLOCKS)
    messages = said("a", "hm|b", "c", "oh|d")
    answers = "<user>a<assistant>«b;»<user>c<assistant>«oh|d;»"
    assert shown(template, Example(messages)) == answers
    assert shown(template, Example(messages, first=3)) == answers.replace("«b;»", "b;")
    text = answers.replace("«", "").replace("»", "")
    assert template.render(messages) == text


def test_one_block_for_all_answers_is_learned_unless_a_prompt_has_one():
    source = (
        "{{ messages[0].content }}{% generation %}{% for m in messages[1:] %}"
        "{{ m.content }}{% endfor %}{% endgeneration %}"
    )
    template = ChatTemplate("one", source)
    beside = TakeExample()({"system": "s", "messages": said("a", "b", "c", "d")})
    assert shown(template, beside) == "s«abcd»"
    with pytest.raises(TakeError, match="has 1 generation blocks for 2 turns"):
        render_example(template, beside._replace(first=3))


def test_a_template_that_rewrites_earlier_turns_is_named_whatever_is_skipped(tmp_path):
    source = BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = ChatTemplate("rewrites", source)
    with pytest.raises(ValueError, match="template rewrites writes message 1, or what"):
        render_example(template, Example(said("a", "hm|b", "c", "oh|d")))
    (tmp_path / "own.jinja").write_text(source)
    records = [{"text": "bad"}, {"messages": said("a", "hm|b", "c", "oh|d")}]
    write_lines(tmp_path / "a.jsonl", records)
    config = DataConfig(
        str(tmp_path / "a.jsonl"),
        windows="examples",
        chat_template=str(tmp_path / "own.jinja"),
        tokenizer=str(write_tokenizer(tmp_path)),
        bad_lines="skip",
    )
    with pytest.raises(
        ValueError, match=r"jsonl, line 2: .* writes message 1"
    ) as error:
        open_data(config, seq_len=64, batch_size=1)
    assert "--bad-lines" not in str(error.value)


def test_an_assistant_that_begins_is_learned_if_the_template_can_write_it():
    first = Example(said("", "Hello")[1:])
    assert shown(named_template("plain"), first) == "<s>«Hello</s>»"
    source = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="the assistant begins, and chat template own"):
        render_example(ChatTemplate("own", source), first)


def test_what_templates_of_tokenizers_use():
    source = """
    {%- for message in messages %}
        {%- if loop.index > 2 %}
            {%- break %}
        {%- endif %}
        {{- message | tojson }} {{ strftime_now('%d %b %Y') }}
    {%- endfor %}
    {%- if tools %}
        {{- tools[0].name }}
    {%- endif -%}
    """
    example = Example(said("<é>", "x", "y"), tools=[{"name": "add"}])
    text = ChatTemplate("own", source).render(example.messages, example.tools)
    assert text == (
        '{"role": "user", "content": "<é>"} 26 Jul 2024'
        '{"role": "assistant", "content": "x"} 26 Jul 2024add'
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' .* is unsafe"),
        ("{{ 1 + '' }}", "unsupported operand"),
    ],
)
def test_a_template_that_fails_is_named(source, problem):
    template = ChatTemplate("own", source)
    with pytest.raises(ValueError, match=f"template own cannot write .*{problem}"):
        template.render(said("Hi"))


def test_a_template_that_is_not_jinja_is_named_with_the_line():
    with pytest.raises(ValueError, match=r"chat template own, line 2: .*endif"):
        ChatTemplate("own", "{% if messages %}\n{% endfor %}")


def test_a_template_is_found_by_name_by_file_and_beside_the_tokenizer(tmp_path):
    tokenizer = write_tokenizer(tmp_path)

    def opened(name: str | None = None) -> ChatTemplate:
        return open_chat_template(name, tokenizer, "<s>", "</s>")

    with pytest.raises(FileNotFoundError, match=r"no chat template beside it.*alpaca"):
        opened()
    with pytest.raises(
        ValueError, match=r"'chat-ml' is unknown.*alpaca, chatml, llama2"
    ):
        opened("chat-ml")
    with pytest.raises(FileNotFoundError, match=r"other\.jinja does not exist"):
        opened(str(tmp_path / "other.jinja"))

    settings = {
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "settings"},
        ],
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "pad_token": {"content": "<pad>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert opened().source == "settings"
    (tmp_path / "chat_template.jinja").write_text("beside\r\n", newline="")
    assert opened().source == "beside\r\n"
    (tmp_path / "other.jinja").write_text("other")
    assert opened(str(tmp_path / "other.jinja")).source == "other"
    assert opened("chatml").source == named_template("chatml").source
    assert (opened().bos_token, opened().eos_token) == ("", "<|im_end|>")

    (tmp_path / "chat_template.jinja").write_text(
        "{{ pad_token + additional_special_tokens | join }}{{ mask_token }}"
        "{{ documents is none }}"
    )
    assert opened().render(said("Hi")) == "<pad><a><b>True"
    other = ChatTemplate("", opened().source, "", "<|im_end|>")
    assert other.fingerprint != opened().fingerprint
    folder = tmp_path / "run"
    folder.mkdir()
    store_chat_template(folder, opened())
    again = open_chat_template(None, folder / "tokenizer.json", "<s>", "</s>")
    assert again.fingerprint == opened().fingerprint

    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        opened()
